//! The service threads of two descriptors: ranges that are answered inline have one of their own ([`super::Second`]).
//!
//! One `munmap` may unmap vmas of both descriptors. Each then reports the whole range, one after the other, and between
//! them the program may map and use the first vma's place again. So of each report only the descriptor's own parts count.

use super::{Common, EVENT_BATCH, Service, map_event, read};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::engine::uffd::abi::Message;
use crate::engine::uffd::second::Second;
use crate::engine::{FaultSink, MapEvent, MapTicket};
use crate::limits::MAP_TICKETS;
use crate::sync::RwLockWriteGuard;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use std::sync::Arc;

/// What a service thread was woken by.
pub(super) enum Heard {
    Message,
    Nothing,
    Stop,
}

/// Changes whose second half is to come.
struct Begun<'a> {
    sink: &'a dyn FaultSink,
    tickets: [Option<MapTicket>; MAP_TICKETS],
    count: usize,
}

impl Begun<'_> {
    fn begin(&mut self, event: MapEvent) {
        let ticket = self.sink.on_map_event(event);
        // The sink has no more tickets than this: the next ones stand for nothing.
        if let Some(place) = self.tickets.get_mut(self.count) {
            *place = Some(ticket);
            self.count += 1;
        }
    }

    fn finish(self) {
        let tickets = self.tickets.into_iter().take(self.count);
        tickets.flatten().for_each(|ticket| self.sink.finish_map_event(ticket));
    }
}

impl Service {
    pub(in crate::engine::uffd) fn sink(&self) -> Option<Arc<dyn FaultSink>> {
        self.shared.sink.read().clone()
    }

    pub(in crate::engine::uffd) fn second(&self) -> Option<&Second> {
        self.shared.second.get().map(|second| &**second)
    }

    /// Lets the service threads look at a second descriptor, too. Once.
    pub(in crate::engine::uffd) fn add_second(&self, second: Shared<Second>) {
        if self.shared.second.set(second).is_ok() {
            // Whoever waits without it wakes, and finds it; the event is never cleared, and nobody waits for it again.
            let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
        }
    }
}

impl Common {
    /// What ends the threads, and whether it is final.
    fn stop_event(&self) -> (&OwnedFd, bool) {
        match self.second.get() {
            Some(second) => (&second.stop, true),
            None => (&self.stop, false),
        }
    }

    /// After the stop event was seen: whether it did not only call to look at the second descriptor.
    fn is_over(&self, is_final: bool) -> Heard {
        if is_final || self.second.get().is_none() { Heard::Stop } else { Heard::Nothing }
    }

    pub(super) fn wait_for_messages(&self) -> Heard {
        let (stop, is_final) = self.stop_event();
        let second = self.second.get().filter(|_| is_final);
        let other = second.map_or(stop, |second| &*second.pages.descriptor);
        let mut waiting = [
            PollFd::new(&*self.descriptor, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(other, PollFlags::IN),
        ];
        let count = if second.is_some() { 3 } else { 2 };
        if rustix::event::poll(&mut waiting[..count], None).is_err() {
            return Heard::Nothing;
        }
        if waiting[1].revents().is_empty() { Heard::Message } else { self.is_over(is_final) }
    }

    /// Half a second's sleep. True when the threads are to end.
    pub(super) fn pause(&self) -> bool {
        let (stop, is_final) = self.stop_event();
        let mut waiting = [PollFd::new(stop, PollFlags::IN)];
        let pause = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
        let seen = matches!(rustix::event::poll(&mut waiting, Some(&pause)), Ok(1..));
        seen && matches!(self.is_over(is_final), Heard::Stop)
    }

    /// As [`Common::read_and_apply`], from both descriptors; the second one has no faults.
    pub(super) fn read_and_apply_both(
        &self,
        second: &Second,
        sink: &dyn FaultSink,
        messages: &mut [Message; EVENT_BATCH],
        changing: RwLockWriteGuard<'_, ()>,
    ) -> usize {
        let mut begun = Begun { sink, tickets: [const { None }; MAP_TICKETS], count: 0 };
        let count = read(&self.descriptor, messages);
        for message in &messages[..count] {
            self.apply(second, message, false, &mut begun);
        }
        let mut others = [Message::default(); EVENT_BATCH];
        let other_count = read(&second.pages.descriptor, &mut others);
        for message in &others[..other_count] {
            self.apply(second, message, true, &mut begun);
        }
        drop(changing);
        begun.finish();
        count
    }

    fn apply(&self, second: &Second, message: &Message, inline: bool, begun: &mut Begun<'_>) {
        let ranges = &second.ranges;
        let own_parts = |range: AddrRange| {
            let whole = (!ranges.is_complete()).then_some(range);
            let parts = ranges.parts(range).filter(move |part| part.1 == inline);
            let parts = parts.map(|part| part.0).filter(move |_| whole.is_none());
            whole.into_iter().chain(parts)
        };
        match map_event(message).filter(|event| !self.is_own_drop(event)) {
            Some(MapEvent::Unmap(range)) => {
                own_parts(range).for_each(|part| begun.begin(MapEvent::Unmap(part)));
                if inline {
                    ranges.remove(range);
                }
            }
            Some(MapEvent::Remove(range)) => {
                own_parts(range).for_each(|part| begun.begin(MapEvent::Remove(part)));
            }
            Some(event @ MapEvent::Remap { from, to }) => {
                begun.begin(event);
                if inline {
                    ranges.follow(from, moved_to(from, to));
                }
            }
            None => {}
        }
    }
}

fn moved_to(from: AddrRange, to: VirtAddr) -> AddrRange {
    AddrRange::from_bounds(to.get(), to.get() + from.len())
}
