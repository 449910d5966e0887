//! What a processor does: loads, stores and atomic adds, with faults that wait for an answer.

use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::engine::model::ModelEngine;
use crate::engine::model::pages::{Bytes, Slot};
use crate::engine::model::state::Touch;
use crate::engine::{Engine, FaultEvent, FaultSink, Resolution};
use crate::error::{Error, Result};
use crate::flags::Protection;
use crate::limits::DEADLINE;
use crate::sync::{self, this_thread};
use std::ops::Range;
use std::time::{Duration, Instant};

/// One page's part of an access: the page, where in it, and which bytes of the caller's buffer.
type Part = (VirtAddr, usize, Range<usize>);

impl ModelEngine {
    /// Loads bytes, page after page; the bytes of one page are loaded at one moment.
    ///
    /// # Errors
    /// [`Error::Fault`] where nothing is mapped, [`Error::Permission`] where the mapping forbids it (both SIGSEGV),
    /// [`Error::Lost`] on a poisoned page (SIGBUS), [`Error::Busy`] when nobody answered the fault in time.
    pub fn cpu_read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<()> {
        self.load(addr, out).1
    }

    /// Stores bytes, page after page; the bytes of one page are stored at one moment.
    ///
    /// # Errors
    /// As [`cpu_read`](Self::cpu_read).
    pub fn cpu_write(&self, addr: VirtAddr, data: &[u8]) -> Result<()> {
        self.store(addr, data).1
    }

    /// Adds to the `u64` at `addr` atomically; returns what was there.
    ///
    /// # Errors
    /// As [`cpu_read`](Self::cpu_read), and [`Error::Invalid`] when `addr` is not a multiple of 8.
    pub fn cpu_fetch_add(&self, addr: VirtAddr, value: u64) -> Result<u64> {
        if !addr.get().is_multiple_of(8) {
            return Err(Error::invalid(addr.get(), "atomics are naturally aligned"));
        }
        let at = addr.offset_in_page();
        self.access(addr.page(), true, |slot| {
            let word = slot.bytes_mut().and_then(|bytes| bytes[at..].first_chunk_mut())?;
            let before = u64::from_ne_bytes(*word);
            *word = before.wrapping_add(value).to_ne_bytes();
            Some(before)
        })
    }

    /// Loads as far as it goes: the bytes loaded, and why it stopped.
    pub(super) fn load(&self, addr: VirtAddr, out: &mut [u8]) -> (usize, Result<()>) {
        parts(addr, out.len(), |(page, at, part)| {
            let target = &mut out[part];
            self.access(page, false, |slot| copy_from(slot.bytes(), at, target))
        })
    }

    /// Stores as far as it goes: the bytes stored, and why it stopped.
    pub(super) fn store(&self, addr: VirtAddr, data: &[u8]) -> (usize, Result<()>) {
        parts(addr, data.len(), |(page, at, part)| {
            let source = &data[part];
            self.access(page, true, |slot| copy_to(slot.bytes_mut(), at, source))
        })
    }

    /// Makes one page present, as an access would.
    pub(super) fn fault_in(&self, page: VirtAddr, write: bool) -> Result<()> {
        self.access(page, write, |_| Some(()))
    }

