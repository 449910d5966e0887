//! Changes of the layout that the program announces before it makes them, by way of `libhmm_preload.so`.
//!
//! Before: nothing of the range leaves any more, and what is leaving has left; mirrors let go of it, and their callbacks
//! have returned (promise 23). Where the engine keeps absent pages out of reach by protection, what the change would
//! take along comes home. Entries stay as they are: if the change fails, nothing has happened.
//!
//! After: entries follow. An engine with events has been told by the kernel; for the others it is done here, before
//! anybody may move a page of the range again. So what is mapped at the same place meanwhile is never taken for what was
//! there.

use super::Mm;
use super::layout::pages_of;
use super::page_table::{Entry, Place};
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::MapEvent;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::{CHANGES, DEADLINE};
use crate::notifier::Invalidating;
use crate::ops::{InvalidateEvent, Invalidation};
use crate::sync::{Condvar, Mutex, this_thread};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// What the program is about to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Unmaps a range, or maps something else over it.
    Unmap(AddrRange),
    /// Drops the contents of a range.
    Drop(AddrRange),
    /// Changes the protection of a range.
    Protect(AddrRange),
    /// Moves a range, over whatever is at the new place if the program names one.
    Move {
        /// Old place.
        from: AddrRange,
        /// New place.
        over: Option<AddrRange>,
    },
}

impl Change {
    fn ranges(self) -> [Option<AddrRange>; 2] {
        match self {
            Self::Unmap(range) | Self::Drop(range) | Self::Protect(range) => [Some(range), None],
            Self::Move { from, over } => [Some(from), over],
        }
    }

    /// Whether it is about a part of some range.
    pub(crate) fn concerns(self, range: AddrRange) -> bool {
        self.ranges().into_iter().flatten().any(|one| one.overlaps(range))
    }

    /// What the change takes along.
    fn kept(self) -> Option<AddrRange> {
        match self {
            Self::Protect(range) | Self::Move { from: range, .. } => Some(range),
            Self::Unmap(_) | Self::Drop(_) => None,
        }
    }

    fn invalidates_as(self) -> InvalidateEvent {
        match self {
            Self::Unmap(_) | Self::Move { .. } => InvalidateEvent::Unmap,
            Self::Drop(_) => InvalidateEvent::Clear,
            Self::Protect(_) => InvalidateEvent::Protection,
        }
    }

    /// For engines that nobody tells. What moved was at home: there is nothing to follow.
    fn events(self) -> [Option<MapEvent>; 2] {
        match self {
            Self::Unmap(range) => [Some(MapEvent::Unmap(range)), None],
            Self::Drop(range) => [Some(MapEvent::Remove(range)), None],
            Self::Protect(_) => [None, None],
            Self::Move { from, over } => [Some(MapEvent::Unmap(from)), over.map(MapEvent::Unmap)],
        }
    }
}

/// What a change keeps pages from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Still {
    /// They do not leave for a device.
    Stay,
    /// Nor do they come home.
    Rest,
}

#[derive(Debug, Clone, Copy)]
struct Underway {
    ranges: [Option<AddrRange>; 2],
    still: Still,
    thread: usize,
}

impl Underway {
    fn parts(&self, range: AddrRange) -> impl Iterator<Item = AddrRange> + use<> {
        self.ranges.into_iter().flatten().filter_map(move |one| one.intersect(range))
    }

    fn overlaps(&self, ranges: &[Option<AddrRange>; 2]) -> bool {
        ranges.iter().flatten().any(|range| self.parts(*range).next().is_some())
    }
}

/// The changes under way. Two that overlap take turns.
#[derive(Debug)]
pub(crate) struct Changes {
    slots: Mutex<[Option<Underway>; CHANGES]>,
    over: Condvar,
    count: AtomicUsize,
}

/// A change that has begun.
#[derive(Debug, Clone, Copy)]
#[must_use = "a change that does not end keeps its range still for ever"]
pub(crate) struct Announced {
    change: Change,
    place: usize,
    invalidating: [Option<Invalidating>; 2],
}

impl Changes {
    pub(super) fn new() -> Self {
        let slots = Mutex::new([None; CHANGES]);
        Self { slots, over: Condvar::new(), count: AtomicUsize::new(0) }
    }

