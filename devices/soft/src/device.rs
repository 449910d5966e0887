//! The device as its user sees it.

use crate::config::{Policy, SoftConfig};
use crate::counters::SoftCounters;
use crate::fault::never;
use crate::jobs::{Job, Queue, closed};
use crate::kernel::Kernel;
use crate::migrate::Driver;
use crate::state::State;
use crate::stays::Stays;
use hmm_core::sync::Mutex;
use hmm_core::{
    AddrRange, Devmem, DevmemOps, Error, Mm, Notifier, NotifierOps, PAGE_SIZE, Result, USER_END,
    VirtAddr,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long `close` lets jobs end by themselves, and how long it then waits for them to be stopped.
const DRAIN: Duration = Duration::from_secs(10);

/// A software accelerator on one address space.
///
/// All methods may be called from any thread, but from no callback of the library. None holds a lock while it waits
/// for memory.
pub struct SoftDevice {
    driver: Arc<Driver>,
    queue: Arc<Queue>,
    open: Mutex<Open>,
}

/// What is still to be taken down.
struct Open {
    threads: Vec<JoinHandle<()>>,
    notifier: Option<Arc<Notifier>>,
    devmem: Option<Arc<Devmem>>,
    pinned: Option<AddrRange>,
}

impl SoftDevice {
    /// Makes a device for an address space: registers its memory and a mirror of all user addresses, and starts its
    /// threads.
    ///
    /// # Errors
    /// `Invalid` for a bad configuration; `NoMemory` when memory, tables or threads cannot be had; `Gone` when the mm
    /// is closed.
    pub fn new(mm: &Arc<Mm>, config: SoftConfig) -> Result<Arc<Self>> {
        config.validate()?;
        let state = Arc::new(State::new(&config)?);
        let ops: Arc<dyn DevmemOps> = Arc::clone(&state) as _;
        let devmem = Devmem::add(ops, state.owner, config.pages())?;
        let driver = Arc::new(Driver::new(Arc::clone(mm), state, Arc::clone(&devmem)));
        let open = Open { threads: Vec::new(), notifier: None, devmem: Some(devmem), pinned: None };
        let device = Arc::new(Self { driver, queue: Arc::default(), open: Mutex::new(open) });
        // On an error the device is dropped, which takes down what is there.
        device.start(config.threads)?;
        Ok(device)
    }

    fn start(&self, threads: u32) -> Result<()> {
        let mut open = self.open.lock();
        let Driver { mm, state, .. } = &*self.driver;
        // The callbacks need it: on the heap of a program without an allocator of its own, it could migrate.
        let start = VirtAddr::from_ptr(Arc::as_ptr(state)).get();
        let home = AddrRange::covering(start, size_of::<State>() as u64)?;
        mm.pin_range(home)?;
        open.pinned = Some(home);
        let everything = AddrRange::new(PAGE_SIZE as u64, USER_END)?;
        let ops: Arc<dyn NotifierOps> = Arc::clone(state) as _;
        open.notifier = Some(mm.notifier_insert(everything, ops)?);
        for number in 0..threads {
            let (queue, driver) = (Arc::clone(&self.queue), Arc::clone(&self.driver));
            let thread = std::thread::Builder::new()
                .name(format!("hmm-soft/{number}"))
                .spawn(move || queue.work(&driver))
                .map_err(|_| Error::NoMemory { what: "a device thread" })?;
            open.threads.push(thread);
        }
        Ok(())
    }

    /// Moves the pages of a range into device memory, from system memory or from other devices. Returns how many
    /// moved: pages that cannot migrate stay, holes between mappings are skipped, and a full device takes what fits.
    ///
    /// # Errors
    /// `Unsupported` with [`Policy::Never`]; `Fault` when nothing of the range is mapped; `Gone` after close; the
    /// core's error when nothing moved because of it.
    pub fn migrate(&self, range: AddrRange) -> Result<usize> {
        self.check_open()?;
        if self.driver.state.settings.policy() == Policy::Never {
            return Err(never());
        }
        self.driver.migrate(range, &mut Stays::default())
    }

    /// As [`SoftDevice::migrate`], and says why the others did not move. Pages that were on a device already are in
    /// neither number.
    ///
    /// # Errors
    /// As [`SoftDevice::migrate`].
    pub fn migrate_explained(&self, range: AddrRange) -> Result<(usize, Stays)> {
        self.check_open()?;
        if self.driver.state.settings.policy() == Policy::Never {
            return Err(never());
        }
        let mut stays = Stays::default();
        let moved = self.driver.migrate(range, &mut stays)?;
        Ok((moved, stays))
    }

    /// Moves this device's pages of a range back into system memory. Returns how many moved.
    ///
    /// # Errors
    /// `Fault` when nothing of the range is mapped; `Gone` after close; the core's error when nothing moved because
    /// of it.
    pub fn bring_home(&self, range: AddrRange) -> Result<usize> {
        self.check_open()?;
        self.driver.bring_home(range)
    }

    /// Queues a kernel. Layout changes that the process made before the call are applied before it starts.
    ///
    /// # Errors
    /// `Invalid` for bad arguments (nothing was queued); `Unsupported` for an atomic operation with
    /// [`Policy::Never`]; `Busy` when the queue is full; `Gone` after close.
    pub fn submit(&self, kernel: Kernel) -> Result<Job> {
        kernel.validate()?;
        let atomic = matches!(kernel, Kernel::AtomicAddU64 { .. });
        if atomic && self.driver.state.settings.policy() == Policy::Never {
            return Err(never());
        }
        self.check_open()?;
        self.driver.mm.sync();
        self.queue.submit(kernel, &self.driver)
    }

    /// Queues a kernel and waits for its result, for as long as the device's jobs get further.
    ///
    /// # Errors
    /// Those of [`Self::submit`] and of the kernel; `Busy` when the device is stuck.
    pub fn run(&self, kernel: Kernel) -> Result<u64> {
        self.submit(kernel)?.wait_while_it_moves()
    }

    /// What the device has counted so far.
    pub fn counters(&self) -> SoftCounters {
        self.driver.state.stats.snapshot()
    }

    /// Changes the added time of each batch and device fault.
    pub fn set_latency(&self, latency: Duration) {
        self.driver.state.settings.set_latency(latency);
    }

    /// Changes the bytes per second of the copy engine; 0 means no limit.
    pub fn set_bandwidth(&self, bandwidth: u64) {
        self.driver.state.settings.set_bandwidth(bandwidth);
    }

    /// Changes when pages move, from the next device fault on. Pages stay where they are.
    pub fn set_policy(&self, policy: Policy) {
        self.driver.state.settings.set_policy(policy);
    }

    /// Takes the device down: refuses new jobs, lets those that wait end (for 10 s, then they are stopped), brings all
    /// pages home, and removes the mirror and the device memory. Idempotent; after an error it may be called again. Does
    /// nothing in a forked child: the device is the parent's.
    ///
    /// # Errors
    /// `Busy` when a job does not end, or pages do not come home.
    pub fn close(&self) -> Result<()> {
        if self.driver.mm.is_inherited() {
            // The threads are the parent's, and locks may be held by them for ever.
            return Ok(());
        }
        let mut open = self.open.lock();
        self.queue.close();
        self.stop_jobs()?;
        for thread in open.threads.drain(..) {
            // The queue is closed and empty: the thread is about to end, or has ended.
            let _ = thread.join();
        }
        // First in large batches; `remove` then brings what is left.
        self.driver.make_room(self.driver.state.memory.pages());
        if let Some(notifier) = &open.notifier {
            unless_gone(notifier.remove())?;
            open.notifier = None;
        }
        if let Some(devmem) = &open.devmem {
            unless_gone(devmem.remove())?;
            open.devmem = None;
        }
        if let Some(pinned) = open.pinned.take() {
            unless_gone(self.driver.mm.unpin_range(pinned))?;
        }
        Ok(())
    }

    fn stop_jobs(&self) -> Result<()> {
        if self.queue.drain(DRAIN) {
            return Ok(());
        }
        self.driver.state.stopping.store(true, Ordering::Release);
        if self.queue.drain(DRAIN) {
            return Ok(());
        }
        Err(Error::Busy { address: VirtAddr::new(0), what: "a job of the device does not end" })
    }

    fn check_open(&self) -> Result<()> {
        if self.driver.mm.is_inherited() {
            return Err(Error::Gone { what: "this device belongs to the parent process" });
        }
        if self.queue.is_closed() { Err(closed()) } else { Ok(()) }
    }
}

/// After the mm was closed there is nothing left to take down.
fn unless_gone(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::Gone { .. }) => Ok(()),
        other => other,
    }
}

impl Drop for SoftDevice {
    /// Closes the device. An error leaves it registered, with its pages: nothing is lost.
    fn drop(&mut self) {
        let _ = self.close();
    }
}

impl fmt::Debug for SoftDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftDevice")
            .field("devmem", &self.driver.devmem)
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}
