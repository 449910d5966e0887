//! What the child of a fork gets of pages that are away.
//!
//! The kernel copies to a child what it has itself: where a page is away, that is nothing, and the child would read zeros.
//! So whatever is still away when the fork comes is left out of it: the child has no mapping there.

use super::Mm;
use super::page_table::{Entry, Leaf, Place};
use crate::addr::{AddrRange, LEAF_PAGES, Pfn, USER_END, VirtAddr};
use crate::devmem::{Devmem, LastFound};
use crate::engine::VmaKind;
use crate::error::{Error, Result};
use crate::flags::Protection;
use crate::limits::{DEADLINE, RANGE_DEADLINE};
use crate::ops::{InvalidateEvent, Invalidation};
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
    /// A copy at the child's first touch: the pages stay on their devices, which parent and child share (promise 69). The
    /// child has an mm from the start, and its touches ask the parent; when the parent is gone without an `exit` of its own,
    /// they get SIGBUS.
    Lazy = 2,
}

impl ForkMode {
    pub(super) const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::DontCopy,
            2 => Self::Lazy,
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

    /// What the fork's own handlers use in the child comes home: the stack of this thread and, for those that open an mm
    /// there, the allocator's memory.
    pub(super) fn bring_home_for_handlers(&self) {
        let (on_stack, own_heap) = (0_u8, Box::new(0_u8));
        let heap = (self.gate.mode() == ForkMode::Lazy).then(OnHeap::new).flatten();
        let used = [&raw const on_stack, &raw const *own_heap];
        let heap = heap.iter().map(|heap| VirtAddr::from_ptr(heap.0.as_ptr()));
        for used in used.map(VirtAddr::from_ptr).into_iter().chain(heap) {
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

    /// Reports the device pages that a child is to share, run by run, with a reference of each; `besides` are ranges that
    /// no child sees. From now on the devices only read them: a write has to bring them home first. What cannot be shared
    /// comes home.
    pub(crate) fn each_to_share(
        &self,
        besides: &[AddrRange],
        report: &mut dyn FnMut(AddrRange, &[Pfn]),
    ) {
        self.note_what_the_program_left_out();
        for leaf in self.table.leaves(everything()) {
            if besides.iter().any(|range| range.covers(leaf.range())) || away_of(leaf).is_empty() {
                continue;
            }
            let (range, event) = (leaf.range(), InvalidateEvent::Clear);
            let invalid = self.notifiers.invalidate(Invalidation { range, event, owner: None });
            let (pages, shared) = share_leaf(leaf, besides);
            drop(invalid);
            let mut unmapped = shared;
            for piece in runs(leaf, shared).flat_map(|run| self.pieces(run)) {
                self::pages(piece).for_each(|page| unmapped.remove(page.index_in_leaf()));
                let first = piece.start().index_in_leaf();
                let pages = &pages[first..first + piece.pages()];
                if self.can_share(piece) {
                    report(piece, pages);
                } else {
                    pages.iter().for_each(|page| put(*page));
                    let _ = self.bring_home(piece);
                }
            }
            // Unmapped a moment ago, and not forgotten yet.
            let without_place = runs(leaf, unmapped).flat_map(self::pages);
            without_place.for_each(|page| put(pages[page.index_in_leaf()]));
        }
    }

    /// Whether a child can have the pages of a piece of a mapping in memory of its own.
    fn can_share(&self, piece: AddrRange) -> bool {
        matches!(
            self.engine.mapping_at(piece.start()),
            Ok(Some(mapping)) if mapping.kind == VmaKind::Anonymous
                && mapping.protection == Protection::READ | Protection::WRITE
        )
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
            if left_out.fork == self.gate.number() {
                wanted = wanted.without(&left_out.coming);
            }
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

    /// Pages of a range come home in this moment: children get them again. A child of a lazy fork looks for itself what it
    /// did not get; so it gets them before their contents are there, and misses no store that follows.
    pub(crate) fn before_home_in_fork(&self, range: AddrRange) {
        if self.gate.mode() == ForkMode::Lazy && self.is_forking() {
            self.take_in(range);
        }
    }

    /// As [`Mm::before_home_in_fork`], for other children: they get pages only with their contents.
    pub(crate) fn after_home_in_fork(&self, range: AddrRange) {
        if self.gate.mode() != ForkMode::Lazy && self.is_forking() {
            self.take_in(range);
        }
    }

    fn take_in(&self, range: AddrRange) {
        let is_lazy = self.gate.mode() == ForkMode::Lazy;
        for leaf in self.table.leaves(range) {
            let left_out = &mut *leaf.left_out.lock();
            if left_out.fork != self.gate.number() {
                (left_out.fork, left_out.coming) = (self.gate.number(), PageSet::default());
            }
            let part = leaf.range().intersect(range);
            part.into_iter()
                .filter(|_| is_lazy)
                .for_each(|part| left_out.coming.insert_pages(part));
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

/// Something on the heap of the C library, which starts threads with it.
struct OnHeap(std::ptr::NonNull<libc::c_void>);

impl OnHeap {
    fn new() -> Option<Self> {
        // SAFETY: small, and given back below.
        std::ptr::NonNull::new(unsafe { libc::malloc(64) }).map(Self)
    }
}

impl Drop for OnHeap {
    fn drop(&mut self) {
        // SAFETY: it came from malloc.
        unsafe { libc::free(self.0.as_ptr()) };
    }
}

/// Takes a reference of each device page of a leaf, and makes the devices' own accesses to them reads.
fn share_leaf(leaf: &Leaf, besides: &[AddrRange]) -> ([Pfn; LEAF_PAGES], PageSet) {
    let (mut pages, mut shared) = ([Pfn::new(0); LEAF_PAGES], PageSet::default());
    let (mut devices, kept) = (LastFound::default(), leaf.left_out.lock().programs);
    for (slot, entry) in leaf.lock().iter_mut().enumerate() {
        let address = leaf.range().page_at(slot);
        if let Place::Device(page) = entry.place()
            && !kept.contains(slot)
            && !besides.iter().any(|range| range.contains(address))
            && devices.find(page).is_some_and(|devmem| devmem.get(page))
        {
            pages[slot] = page;
            shared.insert(slot);
            if !entry.is_locked() {
                *entry = Entry::device(page, false).charged_to(entry.group());
            }
        }
    }
    (pages, shared)
}

/// Drops a reference of a device page. No lock of the library may be held.
pub(crate) fn put(page: Pfn) {
    Devmem::find(page).into_iter().for_each(|devmem| devmem.put(page));
}

/// The pages of a leaf that the kernel does not have, or may lose in the next moment.
fn away_of(leaf: &Leaf) -> PageSet {
    let mut away = PageSet::default();
    let entries = leaf.lock();
    let slots = entries.iter().enumerate().filter(|(_, entry)| **entry != Entry::SYSTEM);
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