    /// Waits for changes that overlap, and for a place. `None` when that takes too long.
    fn insert(&self, underway: Underway, deadline: Instant) -> Option<usize> {
        let mut slots = self.slots.lock();
        loop {
            let is_taken = slots.iter().flatten().any(|one| one.overlaps(&underway.ranges));
            let free = slots.iter().position(Option::is_none);
            if let (false, Some(place)) = (is_taken, free) {
                slots[place] = Some(underway);
                self.count.fetch_add(1, Ordering::SeqCst);
                return Some(place);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            slots = self.over.wait_for(slots, left);
        }
    }

    fn set(&self, place: usize, still: Still) {
        self.slots.lock()[place].iter_mut().for_each(|one| one.still = still);
    }

    fn remove(&self, place: usize) {
        self.slots.lock()[place] = None;
        self.count.fetch_sub(1, Ordering::SeqCst);
        self.over.notify_all();
    }

    /// Reports the parts of a range that changes keep still so far. Whoever asks for what it is about to hold holds the
    /// lock of its leaf: changes look at the leaf after they are registered.
    pub(crate) fn within(&self, range: AddrRange, still: Still, mut report: impl FnMut(AddrRange)) {
        let slots = self.slots.lock();
        let concerned = slots.iter().flatten().filter(|one| one.still >= still);
        concerned.flat_map(|one| one.parts(range)).for_each(&mut report);
    }

    /// Whether the page at an address, which is on a device, has to stay there. Its leaf is locked.
    pub(super) fn rests(&self, page: VirtAddr) -> bool {
        let mut rests = false;
        if self.count.load(Ordering::SeqCst) > 0 {
            self.within(AddrRange::page_of(page), Still::Rest, |_| rests = true);
        }
        rests
    }

    /// Waits until no change of another thread keeps a part of the range so still.
    pub(crate) fn wait_until_over(&self, range: AddrRange, still: Still, deadline: Instant) {
        let me = this_thread();
        let mut slots = self.slots.lock();
        let is_concerned = |one: &Underway| {
            one.thread != me && one.still >= still && one.parts(range).next().is_some()
        };
        while slots.iter().flatten().any(is_concerned) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            slots = self.over.wait_for(slots, left);
        }
    }

    /// Whether a change covers a range.
    pub(super) fn covers(&self, range: AddrRange) -> bool {
        let slots = self.slots.lock();
        let mut ranges = slots.iter().flatten().flat_map(|one| one.ranges).flatten();
        ranges.any(|one| one.covers(range))
    }
}

impl Mm {
    /// The program is about to change its layout. Returns when it may: mirrors have let go of the range, and nothing
    /// of it leaves until [`Mm::end_change`]. Not for callbacks and service threads.
    ///
    /// # Errors
    /// `Busy` when a migration holds pages of the range for longer than the deadline, on an engine that needs them to be
    /// still; `Busy`, `Lost` or `Fault` when what the change would take along does not come home. Nothing has begun then.
    pub(crate) fn begin_change(&self, change: Change) -> Result<Announced> {
        let ranges = change.ranges();
        let deadline = Instant::now() + DEADLINE;
        let first = if change.kept().is_some() { Still::Stay } else { self.stillness() };
        let underway = Underway { ranges, still: first, thread: this_thread() };
        let address = ranges.iter().flatten().next().map_or(VirtAddr::new(0), |one| one.start());
        let what = "another change of the same range does not end";
        let busy = Error::Busy { address, what };
        let place = self.changes.insert(underway, deadline).ok_or(busy)?;
        match self.make_still(change, place, first, deadline) {
            Ok(()) => Ok(Announced { change, place, invalidating: self.let_go(change) }),
            Err(error) => {
                self.release(place, ranges);
                Err(error)
            }
        }
    }

    /// The kernel tells of changes in an order that is right for pages that come home; nobody else does.
    fn stillness(&self) -> Still {
        let told = self.engine.capabilities().contains(Capabilities::EVENTS);
        if told { Still::Stay } else { Still::Rest }
    }

    fn make_still(
        &self,
        change: Change,
        place: usize,
        first: Still,
        deadline: Instant,
    ) -> Result<()> {
        self.wait_for_holders(change, first, deadline)?;
        if let Some(range) = change.kept().filter(|range| self.engine.hides(*range)) {
            self.bring_home(range)?;
            self.check_nothing_lost(range)?;
            self.engine.uncover(range)?;
        }
        let still = self.stillness();
        if still != first {
            self.changes.set(place, still);
            self.wait_for_holders(change, still, deadline)?;
        }
        Ok(())
    }

    /// A page that its device lost stays out of reach for ever; another protection would make zeros of it.
    fn check_nothing_lost(&self, range: AddrRange) -> Result<()> {
        for leaf in self.table.leaves(range) {
            let entries = leaf.lock();
            let is_lost =
                |page: &VirtAddr| entries[page.index_in_leaf()].place() == Place::Poisoned;
            if let Some(address) = pages_of(leaf, range).find(is_lost) {
                return Err(Error::Lost { address, what: "its device lost the data" });
            }
        }
        Ok(())
    }

