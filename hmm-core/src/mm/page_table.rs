//! The library's own page table, sparse, beside the kernel's: what the kernel does not know about a page.
//!
//! A page with no entry is a system page: the kernel has it, or it is a hole. Leaves of 512 entries have a lock each.

use crate::account::GroupId;
use crate::addr::{AddrRange, LEAF_PAGES, LEAF_SIZE, Pfn, VirtAddr};
use crate::page_set::PageSet;
use crate::sparse::SparseTable;
use crate::sync::{Condvar, Mutex, MutexGuard};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

/// Copying saturates at 16 pages for each fault.
const FILL_LIMIT: usize = 16;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The kernel has it (or nobody has).
    System,
    /// On a device, out of the CPU's reach.
    Device(Pfn),
    /// On a device whose memory the CPU reaches: it is mapped, and touches never fault.
    Coherent(Pfn),
    /// Lost by its device.
    Poisoned,
}

/// One entry: a place, whether the page was writable, whether a migration holds it, and the group it is charged to.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry(u64);

impl Entry {
    const KIND: u64 = 0b111;
    const DEVICE: u64 = 1;
    const POISONED: u64 = 2;
    const COHERENT: u64 = 3;
    const LOCKED: u64 = 1 << 3;
    const WRITE: u64 = 1 << 4;
    const PFN_SHIFT: u32 = 8;
    const GROUP_SHIFT: u32 = 48;
    const PFN_MASK: u64 = (1 << Self::GROUP_SHIFT) - 1;

    pub(crate) const SYSTEM: Self = Self(0);
    pub(crate) const POISON: Self = Self(Self::POISONED);

    pub(crate) fn device(page: Pfn, write: bool) -> Self {
        Self((page.get() << Self::PFN_SHIFT) | Self::DEVICE | if write { Self::WRITE } else { 0 })
    }
    pub(crate) fn coherent(page: Pfn) -> Self {
        Self((page.get() << Self::PFN_SHIFT) | Self::COHERENT | Self::WRITE)
    }
    pub(crate) fn place(self) -> Place {
        let page = Pfn::new((self.0 & Self::PFN_MASK) >> Self::PFN_SHIFT);
        match self.0 & Self::KIND {
            Self::DEVICE => Place::Device(page),
            Self::COHERENT => Place::Coherent(page),
            Self::POISONED => Place::Poisoned,
            _ => Place::System,
        }
    }
    /// A page of the kernel's that nothing is known of but perhaps its charge.
    pub(crate) fn is_ordinary(self) -> bool {
        self.0 & (Self::KIND | Self::LOCKED) == 0
    }
    /// The device page that holds it, within the CPU's reach or not.
    pub(crate) fn device_page(self) -> Option<Pfn> {
        match self.place() {
            Place::Device(page) | Place::Coherent(page) => Some(page),
            Place::System | Place::Poisoned => None,
        }
    }
    pub(crate) fn is_on_device(self) -> bool {
        self.device_page().is_some()
    }
    /// The group that the page is charged to; `None`: it never left, or was lost.
    pub(crate) fn group(self) -> Option<GroupId> {
        GroupId::from_bits((self.0 >> Self::GROUP_SHIFT) as u16)
    }
    pub(crate) fn charged_to(self, group: Option<GroupId>) -> Self {
        let bits = group.map_or(0, |group| u64::from(group.bits()));
        Self((self.0 & Self::PFN_MASK) | (bits << Self::GROUP_SHIFT))
    }
    pub(crate) fn is_locked(self) -> bool {
        self.0 & Self::LOCKED != 0
    }
    pub(crate) fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }
    pub(crate) fn locked(self) -> Self {
        Self(self.0 | Self::LOCKED)
    }
    pub(crate) fn unlocked(self) -> Self {
        Self(self.0 & !Self::LOCKED)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.place(), if self.is_locked() { " locked" } else { "" })
    }
}

/// 512 entries under one lock, like a PTE page.
pub(crate) struct Leaf {
    base: VirtAddr,
    entries: Mutex<[Entry; LEAF_PAGES]>,
    unlocked: Condvar,
    /// Where the next first touch would continue the last one, and how many pages that one filled.
    next_hole: AtomicU32,
    /// The whole leaf's absence is watched; an unmap of any part takes it back.
    pub(crate) absence_watched: AtomicBool,
    /// Pages that the child of a fork under way does not get.
    pub(crate) left_out: Mutex<LeftOut>,
}

/// Pages of one leaf that children do not get.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct LeftOut {
    /// By the library's doing, for the time of one fork.
    pub(crate) ours: PageSet,
    /// By the program's own.
    pub(crate) programs: PageSet,
}

