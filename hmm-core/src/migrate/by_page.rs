//! Migration of device pages by their numbers, wherever they are mapped (`migrate_device_range`).

use super::batch::{Batch, Collect};
use super::memory_of;
use super::phases::MOST_BATCHES;
use crate::addr::{AddrRange, PAGE_SIZE, Pfn, USER_END, VirtAddr};
use crate::arena::{Buffer, List};
use crate::devmem::Devmem;
use crate::error::{Error, Result};
use crate::flags::{MigratePfn, Select};
use crate::mm::page_table::{Entry, Leaf};
use crate::mm::{Mm, vma};
use crate::ops::InvalidateEvent;
use std::fmt;
use std::sync::Arc;

/// The pages of one leaf.
struct Part {
    batch: Batch,
    src: Buffer<MigratePfn>,
    dst: Buffer<MigratePfn>,
}

/// A migration of device pages between its calls; as [`super::Migration`], with entries by page number.
pub struct DeviceMigration {
    first: Pfn,
    count: usize,
    parts: List<Part>,
}

impl Devmem {
    /// Takes what pages of this memory hold, from `first` on, one for each element of `src`
    /// (`migrate_device_range`): how a driver empties its memory without knowing the addresses. Entries of pages that
    /// are free or held by somebody else are 0; so are some when there are more than one call can hold: call again while
    /// [`Devmem::in_use`] says so. Mirrors are told `Clear`.
    ///
    /// # Errors
    /// `Invalid` when the pages are not all of this memory; `Deadlock` from a callback; `NoMemory`.
    pub fn migrate_setup(&self, first: Pfn, src: &mut [MigratePfn]) -> Result<DeviceMigration> {
        let end = Pfn::new(first.get().saturating_add(src.len() as u64));
        if first < self.pfn_first() || end > self.pfn_last() || src.is_empty() {
            return Err(Error::invalid(0, "these pages are not of this device memory"));
        }
        src.fill(MigratePfn::default());
        let select = Select::DEVICE | Select::COHERENT;
        let event = InvalidateEvent::Clear;
        let collect =
            Collect { select, owner: None, pages: Some((first, end)), event, waits: true };
        let mut migration = DeviceMigration::new(first, src.len())?;
        let everything = AddrRange::new(0, USER_END)?;
        for mm in Mm::all_open() {
            if mm.is_in_callback() && migration.parts.is_empty() {
                let what = "device pages are migrated from inside a callback";
                return Err(Error::Deadlock { what });
            }
            for leaf in mm.table.leaves(everything) {
                migration.take_leaf(&mm, leaf, collect, src)?;
            }
        }
        Ok(migration)
    }
}

/// The part of a leaf from `from` on that holds such pages: from the first to the last of one mapping.
fn hull_of(
    mm: &Mm,
    leaf: &Leaf,
    from: VirtAddr,
    collect: Collect,
) -> Option<(AddrRange, vma::Vma)> {
    let (first, end) = collect.pages?;
    let entries = leaf.lock();
    let is_there = |address: &VirtAddr| {
        let entry = entries[address.index_in_leaf()];
        !entry.is_locked() && entry.device_page().is_some_and(|page| first <= page && page < end)
    };
    let rest = AddrRange::new(from.get(), leaf.range().end().get()).ok()?;
    let mut there = (0..rest.pages()).map(|page| rest.page_at(page)).filter(is_there);
    let start = there.next()?;
    let last = there.next_back().unwrap_or(start);
    drop(entries);
    let mapping = mm.engine.mapping_at(start).ok()??;
    let hull = AddrRange::from_bounds(start.get(), last.get() + PAGE_SIZE as u64);
    let hull = mapping.range.intersect(hull).filter(|hull| hull.contains(start))?;
    Some((hull, vma::Vma::from_mapping(&*mm.engine, &mapping)))
}

impl DeviceMigration {
    fn new(first: Pfn, count: usize) -> Result<Self> {
        let parts = List::new(MOST_BATCHES).ok_or(NO_MEMORY)?;
        Ok(Self { first, count, parts })
    }

    fn take_leaf(
        &mut self,
        mm: &Arc<Mm>,
        leaf: &Leaf,
        collect: Collect,
        src: &mut [MigratePfn],
    ) -> Result<()> {
        let mut from = leaf.range().start();
        while self.parts.len() < MOST_BATCHES
            && let Some((hull, vma)) = hull_of(mm, leaf, from, collect)
        {
            let blank = || Buffer::new(hull.pages(), |_| MigratePfn::default()).ok_or(NO_MEMORY);
            let (mut found, dst) = (blank()?, blank()?);
            let (batch, _) =
                Batch::begin(mm, &vma, collect, hull, [memory_of(src), None], &mut found)?;
            let part = Part { batch, src: found, dst };
            for index in 0..hull.pages() {
                if let Some(place) = part.place_of(index, self.first, self.count) {
                    src[place] = part.src[index];
                }
            }
            let _ = self.parts.push(part);
            from = hull.end();
            if from >= leaf.range().end() {
                break;
            }
        }
        Ok(())
    }

    /// The frame that is reserved for the page of entry `index`, as [`super::Migration::system_page`].
    pub fn system_page(&self, index: usize) -> Option<Pfn> {
        let wanted = Some(index);
        self.parts.iter().find_map(|part| {
            let mut pages = 0..part.src.len();
            let here = pages.find(|at| part.place_of(*at, self.first, self.count) == wanted)?;
            part.batch.flight.frame(here).map(Pfn::of_addr)
        })
    }

    /// As [`super::Migration::pages`] (`migrate_device_pages`).
    ///
    /// # Errors
    /// `Invalid` when `src` or `dst` has not one element per page.
    pub fn pages(&mut self, src: &mut [MigratePfn], dst: &[MigratePfn]) -> Result<()> {
        if src.len() != self.count || dst.len() != self.count {
            return Err(Error::invalid(0, "src and dst need one element per page"));
        }
        for part in self.parts.iter_mut() {
            for index in 0..part.src.len() {
                if let Some(place) = part.place_of(index, self.first, self.count) {
                    part.dst[index] = dst[place];
                }
            }
            part.batch.decide(&mut part.src, &part.dst);
            for index in 0..part.src.len() {
                if let Some(place) = part.place_of(index, self.first, self.count) {
                    src[place] = part.src[index];
                }
            }
        }
        Ok(())
    }

    /// As [`super::Migration::finalize`] (`migrate_device_finalize`).
    pub fn finalize(mut self) {
        while let Some(part) = self.parts.pop() {
            let Part { batch, src, .. } = part;
            batch.end(&src);
        }
    }
}

const NO_MEMORY: Error = Error::NoMemory { what: "the lists of a migration" };

impl Part {
    /// The place in the caller's arrays of page `index` of this part, if it was collected.
    fn place_of(&self, index: usize, first: Pfn, count: usize) -> Option<usize> {
        let page = self.batch.collected(index)?.device_page()?;
        let place = usize::try_from(page.get().checked_sub(first.get())?).ok()?;
        (place < count).then_some(place)
    }
}

impl Batch {
    /// The entry of a page that the batch held at first.
    fn collected(&self, index: usize) -> Option<Entry> {
        let entry = self.pages[index].entry;
        (entry != Entry::SYSTEM).then_some(entry)
    }
}

impl fmt::Debug for DeviceMigration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMigration({} pages from {:?})", self.count, self.first)
    }
}
