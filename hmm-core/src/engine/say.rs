//! Lines on standard error, without allocation: from signal handlers, and while the heap is out of reach.

use crate::addr::VirtAddr;
use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// What goes wrong once does so again and again; a few lines are enough.
const LINES: u32 = 8;
static SAID: AtomicU32 = AtomicU32::new(0);

/// Writes a line, of at most 512 bytes.
pub(super) fn line(text: std::fmt::Arguments<'_>) {
    if SAID.fetch_add(1, Ordering::Relaxed) >= LINES {
        return;
    }
    let mut buffer = [0_u8; 512];
    let mut rest = &mut buffer[..];
    let _ = rest.write_fmt(text);
    let unused = rest.len();
    let used = buffer.len() - unused;
    let _ = rustix::io::write(rustix::stdio::stderr(), &buffer[..used]);
}

/// A service thread waits for a page that only a service thread can bring.
pub(super) fn self_fault(address: VirtAddr) {
    line(format_args!(
        "libhmm: a driver callback on a service thread touched {address}, which is on a device: pin what callbacks \
         need (hmm_pin_range), or this can hang\n"
    ));
}

/// A thread in a migration's callbacks touched a page that this migration holds.
pub(super) fn own_batch(address: VirtAddr) {
    line(format_args!(
        "libhmm: a migration callback touched {address}, which its own migration holds, and hangs: read sources at \
         the address of their pfn (hmm_pfn_to_virt), not at that of the page\n"
    ));
}

/// A service thread does not come back.
pub(super) fn stuck(address: VirtAddr) {
    line(format_args!(
        "libhmm: the fault at {address} is being answered for more than 5 s: the fault callback of its device, or an \
         invalidation callback that it waits for, does not return\n"
    ));
}
