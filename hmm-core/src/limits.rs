//! Every bound and default in one place.

use crate::addr::LEAF_PAGES;
use std::time::Duration;

/// Leaves (2 MiB each) that one pair of migration callbacks covers; longer requests are cut into such batches.
pub const BATCH_LEAVES: usize = 16;
/// Pages in one batch.
pub const BATCH_PAGES: usize = BATCH_LEAVES * LEAF_PAGES;
/// Migrations in flight at once in one mm; a further one waits for a place.
pub const MIGRATIONS: usize = 64;
/// Staging blocks (2 MiB of address space each) of one mm.
pub const FRAME_BLOCKS: usize = 512;
/// Blocks that keep their memory between migrations (64 MiB); what is above is freed at once.
pub const IDLE_BLOCKS: usize = 32;
/// Blocks that keep their memory when nothing migrates for half a second (4 MiB).
pub const RESTING_BLOCKS: usize = 2;
/// Notifiers and tracked ranges of one mm.
pub const NOTIFIERS: usize = 4096;
/// Pinned ranges of one mm.
pub const PINS: usize = 4096;
/// Pieces of memory that one mm answers inline beside a blocking userfaultfd (`Mm::inline_range`).
pub const INLINE_RANGES: usize = 4096;
/// Layout changes that may be unfinished at once.
pub const MAP_TICKETS: usize = 256;
/// Changes of the layout that the program announces at once; a further one waits for a place.
pub const CHANGES: usize = 64;
/// Pages that devices have exclusively at once, process-wide.
pub const EXCLUSIVE_PAGES: usize = 1 << 16;
/// Events read from the kernel at once.
pub const EVENT_BATCH: usize = 8;
/// Memory groups, process-wide, the root group included.
pub const MEMORY_GROUPS: usize = 256;
/// Devices with memory of their own, process-wide.
pub const DEVICES: usize = 64;
/// log2 of the pages in one device's pfn window (256 GiB).
pub const DEVICE_WINDOW_SHIFT: u32 = 26;
/// How long any call waits for something that should happen soon (`HMM_RANGE_DEFAULT_TIMEOUT` is 1 s).
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How long a range fault retries (`HMM_RANGE_DEFAULT_TIMEOUT`).
pub const RANGE_DEADLINE: Duration = Duration::from_secs(1);
/// `MADV_DONTNEED` reports before it drops; present pages of such a range are not migrated for this long.
pub const REMOVE_GRACE: Duration = Duration::from_millis(50);
/// A drop that was reported longer ago is over, even if changes are still awaited.
pub const REMOVE_MEMORY: Duration = Duration::from_secs(5);
/// Recently removed ranges that are remembered.
pub const REMOVED_RANGES: usize = 64;
/// Runs of at least so many pages are given back by moving frames, shorter ones by copying.
pub const MOVE_MINIMUM: usize = 64;
/// A service thread that is busy for longer is reported.
pub const STUCK: Duration = Duration::from_secs(5);
