//! The process's mappings, asked from the engine each time, and the lock of the address space.

use super::Mm;
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::{Engine, Mapping, VmaKind};
use crate::error::{Error, Result};
use crate::flags::{Capabilities, Protection};
use crate::limits::DEADLINE;
use crate::stay::Stay;
use crate::sync::{Condvar, Mutex};
use std::time::Instant;

/// Neighbouring mappings looked at when one vma is put together.
const JOINED: usize = 65_536;

/// A mapping as the process made it (`struct vm_area_struct`).
///
/// Watching a part of a mapping makes the kernel cut it; the pieces are joined again here. It is a look at one moment:
/// every call of the library looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// Where.
    pub range: AddrRange,
    /// Protection.
    pub protection: Protection,
    /// Kind of memory.
    pub kind: VmaKind,
    /// The engine moves pages of this kind.
    moves: bool,
}

impl Vma {
    pub(crate) fn from_mapping(engine: &dyn Engine, mapping: &Mapping) -> Self {
        let Mapping { range, protection, kind, .. } = *mapping;
        let moves = match kind {
            VmaKind::Anonymous => true,
            VmaKind::PrivateFile => engine.capabilities().contains(Capabilities::PRIVATE_FILES),
            _ => false,
        };
        Self { range, protection, kind, moves }
    }

    /// Why none of its pages migrates; `None` when they can.
    pub fn stays(&self) -> Option<Stay> {
        match self.kind {
            VmaKind::Shared => Some(Stay::Shared),
            VmaKind::SharedFile => Some(Stay::SharedFile),
            VmaKind::Huge => Some(Stay::Huge),
            VmaKind::Special => Some(Stay::Special),
            VmaKind::PrivateFile if !self.moves => Some(Stay::File),
            _ if !self.can_migrate() => Some(Stay::Protection),
            _ => None,
        }
    }

    /// Whether pages of it can migrate: private writable memory, which is anonymous, or a file's where the engine has
    /// [`Capabilities::PRIVATE_FILES`].
    pub fn can_migrate(&self) -> bool {
        self.moves
            && self.protection.contains(Protection::READ | Protection::WRITE)
            && !self.protection.contains(Protection::EXEC)
    }
}

impl Mm {
    /// Why none of a vma's pages can leave now. Read-only anonymous memory can where changes of access are announced:
    /// then nobody writes to it while its contents are copied.
    pub(crate) fn stays(&self, vma: &Vma) -> Option<Stay> {
        match vma.stays() {
            Some(Stay::Protection) if self.copies(vma) => None,
            why => why,
        }
    }

    /// Whether pages of a vma leave by copy and drop.
    pub(crate) fn copies(&self, vma: &Vma) -> bool {
        vma.kind == VmaKind::Anonymous
            && vma.protection == Protection::READ
            && self.is_ordered()
            && self.engine.copies_read_only()
    }
}

fn same_origin(a: &Mapping, b: &Mapping) -> bool {
    a.protection == b.protection && a.kind == b.kind && a.identity == b.identity
}

/// Widens upwards until `end` at least, over mappings of the same origin.
fn join_up(engine: &dyn Engine, mapping: &mut Mapping, end: VirtAddr) -> Result<()> {
    for _ in 0..JOINED {
        if mapping.range.end() >= end {
            break;
        }
        match engine.mapping_at(mapping.range.end())? {
            // An engine that hides pages may find the border elsewhere by now.
            Some(next)
                if next.range.start() <= mapping.range.end() && same_origin(mapping, &next) =>
            {
                mapping.range = mapping.range.hull(next.range);
            }
            _ => break,
        }
    }
    Ok(())
}

fn join_down(engine: &dyn Engine, mapping: &mut Mapping) -> Result<()> {
    for _ in 0..JOINED {
        let Some(below) = mapping.range.start().get().checked_sub(1) else { break };
        match engine.mapping_at(VirtAddr::new(below).page())? {
            Some(previous)
                if previous.range.start() < mapping.range.start()
                    && previous.range.end() >= mapping.range.start()
                    && same_origin(mapping, &previous) =>
            {
                mapping.range = mapping.range.hull(previous.range);
            }
            _ => break,
        }
    }
    Ok(())
}

/// The first vma that ends above `addr`.
pub(crate) fn find(engine: &dyn Engine, addr: VirtAddr) -> Result<Option<Vma>> {
    let Some(mut mapping) = engine.mapping_at(addr.page())? else { return Ok(None) };
    join_down(engine, &mut mapping)?;
    join_up(engine, &mut mapping, VirtAddr::new(crate::addr::USER_END))?;
    Ok(Some(Vma::from_mapping(engine, &mapping)))
}

/// The vma that holds all of `range` (its bounds may be narrower than [`find`]'s).
pub(crate) fn covering(engine: &dyn Engine, range: AddrRange) -> Result<Vma> {
    let address = range.start();
    let mut mapping = engine
        .mapping_at(address)?
        .filter(|mapping| mapping.range.contains(address))
        .ok_or(Error::Fault { address, what: "nothing is mapped there" })?;
    join_up(engine, &mut mapping, range.end())?;
    if !mapping.range.covers(range) {
        return Err(Error::invalid(address.get(), "the range reaches beyond its vma"));
    }
    Ok(Vma::from_mapping(engine, &mapping))
}

/// The lock of an address space (`mmap_lock`), taken and released explicitly, as C code does.
///
/// It orders drivers among themselves (register against register). It cannot keep the process from changing its
/// mappings: that is what notifiers and sequence numbers are for. Service threads never take it, so a driver may hold
/// it while it touches migrated memory.
#[derive(Debug, Default)]
pub struct MmapLock {
    state: Mutex<LockState>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct LockState {
    readers: usize,
    writer: bool,
}

impl MmapLock {
    fn acquire(&self, mut try_take: impl FnMut(&mut LockState) -> bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.state.lock();
        while !try_take(&mut state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let address = VirtAddr::new(0);
                return Err(Error::Busy { address, what: "the address space's lock is held" });
            }
            state = self.released.wait_for(state, left);
        }
        Ok(())
    }

    /// Takes it shared.
    ///
    /// # Errors
    /// `Busy` after the deadline (10 s).
    pub fn read_lock(&self) -> Result<()> {
        self.acquire(|state| {
            let free = !state.writer;
            state.readers += usize::from(free);
            free
        })
    }

    /// Takes it alone.
    ///
    /// # Errors
    /// `Busy` after the deadline (10 s).
    pub fn write_lock(&self) -> Result<()> {
        self.acquire(|state| {
            let free = !state.writer && state.readers == 0;
            state.writer |= free;
            free
        })
    }

    /// Releases it after `read_lock`.
    ///
    /// # Errors
    /// `Invalid` when nobody holds it so.
    pub fn read_unlock(&self) -> Result<()> {
        let mut state = self.state.lock();
        if state.readers == 0 {
            return Err(Error::invalid(0, "the address space's lock is not held for reading"));
        }
        state.readers -= 1;
        self.released.notify_all();
        Ok(())
    }

    /// Releases it after `write_lock`.
    ///
    /// # Errors
    /// `Invalid` when nobody holds it so.
    pub fn write_unlock(&self) -> Result<()> {
        let mut state = self.state.lock();
        if !state.writer {
            return Err(Error::invalid(0, "the address space's lock is not held for writing"));
        }
        state.writer = false;
        self.released.notify_all();
        Ok(())
    }

    /// Whether somebody holds it for writing.
    pub fn is_write_locked(&self) -> bool {
        self.state.lock().writer
    }
}
