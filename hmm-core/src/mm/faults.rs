//! The fault path: what happens when the CPU touches a page that is not there.
//!
//! Runs on the engine's service threads. A page held by a migration is left alone: whoever holds it wakes the toucher.
//! No allocation from the process's heap, no lock that user code can hold, no logging.

use super::Mm;
use super::changes::Still;
use super::page_table::Place;
use crate::addr::{AddrRange, LEAF_SIZE, Pfn, VirtAddr};
use crate::devmem::Devmem;
use crate::engine::{FaultEvent, FaultSink, MapEvent, MapTicket, Progress, Resolution, Stop};
use crate::error::{Error, Result};
use crate::flags::FaultFlags;
use crate::inject::{self, Point};
use crate::limits::DEADLINE;
use crate::mm::vma::Vma;
use crate::ops::{CpuFault, FaultError};
use crate::sync::this_thread;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl FaultSink for Mm {
    fn on_fault(&self, fault: FaultEvent) -> Resolution {
        self.stats.cpu_faults.fetch_add(1, Ordering::Relaxed);
        if fault.from_service_thread {
            self.stats.self_faults.fetch_add(1, Ordering::Relaxed);
        }
        match self.look(fault) {
            Look::Device(page) => {
                if fault.inline && !self.may_answer_inline(page) {
                    Devmem::find(page).into_iter().for_each(|devmem| devmem.put(page));
                    return Resolution::HandOver;
                }
                self.stats.device_faults.fetch_add(1, Ordering::Relaxed);
                self.serve_device_fault(fault, page)
            }
            Look::Parked => {
                self.stats.parked_faults.fetch_add(1, Ordering::Relaxed);
                if fault.thread != 0 && self.inflight.is_held_by(fault.thread, fault.addr) {
                    return self.doubt_own_batch(fault);
                }
                Resolution::Parked
            }
            Look::Answered(resolution) => resolution,
        }
    }

    fn on_map_event(&self, event: MapEvent) -> MapTicket {
        self.apply_map_event(event)
    }

    fn finish_map_event(&self, ticket: MapTicket) {
        self.complete_map_event(ticket);
    }

    fn on_idle(&self) {
        self.frames.trim(&*self.engine);
    }

    fn must_stay(&self, range: AddrRange) -> bool {
        let mut pinned = false;
        self.pins.within(range, |_| pinned = true);
        self.changes.within(range, Still::Stay, |_| pinned = true);
        pinned
    }

    fn on_own_memory(&self, range: AddrRange) {
        // A full pin table would leave this range unprotected; there is room for 4096.
        let _ = self.pins.insert(range);
    }
}

/// What a page needs to come home.
enum ToBring {
    /// The driver must bring it. A reference is held.
    OutOfReach(Pfn),
    /// It is mapped already.
    Coherent,
}

enum Look {
    /// The page is on a device; a reference is held.
    Device(Pfn),
    /// A migration holds it, or a change of the layout.
    Parked,
    /// Done under the leaf's lock.
    Answered(Resolution),
}

impl Mm {
    /// Decides from the *current* state of the page, never from the message. Zero fill happens under the leaf's lock,
    /// so that no migration can take the page in between.
    fn look(&self, fault: FaultEvent) -> Look {
        let layout = self.engine.layout().hold();
        let Some(leaf) = self.table.leaf_or_new(fault.addr) else {
            return Look::Answered(Resolution::Retry);
        };
        let entries = leaf.lock();
        let entry = entries[fault.addr.index_in_leaf()];
        if entry.is_locked() {
            return Look::Parked;
        }
        match entry.place() {
            Place::Device(_) if self.changes.rests(fault.addr) => Look::Parked,
            Place::Device(page) => {
                // The entry's own reference keeps the page alive while the lock is held.
                if Devmem::find(page).is_some_and(|devmem| devmem.get(page)) {
                    return Look::Device(page);
                }
                drop((entries, layout));
                self.lose(fault.addr, page);
                Look::Answered(Resolution::Resolved)
            }
            Place::Poisoned => {
                // Not woken here: where the engine sends the signal itself, the touch would get two.
                self.engine.poison(fault.addr);
                Look::Answered(Resolution::Lost)
            }
            Place::System | Place::Coherent(_) => {
                self.stats.zero_faults.fetch_add(1, Ordering::Relaxed);
                let count = leaf.fill_around(&entries, fault.addr.index_in_leaf());
                let end = fault.addr.plus_pages(count).get();
                let run = AddrRange::from_bounds(fault.addr.get(), end);
                let progress = self.engine.zero_run(run, fault.write);
                drop((entries, layout));
                Look::Answered(self.after_zero(fault, progress))
            }
        }
    }

