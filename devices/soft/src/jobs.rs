//! The job queue and the device threads.

use crate::counters::add;
use crate::kernel::Kernel;
use crate::migrate::Driver;
use hmm_core::sync::{Condvar, Mutex};
use hmm_core::{Error, Result, VirtAddr};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Jobs that may wait at once.
const QUEUE_LENGTH: usize = 4096;
/// How long an idle device thread sleeps before it looks again.
const IDLE: Duration = Duration::from_secs(1);
/// A device none of whose jobs gets further for so long is stuck: every single access has a shorter deadline.
const STALL: Duration = Duration::from_secs(30);

/// Jobs that wait, and how many run.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    inner: Mutex<Inner>,
    /// There is a job, or the queue was closed.
    ready: Condvar,
    /// A job ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<(Kernel, Arc<Slot>)>,
    running: usize,
    closed: bool,
}

/// Where a job's result is put.
#[derive(Debug, Default)]
struct Slot {
    result: Mutex<Option<Result<u64>>>,
    done: Condvar,
}

/// A submitted kernel. Dropping it does not cancel it.
pub struct Job {
    slot: Arc<Slot>,
    driver: Arc<Driver>,
}

impl Queue {
    /// # Errors
    /// `Gone` when closed, `Busy` when too many jobs wait.
    pub(crate) fn submit(&self, kernel: Kernel, driver: &Arc<Driver>) -> Result<Job> {
        let slot = Arc::new(Slot::default());
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(closed());
        }
        if inner.waiting.len() >= QUEUE_LENGTH {
            let address = VirtAddr::new(0);
            return Err(Error::Busy { address, what: "the device's queue is full; wait for jobs" });
        }
        inner.waiting.push_back((kernel, Arc::clone(&slot)));
        drop(inner);
        self.ready.notify_all();
        Ok(Job { slot, driver: Arc::clone(driver) })
    }

    /// The life of a device thread. Ends when the queue is closed and empty.
    pub(crate) fn work(&self, driver: &Driver) {
        while let Some((kernel, slot)) = self.next() {
            let result = driver.execute(&kernel);
            add(&driver.state.stats.jobs, 1);
            *slot.result.lock() = Some(result);
            slot.done.notify_all();
            self.inner.lock().running -= 1;
            self.ended.notify_all();
        }
    }

    fn next(&self) -> Option<(Kernel, Arc<Slot>)> {
        let mut inner = self.inner.lock();
        loop {
            if let Some(job) = inner.waiting.pop_front() {
                inner.running += 1;
                return Some(job);
            }
            if inner.closed {
                return None;
            }
            inner = self.ready.wait_for(inner, IDLE);
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    /// Accepts no more jobs.
    pub(crate) fn close(&self) {
        self.inner.lock().closed = true;
        self.ready.notify_all();
    }

    /// Waits until no job waits or runs; false when that takes longer than `time`.
    pub(crate) fn drain(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut inner = self.inner.lock();
        while inner.running > 0 || !inner.waiting.is_empty() {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            inner = self.ended.wait_for(inner, rest);
        }
        true
    }
}

impl Job {
    /// Waits for the result: what the [`Kernel`]'s documentation says, an `f64` as its bits.
    ///
    /// # Errors
    /// The kernel's error; `Busy` when it has not ended in `time` (it goes on).
    pub fn wait(self, time: Duration) -> Result<u64> {
        let deadline = Instant::now().checked_add(time);
        self.wait_while(|| deadline.is_none_or(|deadline| Instant::now() < deadline), time)
    }

    /// Waits for as long as the device gets further.
    pub(crate) fn wait_while_it_moves(self) -> Result<u64> {
        let mut seen = (self.driver.progress.load(Ordering::Relaxed), Instant::now());
        let driver = Arc::clone(&self.driver);
        let moves = move || {
            let progress = driver.progress.load(Ordering::Relaxed);
            if progress != seen.0 {
                seen = (progress, Instant::now());
            }
            seen.1.elapsed() < STALL
        };
        self.wait_while(moves, IDLE)
    }

    fn wait_while(self, mut patient: impl FnMut() -> bool, slice: Duration) -> Result<u64> {
        let mut result = self.slot.result.lock();
        loop {
            if let Some(result) = result.take() {
                return result;
            }
            if !patient() {
                let address = VirtAddr::new(0);
                return Err(Error::Busy { address, what: "the job has not ended yet" });
            }
            result = self.slot.done.wait_for(result, slice.min(IDLE));
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job(result: {:?})", self.slot.result.lock())
    }
}

pub(crate) fn closed() -> Error {
    Error::Gone { what: "the device is closed" }
}
