//! What the process does to its layout, applied to the page table, the migrations in flight, and the mirrors.
//!
//! First half, with the layout lock held for writing: page states change, notifier numbers change. Second half, with
//! no lock held: callbacks run, device pages that lost their place are dropped. Verbs wait for unfinished halves
//! ([`Tickets::settle`]), so that whoever called munmap and then the library finds everything done.

use super::Mm;
use super::page_table::{Entry, Leaf};
use crate::addr::{AddrRange, VirtAddr};
use crate::devmem::DoomedPages;
use crate::engine::{MapEvent, MapTicket};
use crate::limits::{DEADLINE, MAP_TICKETS, REMOVE_GRACE, REMOVE_MEMORY, REMOVED_RANGES};
use crate::notifier::Invalidating;
use crate::ops::{InvalidateEvent, Invalidation};
use crate::stats::Stats;
use crate::sync::{Condvar, Mutex};
use std::sync::atomic::Ordering;
use std::time::Instant;

#[derive(Debug, Clone, Copy)]
struct Unfinished {
    invalidating: [Option<Invalidating>; 2],
    doomed: DoomedPages,
    serial: u64,
}

#[derive(Debug)]
struct TicketState {
    slots: [Option<Unfinished>; MAP_TICKETS],
    next_serial: u64,
}

/// Layout changes whose second half is to come.
#[derive(Debug)]
pub(crate) struct Tickets {
    state: Mutex<TicketState>,
    finished: Condvar,
}

impl Tickets {
    pub(crate) fn new() -> Self {
        let state = TicketState { slots: [None; MAP_TICKETS], next_serial: 0 };
        Self { state: Mutex::new(state), finished: Condvar::new() }
    }

    fn open(
        &self,
        invalidating: [Option<Invalidating>; 2],
        doomed: DoomedPages,
    ) -> Option<MapTicket> {
        let mut state = self.state.lock();
        let slot = state.slots.iter().position(Option::is_none)?;
        let serial = state.next_serial;
        state.next_serial += 1;
        state.slots[slot] = Some(Unfinished { invalidating, doomed, serial });
        Some(MapTicket(slot))
    }

    fn get(&self, ticket: &MapTicket) -> Option<Unfinished> {
        self.state.lock().slots[ticket.0]
    }

    fn close(&self, ticket: &MapTicket) {
        self.state.lock().slots[ticket.0] = None;
        self.finished.notify_all();
    }

    /// Waits until every change that had begun by now is finished.
    pub(crate) fn settle(&self) {
        let deadline = Instant::now() + DEADLINE;
        let mut state = self.state.lock();
        let limit = state.next_serial;
        while state.slots.iter().flatten().any(|one| one.serial < limit) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.finished.wait_for(state, left);
        }
    }
}

/// Ranges whose contents were dropped a moment ago.
///
/// The kernel reports `MADV_DONTNEED` *before* it drops the pages, and nothing tells when it is done. A page that is
/// still there may hold the contents that are about to go; migrating it would save them from the drop and bring them
/// back later. So pages that are present in such a range stay where they are for a moment.
#[derive(Debug)]
pub(crate) struct RecentlyRemoved(Mutex<RemovedRing>);

#[derive(Debug)]
struct RemovedRing {
    ranges: [Option<(AddrRange, Instant)>; REMOVED_RANGES],
    next: usize,
}

impl RecentlyRemoved {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(RemovedRing { ranges: [None; REMOVED_RANGES], next: 0 }))
    }

    fn insert(&self, range: AddrRange) {
        let mut ring = self.0.lock();
        let now = Instant::now();
        let last = (ring.next + REMOVED_RANGES - 1) % REMOVED_RANGES;
        // An allocator trims neighbour after neighbour: one entry for a run of them.
        if let Some((previous, time)) = &mut ring.ranges[last]
            && (previous.end() == range.start() || previous.overlaps(range))
        {
            (*previous, *time) = (previous.hull(range), now);
            return;
        }
        let next = ring.next;
        // A full ring forgets nothing: the entry that must go is joined to its neighbour.
        if let (Some((old, time)), Some((neighbour, _))) =
            (ring.ranges[next], ring.ranges[(next + 1) % REMOVED_RANGES])
            && time.elapsed() < REMOVE_GRACE
        {
            ring.ranges[(next + 1) % REMOVED_RANGES] = Some((neighbour.hull(old), now));
        }
        ring.ranges[next] = Some((range, now));
        ring.next = (next + 1) % REMOVED_RANGES;
    }

    /// The parts of a range that were dropped so short a time ago that the drop may still come.
    pub(crate) fn within(&self, range: AddrRange) -> impl Iterator<Item = AddrRange> + use<> {
        let (ranges, now) = (self.0.lock().ranges, Instant::now());
        let recent =
            ranges.into_iter().flatten().filter(move |(_, time)| *time + REMOVE_GRACE > now);
        recent.filter_map(move |(removed, _)| removed.intersect(range))
    }

    /// Some reported change of the layout is not made yet. If it is a drop that touches the range, its time counts from
    /// now: the thread that drops may have been kept from running.
    pub(crate) fn renew(&self, range: AddrRange) {
        let now = Instant::now();
        let mut ring = self.0.lock();
        let touching =
            ring.ranges.iter_mut().flatten().filter(|(removed, _)| removed.overlaps(range));
        touching.filter(|(_, time)| *time + REMOVE_MEMORY > now).for_each(|(_, time)| *time = now);
    }

    /// When the last drop that touches the range is surely over; `None` if it is already.
    pub(crate) fn busy_until(&self, range: AddrRange) -> Option<Instant> {
        let ring = self.0.lock();
        let touching = ring.ranges.iter().flatten().filter(|(removed, _)| removed.overlaps(range));
        touching.map(|(_, time)| *time + REMOVE_GRACE).filter(|end| *end > Instant::now()).max()
    }
}

