//! Interval notifiers: who is told of changes, and the sequence numbers by which ranges are validated.
//!
//! An invalidation has three steps: [`Notifiers::begin`] makes every overlapping subscription's sequence number change
//! and marks it busy, in one go; [`Notifiers::call`] runs the callbacks with no lock held; [`Notifiers::end`] makes the
//! subscriptions idle again. A driver takes the number while its subscription is idle, looks at the page table, and
//! under its own lock asks whether the number still stands. (`mmu_interval_read_begin`, `_read_retry`.)

use crate::addr::AddrRange;
use crate::arena::{List, Shared};
use crate::error::{Error, Result};
use crate::limits::{DEADLINE, NOTIFIERS};
use crate::ops::{Invalidation, NotifierOps};
use crate::sync::{Condvar, Mutex, this_thread};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Callbacks that run at once at most (service threads and callers).
const RUNNING: usize = 256;

/// A subscription to changes of a range (`struct mmu_interval_notifier`).
pub(crate) struct Subscription {
    range: AddrRange,
    ops: Option<Arc<dyn NotifierOps>>,
    id: u64,
    /// Changes with every invalidation. Written under the list's lock.
    sequence: AtomicU64,
    /// Invalidations in progress. Written under the list's lock.
    active: AtomicU64,
    /// Serial number of the first invalidation that does not concern it any more.
    dead_from: AtomicU64,
    /// Hull of what was invalidated: start and end.
    hull: [AtomicU64; 2],
}

/// An invalidation that has begun.
#[derive(Debug, Clone, Copy)]
#[must_use = "an invalidation that does not end keeps its range invalid for ever"]
pub(crate) struct Invalidating {
    update: Invalidation,
    serial: u64,
    first_later_id: u64,
}

struct State {
    subscriptions: List<Shared<Subscription>>,
    next_id: u64,
    serial: u64,
    running: [usize; RUNNING],
}

/// All subscriptions of one mm.
pub(crate) struct Notifiers {
    list: Mutex<State>,
    idle: Condvar,
}

impl Invalidating {
    pub(crate) fn range(&self) -> AddrRange {
        self.update.range
    }
}

impl Subscription {
    fn concerned(&self, invalidating: &Invalidating) -> bool {
        self.id < invalidating.first_later_id
            && invalidating.serial < self.dead_from.load(Ordering::Relaxed)
            && self.range.overlaps(invalidating.update.range)
    }
}

impl State {
    fn is_running(&self, thread: usize) -> bool {
        self.running.contains(&thread)
    }

    fn enter(&mut self, thread: usize) {
        if let Some(slot) = self.running.iter_mut().find(|slot| **slot == 0) {
            *slot = thread;
        }
    }

    fn leave(&mut self, thread: usize) {
        if let Some(slot) = self.running.iter_mut().find(|slot| **slot == thread) {
            *slot = 0;
        }
    }

    fn next_to_call(
        &self,
        after: Option<u64>,
        what: &Invalidating,
    ) -> Option<Shared<Subscription>> {
        self.subscriptions
            .iter()
            .filter(|one| after.is_none_or(|id| one.id > id))
            .find(|one| one.ops.is_some() && one.concerned(what))
            .cloned()
    }
}

impl Notifiers {
    pub(crate) fn new() -> Option<Self> {
        let list = State {
            subscriptions: List::new(NOTIFIERS)?,
            next_id: 0,
            serial: 0,
            running: [0; RUNNING],
        };
        Some(Self { list: Mutex::new(list), idle: Condvar::new() })
    }

    pub(crate) fn insert(
        &self,
        range: AddrRange,
        ops: Option<Arc<dyn NotifierOps>>,
    ) -> Result<Shared<Subscription>> {
        let mut list = self.list.lock();
        let id = list.next_id;
        list.next_id += 1;
        let no_memory = || Error::NoMemory { what: "notifiers" };
        let subscription = Shared::new(Subscription {
            range,
            ops,
            id,
            sequence: AtomicU64::new(0),
            active: AtomicU64::new(0),
            dead_from: AtomicU64::new(u64::MAX),
            hull: [AtomicU64::new(u64::MAX), AtomicU64::new(0)],
        })
        .ok_or_else(no_memory)?;
        let full = |_| Error::NoMemory { what: "too many notifiers and tracked ranges" };
        list.subscriptions.push(subscription.clone()).map_err(full)?;
        Ok(subscription)
    }

    /// Takes a subscription out and waits until none of its callbacks runs (promise 42).
    pub(crate) fn remove(&self, subscription: &Shared<Subscription>) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut list = self.list.lock();
        if subscription.active.load(Ordering::Relaxed) > 0 && list.is_running(this_thread()) {
            return Err(Error::Deadlock {
                what: "a notifier cannot be removed from inside a callback of the same mm",
            });
        }
        let serial = list.serial;
        let _ = subscription.dead_from.compare_exchange(
            u64::MAX,
            serial,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        while subscription.active.load(Ordering::Relaxed) > 0 {
            if Instant::now() >= deadline {
                let address = subscription.range.start();
                return Err(Error::Busy { address, what: "a notifier callback did not return" });
            }
            list = self.idle.wait_for(list, deadline.saturating_duration_since(Instant::now()));
        }
        list.subscriptions.remove_first(|one| one.id == subscription.id);
        Ok(())
    }

    /// Takes a subscription without callbacks out, at once: there is nothing to wait for.
    pub(crate) fn forget(&self, subscription: &Subscription) {
        self.list.lock().subscriptions.remove_first(|one| one.id == subscription.id);
    }

