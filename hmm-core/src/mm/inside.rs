//! The program's threads while they are inside the library.
//!
//! A thread that holds a lock of the library must not wait for a page: whoever brings pages may need that lock. Two
//! things could make it wait all the same: its own stack may have been migrated by another thread, and a signal handler
//! of the program may touch a migrated page in its middle. So a thread that enters makes its place known (migrations
//! leave that stretch of stack alone), has what was already taken of it brought back, and holds signals off. They stay off
//! in the callbacks of a migration: a handler that touched a page of the batch would wait for its own thread.

use super::Mm;
use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::limits::DEADLINE;
use crate::sync::this_thread;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicU64, Ordering};

/// Threads that may be inside at once; a further one goes without this protection.
const PLACES: usize = 256;
/// The stretch of a stack that code inside the library uses: below and above the point of entry.
const BELOW: u64 = 64 << 10;
const ABOVE: u64 = 12 << 10;
/// What lies above a thread's pthread handle, at the top of its stack.
const ABOVE_HANDLE: u64 = 2304;
/// Signals that a fault of the thread itself raises: held off, they would end the process.
const OWN_FAULTS: [libc::c_int; 5] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

/// The stretches of the threads inside: address and pages. 0: free.
#[derive(Debug)]
pub(super) struct Places([AtomicU64; PLACES]);

impl Default for Places {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; PLACES])
    }
}

/// The calling thread is inside; leaves when dropped.
pub(crate) struct Inside<'a> {
    place: Option<&'a AtomicU64>,
    /// The signals that were held off before; `None` on service threads, which hold all off anyway.
    before: Option<libc::sigset_t>,
}

impl Mm {
    /// Enters the library. No lock may be held.
    pub(crate) fn enter(&self) -> Inside<'_> {
        if self.engine.is_service_thread() {
            return Inside { place: None, before: None };
        }
        let before = hold_signals_off();
        let stack = stretch_of_this_thread();
        let place = self.take_place(stack);
        self.bring_stack_back(stack);
        Inside { place, before }
    }

    fn take_place(&self, stack: AddrRange) -> Option<&AtomicU64> {
        let places = &self.places.0;
        // Threads begin to look at different places; stacks are far apart.
        let first = (this_thread() >> 12) % PLACES;
        let order = places[first..].iter().chain(&places[..first]);
        order.into_iter().find(|place| {
            // The start is page aligned; the pages go into the low bits.
            let (free, mine) = (0, stack.start().get() | stack.pages() as u64);
            place.compare_exchange(free, mine, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    }

    /// Migrations that begin from here on leave the stretch alone. Waits for the others, and has what they took brought
    /// back; all that without a lock, since every line of it may fault.
    fn bring_stack_back(&self, stack: AddrRange) {
        if self.table.leaf(stack.start()).is_none() && self.table.leaf(stack.end()).is_none() {
            // Nothing near it was ever migrated.
            return;
        }
        self.inflight.wait_for_posted(stack, this_thread(), DEADLINE);
        if self.engine.populate(stack, false).is_err() {
            // The stretch reaches beyond the stack: page by page, as far as it goes.
            (0..stack.pages()).for_each(|page| _ = self.engine.populate(stack.sub(page, 1), false));
        }
    }

    /// Reports the stacks that must stay, because their threads are inside.
    pub(crate) fn each_stack_inside(&self, mut report: impl FnMut(AddrRange)) {
        for place in &self.places.0 {
            let place = place.load(Ordering::SeqCst);
            if place != 0 {
                let (start, pages) = (VirtAddr::new(place).page(), place & (PAGE_SIZE as u64 - 1));
                report(AddrRange::from_bounds(start.get(), start.get() + pages * PAGE_SIZE as u64));
            }
        }
    }
}

/// The stretch around the calling thread's point of entry. The handle of a thread lies at the top of its stack (of the
/// main thread: elsewhere): the stretch must not reach into what is mapped above.
fn stretch_of_this_thread() -> AddrRange {
    let marker = 0_u8;
    let page = VirtAddr::from_ptr(&raw const marker).page().get();
    let top = this_thread() as u64 + ABOVE_HANDLE;
    let end = page + ABOVE;
    let end = if page < top && top < end { top.next_multiple_of(PAGE_SIZE as u64) } else { end };
    AddrRange::from_bounds(page.saturating_sub(BELOW).max(PAGE_SIZE as u64), end)
}

impl Inside<'_> {
    /// Runs a callback of the program with the signals that its thread had. No lock may be held.
    pub(crate) fn outside<R>(&self, callback: impl FnOnce() -> R) -> R {
        let Some(before) = &self.before else { return callback() };
        /// Holds signals off again, be it after a panic.
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                let _ = hold_signals_off();
            }
        }
        set_signals(before);
        let _back = Back;
        callback()
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            place.store(0, Ordering::SeqCst);
        }
        if let Some(before) = &self.before {
            set_signals(before);
        }
    }
}

/// Holds every signal off that is not raised by the thread's own faults; returns what was held off before.
fn hold_signals_off() -> Option<libc::sigset_t> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    for signal in OWN_FAULTS {
        // SAFETY: the set is initialised, and the numbers are signals.
        unsafe { libc::sigdelset(all.as_mut_ptr(), signal) };
    }
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    let how = libc::SIG_SETMASK;
    // SAFETY: `all` is initialised, and there is room for the old set.
    let failed = unsafe { libc::pthread_sigmask(how, all.as_ptr(), before.as_mut_ptr()) };
    // SAFETY: a successful call has written the old set.
    (failed == 0).then(|| unsafe { before.assume_init() })
}

fn set_signals(set: &libc::sigset_t) {
    // SAFETY: the set is initialised, and a null old set is allowed.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, set, std::ptr::null_mut()) };
}
