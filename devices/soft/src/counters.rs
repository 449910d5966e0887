//! What the device counts.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a device has counted since it was made (a snapshot; the numbers are read one after another).
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct SoftCounters { $($(#[$doc])* pub $name: u64,)* }

        #[derive(Debug, Default)]
        pub(crate) struct Stats { $(pub(crate) $name: AtomicU64,)* }

        impl Stats {
            pub(crate) fn snapshot(&self) -> SoftCounters {
                SoftCounters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Device page faults: a kernel met a page without a usable entry in the device's page table.
    device_faults,
    /// CPU faults on device pages that the driver was called for.
    cpu_faults,
    /// Pages that moved into device memory.
    pages_to_device,
    /// Pages that moved back into system memory (those evicted are among them).
    pages_to_system,
    /// Pages that moved back to make room for others.
    evictions,
    /// Invalidation callbacks received.
    invalidations,
    /// Times that a range changed while a device fault looked at it, or a page went away before it was used.
    retries,
    /// Jobs that ended, well or not.
    jobs,
}

pub(crate) fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}
