//! Keeps pages at home while the process forks.

use super::Mm;
use crate::error::{Error, Result};
use crate::limits::DEADLINE;
use crate::sync::{Condvar, Mutex, this_thread};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

/// How many forks lie between the first process of the family and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Number of the process in its family: an mm of another generation belongs to an ancestor.
pub(super) fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

/// This process is a child that was forked a moment ago.
pub(crate) fn next_generation() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Closed while a fork is under way: nothing leaves for a device.
#[derive(Debug, Default)]
pub(super) struct ForkGate {
    closed: Mutex<bool>,
    opened: Condvar,
    /// A fork was seen: private pages may be shared with a child until they are written.
    has_forked: AtomicBool,
}

impl Mm {
    /// Whether nothing may leave for a device now.
    pub(crate) fn is_forking(&self) -> bool {
        *self.gate.closed.lock()
    }

    /// Whether private pages may be shared with a parent or a child, and become this process's own by a write alone.
    pub(crate) fn may_share_pages(&self) -> bool {
        self.generation > 0 || self.gate.has_forked.load(Ordering::Acquire)
    }

    /// Waits until no fork is under way. A service thread, and a migration inside another one's callback, must not
    /// wait: they are refused.
    pub(crate) fn pass_fork_gate(&self) -> Result<()> {
        let mut closed = self.gate.closed.lock();
        let deadline = Instant::now() + DEADLINE;
        while *closed {
            let left = deadline.saturating_duration_since(Instant::now());
            let nested = self.inflight.count_of_thread(this_thread()) > 0;
            if left.is_zero() || nested || self.engine.is_service_thread() {
                let address = crate::addr::VirtAddr::new(0);
                return Err(Error::Busy { address, what: "the process forks" });
            }
            closed = self.gate.opened.wait_for(closed, left);
        }
        Ok(())
    }

    /// Every page comes home, and stays until the gate is opened again. A device that does not give its pages back is
    /// reported by the touch in the parent as ever; the child has the same hole.
    pub(crate) fn close_gate_for_fork(&self) {
        if self.engine.is_service_thread() || self.notifiers.in_callback() {
            return;
        }
        *self.gate.closed.lock() = true;
        self.gate.has_forked.store(true, Ordering::Release);
        let _ = self.empty_all_devices();
    }

    pub(crate) fn open_gate_after_fork(&self) {
        *self.gate.closed.lock() = false;
        self.gate.opened.notify_all();
    }
}
