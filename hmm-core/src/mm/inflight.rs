//! Migrations in flight: where each page of them is now, so that a layout change can redirect or drop it.
//!
//! A migration holds pages by the `LOCKED` bit of their entries. If the process unmaps or moves such a page meanwhile,
//! the event changes the page's slot here (with the layout lock held for writing), and the migration finds out when it
//! commits (with the layout lock held for reading).

use crate::addr::{AddrRange, VirtAddr};
use crate::arena::{Buffer, Shared};
use crate::limits::MIGRATIONS;
use crate::sync::{Condvar, Mutex};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The pages of one migration batch.
pub(crate) struct Flight {
    /// The addresses as the migration was asked for them.
    pub(crate) range: AddrRange,
    /// The calling thread.
    pub(crate) thread: usize,
    /// Its kernel id.
    thread_id: u32,
    /// What the calling thread needs while it holds pages: no migration takes these.
    pub(crate) keep: [Option<AddrRange>; 3],
    pages: Buffer<PageInFlight>,
    /// Some page is no longer where it was: look at all of them.
    moved: AtomicBool,
}

/// One page of a migration.
struct PageInFlight {
    /// Where it is mapped now; 0: the migration does not hold it (any more).
    address: AtomicU64,
    /// The populated frame that waits for its contents, when it comes home from a device; else 0.
    frame: AtomicU64,
}

impl Flight {
    pub(crate) fn new(
        range: AddrRange,
        thread: usize,
        keep: [Option<AddrRange>; 3],
    ) -> Option<Shared<Self>> {
        let pages = Buffer::new(range.pages(), |_| PageInFlight {
            address: AtomicU64::new(0),
            frame: AtomicU64::new(0),
        })?;
        let thread_id = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        Shared::new(Self { range, thread, thread_id, keep, pages, moved: AtomicBool::new(false) })
    }

    /// Where page `index` is now, if the migration still holds it.
    pub(crate) fn address(&self, index: usize) -> Option<VirtAddr> {
        match self.pages[index].address.load(Ordering::Acquire) {
            0 => None,
            address => Some(VirtAddr::new(address)),
        }
    }

    /// Whether page `index` is held, and still where the migration was asked for it.
    pub(crate) fn is_in_place(&self, index: usize) -> bool {
        self.address(index) == Some(self.range.page_at(index))
    }

    pub(crate) fn hold(&self, index: usize) {
        self.pages[index].address.store(self.range.page_at(index).get(), Ordering::Release);
    }

    pub(crate) fn let_go(&self, index: usize) {
        self.pages[index].address.store(0, Ordering::Release);
    }

    pub(crate) fn set_frame(&self, index: usize, frame: VirtAddr) {
        self.pages[index].frame.store(frame.get(), Ordering::Release);
    }

    /// The frame for a page that comes home.
    pub(crate) fn frame(&self, index: usize) -> Option<VirtAddr> {
        match self.pages[index].frame.load(Ordering::Acquire) {
            0 => None,
            frame => Some(VirtAddr::new(frame)),
        }
    }

    fn redirect(&self, from: AddrRange, to: Option<VirtAddr>) {
        if !self.moved.load(Ordering::Acquire) && !self.range.overlaps(from) {
            return;
        }
        for page in self.pages.iter() {
            let address = VirtAddr::new(page.address.load(Ordering::Acquire));
            if address.get() != 0 && from.contains(address) {
                let offset = address.get() - from.start().get();
                page.address.store(to.map_or(0, |to| to.get() + offset), Ordering::Release);
                self.moved.store(true, Ordering::Release);
            }
        }
    }
}

/// All migrations of one mm.
pub(crate) struct InFlight {
    flights: Mutex<[Option<Shared<Flight>>; MIGRATIONS]>,
    landed: Condvar,
}

impl InFlight {
    pub(crate) fn new() -> Self {
        Self { flights: Mutex::new([const { None }; MIGRATIONS]), landed: Condvar::new() }
    }

    /// Registers a migration; waits for a place at most so long. False when none came free.
    pub(crate) fn add(&self, flight: &Shared<Flight>, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut flights = self.flights.lock();
        loop {
            if let Some(place) = flights.iter().position(Option::is_none) {
                flights[place] = Some(flight.clone());
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            flights = self.landed.wait_for(flights, left);
        }
    }

    /// Reports what the callers of migrations under way need.
    pub(crate) fn each_kept(&self, mut report: impl FnMut(AddrRange)) {
        let flights = self.flights.lock();
        flights.iter().flatten().flat_map(|flight| flight.keep).flatten().for_each(&mut report);
    }

    /// Whether the page at an address is held by a migration of this thread: it waits for itself then.
    pub(crate) fn is_held_by(&self, thread_id: u32, address: VirtAddr) -> bool {
        let flights = self.flights.lock();
        let mut mine = flights.iter().flatten().filter(|flight| flight.thread_id == thread_id);
        mine.any(|flight| {
            flight.range.contains(address) && flight.is_in_place(flight.range.index_of(address))
        })
    }

    pub(crate) fn remove(&self, flight: &Shared<Flight>) {
        let mut flights = self.flights.lock();
        for place in flights.iter_mut() {
            if place.as_ref().is_some_and(|one| one.is_same(flight)) {
                *place = None;
            }
        }
        self.landed.notify_all();
    }

    /// Whether no migration is under way.
    pub(crate) fn is_empty(&self) -> bool {
        self.flights.lock().iter().all(Option::is_none)
    }

    /// The migrations of other threads that are under way now.
    pub(crate) fn of_others(&self, thread: usize) -> [Option<Shared<Flight>>; MIGRATIONS] {
        let flights = self.flights.lock();
        std::array::from_fn(|place| {
            flights[place].as_ref().filter(|one| one.thread != thread).cloned()
        })
    }

    /// Waits until none of some migrations is under way any more. False when the time is over before.
    pub(crate) fn wait_for(
        &self,
        some: &[Option<Shared<Flight>>; MIGRATIONS],
        time: Duration,
    ) -> bool {
        let deadline = Instant::now() + time;
        let mut flights = self.flights.lock();
        let is_wanted =
            |one: &Shared<Flight>| some.iter().flatten().any(|wanted| wanted.is_same(one));
        while flights.iter().flatten().any(is_wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            flights = self.landed.wait_for(flights, left);
        }
        true
    }

    /// Pages in `from` are gone (`to` is none) or are mapped from `to` on. Layout lock held for writing.
    pub(crate) fn redirect(&self, from: AddrRange, to: Option<VirtAddr>) {
        for flight in self.flights.lock().iter().flatten() {
            flight.redirect(from, to);
        }
    }

    /// Migrations that a thread has under way.
    pub(crate) fn count_of_thread(&self, thread: usize) -> usize {
        self.flights.lock().iter().flatten().filter(|one| one.thread == thread).count()
    }

    /// The flight that the calling thread has under way and that covers an address.
    pub(crate) fn of_thread(&self, thread: usize, address: VirtAddr) -> Option<Shared<Flight>> {
        let flights = self.flights.lock();
        let mut mine = flights.iter().flatten().filter(|one| one.thread == thread);
        mine.find(|one| one.range.contains(address)).cloned()
    }
}

impl fmt::Debug for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flight({:?})", self.range)
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InFlight")
    }
}
