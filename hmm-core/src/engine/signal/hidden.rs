//! Which pages the engine made inaccessible, and which of those are away. One node with a lock for each leaf.

use crate::addr::{AddrRange, LEAF_PAGES, LEAF_SIZE, VirtAddr};
use crate::page_set::PageSet;
use crate::sparse::SparseTable;
use crate::sync::{Mutex, MutexGuard};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The pages of one leaf.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct State {
    /// Inaccessible by our doing.
    pub(super) hidden: PageSet,
    /// Of those: their contents were taken.
    pub(super) away: PageSet,
    /// Of those: lost by their device. They stay inaccessible for ever.
    pub(super) poisoned: PageSet,
    /// Of those that are away: what they had was dropped, and a mark was left in its place.
    pub(super) marked: PageSet,
    /// Of those that are hidden: pages of private file mappings.
    pub(super) of_file: PageSet,
    /// Hidden as a whole, or as good: accessible again only as a whole, since mappings are short.
    pub(super) whole: bool,
}

/// One leaf.
#[derive(Debug)]
pub(super) struct Leaf {
    base: VirtAddr,
    state: Mutex<State>,
}

impl Leaf {
    /// Its pages, locked.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    pub(super) fn range(&self) -> AddrRange {
        AddrRange::from_bounds(self.base.get(), self.base.get() + LEAF_SIZE)
    }

    /// The addresses of a run of its pages.
    pub(super) fn pages(&self, first: usize, end: usize) -> AddrRange {
        self.range().sub(first, end - first)
    }
}

/// All leaves, and how many runs of hidden pages they have: each run costs the process up to two mappings.
#[derive(Debug)]
pub(super) struct Hidden {
    table: SparseTable<Leaf>,
    runs: AtomicUsize,
}

impl Hidden {
    pub(super) fn new() -> Option<Self> {
        Some(Self { table: SparseTable::new()?, runs: AtomicUsize::new(0) })
    }

    /// The leaf that covers an address, if a page of it was ever of interest.
    pub(super) fn leaf(&self, addr: VirtAddr) -> Option<&Leaf> {
        self.table.get(addr)
    }

    /// As [`Hidden::leaf`], made if need be. `None` without memory.
    pub(super) fn leaf_or_new(&self, addr: VirtAddr) -> Option<&Leaf> {
        let base = addr.leaf();
        self.table.get_or_make(base, || Leaf { base, state: Mutex::new(State::default()) })
    }

    /// Every leaf of a range that was ever of interest.
    pub(super) fn leaves(&self, range: AddrRange) -> impl Iterator<Item = &Leaf> {
        self.table.range(range)
    }

    /// Sets which pages of a locked leaf are hidden.
    pub(super) fn set(&self, state: &mut State, hidden: PageSet) {
        let (before, after) = (state.hidden.runs(), hidden.runs());
        state.hidden = hidden;
        state.of_file = state.of_file.without(&state.of_file.without(&hidden));
        self.runs.fetch_add(after, Ordering::Relaxed);
        self.runs.fetch_sub(before, Ordering::Relaxed);
    }

    /// Runs of hidden pages.
    pub(super) fn runs(&self) -> usize {
        self.runs.load(Ordering::Relaxed)
    }

    /// Every run of hidden pages of a range.
    pub(super) fn each_run(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange)) {
        for leaf in self.leaves(range) {
            let hidden = leaf.lock().hidden;
            let mut slot = 0;
            while slot < LEAF_PAGES {
                let (end, inside) = hidden.run_at(slot);
                if inside {
                    leaf.pages(slot, end).intersect(range).into_iter().for_each(&mut *report);
                }
                slot = end;
            }
        }
    }

    /// Whether a page is hidden.
    pub(super) fn contains(&self, addr: VirtAddr) -> bool {
        self.leaf(addr).is_some_and(|leaf| leaf.lock().hidden.contains(addr.index_in_leaf()))
    }

    /// The part of `within` around `addr` whose pages are all hidden, or all not, and which of the two.
    pub(super) fn run_around(&self, addr: VirtAddr, within: AddrRange) -> (AddrRange, bool) {
        let hidden = self.contains(addr);
        // The page itself belongs to it, whatever happened to it since.
        let start = self.run_start(addr, within, hidden).min(addr.page());
        let end = self.run_end(addr, within, hidden).max(addr.page().plus_pages(1));
        (AddrRange::from_bounds(start.get(), end.get()), hidden)
    }

    /// The hidden pages of the leaf at `base`; none where nothing was ever of interest.
    fn hidden_of(&self, base: VirtAddr) -> PageSet {
        self.leaf(base).map_or(PageSet::default(), |leaf| leaf.lock().hidden)
    }

    fn run_end(&self, addr: VirtAddr, within: AddrRange, hidden: bool) -> VirtAddr {
        let (mut base, mut slot) = (addr.leaf(), addr.index_in_leaf());
        while base < within.end() {
            let set = self.hidden_of(base);
            if set.contains(slot) != hidden {
                return base.plus_pages(slot).min(within.end());
            }
            let end = set.run_at(slot).0;
            if end < LEAF_PAGES {
                return base.plus_pages(end).min(within.end());
            }
            (base, slot) = (base.plus_pages(LEAF_PAGES), 0);
        }
        within.end()
    }

    fn run_start(&self, addr: VirtAddr, within: AddrRange, hidden: bool) -> VirtAddr {
        let (mut base, mut slot) = (addr.leaf(), addr.index_in_leaf());
        loop {
            let set = self.hidden_of(base);
            if set.contains(slot) != hidden {
                return base.plus_pages(slot + 1).max(within.start());
            }
            let first = set.run_before(slot);
            if first > 0 || base <= within.start() {
                return base.plus_pages(first).max(within.start());
            }
            (base, slot) = (VirtAddr::new(base.get() - LEAF_SIZE), LEAF_PAGES - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_told_apart_across_leaves() {
        let hidden = Hidden::new().unwrap();
        let base = 0x4000_0000_u64;
        let mut set = PageSet::default();
        (500..512).for_each(|slot| set.insert(slot));
        let leaf = hidden.leaf_or_new(VirtAddr::new(base)).unwrap();
        hidden.set(&mut leaf.lock(), set);
        let mut set = PageSet::default();
        (0..3).for_each(|slot| set.insert(slot));
        let leaf = hidden.leaf_or_new(VirtAddr::new(base + LEAF_SIZE)).unwrap();
        hidden.set(&mut leaf.lock(), set);
        assert_eq!(hidden.runs(), 2);
        let within = AddrRange::new(base, base + 4 * LEAF_SIZE).unwrap();
        let at = |page: u64| {
            let (run, inside) = hidden.run_around(VirtAddr::new(base + page * 4096), within);
            ((run.start().get() - base) / 4096, (run.end().get() - base) / 4096, inside)
        };
        assert_eq!(at(0), (0, 500, false));
        assert_eq!(at(505), (500, 515, true));
        assert_eq!(at(514), (500, 515, true));
        assert_eq!(at(515), (515, 2048, false));
        assert_eq!(at(1600), (515, 2048, false));
        let narrow = AddrRange::new(base + 510 * 4096, base + 513 * 4096).unwrap();
        let (run, inside) = hidden.run_around(VirtAddr::new(base + 511 * 4096), narrow);
        assert_eq!((run, inside), (narrow, true));
    }
}
