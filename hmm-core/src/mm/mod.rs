//! One address space: the engine, the page table, the notifiers, the frames, and the counters.

mod access;
pub(crate) mod changes;
mod charges;
mod coherent;
mod faults;
mod fork_gate;
mod fork_mode;
pub(crate) mod frames;
pub(crate) mod inflight;
mod inline;
mod layout;
pub(crate) mod page_table;
mod pins;
mod rss;
pub(crate) mod vma;

pub use access::Residency;
pub(crate) use fork_gate::next_generation;
pub use fork_mode::ForkMode;
pub use vma::{MmapLock, Vma};

use crate::account::GroupRef;
use crate::addr::{AddrRange, PAGE_SIZE, USER_END, VirtAddr};
use crate::arena::{self, Shared};
use crate::engine::{Engine, FaultSink};
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::DEADLINE;
use crate::notifier::{Notifiers, Subscription};
use crate::ops::{InvalidateEvent, Invalidation, NotifierOps};
use crate::stats::{Counters, Stats};
use crate::sync::{Mutex, MutexGuard, this_thread};
use changes::Changes;
use fork_gate::ForkGate;
use frames::Frames;
use inflight::InFlight;
use layout::{RecentlyRemoved, Tickets};
use page_table::PageTable;
use pins::Pins;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Every open mm, for device removal.
static OPEN: Mutex<Vec<Weak<Mm>>> = Mutex::new(Vec::new());

/// The mm of this process.
static CURRENT: Mutex<Option<Arc<Mm>>> = Mutex::new(None);

/// An address space under heterogeneous memory management (`struct mm_struct` with its `struct hmm`).
///
/// Shared by reference; every method may be called from any thread, except where it says otherwise.
pub struct Mm {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) table: PageTable,
    pub(crate) notifiers: Notifiers,
    pub(crate) frames: Frames,
    pub(crate) inflight: InFlight,
    pub(crate) pins: Pins,
    pub(crate) tickets: Tickets,
    pub(crate) removed: RecentlyRemoved,
    pub(crate) changes: Changes,
    /// Changes of the layout are announced.
    ordered: AtomicBool,
    pub(crate) stats: Stats,
    /// Where pages that leave are charged.
    group: Mutex<GroupRef>,
    lock: MmapLock,
    closing: AtomicBool,
    closed: AtomicBool,
    /// Serialises `close`.
    close_lock: Mutex<()>,
    gate: ForkGate,
    generation: u32,
    /// The touch that [`FaultSink::on_fault`] took last for one that waits for itself.
    doubted: AtomicU64,
    me: Weak<Mm>,
}

impl Mm {
    /// Opens an address space on an engine. Most programs call [`Mm::current`].
    ///
    /// # Errors
    /// What the engine says when it cannot start; `NoMemory`.
    pub fn with_engine(engine: Arc<dyn Engine>) -> Result<Arc<Self>> {
        let frames = Frames::new(&*engine)?;
        let no_memory = || Error::NoMemory { what: "lists of the mm" };
        let table = PageTable::new().ok_or_else(no_memory)?;
        let notifiers = Notifiers::new().ok_or_else(no_memory)?;
        let pins = Pins::new().ok_or_else(no_memory)?;
        let mm = Arc::new_cyclic(|me| Self {
            engine,
            table,
            notifiers,
            frames,
            inflight: InFlight::new(),
            pins,
            tickets: Tickets::new(),
            removed: RecentlyRemoved::new(),
            changes: Changes::new(),
            ordered: AtomicBool::new(false),
            stats: Stats::default(),
            group: Mutex::new(GroupRef::root()),
            lock: MmapLock::default(),
            closing: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            close_lock: Mutex::new(()),
            gate: ForkGate::default(),
            generation: fork_gate::generation(),
            doubted: AtomicU64::new(0),
            me: Weak::clone(me),
        });
        // In a Rust program both lie in the ordinary heap, and must not migrate.
        if !arena::keep_object(&mm) || !arena::keep_object(&mm.engine) {
            return Err(Error::NoMemory { what: "places for objects of the library (512)" });
        }
        mm.pins.insert(mm.frames.area())?;
        arena::own_segments(&mut |segment| _ = mm.pins.insert(segment));
        let sink: Arc<dyn FaultSink> = Arc::clone(&mm) as Arc<dyn FaultSink>;
        // What was started before the failure is stopped again, and lets go of the mm.
        mm.engine.start(sink).inspect_err(|_| mm.engine.stop())?;
        let mut open = OPEN.lock();
        open.retain(|one| one.strong_count() > 0);
        open.push(Arc::downgrade(&mm));
        Ok(mm)
    }

