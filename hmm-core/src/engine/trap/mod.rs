//! Faults as signals: the thread that touches a page that is away answers for itself, in a handler of SIGSEGV (pages
//! made inaccessible) or SIGBUS (missing pages of a userfaultfd with `UFFD_FEATURE_SIGBUS`).
//!
//! Both signals are synchronous: they come from an access, never from between two instructions of the library, whose own
//! memory is never away. So the handler may take the library's locks. What it must not use is what the program may hold
//! at an access: the heap, and locks of drivers. A device says whether its `fault` keeps to that
//! ([`crate::DevmemOps::is_signal_safe`]); for others, a service thread answers while the toucher sleeps.

mod actions;
mod chain;
mod context;
pub(super) mod copy;
mod handler;
mod handover;
mod parking;
mod stacks;

pub(super) use actions::Signal;
pub(super) use handler::Access;

use super::{FaultEvent, FaultSink, Resolution, say, threads};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard, RwLock, this_thread};
use handler::Verdict;
use handover::Handover;
use parking::Parking;
use stacks::Stacks;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Service threads of one trap.
const THREADS: usize = 4;
/// A fault that needs layout changes to be read first is tried again so often before the toucher faults anew.
const TRIES: usize = 64;

/// Whose a fault is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// The engine made the page inaccessible.
    Mine,
    /// The page became accessible meanwhile: try again.
    Settled,
    /// The program's own affair.
    Stranger,
}

/// The engine behind a trap.
pub(super) trait Owner: Send + Sync {
    /// Whose an access is. Runs in the handler.
    fn claim(&self, access: &Access) -> Claim;
    /// As [`super::Engine::drain`].
    fn drain(&self);
}

/// How far a fault came on the library's own stack.
enum Served {
    /// All is done.
    Here(Verdict),
    /// The toucher sleeps until the page is released.
    Asleep,
    /// A service thread answers.
    Elsewhere(FaultEvent),
}

/// A handler's view of one engine, and the service threads behind it.
pub(super) struct Trap {
    signals: &'static [Signal],
    process: u32,
    owner: NonNull<dyn Owner>,
    sink: RwLock<Option<Arc<dyn FaultSink>>>,
    parking: Parking,
    handover: Handover,
    stacks: Stacks,
    threads: Mutex<Vec<JoinHandle<()>>>,
    handles: [AtomicUsize; THREADS],
    ids: [AtomicU32; THREADS],
    /// Address of a handed-over fault that nobody took, when the watch looked last.
    stuck: AtomicU64,
}

// SAFETY: the owner is `Sync`, and outlives the trap (`Trap::new`).
unsafe impl Send for Trap {}
// SAFETY: as above.
unsafe impl Sync for Trap {}

impl std::fmt::Debug for Trap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Trap({:?})", self.signals)
    }
}

impl Trap {
    /// A trap that is not set yet.
    ///
    /// # Safety
    /// The owner stays where it is until [`Trap::stop`] returned.
    ///
    /// # Errors
    /// `NoMemory`.
    pub(super) unsafe fn new(
        owner: NonNull<dyn Owner>,
        signals: &'static [Signal],
    ) -> Result<Shared<Self>> {
        signals.iter().try_for_each(|signal| actions::check(*signal))?;
        let trap = Self {
            signals,
            process: std::process::id(),
            owner,
            sink: RwLock::new(None),
            parking: Parking::new(),
            handover: Handover::new(),
            stacks: Stacks::new()?,
            threads: Mutex::new(Vec::new()),
            handles: [const { AtomicUsize::new(0) }; THREADS],
            ids: [const { AtomicU32::new(0) }; THREADS],
            stuck: AtomicU64::new(0),
        };
        Shared::new(trap).ok_or(Error::NoMemory { what: "the signal handler's state" })
    }

    /// Puts the handler first and starts the service threads.
    ///
    /// # Errors
    /// When the program ignores a signal that is needed; when threads cannot be started.
    pub(super) fn start(this: &Shared<Self>, sink: &Arc<dyn FaultSink>) -> Result<()> {
        sink.on_own_memory(this.stacks.area());
        *this.sink.write() = Some(Arc::clone(sink));
        // SAFETY: the trap lies in the arena; `stop` removes it, and whoever holds a trap stops it before letting go.
        unsafe { handler::insert(NonNull::from(&**this), this.signals)? };
        let mut threads = this.threads.lock();
        for number in 0..threads::usable_cpus().len().clamp(2, THREADS) {
            let shared = this.clone();
            let spawned = std::thread::Builder::new()
                .name(format!("hmm-signal/{number}"))
                .stack_size(threads::STACK)
                .spawn(move || shared.serve(number));
            threads.push(spawned.map_err(threads::cannot_start)?);
        }
        Ok(())
    }

    /// All pages are home; nobody faults any more.
    pub(super) fn stop(&self) {
        handler::remove(NonNull::from(self));
        self.handover.close();
        for thread in self.threads.lock().drain(..) {
            // A panic on it has ended the process already.
            let _ = thread.join();
        }
        *self.sink.write() = None;
    }

    /// Puts the handler first again if somebody replaced it.
    ///
    /// # Errors
    /// `Unsupported` when that does not last, or when the calling thread blocks a signal that it needs.
    pub(super) fn renew(&self) -> Result<()> {
        handler::renew(self.signals)
    }

