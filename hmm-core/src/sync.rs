//! The only file that names `std::sync` locks. They do not allocate, and a panic does not poison them: a panic on a
//! service thread ends the process anyway.
//!
//! The feature `schedules` (of the package hmm-schedules, which builds this crate a second time for its tests) takes
//! shuttle's locks instead: shuttle then decides who runs next at each of them.

#[cfg(feature = "schedules")]
use shuttle::sync as primitives;
#[cfg(not(feature = "schedules"))]
use std::sync as primitives;

use primitives::{
    Condvar as StdCondvar, Mutex as StdMutex, PoisonError, RwLock as StdRwLock, TryLockError,
};
pub use primitives::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A mutex.
#[derive(Debug, Default)]
pub struct Mutex<T>(StdMutex<T>);

impl<T> Mutex<T> {
    /// A new, free one.
    pub const fn new(value: T) -> Self {
        Self(StdMutex::new(value))
    }
    /// Waits for it.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reader-writer lock that prefers writers.
#[derive(Debug, Default)]
pub struct RwLock<T>(StdRwLock<T>);

impl<T> RwLock<T> {
    /// A new, free one.
    pub const fn new(value: T) -> Self {
        Self(StdRwLock::new(value))
    }
    /// Waits for shared access.
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
    /// Exclusive access, if nobody has any now.
    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        match self.0.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
    /// Waits for exclusive access.
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A condition variable whose waiters are counted: to notify nobody costs no system call.
///
/// The state that is waited for must be changed under the mutex before `notify_all`, as always.
#[derive(Debug, Default)]
pub struct Condvar {
    inner: StdCondvar,
    waiters: AtomicU32,
}

impl Condvar {
    /// A new one.
    pub const fn new() -> Self {
        Self { inner: StdCondvar::new(), waiters: AtomicU32::new(0) }
    }
    /// Wakes everyone.
    pub fn notify_all(&self) {
        // Whoever waits counted itself under the mutex, before the state changed under it.
        if self.waiters.load(Ordering::SeqCst) > 0 {
            self.inner.notify_all();
        }
    }
    /// Sleeps until woken or until the time is over.
    pub fn wait_for<'a, T>(&self, guard: MutexGuard<'a, T>, time: Duration) -> MutexGuard<'a, T> {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let guard = self.inner.wait_timeout(guard, time).unwrap_or_else(PoisonError::into_inner).0;
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        guard
    }
}

/// Who the calling thread is: shuttle's tasks share one thread.
#[cfg(feature = "schedules")]
pub(crate) fn this_thread() -> usize {
    usize::from(shuttle::current::me()) + 1
}

/// Who the calling thread is, without thread-local storage: its pthread handle.
#[cfg(not(feature = "schedules"))]
pub(crate) fn this_thread() -> usize {
    // SAFETY: pthread_self has no preconditions.
    unsafe { libc::pthread_self() as usize }
}

/// Lets others go on.
pub(crate) fn yield_now() {
    #[cfg(feature = "schedules")]
    shuttle::thread::yield_now();
    #[cfg(not(feature = "schedules"))]
    std::thread::yield_now();
}

/// Sleeps. In a schedule no time passes: others go on, that is all.
pub(crate) fn sleep(time: Duration) {
    if cfg!(feature = "schedules") {
        yield_now();
    } else {
        std::thread::sleep(time);
    }
}
