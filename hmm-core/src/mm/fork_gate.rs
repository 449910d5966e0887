//! Keeps pages at home while the process forks.

use super::{ForkMode, Mm};
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
    /// A [`ForkMode`].
    mode: AtomicU32,
    /// The child could read zeros for data.
    has_holes: AtomicBool,
    /// A fork was seen: private pages may be shared with a child until they are written.
    has_forked: AtomicBool,
}

impl ForkGate {
    pub(super) fn mode(&self) -> ForkMode {
        ForkMode::from_number(self.mode.load(Ordering::Relaxed))
    }

    pub(super) fn set_mode(&self, mode: ForkMode) {
        self.mode.store(mode as u32, Ordering::Relaxed);
    }
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

    /// Nothing leaves until the gate is opened again. Everything comes home, if that is the mode. A callback that forks
    /// cannot wait for others: false then.
    pub(crate) fn close_gate_for_fork(&self) -> bool {
        *self.gate.closed.lock() = true;
        self.gate.has_forked.store(true, Ordering::Release);
        let may_wait = !self.engine.is_service_thread()
            && !self.notifiers.in_callback()
            && self.inflight.count_of_thread(this_thread()) == 0;
        if may_wait && self.gate.mode() == ForkMode::Home {
            let _ = self.empty_all_devices();
        } else {
            self.settle_for_fork(may_wait);
        }
        may_wait
    }

    /// What is still away is left out of the child; what cannot be left out comes home, if this thread may wait for that.
    pub(crate) fn leave_out_for_fork(&self, may_wait: bool) {
        let is_safe = self.leave_out_what_is_away(may_wait);
        self.gate.has_holes.store(!is_safe, Ordering::Relaxed);
    }

    /// In the child: whether it could read zeros for data that was away.
    pub(crate) fn child_has_holes(&self) -> bool {
        self.gate.has_holes.load(Ordering::Relaxed)
    }

    pub(crate) fn open_gate_after_fork(&self) {
        self.take_back_in();
        *self.gate.closed.lock() = false;
        self.gate.opened.notify_all();
    }
}