    /// The page is held by a migration of the toucher's own. A message that was read late may tell of a touch which is long
    /// over: the toucher is woken once, and whoever really waits for itself touches again.
    fn doubt_own_batch(&self, fault: FaultEvent) -> Resolution {
        let touch = fault.addr.get() | u64::from(fault.thread) << 48 | 1;
        if !fault.inline && self.doubted.swap(touch, Ordering::Relaxed) != touch {
            self.engine.wake(AddrRange::page_of(fault.addr));
            return Resolution::Parked;
        }
        self.stats.self_faults.fetch_add(1, Ordering::Relaxed);
        Resolution::WaitsForItself
    }

    /// In a signal handler the driver is only called when it can stand it, and when this thread is not inside one of its
    /// callbacks.
    fn may_answer_inline(&self, page: Pfn) -> bool {
        Devmem::find(page).is_some_and(|devmem| devmem.ops().is_signal_safe())
            && !self.notifiers.in_callback()
            && self.inflight.count_of_thread(this_thread()) == 0
    }

    fn after_zero(&self, fault: FaultEvent, progress: Progress) -> Resolution {
        let addr = fault.addr;
        if progress.pages > 0 {
            return Resolution::Resolved;
        }
        match progress.stop {
            Stop::Done => Resolution::Resolved,
            Stop::Retry | Stop::NoMemory => Resolution::Retry,
            Stop::Exists | Stop::Busy | Stop::Refused => {
                // It is there already, or the mapping is gone: the access itself finds out.
                self.engine.wake(AddrRange::page_of(addr));
                Resolution::Resolved
            }
            Stop::WithLeaf if fault.inline => Resolution::HandOver,
            Stop::WithLeaf => self.bring_leaf_home(addr),
        }
    }

    /// The page is at home, and becomes accessible with the last one of its leaf.
    fn bring_leaf_home(&self, addr: VirtAddr) -> Resolution {
        let start = addr.leaf().get();
        match self.bring_home(AddrRange::from_bounds(start, start + LEAF_SIZE)) {
            // A page that was lost on the way does not keep the others away.
            // Shown by the touch that is made again, under the leaf's lock: by now the page may have left once more.
            Ok(_) | Err(Error::Lost { .. }) => Resolution::Resolved,
            Err(_) => Resolution::Retry,
        }
    }

    fn serve_device_fault(&self, fault: FaultEvent, page: Pfn) -> Resolution {
        let flags = if fault.write { FaultFlags::WRITE } else { FaultFlags::empty() };
        match self.call_fault(fault.addr, page, flags) {
            Ok(()) => {}
            Err(FaultError::SigBus) => {
                self.lose(fault.addr, page);
                return Resolution::Resolved;
            }
            Err(FaultError::OutOfMemory) => return Resolution::Retry,
        }
        match self.table.entry(fault.addr) {
            entry if entry.is_locked() => Resolution::Parked,
            entry if entry.place() == Place::Device(page) => Resolution::Retry,
            // The migration that brought it home landed after the toucher went to sleep, and woke it.
            _ => Resolution::Resolved,
        }
    }

    /// Calls the driver's `fault`; consumes the caller's reference on the page. No lock is held.
    fn call_fault(
        &self,
        addr: VirtAddr,
        page: Pfn,
        flags: FaultFlags,
    ) -> std::result::Result<(), FaultError> {
        let Some(devmem) = Devmem::find(page) else { return Err(FaultError::SigBus) };
        if inject::fails(Point::Fault).is_some() {
            devmem.put(page);
            return Err(FaultError::OutOfMemory);
        }
        let result = match (self.arc(), self.engine.mapping_at(addr)) {
            (Some(mm), Ok(Some(mapping))) if mapping.range.contains(addr) => {
                let vma = Vma::from_mapping(&*self.engine, &mapping);
                devmem.ops().fault(&devmem, &CpuFault { mm: &mm, vma, addr, page, flags })
            }
            // Unmapped meanwhile: the event drops the page. An engine without events has found out by this look.
            _ => {
                self.engine.drain();
                Ok(())
            }
        };
        devmem.put(page);
        result
    }

    /// The device lost the page: a touch gets SIGBUS from now on, never zeros. Does nothing when the page is elsewhere
    /// by now, or a migration holds it.
    fn lose(&self, addr: VirtAddr, page: Pfn) {
        let layout = self.engine.layout().hold();
        let Some(leaf) = self.table.leaf(addr) else { return };
        let mut entries = leaf.lock();
        let entry = &mut entries[addr.index_in_leaf()];
        if entry.is_locked() || entry.place() != Place::Device(page) {
            return;
        }
        let before = std::mem::replace(entry, super::page_table::Entry::POISON);
        if let Some(group) = before.group() {
            group.uncharge(true);
        }
        drop(entries);
        leaf.notify();
        self.stats.poisoned.fetch_add(1, Ordering::Relaxed);
        self.stats.device_pages.fetch_sub(1, Ordering::Relaxed);
        self.engine.poison(addr);
        drop(layout);
        if let Some(devmem) = Devmem::find(page) {
            devmem.put(page);
        }
        self.engine.wake(AddrRange::page_of(addr));
    }

