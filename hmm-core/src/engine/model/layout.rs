//! What the process does to its layout: the system calls that map, unmap, move, protect and drop memory.
//!
//! A change of watched memory and its events are one step under the layout lock, events in the kernel's order (as
//! userfaultfd reports them on 6.18): `munmap` and `mremap` change first and report then, `MADV_DONTNEED` reports
//! first, and an mremap reports the unmapping of its destination, the move, and the unmapping of its old place.
//! Like the kernel, none of them wakes a thread that waits for a page of the range: that is up to the sink.

use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::engine::model::ModelEngine;
use crate::engine::model::pages::{PageCondition, Slot};
use crate::engine::model::state::State;
use crate::engine::{MapEvent, MapTicket, VmaKind};
use crate::error::{Error, Result};
use crate::flags::Protection;
use std::time::Duration;

/// How late a late drop is: long enough for others to do something, shorter than anybody may rely on.
const LATENESS: Duration = Duration::from_millis(5);

impl ModelEngine {
    /// Maps `pages` pages at the lowest free place.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no pages, [`Error::NoMemory`] when the address space is full.
    pub fn mmap(&self, pages: usize, protection: Protection, kind: VmaKind) -> Result<AddrRange> {
        let bytes = pages.checked_mul(PAGE_SIZE).filter(|bytes| *bytes != 0);
        let bytes = bytes.ok_or_else(|| Error::invalid(0, "no pages, or too many"))?;
        let mut state = self.state.lock();
        let free = state.space.find_free(bytes as u64);
        let range = free.ok_or(Error::NoMemory { what: "address space of the model" })?;
        let region = state.space.new_region(protection, kind);
        state.space.insert(range, region);
        Ok(range)
    }

    /// Maps `range` in place of whatever is there (`MAP_FIXED`).
    pub fn mmap_fixed(&self, range: AddrRange, protection: Protection, kind: VmaKind) {
        self.change(|state| {
            let events = unmap(state, range);
            let region = state.space.new_region(protection, kind);
            state.space.insert(range, region);
            events
        });
    }

    /// Unmaps `range`, which may have holes.
    pub fn munmap(&self, range: AddrRange) {
        self.change(|state| unmap(state, range));
    }

    /// Moves a mapping with its contents to `to`, over whatever is there (`MREMAP_MAYMOVE | MREMAP_FIXED`).
    ///
    /// # Errors
    /// [`Error::Fault`] when not all of `from` is mapped; [`Error::Invalid`] when the places overlap or the new one
    /// leaves the address space.
    pub fn mremap(&self, from: AddrRange, to: VirtAddr) -> Result<()> {
        let end = to.checked_add(from.len());
        let end = end.ok_or_else(|| Error::invalid(to.get(), "the new place overflows"))?;
        let destination = AddrRange::new(to.get(), end.get())?;
        if destination.overlaps(from) {
            return Err(Error::invalid(to.get(), "the new place overlaps the old one"));
        }
        self.try_change(|state| {
            require_mapped(state, from)?;
            let mut events = unmap(state, destination);
            if state.space.is_watched(from) {
                events.extend([MapEvent::Remap { from, to }, MapEvent::Unmap(from)]);
            }
            let moved = |addr: u64| addr - from.start().get() + to.get();
            for (at, region) in state.space.remove(from) {
                let (start, end) = (moved(at.start().get()), moved(at.end().get()));
                state.space.insert(AddrRange::from_bounds(start, end), region);
            }
            let pages = state.drop_pages(from);
            state.pages.extend(pages.into_iter().map(|(page, slot)| (moved(page), slot)));
            Ok(events)
        })
    }

    /// Changes the protection of `range`. Raises no event: the kernel has none for it.
    ///
    /// # Errors
    /// [`Error::Fault`] when not all of the range is mapped.
    pub fn mprotect(&self, range: AddrRange, protection: Protection) -> Result<()> {
        let mut state = self.state.lock();
        require_mapped(&state, range)?;
        state.space.update(range, |region| region.protection = protection);
        Ok(())
    }

    /// Drops the contents of `range` (`MADV_DONTNEED`): private memory reads as zeros from now on (the model's files
    /// hold nothing else), shared memory as before.
    ///
    /// # Errors
    /// [`Error::Fault`] when not all of the range is mapped; nothing is dropped then.
    pub fn madvise_dontneed(&self, range: AddrRange) -> Result<()> {
        let mut tickets = Vec::new();
        let late = {
            let _change = self.layout.change();
            let mut state = self.state.lock();
            require_mapped(&state, range)?;
            let pieces = state.space.pieces(range);
            let late = state.chaos.drops_late();
            drop(state);
            let watched = pieces.iter().filter(|(_, region)| region.watch.is_some());
            tickets.extend(watched.filter_map(|(at, _)| self.announce(MapEvent::Remove(*at))));
            if !late {
                drop_contents(&mut self.state.lock(), range);
            }
            late
        };
        self.finish(tickets);
        if late {
            crate::sync::sleep(LATENESS);
            drop_contents(&mut self.state.lock(), range);
        }
        Ok(())
    }

    /// Puts the pages that are present in `range` into a condition (fork, direct I/O, swap).
    pub fn set_condition(&self, range: AddrRange, condition: PageCondition) {
        let mut state = self.state.lock();
        for (_, slot) in state.pages.range_mut(range.start().get()..range.end().get()) {
            if let Slot::Page(_, now) = slot {
                *now = condition;
            }
        }
    }

    /// Applies a change that cannot fail.
    fn change(&self, apply: impl FnOnce(&mut State) -> Vec<MapEvent>) {
        let applied = self.try_change(|state| Ok(apply(state)));
        debug_assert!(applied.is_ok(), "it returned Ok");
    }

    /// Applies a change, reports its events under the layout lock, and finishes them after it.
    fn try_change(&self, apply: impl FnOnce(&mut State) -> Result<Vec<MapEvent>>) -> Result<()> {
        let tickets: Vec<MapTicket> = {
            let _change = self.layout.change();
            let events = apply(&mut self.state.lock())?;
            events.into_iter().filter_map(|event| self.announce(event)).collect()
        };
        self.finish(tickets);
        Ok(())
    }

    fn announce(&self, event: MapEvent) -> Option<MapTicket> {
        let sink = self.state.lock().sink.clone()?;
        Some(self.serve(|| sink.on_map_event(event)))
    }

    fn finish(&self, tickets: Vec<MapTicket>) {
        let Some(sink) = self.state.lock().sink.clone() else { return };
        for ticket in tickets {
            self.serve(|| sink.finish_map_event(ticket));
        }
    }
}

fn unmap(state: &mut State, range: AddrRange) -> Vec<MapEvent> {
    let watched = state.space.is_watched(range);
    state.space.remove(range);
    state.drop_pages(range);
    if watched { vec![MapEvent::Unmap(range)] } else { Vec::new() }
}

fn drop_contents(state: &mut State, range: AddrRange) {
    for (at, region) in state.space.pieces(range) {
        if matches!(region.kind, VmaKind::Anonymous | VmaKind::PrivateFile) {
            state.drop_pages(at);
        }
    }
}

fn require_mapped(state: &State, range: AddrRange) -> Result<()> {
    if state.space.is_mapped(range) {
        return Ok(());
    }
    Err(Error::Fault { address: range.start(), what: "part of the range is not mapped" })
}
