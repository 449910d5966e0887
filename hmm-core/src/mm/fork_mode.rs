//! What the child of a fork gets of pages that are away.
//!
//! The kernel copies to a child what it has itself: where a page is away, that is nothing, and the child would read zeros.
//! So whatever is still away when the fork comes is left out of it: the child has no mapping there.

use super::Mm;
use super::page_table::{Entry, Leaf, Place};
use crate::addr::{AddrRange, LEAF_PAGES, USER_END, VirtAddr};
use crate::error::{Error, Result};
use crate::limits::{DEADLINE, RANGE_DEADLINE};
use crate::page_set::PageSet;
use crate::sync::this_thread;

/// What the child of a fork gets of pages that are on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum ForkMode {
    /// A copy, as the kernel's: every page comes home before the fork.
    #[default]
    Home = 0,
    /// Nothing: the pages stay on their devices, and the child has no mapping there (a touch of its is SIGSEGV). For
    /// children that do not need the data, such as those that call `exec` at once.
    DontCopy = 1,
}

impl ForkMode {
    pub(super) const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::DontCopy,
            _ => Self::Home,
        }
    }
}

impl Mm {
    /// Sets what children get of pages that are on a device, from the next fork on.
    ///
    /// In every mode a child never reads zeros for data: what does not come home, because its device fails or the fork is
    /// made inside a callback, is left out of the child as [`ForkMode::DontCopy`] leaves it out.
    ///
    /// # Errors
    /// `Gone`.
    pub fn set_fork_mode(&self, mode: ForkMode) -> Result<()> {
        self.check_open()?;
        self.gate.set_mode(mode);
        Ok(())
    }

    /// What children get of pages that are on a device.
    pub fn fork_mode(&self) -> ForkMode {
        self.gate.mode()
    }

    /// Nothing new leaves any more: waits for what is on its way, in so far as this thread may wait.
    pub(super) fn settle_for_fork(&self, may_wait: bool) {
        let time = if may_wait { DEADLINE } else { RANGE_DEADLINE };
        let others = self.inflight.of_others(this_thread());
        self.inflight.wait_for(&others, time);
        if may_wait {
            self.bring_home_for_handlers();
            self.table.leaves(everything()).for_each(|leaf| self.show_pages_at_home(leaf));
        }
    }

    /// What the fork's own handlers use in the child comes home: the stack of this thread, and the allocator's memory.
    pub(super) fn bring_home_for_handlers(&self) {
        let (on_stack, own_heap) = (0_u8, Box::new(0_u8));
        let used = [&raw const on_stack, &raw const *own_heap];
        for used in used.map(VirtAddr::from_ptr) {
            if crate::arena::contains(used) {
                // It never leaves.
                continue;
            }
            if let Ok(Some(mapping)) = self.engine.mapping_at(used.page()) {
                // What does not come home is left out with the rest.
                let _ = self.bring_home(mapping.range);
            }
        }
    }

    /// Leaves can be out of reach as a whole, and the child has nobody who shows it what is at home.
    fn show_pages_at_home(&self, leaf: &Leaf) {
        if self.engine.hides_pages_at_home(leaf.range()) {
            // What does not come home is left out with the rest.
            let _ = self.bring_home(leaf.range());
        }
    }

    /// Leaves what is away out of the child. False when something could neither be left out nor brought home.
    pub(super) fn leave_out_what_is_away(&self, may_wait: bool) -> bool {
        let mut first = true;
        let mut all = true;
        for leaf in self.table.leaves(everything()) {
            let away = away_of(leaf);
            if away.is_empty() {
                continue;
            }
            if std::mem::take(&mut first) {
                self.note_what_the_program_left_out();
            }
            let left_to_do = away.without(&leaf.left_out.lock().programs);
            for run in runs(leaf, left_to_do) {
                all &= self.leave_out_run(leaf, run, may_wait);
            }
        }
        all
    }

    fn note_what_the_program_left_out(&self) {
        self.table
            .leaves(everything())
            .for_each(|leaf| leaf.left_out.lock().programs = PageSet::default());
        self.engine.each_left_out_of_children(&mut |range| {
            for leaf in self.table.leaves(range) {
                let part = leaf.range().intersect(range);
                part.into_iter().for_each(|part| leaf.left_out.lock().programs.insert_pages(part));
            }
        });
    }