    pub(crate) fn all_open() -> Vec<Arc<Self>> {
        OPEN.lock().iter().filter_map(Weak::upgrade).filter(|mm| mm.check_open().is_ok()).collect()
    }

    /// The place of this process's mm.
    pub(crate) fn lock_current() -> MutexGuard<'static, Option<Arc<Self>>> {
        CURRENT.lock()
    }

    /// The list of open mms, held across a fork.
    pub(crate) fn lock_list() -> MutexGuard<'static, Vec<Weak<Self>>> {
        OPEN.lock()
    }

    pub(crate) fn arc(&self) -> Option<Arc<Self>> {
        self.me.upgrade()
    }

    /// `Gone` once the mm is closed.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.is_inherited() {
            return Err(Error::Gone { what: "this mm belongs to the parent process" });
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Gone { what: "this mm was closed" });
        }
        Ok(())
    }

    /// Whether a fork lies between the opening and this process: the mm and its threads are the parent's, and calls on it
    /// say `Gone`. Takes no lock.
    pub fn is_inherited(&self) -> bool {
        self.generation != fork_gate::generation()
    }

    /// `Gone` as soon as closing began: nothing new may leave for a device.
    pub(crate) fn check_not_closing(&self) -> Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(Error::Gone { what: "this mm is being closed" });
        }
        self.check_open()
    }

    /// Whether the calling thread must not wait for pages: it answers faults, or is inside a driver's callback.
    pub(crate) fn is_in_callback(&self) -> bool {
        self.engine.is_service_thread()
            || self.notifiers.in_callback()
            || self.inflight.count_of_thread(this_thread()) > 0
    }

    /// The engine's name, for people: `"uffd"`, `"model"`.
    pub fn engine_name(&self) -> &'static str {
        self.engine.name()
    }

    /// What the engine can do, and whether the program announces changes of its layout.
    pub fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.engine.capabilities();
        capabilities.set(Capabilities::ORDERED, self.is_ordered());
        capabilities
    }

    pub(crate) fn is_ordered(&self) -> bool {
        self.ordered.load(Ordering::Acquire)
    }

    /// From now on the program announces changes of its layout.
    pub(crate) fn set_ordered(&self) {
        self.engine.announces();
        self.ordered.store(true, Ordering::Release);
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        self.stats.snapshot()
    }

    /// The lock of the address space.
    pub fn mmap_lock(&self) -> &MmapLock {
        &self.lock
    }

    /// The first vma that ends above `addr` (`find_vma`). It may begin above `addr`.
    ///
    /// # Errors
    /// `Invalid` above the user address space; what the engine says.
    pub fn find_vma(&self, addr: VirtAddr) -> Result<Option<Vma>> {
        self.check_open()?;
        if addr.get() >= USER_END {
            return Err(Error::invalid(addr.get(), "above the user address space"));
        }
        vma::find(&*self.engine, addr)
    }

    /// The vma that holds a whole range.
    ///
    /// # Errors
    /// `Fault` when nothing is mapped at its start, `Invalid` when it reaches beyond the vma.
    pub fn vma_covering(&self, range: AddrRange) -> Result<Vma> {
        self.check_open()?;
        vma::covering(&*self.engine, range)
    }

    /// Returns once every layout change made by a call that returned before (munmap, mremap, madvise, of any thread
    /// that the caller synchronised with) is applied, and its callbacks are done. Not for callbacks.
    pub fn sync(&self) {
        drop(self.engine.layout().hold());
        if let Ok(everything) = AddrRange::new(0, USER_END) {
            self.engine.refresh(everything);
        }
        if !self.notifiers.in_callback() && !self.engine.is_service_thread() {
            self.tickets.settle();
        }
    }

    /// Subscribes to changes of a range (`mmu_interval_notifier_insert`).
    ///
    /// # Errors
    /// `NoMemory` when there are too many; `Gone`.
    pub fn notifier_insert(
        self: &Arc<Self>,
        range: AddrRange,
        ops: Arc<dyn NotifierOps>,
    ) -> Result<Arc<Notifier>> {
        self.check_not_closing()?;
        // What was changed by calls that returned is not this subscription's business any more.
        self.sync();
        let subscription = self.notifiers.insert(range, Some(ops))?;
        Ok(Arc::new(Notifier { mm: Arc::clone(self), subscription }))
    }

    /// Follows a range for one populate loop: a notifier without a callback.
    ///
    /// # Errors
    /// `NoMemory` when there are too many; `Gone`.
    pub fn track(self: &Arc<Self>, range: AddrRange) -> Result<RangeTracker> {
        self.check_open()?;
        self.sync();
        let subscription = self.notifiers.insert(range, None)?;
        Ok(RangeTracker { mm: Arc::clone(self), subscription })
    }

    /// Ends the management of this address space: `release` of every notifier, all pages home, service threads
    /// stopped. Calls after it say `Gone`. Idempotent.
    ///
    /// # Errors
    /// `Deadlock` from a callback or service thread; `Lost` or `Busy` when a device does not give its pages back: the
    /// mm then stays open, and nothing is lost.
    pub fn close(&self) -> Result<()> {
        if self.engine.is_service_thread() || self.notifiers.in_callback() {
            return Err(Error::Deadlock {
                what: "an mm cannot be closed from one of its callbacks",
            });
        }
        if self.is_inherited() {
            return Ok(());
        }
        let _one = self.close_lock.lock();
        if self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let first = !self.closing.swap(true, Ordering::AcqRel);
        if first {
            let range = AddrRange::new(0, USER_END)?;
            let event = InvalidateEvent::Release;
            let _all = self.notifiers.invalidate(Invalidation { range, event, owner: None });
            self.notifiers.release();
        }
        self.empty_all_devices()?;
        self.closed.store(true, Ordering::Release);
        self.engine.stop();
        self.drop_charges();
        OPEN.lock().retain(|one| !Weak::ptr_eq(one, &self.me));
        Ok(())
    }

    /// Migrations that began before `closing` was set may still land: look until none is under way.
    fn empty_all_devices(&self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.bring_all_home(None)?;
            if self.inflight.is_empty() {
                // What landed before the look is found by one more pass.
                return self.bring_all_home(None).map(|_| ());
            }
            if Instant::now() >= deadline {
                let address = VirtAddr::new(0);
                return Err(Error::Busy { address, what: "a migration does not end" });
            }
            crate::sync::sleep(Duration::from_millis(1));
        }
    }

    /// Keeps a range from ever migrating; its device pages come home first, and it is made present. Counted.
    ///
    /// Pin what a driver's callbacks touch: a service thread that waits for a migrated page waits for itself.
    ///
    /// # Errors
    /// `NoMemory` when there are too many; what bringing home says. Pinning is about addresses: whether something is
    /// mapped there does not matter.
    pub fn pin_range(&self, range: AddrRange) -> Result<()> {
        self.check_open()?;
        self.pins.insert(range)?;
        self.bring_home(range).inspect_err(|_| _ = self.pins.remove(range))?;
        // A first touch may be a fault that service threads answer, too, when a neighbour in the same vma migrates.
        if self.engine.populate(range, true).is_err() {
            let _ = self.engine.populate(range, false);
        }
        Ok(())
    }

    /// Keeps a range present for system calls, on engines where the kernel cannot wait for an absent page: brings it
    /// home, makes it present as an access would, and keeps it from migrating until the guard is dropped.
    ///
    /// # Errors
    /// `Fault` where nothing is mapped, `Permission` when the mapping forbids the access; as [`Mm::pin_range`].
    pub fn guard(self: &Arc<Self>, range: AddrRange, write: bool) -> Result<PresentGuard> {
        self.check_open()?;
        self.pins.insert(range)?;
        let guard = PresentGuard { mm: Arc::clone(self), range };
        self.make_present(range, write)?;
        Ok(guard)
    }

    /// Undoes one [`Mm::pin_range`] of exactly this range.
    ///
    /// # Errors
    /// `Invalid` when it is not pinned.
    pub fn unpin_range(&self, range: AddrRange) -> Result<()> {
        self.pins.remove(range)
    }

    /// The address range `len` bytes around the calling thread's stack pointer that must not be taken from it.
    pub(crate) fn own_stack(&self, near: AddrRange) -> Option<AddrRange> {
        const BELOW: u64 = 256 << 10;
        const ABOVE: u64 = 64 << 20;
        let marker = 0_u8;
        let here = VirtAddr::from_ptr(&raw const marker).page().get();
        let around =
            AddrRange::new(here.saturating_sub(BELOW), (here + ABOVE).min(USER_END)).ok()?;
        if !around.overlaps(near) {
            return None;
        }
        let mapping = self.engine.mapping_at(VirtAddr::new(here)).ok()??;
        let end = mapping.range.end().get().max(here + PAGE_SIZE as u64);
        AddrRange::new(here.saturating_sub(BELOW), end).ok()
    }
}