    /// Every overlapping subscription becomes busy and its number changes. Runs no callback.
    pub(crate) fn begin(&self, update: Invalidation) -> Invalidating {
        let mut list = self.list.lock();
        let what = Invalidating { update, serial: list.serial, first_later_id: list.next_id };
        list.serial += 1;
        for one in list.subscriptions.iter().filter(|one| one.concerned(&what)) {
            one.sequence.fetch_add(1, Ordering::Release);
            one.active.fetch_add(1, Ordering::Relaxed);
            one.hull[0].fetch_min(update.range.start().get(), Ordering::Relaxed);
            one.hull[1].fetch_max(update.range.end().get(), Ordering::Relaxed);
        }
        what
    }

    /// [`Notifiers::begin`] and [`Notifiers::call`]; the result ends it.
    pub(crate) fn invalidate(&self, update: Invalidation) -> Begun<'_> {
        let begun = Begun { notifiers: self, what: self.begin(update) };
        self.call(&begun.what);
        begun
    }

    /// Runs the callbacks, one after another, with no lock held.
    pub(crate) fn call(&self, what: &Invalidating) {
        let mut last = None;
        loop {
            let list = self.list.lock();
            let Some(next) = list.next_to_call(last, what) else { return };
            last = Some(next.id);
            drop(list);
            if let Some(ops) = &next.ops {
                let _running = Running::enter(self);
                ops.invalidate(&what.update);
            }
        }
    }

    /// The change is made: subscriptions that nothing else keeps busy are idle again.
    pub(crate) fn end(&self, what: Invalidating) {
        let list = self.list.lock();
        for one in list.subscriptions.iter().filter(|one| one.concerned(&what)) {
            one.active.fetch_sub(1, Ordering::Relaxed);
        }
        self.idle.notify_all();
    }

    /// The number now, once no invalidation of the range is in progress.
    pub(crate) fn read_begin(&self, subscription: &Subscription) -> Result<u64> {
        let deadline = Instant::now() + DEADLINE;
        let mut list = self.list.lock();
        while subscription.active.load(Ordering::Relaxed) > 0 {
            let address = subscription.range.start();
            if list.is_running(this_thread()) {
                return Err(Error::Deadlock { what: "read_begin from inside a notifier callback" });
            }
            if Instant::now() >= deadline {
                return Err(Error::Busy { address, what: "an invalidation did not end" });
            }
            list = self.idle.wait_for(list, deadline.saturating_duration_since(Instant::now()));
        }
        Ok(subscription.sequence.load(Ordering::Acquire))
    }

    /// Tells every subscriber that the mm goes away.
    pub(crate) fn release(&self) {
        let mut last = None;
        loop {
            let list = self.list.lock();
            let next = list
                .subscriptions
                .iter()
                .filter(|one| last.is_none_or(|id| one.id > id))
                .find(|one| one.dead_from.load(Ordering::Relaxed) == u64::MAX)
                .cloned();
            drop(list);
            let Some(next) = next else { return };
            last = Some(next.id);
            if let Some(ops) = &next.ops {
                let _running = Running::enter(self);
                ops.release();
            }
        }
    }

    /// Whether the calling thread runs a callback of this mm.
    pub(crate) fn in_callback(&self) -> bool {
        self.list.lock().is_running(this_thread())
    }
}

/// The calling thread runs a callback; ends when dropped, be it by a panic of the callback.
struct Running<'a>(&'a Notifiers);

impl<'a> Running<'a> {
    fn enter(notifiers: &'a Notifiers) -> Self {
        notifiers.list.lock().enter(this_thread());
        Self(notifiers)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.list.lock().leave(this_thread());
    }
}

/// An invalidation that has begun; ends when dropped, be it by a panic of a callback.
#[must_use = "the invalidation ends with it"]
pub(crate) struct Begun<'a> {
    notifiers: &'a Notifiers,
    what: Invalidating,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.notifiers.end(self.what);
    }
}

impl Subscription {
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    pub(crate) fn changed_since(&self, sequence: u64) -> bool {
        self.sequence() != sequence
    }

    pub(crate) fn range(&self) -> AddrRange {
        self.range
    }

    /// What was invalidated since the subscription began, as one covering range.
    pub(crate) fn invalidated(&self) -> Option<AddrRange> {
        let start = self.hull[0].load(Ordering::Acquire).max(self.range.start().get());
        let end = self.hull[1].load(Ordering::Acquire).min(self.range.end().get());
        (start < end).then(|| AddrRange::from_bounds(start, end))
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subscription({} {:?})", self.id, self.range)
    }
}

impl fmt::Debug for Notifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notifiers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::InvalidateEvent;

    fn update(start: u64, end: u64) -> Invalidation {
        let range = AddrRange::new(start, end).unwrap();
        Invalidation { range, event: InvalidateEvent::Clear, owner: None }
    }

    #[test]
    fn numbers_change_only_for_overlapping_invalidations() {
        let all = Notifiers::new().unwrap();
        let one = all.insert(AddrRange::new(0x1000, 0x3000).unwrap(), None).unwrap();
        let number = all.read_begin(&one).unwrap();
        let elsewhere = all.begin(update(0x3000, 0x4000));
        all.end(elsewhere);
        assert!(!one.changed_since(number));
        let here = all.begin(update(0x2000, 0x9000));
        assert!(one.changed_since(number));
        all.end(here);
        assert_ne!(all.read_begin(&one).unwrap(), number);
        assert_eq!(one.invalidated().unwrap(), AddrRange::new(0x2000, 0x3000).unwrap());
        all.remove(&one).unwrap();
    }
}
