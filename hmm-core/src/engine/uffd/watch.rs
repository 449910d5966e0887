//! What the watch says, on standard error and without allocation: it may speak while the heap is out of reach.

use crate::addr::VirtAddr;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// A callback that touches migrated memory does so again and again; a few lines are enough.
const REPORTS: u32 = 8;
static REPORTED: AtomicU32 = AtomicU32::new(0);

/// A clock that only moves forward, in milliseconds.
pub(super) fn milliseconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

fn say(line: std::fmt::Arguments<'_>) {
    if REPORTED.fetch_add(1, Ordering::Relaxed) >= REPORTS {
        return;
    }
    let mut buffer = [0_u8; 512];
    let mut rest = &mut buffer[..];
    let _ = rest.write_fmt(line);
    let unused = rest.len();
    let used = buffer.len() - unused;
    let _ = rustix::io::write(rustix::stdio::stderr(), &buffer[..used]);
}

/// A service thread waits for a page that only a service thread can bring.
pub(super) fn report_self_fault(address: VirtAddr) {
    say(format_args!(
        "libhmm: a driver callback on a service thread touched {address}, which is on a device: pin what callbacks \
         need (hmm_pin_range), or this can hang\n"
    ));
}

/// A thread in a migration's callbacks touched a page that this migration holds.
pub(super) fn report_own_batch(address: VirtAddr) {
    say(format_args!(
        "libhmm: a migration callback touched {address}, which its own migration holds, and hangs: read sources at \
         the address of their pfn (hmm_pfn_to_virt), not at that of the page\n"
    ));
}

/// A service thread does not come back.
pub(super) fn report_stuck(address: VirtAddr) {
    say(format_args!(
        "libhmm: the fault at {address} is being answered for more than 5 s: the fault callback of its device, or an \
         invalidation callback that it waits for, does not return\n"
    ));
}