    fn leave_out_run(&self, leaf: &Leaf, run: AddrRange, may_wait: bool) -> bool {
        self.pieces(run).all(|piece| {
            // Under the lock: whoever brings a page home comes before this, and is seen, or after it, and undoes it.
            let mut left_out = leaf.left_out.lock();
            let mut wanted = PageSet::default();
            wanted.insert_pages(piece);
            let done = runs(leaf, wanted).try_for_each(|part| {
                self.engine.leave_out_of_children(part, true)?;
                left_out.ours.insert_pages(part);
                Ok::<_, Error>(())
            });
            drop(left_out);
            // Where the kernel's lists are short, the pages come home.
            let is_good = done.is_ok() || may_wait && self.bring_home(piece).is_ok();
            is_good || self.pieces(piece).next().is_none()
        })
    }

    /// The mapped parts of a run, each in one mapping. What is not mapped needs no care.
    pub(crate) fn pieces(&self, run: AddrRange) -> impl Iterator<Item = AddrRange> + '_ {
        let mut next = run.start();
        std::iter::from_fn(move || {
            let rest = AddrRange::new(next.get(), run.end().get()).ok()?;
            let piece = self.engine.mapping_at(next).ok()??.range.intersect(rest)?;
            next = piece.end();
            Some(piece)
        })
    }

    /// Pages of a range came home in this moment: children get them again, now that their contents are there.
    pub(crate) fn after_home_in_fork(&self, range: AddrRange) {
        if !self.is_forking() {
            return;
        }
        for leaf in self.table.leaves(range) {
            let left_out = &mut *leaf.left_out.lock();
            for run in runs(leaf, left_out.ours).filter_map(|run| run.intersect(range)) {
                // With too many mappings it is taken in with its neighbours, after the fork.
                if self.engine.leave_out_of_children(run, false).is_ok() {
                    pages(run).for_each(|page| left_out.ours.remove(page.index_in_leaf()));
                }
            }
        }
    }

    /// The fork is over, or it failed: later children get everything again.
    pub(super) fn take_back_in(&self) {
        // What was moved meanwhile is known at its new place after this.
        drop(self.engine.layout().hold());
        for leaf in self.table.leaves(everything()) {
            let ours = std::mem::take(&mut leaf.left_out.lock().ours);
            for piece in runs(leaf, ours).flat_map(|run| self.pieces(run)) {
                // Only what was unmapped meanwhile refuses.
                let _ = self.engine.leave_out_of_children(piece, false);
            }
        }
    }

    /// A mapping moved, and the kernel leaves it out of children at its new place. The layout lock is held for writing.
    pub(super) fn move_left_out(&self, from: AddrRange, to: VirtAddr) {
        for leaf in self.table.leaves(from) {
            let ours = leaf.left_out.lock().ours;
            for page in runs(leaf, ours).filter_map(|run| run.intersect(from)).flat_map(pages) {
                leaf.left_out.lock().ours.remove(page.index_in_leaf());
                let new_place = VirtAddr::new(to.get() + (page.get() - from.start().get()));
                if let Some(leaf) = self.table.leaf_or_new(new_place) {
                    leaf.left_out.lock().ours.insert(new_place.index_in_leaf());
                }
            }
        }
    }
}

fn everything() -> AddrRange {
    AddrRange::from_bounds(0, USER_END)
}

fn pages(run: AddrRange) -> impl Iterator<Item = VirtAddr> {
    (0..run.pages()).map(move |page| run.page_at(page))
}

/// The pages of a leaf that the kernel does not have, or may lose in the next moment.
fn away_of(leaf: &Leaf) -> PageSet {
    let mut away = PageSet::default();
    let entries = leaf.lock();
    let is_away = |entry: &Entry| {
        entry.is_locked() || matches!(entry.place(), Place::Device(_) | Place::Poisoned)
    };
    let slots = entries.iter().enumerate().filter(|(_, entry)| is_away(entry));
    slots.for_each(|(slot, _)| away.insert(slot));
    away
}

/// The runs of pages of a set.
fn runs(leaf: &Leaf, set: PageSet) -> impl Iterator<Item = AddrRange> + use<> {
    let (range, mut slot) = (leaf.range(), 0);
    std::iter::from_fn(move || {
        while slot < LEAF_PAGES {
            let (start, (end, inside)) = (slot, set.run_at(slot));
            slot = end;
            if inside {
                return Some(range.sub(start, end - start));
            }
        }
        None
    })
}
