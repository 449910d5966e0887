//! Where threads sleep that touched a page held by a migration, until whoever holds it is done.

use crate::addr::{AddrRange, LEAF_SIZE, VirtAddr};
use crate::sync::{Condvar, Mutex};
use std::time::Duration;

const PLACES: usize = 64;
/// A sleeper looks again now and then: the page may have been released without a wake-up (by an unmap).
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Place {
    wakes: Mutex<u64>,
    woken: Condvar,
}

/// A few places to sleep at, shared by the leaves of the address space.
#[derive(Debug)]
pub(super) struct Parking([Place; PLACES]);

/// How often a place was woken before somebody looked at a page.
pub(super) struct Before(u64);

impl Parking {
    pub(super) fn new() -> Self {
        Self([const { Place { wakes: Mutex::new(0), woken: Condvar::new() } }; PLACES])
    }

    fn place(&self, addr: VirtAddr) -> &Place {
        &self.0[(addr.get() / LEAF_SIZE) as usize % PLACES]
    }

    /// Taken before a look at the page's state: a wake-up between the look and [`Parking::sleep`] is not missed.
    pub(super) fn before(&self, addr: VirtAddr) -> Before {
        Before(*self.place(addr).wakes.lock())
    }

    /// Sleeps until the page's place is woken.
    pub(super) fn sleep(&self, addr: VirtAddr, before: &Before) {
        let place = self.place(addr);
        let wakes = place.wakes.lock();
        if *wakes == before.0 {
            drop(place.woken.wait_for(wakes, LOOK_AGAIN));
        }
    }

    /// Wakes everyone who sleeps for a page of the range.
    pub(super) fn wake(&self, range: AddrRange) {
        let first = range.start().get() / LEAF_SIZE;
        let last = (range.end().get() - 1) / LEAF_SIZE;
        for leaf in first..=last.min(first + PLACES as u64 - 1) {
            let place = &self.0[leaf as usize % PLACES];
            *place.wakes.lock() += 1;
            place.woken.notify_all();
        }
    }
}
