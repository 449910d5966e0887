//! The counters of an address space.

use crate::mm::{self, mm_struct};
use crate::ret::IntoC;
use crate::sized::{self, Sized32};
use hmm_core::Counters;
use std::ffi::c_int;

/// What an address space has counted since it was opened.
///
/// Set size to sizeof(struct hmm_mm_counters) before the call; later versions may add members at
/// the end.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct hmm_mm_counters {
    /// In: sizeof(struct hmm_mm_counters).
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// CPU faults that service threads answered.
    pub cpu_faults: u64,
    /// Of these: touches of pages that were on a device.
    pub device_faults: u64,
    /// Of these: first touches of holes in a range whose absence is watched.
    pub zero_faults: u64,
    /// Of these: touches of a page that a migration held; they slept until it was done.
    pub parked_faults: u64,
    /// Pages that left for a device.
    pub migrated_to_device: u64,
    /// Pages that came home.
    pub migrated_to_system: u64,
    /// Pages that a migration was asked for and left where they were.
    pub not_migrated: u64,
    /// Pages that are on devices now.
    pub device_pages: u64,
    /// Invalidations of mirrored ranges.
    pub invalidations: u64,
    /// Layout changes of the process (munmap, mremap, madvise) that were applied.
    pub map_events: u64,
    /// Times that an operation waited for layout changes and tried again.
    pub retries: u64,
    /// Device pages that were dropped with their range (munmap, madvise).
    pub device_pages_dropped: u64,
    /// Pages whose device lost the data: SIGBUS at the touch.
    pub poisoned: u64,
    /// Faults raised by the library's own threads: a driver's callback touched memory that
    /// migrates.
    pub self_faults: u64,
}

// SAFETY: repr(C), u32 first, integers only, two u32 before the u64s leave no padding.
unsafe impl Sized32 for hmm_mm_counters {}

impl From<Counters> for hmm_mm_counters {
    fn from(from: Counters) -> Self {
        Self {
            size: 0,
            reserved: 0,
            cpu_faults: from.cpu_faults,
            device_faults: from.device_faults,
            zero_faults: from.zero_faults,
            parked_faults: from.parked_faults,
            migrated_to_device: from.migrated_to_device,
            migrated_to_system: from.migrated_to_system,
            not_migrated: from.not_migrated,
            device_pages: from.device_pages,
            invalidations: from.invalidations,
            map_events: from.map_events,
            retries: from.retries,
            device_pages_dropped: from.device_pages_dropped,
            poisoned: from.poisoned,
            self_faults: from.self_faults,
        }
    }
}

/// Reads the counters of an address space.
///
/// Device pages count in the process's size as before their migration (hmm.txt, section 7):
/// hmm_mm_rss() tells it.
///
/// @param mm        The address space.
/// @param counters  Its size member says how much the caller knows; the rest is filled in.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, counters is NULL or misaligned, or its size is below 4.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; hmm.txt section 7 for what counts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_counters(
    mm: *const mm_struct,
    counters: *mut hmm_mm_counters,
) -> c_int {
    let now = mm::get(mm).map(|mm| hmm_mm_counters::from(mm.core.counters()));
    // SAFETY: the caller promises a struct whose size member says how large it is.
    now.and_then(|now| unsafe { sized::write(counters, &now) }).into_c()
}
