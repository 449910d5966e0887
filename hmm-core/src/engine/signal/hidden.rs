//! Which pages the engine made inaccessible, and which of those are away. One node with a lock for each leaf.

use crate::addr::{AddrRange, LEAF_SIZE, VirtAddr};
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
        self.runs.fetch_add(after, Ordering::Relaxed);
        self.runs.fetch_sub(before, Ordering::Relaxed);
    }

    /// Runs of hidden pages.
    pub(super) fn runs(&self) -> usize {
        self.runs.load(Ordering::Relaxed)
    }

    /// Whether a page is hidden.
    pub(super) fn contains(&self, addr: VirtAddr) -> bool {
        self.leaf(addr).is_some_and(|leaf| leaf.lock().hidden.contains(addr.index_in_leaf()))
    }

    /// The part of `within` around `addr` whose pages are all hidden, or all not, and which of the two.
    pub(super) fn run_around(&self, addr: VirtAddr, within: AddrRange) -> (AddrRange, bool) {
        let hidden = self.contains(addr);
        let (mut start, mut end) = (within.start(), within.end());
        for leaf in self.leaves(within) {
            let state = leaf.lock();
            if !hidden && state.hidden.is_empty() {
                continue;
            }
            let mut slot = 0;
            while slot < crate::addr::LEAF_PAGES {
                let (next, inside) = state.hidden.run_at(slot);
                let run = leaf.pages(slot, next);
                if inside != hidden {
                    if run.end() <= addr {
                        start = start.max(run.end());
                    } else if run.start() > addr {
                        end = end.min(run.start());
                    }
                }
                slot = next;
            }
            if leaf.range().start() > addr && end < leaf.range().end() {
                break;
            }
        }
        if hidden {
            // Leaves without a node have no hidden page.
            (start, end) = self.clip_to_nodes(addr, start, end);
        }
        (AddrRange::from_bounds(start.get(), end.get()), hidden)
    }

    fn clip_to_nodes(
        &self,
        addr: VirtAddr,
        start: VirtAddr,
        end: VirtAddr,
    ) -> (VirtAddr, VirtAddr) {
        let mut low = addr.leaf();
        while low > start && low.get() >= LEAF_SIZE {
            let below = VirtAddr::new(low.get() - LEAF_SIZE);
            if self.leaf(below).is_none() {
                break;
            }
            low = below;
        }
        let mut high = VirtAddr::new(addr.leaf().get() + LEAF_SIZE);
        while high < end && self.leaf(high).is_some() {
            high = VirtAddr::new(high.get() + LEAF_SIZE);
        }
        (start.max(low), end.min(high))
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
