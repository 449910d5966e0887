//! Migrations between their calls: set up, not finalized yet. Each is found by the address of its caller's array `src`.

use crate::arrays::{self, Pinned};
use crate::handle::{Opaque, Table, invalid, lock};
use crate::mm::MmHandle;
use hmm_core::{DeviceMigration, Error, MigratePfn, Migration, Pfn, Result, VirtAddr};
use std::ffi::c_ulong;
use std::ptr;
use std::sync::{Arc, Mutex};

/// The core's side of a migration.
pub(crate) enum Core {
    ByAddress(Migration),
    ByPage(DeviceMigration),
}

/// What a migration holds. Dropped before its end, it puts every page back.
struct Held {
    core: Core,
    /// As the core has it: the caller's array is only a wish.
    src: Vec<MigratePfn>,
    is_decided: bool,
}

/// One migration between its calls.
pub(crate) struct Phase {
    src: usize,
    pages: usize,
    mm: Option<Arc<MmHandle>>,
    /// Taken out while a call is at work, which may run callbacks.
    held: Mutex<Option<Held>>,
    /// Let go of after `held`.
    _pinned: Pinned,
}

pub(crate) static PHASES: Table<Opaque, Phase, 64> = Table::new(
    "not a migration between its calls",
    "migrations between their calls (64): is each finalized?",
);

impl Core {
    fn system_page(&self, index: usize) -> Option<Pfn> {
        match self {
            Self::ByAddress(migration) => migration.system_page(index),
            Self::ByPage(migration) => migration.system_page(index),
        }
    }

    fn pages(&mut self, src: &mut [MigratePfn], dst: &[MigratePfn]) -> Result<()> {
        match self {
            Self::ByAddress(migration) => migration.pages(src, dst),
            Self::ByPage(migration) => migration.pages(src, dst),
        }
    }

    fn finalize(self, src: &[MigratePfn]) {
        match self {
            Self::ByAddress(migration) => migration.finalize(src),
            Self::ByPage(migration) => migration.finalize(),
        }
    }
}

/// The first migration that fits. What was set up before a fork is the parent's, and not found in the child.
fn find_where(fits: impl Fn(&Phase) -> bool) -> Option<(*mut Opaque, Arc<Phase>)> {
    let is_inherited = |phase: &Phase| phase.mm.as_ref().is_some_and(|mm| mm.core.is_inherited());
    PHASES.find(|phase| fits(phase) && !is_inherited(phase))
}

/// The migration that belongs to an array.
fn find(src: *const c_ulong) -> Result<(*mut Opaque, Arc<Phase>)> {
    let what = "no migration was set up with this src, or it is finalized";
    let found = find_where(|phase| phase.src == src.addr());
    found.ok_or_else(|| invalid(src.addr() as u64, what))
}

/// A place for a migration that is about to be set up.
fn reserve(phase: Phase) -> Result<(*mut Opaque, Arc<Phase>)> {
    static RESERVING: Mutex<()> = Mutex::new(());
    let _guard = lock(&RESERVING);
    if find(ptr::without_provenance(phase.src)).is_ok() {
        let address = VirtAddr::new(phase.src as u64);
        let what = "src belongs to a migration that is not finalized";
        return Err(Error::Busy { address, what });
    }
    let phase = Arc::new(phase);
    Ok((PHASES.insert(Arc::clone(&phase))?, phase))
}

/// Sets a migration up, and fills the caller's array. Returns how many pages it holds.
pub(crate) fn begin(
    mm: Option<&Arc<MmHandle>>,
    src: *mut c_ulong,
    pages: usize,
    pinned: Pinned,
    collect: impl FnOnce(&mut [MigratePfn]) -> Result<Core>,
) -> Result<usize> {
    let mut entries = arrays::entries(pages)?;
    let (mm, held) = (mm.cloned(), Mutex::new(None));
    let phase = Phase { src: src.expose_provenance(), pages, mm, held, _pinned: pinned };
    let (handle, phase) = reserve(phase)?;
    let core = collect(&mut entries).inspect_err(|_| {
        PHASES.remove(handle);
    })?;
    arrays::write_out(&entries, src);
    let collected = entries.iter().filter(|entry| entry.migrates()).count();
    *lock(&phase.held) = Some(Held { core, src: entries, is_decided: false });
    Ok(collected)
}

impl Phase {
    fn take(&self) -> Result<Held> {
        let what = "another call is at work on this migration";
        lock(&self.held).take().ok_or_else(|| invalid(self.src as u64, what))
    }

    /// Commits what the driver stored in `dst`. A page that it took MIGRATE from in `src` stays where it is.
    fn decide(&self, held: &mut Held, dst: *const c_ulong) -> Result<()> {
        if held.is_decided {
            return Err(invalid(self.src as u64, "its pages were migrated already: finalize it"));
        }
        let mut wishes = arrays::entries(self.pages)?;
        let mut targets = arrays::entries(self.pages)?;
        let src = ptr::with_exposed_provenance_mut(self.src);
        arrays::read_in(&mut wishes, src);
        arrays::read_in(&mut targets, dst);
        for (wish, target) in wishes.iter().zip(&mut targets) {
            if !wish.migrates() {
                *target = MigratePfn::default();
            }
        }
        held.core.pages(&mut held.src, &targets)?;
        held.is_decided = true;
        arrays::write_out(&held.src, src);
        Ok(())
    }
}

/// The second call: the pages move to where `dst` says. `pages` is how many the caller believes there are.
pub(crate) fn pages(src: *const c_ulong, dst: *const c_ulong, pages: usize) -> Result<()> {
    let (_, phase) = find(src)?;
    if phase.pages != pages {
        return Err(invalid(src.addr() as u64, "not the npages that it was set up with"));
    }
    let mut held = phase.take()?;
    let decided = phase.decide(&mut held, dst);
    *lock(&phase.held) = Some(held);
    decided
}

/// The last call: what moved is visible, what did not is put back.
pub(crate) fn finalize(src: *const c_ulong) -> Result<()> {
    let (handle, phase) = find(src)?;
    let held = phase.take()?;
    held.core.finalize(&held.src);
    PHASES.remove(handle);
    Ok(())
}

/// The system page that is reserved for one entry of an array `src`.
pub(crate) fn system_page(entry: *const c_ulong) -> Result<Pfn> {
    let place = |phase: &Phase| {
        let offset = entry.addr().checked_sub(phase.src)?;
        let index = offset / size_of::<c_ulong>();
        (offset.is_multiple_of(size_of::<c_ulong>()) && index < phase.pages).then_some(index)
    };
    let found = find_where(|phase| place(phase).is_some());
    let page = found.and_then(|(_, phase)| {
        let held = lock(&phase.held);
        let held = held.as_ref().filter(|held| !held.is_decided)?;
        held.core.system_page(place(&phase)?)
    });
    let what = "only between setup and pages, for an entry of src whose page comes home";
    page.ok_or_else(|| invalid(entry.addr() as u64, what))
}

/// Puts back what unfinished migrations of an address space hold, before it is closed.
pub(crate) fn forget(mm: &Arc<MmHandle>) {
    let is_of = |phase: &Phase| phase.mm.as_ref().is_some_and(|one| Arc::ptr_eq(one, mm));
    while let Some((handle, phase)) = PHASES.find(is_of) {
        PHASES.remove(handle);
        let held = lock(&phase.held).take();
        drop(held);
    }
}
