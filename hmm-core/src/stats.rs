//! Counters of one mm: plain atomics, read as one struct.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What an mm has counted since it was opened (a snapshot).
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)* }

        #[derive(Debug, Default)]
        pub(crate) struct Stats { $(pub(crate) $name: AtomicU64,)* }

        impl Stats {
            pub(crate) fn snapshot(&self) -> Counters {
                Counters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// CPU faults that service threads answered.
    cpu_faults,
    /// Of these: touches of pages that are on a device.
    device_faults,
    /// Of these: first touches of holes in a range whose absence is watched.
    zero_faults,
    /// Of these: touches of a page that a migration held; it woke them.
    parked_faults,
    /// Pages that left for a device.
    migrated_to_device,
    /// Pages that came home.
    migrated_to_system,
    /// Pages that a migration was asked for and left where they were.
    not_migrated,
    /// Pages of devices now (anonymous, like every page that can migrate).
    device_pages,
    /// Invalidations of mirrored ranges.
    invalidations,
    /// Layout events (munmap, mremap, madvise) applied.
    map_events,
    /// Times that an operation waited for layout events and tried again.
    retries,
    /// Device pages that were dropped with their range (munmap, madvise).
    device_pages_dropped,
    /// Pages whose device lost the data: SIGBUS at the touch.
    poisoned,
    /// Faults raised by the library's own threads: a driver's callback touched memory that migrates.
    self_faults,
}

impl Stats {
    pub(crate) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(crate) fn subtract(counter: &AtomicU64, count: usize) {
        counter.fetch_sub(count as u64, Ordering::Relaxed);
    }
}