impl Leaf {
    fn new(base: VirtAddr) -> Self {
        Self {
            base,
            entries: Mutex::new([Entry::SYSTEM; LEAF_PAGES]),
            unlocked: Condvar::new(),
            next_hole: AtomicU32::new(0),
            absence_watched: AtomicBool::new(false),
            left_out: Mutex::new(LeftOut::default()),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, [Entry; LEAF_PAGES]> {
        self.entries.lock()
    }

    /// Lets go of the lock until some entry was unlocked, or the time is over.
    pub(crate) fn wait<'a>(
        &self,
        guard: MutexGuard<'a, [Entry; LEAF_PAGES]>,
        time: Duration,
    ) -> MutexGuard<'a, [Entry; LEAF_PAGES]> {
        self.unlocked.wait_for(guard, time)
    }

    /// After entries were unlocked.
    pub(crate) fn notify(&self) {
        self.unlocked.notify_all();
    }

    /// How many pages to fill for a first touch of page `index`: one, and twice as many as last time when touches run
    /// on without a gap, so that a sweep over fresh memory does not fault page by page. The caller holds the lock.
    pub(crate) fn fill_around(&self, entries: &[Entry; LEAF_PAGES], index: usize) -> usize {
        let last = self.next_hole.load(Ordering::Relaxed);
        let (expected, filled) = ((last >> 16) as usize, (last & 0xffff) as usize);
        let wanted = if expected == index && filled > 0 { (2 * filled).min(FILL_LIMIT) } else { 1 };
        let is_hole = |entry: &&Entry| entry.is_ordinary();
        let count = entries[index..].iter().take(wanted).take_while(is_hole).count().max(1);
        self.next_hole.store(((index + count) << 16 | count) as u32, Ordering::Relaxed);
        count
    }

    pub(crate) fn range(&self) -> AddrRange {
        AddrRange::from_bounds(self.base.get(), self.base.get() + LEAF_SIZE)
    }
}

/// The leaves of an address space.
#[derive(Debug)]
pub(crate) struct PageTable(SparseTable<Leaf>);

impl PageTable {
    pub(crate) fn new() -> Option<Self> {
        SparseTable::new().map(Self)
    }

    /// The leaf that covers an address, if anything was ever recorded in it.
    pub(crate) fn leaf(&self, address: VirtAddr) -> Option<&Leaf> {
        self.0.get(address)
    }

    /// The leaf that covers an address, made if need be. `None` above the user address space or without memory.
    pub(crate) fn leaf_or_new(&self, address: VirtAddr) -> Option<&Leaf> {
        self.0.get_or_make(address, || Leaf::new(address.leaf()))
    }

    /// Every leaf that overlaps a range, in rising order.
    pub(crate) fn leaves(&self, range: AddrRange) -> impl Iterator<Item = &Leaf> {
        self.0.range(range)
    }

    /// The entry of one page.
    pub(crate) fn entry(&self, address: VirtAddr) -> Entry {
        self.leaf(address).map_or(Entry::SYSTEM, |leaf| leaf.lock()[address.index_in_leaf()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::USER_END;

    #[test]
    fn leaves_are_made_once_and_found_in_order() {
        let table = PageTable::new().unwrap();
        assert!(table.leaf(VirtAddr::new(0x40_0000)).is_none());
        for address in [0x7f00_0000_0000_u64, 0x40_0000, 0x60_0000] {
            let leaf = table.leaf_or_new(VirtAddr::new(address)).unwrap();
            assert!(leaf.range().contains(VirtAddr::new(address)));
        }
        let all = AddrRange::new(0x1000, USER_END).unwrap();
        let bases: Vec<_> = table.leaves(all).map(|leaf| leaf.range().start().get()).collect();
        assert_eq!(bases, [0x40_0000, 0x60_0000, 0x7f00_0000_0000]);
        assert!(table.leaf_or_new(VirtAddr::new(USER_END)).is_none());
    }

    #[test]
    fn runs_of_first_touches_are_filled_in_growing_steps() {
        let leaf = Leaf::new(VirtAddr::new(LEAF_SIZE));
        let mut entries = [Entry::SYSTEM; LEAF_PAGES];
        entries[40] = Entry::POISON;
        let mut steps = Vec::new();
        let mut index = 5;
        while index < 40 {
            steps.push(leaf.fill_around(&entries, index));
            index += steps.last().unwrap();
        }
        assert_eq!(steps, [1, 2, 4, 8, 16, 4]);
        assert_eq!(leaf.fill_around(&entries, 300), 1);
    }

    #[test]
    fn entries_keep_place_and_lock_apart() {
        let page = Pfn::new(Pfn::DEVICE_BASE + 77);
        let entry = Entry::device(page, true).locked();
        assert!(entry.is_locked() && entry.is_writable());
        assert_eq!(entry.unlocked().place(), Place::Device(page));
        assert_eq!(entry.unlocked(), Entry::device(page, true));
        let group = GroupId::from_bits(u16::MAX);
        let charged = entry.charged_to(group);
        assert_eq!((charged.place(), charged.group()), (Place::Device(page), group));
        assert!(charged.is_locked() && charged.is_writable() && charged.is_on_device());
        assert_eq!(charged.charged_to(None), entry);
        assert!(Entry::SYSTEM.charged_to(group).is_ordinary() && !charged.is_ordinary());
    }
}