    /// Performs `operation` on a page under the lock, as soon as the page can be accessed.
    fn access<R>(
        &self,
        page: VirtAddr,
        write: bool,
        mut operation: impl FnMut(&mut Slot) -> Option<R>,
    ) -> Result<R> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut state = self.state.lock();
            if state.touch(page, write)? == Touch::Present {
                let slot = state.pages.get_mut(&page.get());
                if let Some(done) = slot.and_then(&mut operation) {
                    return Ok(done);
                }
            } else if let Some(sink) = state.sink.clone() {
                let ticket = state.enqueue(page);
                let from_service_thread = state.serving.contains(&this_thread());
                drop(state);
                let event =
                    FaultEvent { addr: page, write, thread: 0, from_service_thread, inline: false };
                let answered = self.report(&*sink, event, ticket, deadline);
                self.state.lock().dequeue(ticket);
                answered?;
            }
            if Instant::now() >= deadline {
                return Err(timed_out(page));
            }
        }
    }

    /// Reports a fault and sleeps until the page is touched.
    fn report(
        &self,
        sink: &dyn FaultSink,
        event: FaultEvent,
        ticket: u64,
        deadline: Instant,
    ) -> Result<()> {
        while self.serve(|| sink.on_fault(event)) == Resolution::Retry {
            self.drain();
            if self.state.lock().is_woken(ticket) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(timed_out(event.addr));
            }
            sync::yield_now();
        }
        let mut state = self.state.lock();
        while !state.is_woken(ticket) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(timed_out(event.addr));
            }
            state = self.touched.wait_for(state, left);
        }
        Ok(())
    }

    /// Runs a call into the sink, during which this thread counts as a service thread.
    pub(super) fn serve<R>(&self, call: impl FnOnce() -> R) -> R {
        let thread = this_thread();
        self.state.lock().serving.push(thread);
        let result = call();
        let mut state = self.state.lock();
        if let Some(place) = state.serving.iter().rposition(|one| *one == thread) {
            state.serving.swap_remove(place);
        }
        result
    }
}

/// Cuts `length` bytes at `addr` at page boundaries and does part after part until one fails.
fn parts(
    addr: VirtAddr,
    length: usize,
    mut one: impl FnMut(Part) -> Result<()>,
) -> (usize, Result<()>) {
    let mut done = 0;
    while done < length {
        let Some(here) = addr.checked_add(done as u64) else {
            let what = "the access runs past the end of the address space";
            return (done, Err(Error::Fault { address: addr, what }));
        };
        let at = here.offset_in_page();
        let count = (PAGE_SIZE - at).min(length - done);
        if let Err(error) = one((here.page(), at, done..done + count)) {
            return (done, Err(error));
        }
        done += count;
    }
    (done, Ok(()))
}

/// Peeks and pokes: part after part on pages that are present, without any fault.
impl ModelEngine {
    pub(super) fn peek_present(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        let state = self.state.lock();
        parts(addr, out.len(), |(page, at, part)| {
            let slot = state.pages.get(&page.get());
            let loaded = slot.and_then(|slot| copy_from(slot.bytes(), at, &mut out[part]));
            loaded.ok_or_else(|| not_there(page))
        })
        .1
        .is_ok()
    }

    pub(super) fn poke_present(&self, addr: VirtAddr, data: &[u8]) -> bool {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        parts(addr, data.len(), |(page, at, part)| {
            let region = state.space.at(page).map(|(_, region)| region);
            let writable = region.is_some_and(|one| one.protection.contains(Protection::WRITE));
            let slot = state.pages.get_mut(&page.get()).filter(|_| writable);
            let stored = slot.and_then(|slot| copy_to(slot.bytes_mut(), at, &data[part]));
            stored.ok_or_else(|| not_there(page))
        })
        .1
        .is_ok()
    }

    /// Wakes whoever waits for a page of `range`.
    pub(super) fn wake_range(&self, range: AddrRange) {
        self.state.lock().wake(range);
        self.touched.notify_all();
    }
}

fn copy_from(bytes: Option<&Bytes>, at: usize, target: &mut [u8]) -> Option<()> {
    target.copy_from_slice(&bytes?[at..at + target.len()]);
    Some(())
}

fn copy_to(bytes: Option<&mut Bytes>, at: usize, source: &[u8]) -> Option<()> {
    bytes?[at..at + source.len()].copy_from_slice(source);
    Some(())
}

fn not_there(page: VirtAddr) -> Error {
    Error::Fault { address: page, what: "the page is not present" }
}

fn timed_out(page: VirtAddr) -> Error {
    Error::Busy { address: page, what: "the answer to a CPU fault" }
}