    /// What migrations hold of a range that is about to change is let go of.
    fn wait_for_holders(&self, change: Change, still: Still, deadline: Instant) -> Result<()> {
        let is_awaited = |entry: &Entry| {
            let leaves = matches!(entry.place(), Place::System | Place::Coherent(_));
            entry.is_locked() && (still == Still::Rest || leaves)
        };
        for range in change.ranges().into_iter().flatten() {
            let is_free = self.wait_while(range, deadline, is_awaited);
            let copes = Capabilities::EVENTS | Capabilities::MOVE;
            if !is_free && !self.engine.capabilities().contains(copes) {
                let what = "a migration holds pages of the range for longer than the deadline";
                return Err(Error::Busy { address: range.start(), what });
            }
        }
        Ok(())
    }

    /// Waits until no entry of a range is such; false when the deadline came first.
    pub(crate) fn wait_while(
        &self,
        range: AddrRange,
        deadline: Instant,
        such: impl Fn(&Entry) -> bool,
    ) -> bool {
        for leaf in self.table.leaves(range) {
            let Some(part) = leaf.range().intersect(range) else { continue };
            let first = part.start().index_in_leaf();
            let mut entries = leaf.lock();
            while entries[first..first + part.pages()].iter().any(&such) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                entries = leaf.wait(entries, left);
            }
        }
        true
    }

    fn let_go(&self, change: Change) -> [Option<Invalidating>; 2] {
        let event = change.invalidates_as();
        let begun = change
            .ranges()
            .map(|range| range.map(|range| self.begin(Invalidation { range, event, owner: None })));
        begun.iter().flatten().for_each(|one| self.notifiers.call(one));
        begun
    }

    /// The program made its change, or failed to. Then some of it may have been made all the same: the engine looks.
    pub(crate) fn end_change(&self, announced: &Announced, made: bool) {
        let change = announced.change;
        let is_told = self.stillness() == Still::Stay;
        match (is_told, made) {
            (true, _) => {
                // The kernel's report was read before the call returned: when the lock is free it is applied.
                drop(self.engine.layout().hold());
                self.tickets.settle();
            }
            (false, true) => {}
            (false, false) => {
                change.ranges().into_iter().flatten().for_each(|one| self.engine.refresh(one));
            }
        }
        let events = change.events().into_iter().flatten().filter(|_| made);
        events.for_each(|event| self.engine.changed(event));
        announced.invalidating.into_iter().flatten().for_each(|one| self.notifiers.end(one));
        self.release(announced.place, change.ranges());
    }

    fn release(&self, place: usize, ranges: [Option<AddrRange>; 2]) {
        self.changes.remove(place);
        for range in ranges.into_iter().flatten() {
            for leaf in self.table.leaves(range) {
                // Who waits for a page looks again.
                drop(leaf.lock());
                leaf.notify();
            }
            if self.stillness() == Still::Rest {
                self.engine.wake(range);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::{ModelConfig, ModelEngine};
    use crate::engine::{Engine, FaultSink, VmaKind, Watch};
    use crate::flags::Protection;
    use crate::ops::NotifierOps;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    fn stage(without: Capabilities) -> (Arc<ModelEngine>, Arc<Mm>, AddrRange) {
        let model = ModelEngine::new(ModelConfig { without, ..ModelConfig::default() });
        let mm = Mm::with_engine(model.clone()).unwrap();
        let both = Protection::READ | Protection::WRITE;
        let range = model.mmap(8, both, VmaKind::Anonymous).unwrap();
        model.watch(range, Watch::Changes).unwrap();
        (model, mm, range)
    }

    struct Witness {
        model: Arc<ModelEngine>,
        calls: AtomicUsize,
        saw_all: AtomicBool,
    }

    impl NotifierOps for Witness {
        fn invalidate(&self, update: &Invalidation) {
            let mapped = self.model.mapping_at(update.range.start()).unwrap().unwrap();
            self.saw_all.store(mapped.range.covers(update.range), Ordering::SeqCst);
            self.calls.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn callbacks_come_first_and_the_range_is_invalid_until_the_end() {
        let (model, mm, range) = stage(Capabilities::empty());
        let (calls, saw_all) = (AtomicUsize::new(0), AtomicBool::new(false));
        let witness = Arc::new(Witness { model: model.clone(), calls, saw_all });
        let notifier = mm.notifier_insert(range, witness.clone()).unwrap();
        let sequence = notifier.read_begin().unwrap();
        let announced = mm.begin_change(Change::Unmap(range.sub(2, 4))).unwrap();
        assert_eq!(witness.calls.load(Ordering::SeqCst), 1);
        assert!(witness.saw_all.load(Ordering::SeqCst) && notifier.read_retry(sequence));
        let reader = std::thread::spawn(move || notifier.read_begin().unwrap());
        model.munmap(range.sub(2, 4));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!reader.is_finished());
        mm.end_change(&announced, true);
        assert_ne!(reader.join().unwrap(), sequence);
    }

    fn hold(mm: &Mm, page: VirtAddr, entry: Entry) {
        let leaf = mm.table.leaf_or_new(page).unwrap();
        leaf.lock()[page.index_in_leaf()] = entry;
        leaf.notify();
    }

    /// Whether a change waits for an entry, until it is another one.
    fn waits_for(without: Capabilities, entry: Entry) -> bool {
        let (_model, mm, range) = stage(without);
        let page = range.page_at(3);
        hold(&mm, page, entry);
        let changing = {
            let mm = Arc::clone(&mm);
            std::thread::spawn(move || {
                let announced = mm.begin_change(Change::Unmap(range)).unwrap();
                mm.end_change(&announced, false);
            })
        };
        std::thread::sleep(Duration::from_millis(50));
        let waited = !changing.is_finished();
        hold(&mm, page, Entry::SYSTEM);
        changing.join().unwrap();
        waited
    }

    #[test]
    fn what_migrations_hold_is_awaited() {
        let page = Entry::device(crate::addr::Pfn::new(crate::addr::Pfn::DEVICE_BASE), true);
        assert!(waits_for(Capabilities::empty(), Entry::SYSTEM.locked()));
        assert!(waits_for(Capabilities::EVENTS, Entry::SYSTEM.locked()));
        assert!(waits_for(Capabilities::EVENTS, page.locked()));
        // Whoever waits for these in vain is refused: without MOVE, pages must be still.
        for (without, entry) in [
            // Who is told of changes can cope with pages that come home meanwhile.
            (Capabilities::MOVE, page.locked()),
            (Capabilities::MOVE | Capabilities::EVENTS, page),
        ] {
            let (_model, mm, range) = stage(without);
            hold(&mm, range.page_at(3), entry);
            let announced = mm.begin_change(Change::Unmap(range)).unwrap();
            mm.end_change(&announced, false);
            hold(&mm, range.page_at(3), Entry::SYSTEM);
        }
    }

    fn kept(mm: &Mm, range: AddrRange, still: Still) -> usize {
        let mut pages = 0;
        mm.changes.within(range, still, |part| pages += part.pages());
        pages
    }

    #[test]
    fn pages_are_kept_still_until_the_end() {
        for (without, rest) in [(Capabilities::empty(), 0), (Capabilities::EVENTS, 2)] {
            let (_model, mm, range) = stage(without);
            let announced = mm.begin_change(Change::Drop(range.sub(0, 2))).unwrap();
            assert_eq!((kept(&mm, range, Still::Stay), kept(&mm, range, Still::Rest)), (2, rest));
            assert_eq!(mm.changes.rests(range.start()), rest > 0);
            assert!(!mm.changes.rests(range.page_at(2)) && mm.must_stay(range.sub(1, 1)));
            // Its own thread never waits for it.
            mm.changes.wait_until_over(range, Still::Stay, Instant::now() + DEADLINE);
            mm.end_change(&announced, false);
            assert_eq!(kept(&mm, range, Still::Stay), 0);
        }
    }

    #[test]
    fn changes_that_overlap_take_turns() {
        let (_model, mm, range) = stage(Capabilities::empty());
        let first = mm.begin_change(Change::Protect(range.sub(0, 4))).unwrap();
        let beside = mm.begin_change(Change::Unmap(range.sub(4, 1))).unwrap();
        let over = Some(range.sub(3, 1));
        let (other, from) = (Arc::clone(&mm), range.sub(6, 1));
        let second = std::thread::spawn(move || {
            let second = other.begin_change(Change::Move { from, over }).unwrap();
            other.end_change(&second, false);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished());
        mm.end_change(&first, true);
        second.join().unwrap();
        mm.end_change(&beside, false);
    }

    #[test]
    fn a_drop_that_was_announced_is_over_at_its_end() {
        let (model, mm, range) = stage(Capabilities::empty());
        let announced = mm.begin_change(Change::Drop(range)).unwrap();
        model.madvise_dontneed(range).unwrap();
        mm.end_change(&announced, true);
        assert!(mm.removed.busy_until(range).is_none());
        model.madvise_dontneed(range).unwrap();
        assert!(mm.removed.busy_until(range).is_some());
    }
}