    /// Brings the device pages of a range home, in the calling thread; waits for migrations that hold some of them.
    /// Returns how many were on a device.
    pub(crate) fn bring_home(&self, range: AddrRange) -> Result<usize> {
        self.bring_home_matching(range, &|_| true)
    }

    /// Every device page of this mm comes home (of one device's window, if one is named).
    pub(crate) fn bring_all_home(&self, only: Option<&Devmem>) -> Result<usize> {
        self.bring_pages_home(&|page| {
            only.is_none_or(|devmem| devmem.pfn_first() <= page && page < devmem.pfn_last())
        })
    }

    /// The device pages of this mm that are wanted come home.
    pub(crate) fn bring_pages_home(&self, wanted: &dyn Fn(Pfn) -> bool) -> Result<usize> {
        let everything = AddrRange::new(0, crate::addr::USER_END)?;
        self.bring_home_matching(everything, wanted)
    }

    /// A page that is lost keeps no other one away; the first of them is reported in the end.
    pub(super) fn bring_home_matching(
        &self,
        range: AddrRange,
        wanted: &dyn Fn(Pfn) -> bool,
    ) -> Result<usize> {
        // A driver brings neighbours too, so they are counted before the first call.
        let leaves = self.table.leaves(range);
        let count = leaves.map(|leaf| self.pages_on_device(leaf, range, wanted)).sum();
        let mut lost = None;
        for leaf in self.table.leaves(range) {
            for addr in super::layout::pages_of(leaf, range) {
                // For each page: a slow device that gets further is not stuck.
                let deadline = Instant::now() + DEADLINE;
                // `None`: the page is not (any more) on a device.
                while let Some(page) = self.page_to_bring(leaf, addr, wanted, deadline)? {
                    let asked = match page {
                        ToBring::OutOfReach(page) => {
                            self.call_fault(addr, page, FaultFlags::REMOTE).map_err(|e| (e, page))
                        }
                        ToBring::Coherent => {
                            self.take_back(leaf, range, wanted);
                            Ok(())
                        }
                    };
                    match asked {
                        Ok(()) => {}
                        Err((FaultError::SigBus, page)) => {
                            self.lose(addr, page);
                            lost = lost.or(Some(addr));
                        }
                        Err((FaultError::OutOfMemory, _)) => {
                            crate::sync::sleep(Duration::from_millis(1))
                        }
                    }
                    if Instant::now() >= deadline {
                        let what = "the device's fault callback does not bring the page home";
                        return Err(Error::Busy { address: addr, what });
                    }
                }
            }
        }
        if let Some(address) = lost {
            return Err(Error::Lost { address, what: "device cannot return it" });
        }
        Ok(count)
    }

    fn pages_on_device(
        &self,
        leaf: &super::page_table::Leaf,
        range: AddrRange,
        wanted: &dyn Fn(Pfn) -> bool,
    ) -> usize {
        let entries = leaf.lock();
        let is_there =
            |addr: &VirtAddr| entries[addr.index_in_leaf()].device_page().is_some_and(wanted);
        super::layout::pages_of(leaf, range).filter(is_there).count()
    }

    /// What to bring home from an address, with a reference to its page where the driver has to. Waits while a migration holds it.
    fn page_to_bring(
        &self,
        leaf: &super::page_table::Leaf,
        addr: VirtAddr,
        wanted: &dyn Fn(Pfn) -> bool,
        deadline: Instant,
    ) -> Result<Option<ToBring>> {
        let mut entries = leaf.lock();
        loop {
            let entry = entries[addr.index_in_leaf()];
            if !entry.is_locked() && !self.changes.rests(addr) {
                return Ok(match entry.place() {
                    Place::Device(page) => {
                        let referenced = || Devmem::find(page).is_some_and(|one| one.get(page));
                        (wanted(page) && referenced()).then_some(ToBring::OutOfReach(page))
                    }
                    Place::Coherent(page) => wanted(page).then_some(ToBring::Coherent),
                    Place::System | Place::Poisoned => None,
                });
            }
            if self.engine.is_service_thread() {
                let what = "a callback waits for a page that a migration holds";
                return Err(Error::Deadlock { what });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let what = "a migration holds the page for longer than the deadline";
                return Err(Error::Busy { address: addr, what });
            }
            entries = leaf.wait(entries, left);
        }
    }
}