    /// Now and then, from a thread that nobody waits for.
    pub(super) fn look_after(&self) {
        let _ = self.renew();
        self.stacks.trim();
        let waiting = self.handover.waiting().map_or(0, VirtAddr::get);
        if waiting != 0 && self.stuck.swap(waiting, Ordering::Relaxed) == waiting {
            say::line(format_args!(
                "libhmm: nobody answers the fault at {}: all service threads are in callbacks that do not return\n",
                VirtAddr::new(waiting)
            ));
        }
        self.stuck.store(waiting, Ordering::Relaxed);
    }

    /// Everyone who sleeps for a page of the range looks again.
    pub(super) fn wake(&self, range: AddrRange) {
        self.parking.wake(range);
    }

    /// Whether the calling thread is one of the service threads.
    pub(super) fn is_own_thread(&self) -> bool {
        let me = this_thread();
        self.handles.iter().any(|one| one.load(Ordering::Relaxed) == me)
    }

    fn owner(&self) -> &dyn Owner {
        // SAFETY: by the promise to `new`.
        unsafe { self.owner.as_ref() }
    }

    /// A fault, in the handler of the thread that raised it. Little happens on the stack on which the handler runs: a
    /// program's alternate stack may be small.
    fn on_access(&self, access: &Access) -> Verdict {
        if !self.signals.contains(&access.signal) || self.process != std::process::id() {
            return Verdict::Stranger;
        }
        let before = self.parking.before(access.addr);
        match self.stacks.run(&mut || self.serve_access(access)) {
            Some(Served::Asleep) => {
                self.parking.sleep(access.addr, &before);
                Verdict::TryAgain
            }
            Some(Served::Elsewhere(fault)) => match self.handover.ask(fault) {
                Resolution::Lost => Verdict::Lost,
                Resolution::Parked => {
                    self.parking.sleep(access.addr, &before);
                    Verdict::TryAgain
                }
                _ => Verdict::TryAgain,
            },
            Some(Served::Here(verdict)) => verdict,
            None => Verdict::Stranger,
        }
    }

    fn serve_access(&self, access: &Access) -> Served {
        let Some(sink) = self.sink.read().clone() else { return Served::Here(Verdict::Stranger) };
        match self.owner().claim(access) {
            Claim::Mine => {}
            Claim::Settled => return Served::Here(Verdict::TryAgain),
            Claim::Stranger => return Served::Here(Verdict::Stranger),
        }
        let thread = threads::id();
        let from_service_thread = self.ids.iter().any(|id| id.load(Ordering::Relaxed) == thread);
        let fault = FaultEvent {
            addr: access.addr.page(),
            write: access.write,
            thread,
            from_service_thread,
            inline: true,
        };
        let elsewhere = Served::Elsewhere(FaultEvent { inline: false, ..fault });
        if from_service_thread {
            say::self_fault(fault.addr);
            return elsewhere;
        }
        match self.answer(&*sink, fault) {
            Resolution::HandOver => elsewhere,
            Resolution::Lost => Served::Here(Verdict::Lost),
            Resolution::Parked => Served::Asleep,
            Resolution::WaitsForItself => {
                say::own_batch(fault.addr);
                Served::Asleep
            }
            Resolution::Resolved | Resolution::Retry => Served::Here(Verdict::TryAgain),
        }
    }

    fn answer(&self, sink: &dyn FaultSink, fault: FaultEvent) -> Resolution {
        for _ in 0..TRIES {
            match sink.on_fault(fault) {
                Resolution::Retry => self.owner().drain(),
                resolution => return resolution,
            }
            std::thread::yield_now();
        }
        Resolution::Retry
    }

    fn serve(&self, number: usize) {
        // If this thread disappeared, faults that were handed over would hang: a panic ends the process.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let sink = self.sink.read().clone();
            let id = threads::prepare(sink.as_deref());
            self.handles[number].store(this_thread(), Ordering::Relaxed);
            self.ids[number].store(id, Ordering::Release);
            while let (Some(sink), Some(task)) = (&sink, self.handover.take()) {
                let resolution = self.answer(&**sink, task.fault);
                self.handover.answer(&task, resolution);
            }
        }));
        if ended.is_err() {
            std::process::abort();
        }
    }
}

/// The handler's process-wide state, held across a fork.
pub(crate) struct HandlersHeld([MutexGuard<'static, ()>; 2]);

impl std::fmt::Debug for HandlersHeld {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HandlersHeld({})", self.0.len())
    }
}

impl HandlersHeld {
    /// No child inherits it taken.
    pub(crate) fn take() -> Self {
        Self(actions::lock_for_fork())
    }

    /// In the child: the parent's engines answer nothing here, and wait for nobody.
    pub(crate) fn disown(&self) {
        handler::forget_after_fork();
        chain::forget_after_fork();
    }
}

/// How long a thread of an engine pauses between two looks.
pub(super) const PAUSE: Duration = Duration::from_millis(500);

/// What the program asks `sigaction` for, by way of libhmm_preload.so: 0 when ours stays first and the program's was put
/// behind it, 1 when the signal is none of ours.
///
/// # Safety
/// As for `sigaction`: each pointer is null or valid.
pub(crate) unsafe extern "C" fn program_action(
    signal: i32,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> i32 {
    match Signal::of_number(signal) {
        // SAFETY: by the caller's promise.
        Some(signal) if unsafe { actions::program_asks(signal, new, old) } => 0,
        _ => 1,
    }
}