impl Drop for Mm {
    fn drop(&mut self) {
        arena::forget_object(self);
        arena::forget_object(&*self.engine);
        if !self.is_inherited() {
            self.engine.stop();
            self.drop_charges();
        }
    }
}

impl fmt::Debug for Mm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mm({}, {:?})", self.engine.name(), self.counters())
    }
}

/// Pages that stay present as long as it lives ([`Mm::guard`]).
#[derive(Debug)]
#[must_use = "the pages may leave again as soon as the guard is dropped"]
pub struct PresentGuard {
    mm: Arc<Mm>,
    range: AddrRange,
}

impl PresentGuard {
    /// What it keeps.
    pub fn range(&self) -> AddrRange {
        self.range
    }
}

impl Drop for PresentGuard {
    fn drop(&mut self) {
        // It was inserted when the guard was made. In a forked child its list may be locked for ever, and means nothing.
        if !self.mm.is_inherited() {
            let _ = self.mm.pins.remove(self.range);
        }
    }
}

/// A subscription with callbacks (`struct mmu_interval_notifier`). Stays in force until removed.
#[derive(Debug)]
pub struct Notifier {
    mm: Arc<Mm>,
    subscription: Shared<Subscription>,
}

impl Notifier {
    /// The sequence number; sleeps while an invalidation of the range is in progress.
    ///
    /// # Errors
    /// `Busy` when that takes longer than the deadline, `Deadlock` from a callback.
    pub fn read_begin(&self) -> Result<u64> {
        self.mm.notifiers.read_begin(&self.subscription)
    }
    /// The sequence number now, even while an invalidation of the range is in progress: the number of that one.
    pub fn sequence(&self) -> u64 {
        self.subscription.sequence()
    }
    /// Whether the range was invalidated since `sequence` was read. Asked under the driver's own lock.
    pub fn read_retry(&self, sequence: u64) -> bool {
        self.subscription.changed_since(sequence)
    }
    /// Ends it. No callback runs afterwards.
    ///
    /// # Errors
    /// `Deadlock` from inside a callback of this mm; `Busy` when a callback does not return.
    pub fn remove(&self) -> Result<()> {
        self.mm.notifiers.remove(&self.subscription)
    }
    /// What it covers.
    pub fn range(&self) -> AddrRange {
        self.subscription.range()
    }
}

/// Tells whether a range changed since a look at it (`struct hmm_range` while it is active). Ends when dropped.
#[derive(Debug)]
pub struct RangeTracker {
    mm: Arc<Mm>,
    subscription: Shared<Subscription>,
}

impl RangeTracker {
    /// The sequence number; sleeps while an invalidation of the range is in progress.
    ///
    /// # Errors
    /// `Busy` when that takes longer than the deadline, `Deadlock` from a callback.
    pub fn begin(&self) -> Result<u64> {
        self.mm.notifiers.read_begin(&self.subscription)
    }
    /// Whether the range was invalidated since `sequence` was read. Asked under the driver's own lock.
    pub fn changed(&self, sequence: u64) -> bool {
        self.subscription.changed_since(sequence)
    }
    /// What was invalidated since the tracker was made, as one covering range.
    pub fn invalidated(&self) -> Option<AddrRange> {
        self.subscription.invalidated()
    }
    /// What it covers.
    pub fn range(&self) -> AddrRange {
        self.subscription.range()
    }
    /// The address space.
    pub fn mm(&self) -> &Arc<Mm> {
        &self.mm
    }
}

impl Drop for RangeTracker {
    fn drop(&mut self) {
        self.mm.notifiers.forget(&self.subscription);
    }
}