impl Mm {
    /// First half of a layout change. The layout lock is held for writing.
    pub(super) fn apply_map_event(&self, event: MapEvent) -> MapTicket {
        self.stats.map_events.fetch_add(1, Ordering::Relaxed);
        let mut doomed = DoomedPages::default();
        let (first, second) = match event {
            MapEvent::Unmap(range) => {
                self.forget(range, true, &mut doomed);
                (self.begin_event(range, InvalidateEvent::Unmap), None)
            }
            MapEvent::Remove(range) => {
                // What was announced is over when nothing keeps the range still any more.
                if !self.changes.covers(range) {
                    self.removed.insert(range);
                }
                self.forget(range, false, &mut doomed);
                (self.begin_event(range, InvalidateEvent::Clear), None)
            }
            MapEvent::Remap { from, to } => {
                let target = AddrRange::from_bounds(to.get(), to.get() + from.len());
                self.move_entries(from, to, &mut doomed);
                (
                    self.begin_event(from, InvalidateEvent::Unmap),
                    Some(self.begin_event(target, InvalidateEvent::Unmap)),
                )
            }
        };
        Stats::add(&self.stats.device_pages_dropped, doomed.count);
        Stats::subtract(&self.stats.device_pages, doomed.count);
        match self.tickets.open([Some(first), second], doomed) {
            Some(ticket) => ticket,
            None => {
                // Hundreds of unfinished changes: finish this one here, late is better than never.
                self.finish([Some(first), second], doomed);
                MapTicket(MAP_TICKETS)
            }
        }
    }

    /// Second half. No lock is held.
    pub(super) fn complete_map_event(&self, ticket: MapTicket) {
        if ticket.0 < MAP_TICKETS
            && let Some(unfinished) = self.tickets.get(&ticket)
        {
            self.finish(unfinished.invalidating, unfinished.doomed);
            self.tickets.close(&ticket);
        }
    }

    fn finish(&self, invalidating: [Option<Invalidating>; 2], doomed: DoomedPages) {
        invalidating.iter().flatten().for_each(|one| self.notifiers.call(one));
        doomed.put_all();
        // Whoever touched a page that a migration held waits for an address that may have changed its meaning.
        invalidating.iter().flatten().for_each(|one| self.engine.wake(one.range()));
        invalidating.into_iter().flatten().for_each(|one| self.notifiers.end(one));
    }

    fn begin_event(&self, range: AddrRange, event: InvalidateEvent) -> Invalidating {
        self.begin(Invalidation { range, event, owner: None })
    }

    /// Counted, and begun.
    pub(super) fn begin(&self, update: Invalidation) -> Invalidating {
        self.stats.invalidations.fetch_add(1, Ordering::Relaxed);
        self.notifiers.begin(update)
    }

    /// The pages of a range are gone; so is its registration when it was unmapped.
    fn forget(&self, range: AddrRange, unmapped: bool, doomed: &mut DoomedPages) {
        self.inflight.redirect(range, None);
        for leaf in self.table.leaves(range) {
            if unmapped {
                leaf.absence_watched.store(false, Ordering::Release);
            }
            let mut entries = leaf.lock();
            for entry in pages_of(leaf, range).map(|page| page.index_in_leaf()) {
                forget_entry(std::mem::take(&mut entries[entry]), doomed);
            }
            drop(entries);
            leaf.notify();
        }
    }

    /// Entries follow a moved mapping; what was recorded at the new place is gone.
    fn move_entries(&self, from: AddrRange, to: VirtAddr, doomed: &mut DoomedPages) {
        let target = AddrRange::from_bounds(to.get(), to.get() + from.len());
        self.forget(target, true, doomed);
        self.inflight.redirect(from, Some(to));
        self.move_left_out(from, to);
        for leaf in self.table.leaves(from) {
            leaf.absence_watched.store(false, Ordering::Release);
            for page in pages_of(leaf, from) {
                let entry = std::mem::take(&mut leaf.lock()[page.index_in_leaf()]);
                if entry == Entry::SYSTEM {
                    continue;
                }
                let new_place = VirtAddr::new(to.get() + (page.get() - from.start().get()));
                match self.table.leaf_or_new(new_place) {
                    Some(leaf) => leaf.lock()[new_place.index_in_leaf()] = entry,
                    // Without memory for a leaf the page cannot be found again: SIGBUS, never zeros.
                    None => {
                        self.engine.poison(new_place);
                        forget_entry(entry, doomed);
                    }
                }
            }
            leaf.notify();
        }
    }
}

/// The page of an entry is gone, and its charge with it. What a migration holds belongs to that, which was told.
fn forget_entry(entry: Entry, doomed: &mut DoomedPages) {
    if entry.is_locked() {
        return;
    }
    if let Some(group) = entry.group() {
        group.uncharge(entry.is_on_device());
    }
    if let Some(page) = entry.device_page() {
        doomed.push(page);
    }
}

/// The pages of a leaf that lie in a range.
pub(super) fn pages_of(leaf: &Leaf, range: AddrRange) -> impl Iterator<Item = VirtAddr> + use<> {
    let part = leaf.range().intersect(range);
    part.into_iter().flat_map(|part| (0..part.pages()).map(move |index| part.page_at(index)))
}
