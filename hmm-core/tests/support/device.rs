//! A driver with device memory of its own, on the public API alone. It notes every breach of the rules it sees.

use super::memory::Bytes;
use hmm_core::sync::Mutex;
use hmm_core::{
    Access, AddrRange, CpuFault, Devmem, DevmemOps, Error, FaultError, InvalidateEvent,
    Invalidation, MigrateBatch, MigrateFlags, MigrateOps, MigratePfn, MigrateRequest, Mm, Notifier,
    NotifierOps, OwnerId, PAGE_SIZE, Pfn, PfnEntry, PfnFlags, RangeRequest, Select, VirtAddr,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a populate loop tries.
const PATIENCE: Duration = Duration::from_secs(5);

/// Something that happens while a migration is under way: after the copy, before its outcome is decided.
pub(crate) type Interruption = Box<dyn FnOnce() + Send>;

/// One entry of the device's page table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mirrored {
    pub(crate) page: Pfn,
    pub(crate) write: bool,
}

/// What the driver's callbacks use.
pub(crate) struct Driver {
    owner: OwnerId,
    first: OnceLock<Pfn>,
    /// `None`: free.
    memory: Mutex<Vec<Option<Box<Bytes>>>>,
    table: Mutex<BTreeMap<u64, Mirrored>>,
    /// Pages whose contents the device cannot return.
    lost: Mutex<BTreeSet<Pfn>>,
    /// CPU faults that are still to fail for want of memory.
    pub(crate) short_of_memory: AtomicUsize,
    breaches: Mutex<Vec<String>>,
    releases: AtomicUsize,
    freed: AtomicUsize,
    /// Pages that a CPU fault brings home at most.
    pub(crate) fault_around: AtomicUsize,
    pub(crate) interruption: Mutex<Option<Interruption>>,
    /// The same, but after the outcome was decided, and before the device's table follows.
    pub(crate) late_interruption: Mutex<Option<Interruption>>,
}

/// A device: its driver, its memory and its mirror of one range.
pub(crate) struct Device {
    pub(crate) driver: Arc<Driver>,
    devmem: Arc<Devmem>,
    notifier: Arc<Notifier>,
    mm: Arc<Mm>,
}

impl Driver {
    fn breach(&self, what: String) {
        self.breaches.lock().push(what);
    }

    /// Takes a free page and puts `bytes` into it.
    fn allocate(&self, bytes: &Bytes) -> Option<Pfn> {
        let mut memory = self.memory.lock();
        let index = memory.iter().position(Option::is_none)?;
        memory[index] = Some(Box::new(*bytes));
        Some(Pfn::new(self.first.get()?.get() + index as u64))
    }

    fn give_up(&self, page: Pfn) {
        if let Some(index) = self.index_of(page) {
            self.memory.lock()[index] = None;
        }
    }

    fn index_of(&self, page: Pfn) -> Option<usize> {
        usize::try_from(page.get().checked_sub(self.first.get()?.get())?).ok()
    }

    /// Does something with the bytes of a page in use.
    fn with_page<R>(&self, page: Pfn, work: impl FnOnce(&mut Bytes) -> R) -> Option<R> {
        let index = self.index_of(page)?;
        self.memory.lock().get_mut(index)?.as_deref_mut().map(work)
    }

    pub(crate) fn contents(&self, page: Pfn) -> Option<Box<Bytes>> {
        self.with_page(page, |bytes| Box::new(*bytes))
    }

    fn is_lost(&self, page: Pfn) -> bool {
        self.lost.lock().contains(&page)
    }

    fn forget(&self, range: AddrRange) {
        let mut table = self.table.lock();
        table.retain(|page, _| !range.contains(VirtAddr::new(*page)));
    }
}

/// Lets what waits there happen, once.
pub(crate) fn happen(slot: &Mutex<Option<Interruption>>) {
    let interruption = slot.lock().take();
    if let Some(happen) = interruption {
        happen();
    }
}

impl NotifierOps for Driver {
    fn invalidate(&self, update: &Invalidation) {
        self.forget(update.range);
        if update.event == InvalidateEvent::Release {
            self.releases.fetch_add(100, Ordering::Relaxed);
        }
    }
    fn release(&self) {
        self.releases.fetch_add(1, Ordering::Relaxed);
    }
}

impl DevmemOps for Driver {
    fn free(&self, _: &Devmem, page: Pfn) {
        self.freed.fetch_add(1, Ordering::Relaxed);
        self.lost.lock().remove(&page);
        let index = self.index_of(page);
        let mut memory = self.memory.lock();
        match index.and_then(|index| memory.get_mut(index)).map(Option::take) {
            Some(Some(_)) => {}
            Some(None) => self.breach(format!("{page:?} was freed while free")),
            None => self.breach(format!("{page:?} was freed, and is not of this device")),
        }
    }

    fn fault(&self, _: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        if self.contents(fault.page).is_none() {
            self.breach(format!("fault at {} on {:?}, which is free", fault.addr, fault.page));
        }
        let short = |count: usize| count.checked_sub(1);
        if self.short_of_memory.fetch_update(Ordering::Relaxed, Ordering::Relaxed, short).is_ok() {
            return Err(FaultError::OutOfMemory);
        }
        if self.is_lost(fault.page) {
            return Err(FaultError::SigBus);
        }
        let around = self.fault_around.load(Ordering::Relaxed).max(1) as u64;
        let end = fault.addr.get() + around * PAGE_SIZE as u64;
        let end = end.min(fault.vma.range.end().get());
        let range = AddrRange::new(fault.addr.get(), end).map_err(|_| FaultError::SigBus)?;
        let request = MigrateRequest {
            range,
            select: Select::DEVICE,
            owner: Some(self.owner),
            fault_page: Some(fault.page),
        };
        match migrate(fault.mm, &request, &mut ToSystem { driver: self, moved: 0 }) {
            Ok(()) | Err(Error::Fault { .. } | Error::Invalid { .. }) => Ok(()),
            Err(Error::NoMemory { .. } | Error::Busy { .. }) => Err(FaultError::OutOfMemory),
            Err(error) => {
                self.breach(format!("fault at {}: {error}", fault.addr));
                Err(FaultError::SigBus)
            }
        }
    }
}

fn migrate(mm: &Arc<Mm>, request: &MigrateRequest, ops: &mut dyn MigrateOps) -> Result<(), Error> {
    let mut src = vec![MigratePfn::default(); request.range.pages()];
    let mut dst = src.clone();
    mm.migrate(request, ops, &mut src, &mut dst)
}

/// Brings pages home.
struct ToSystem<'a> {
    driver: &'a Driver,
    moved: usize,
}

impl MigrateOps for ToSystem<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        for index in 0..batch.src.len() {
            let src = batch.src[index];
            let Some(page) = src.pfn().filter(|_| src.migrates()) else { continue };
            if self.driver.is_lost(page) {
                batch.dst[index] = MigratePfn::bare(MigrateFlags::ERROR);
                continue;
            }
            let Some(bytes) = self.driver.contents(page) else {
                self.driver.breach(format!("asked to bring {page:?} home, which is free"));
                continue;
            };
            let Some(frame) = batch.alloc_system_page(batch.range.page_at(index)) else { continue };
            write_frame(frame, &bytes);
            batch.dst[index] = MigratePfn::new(frame, MigrateFlags::LOCKED);
        }
        happen(&self.driver.interruption);
    }
    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        happen(&self.driver.late_interruption);
        self.moved += batch.src.iter().filter(|src| src.migrates()).count();
    }
}

/// Takes pages to a device, from the system or from other devices.
struct ToDevice<'a> {
    driver: &'a Driver,
    peers: &'a [Arc<Driver>],
    /// One candidate in so many is left where it is; 0: none.
    leave: usize,
    moved: usize,
    /// Pages that the library does not know of yet.
    allocated: Vec<Pfn>,
}

impl Drop for ToDevice<'_> {
    /// After a panic in `alloc_and_copy`: what was never handed over is still the driver's.
    fn drop(&mut self) {
        self.allocated.drain(..).for_each(|page| self.driver.give_up(page));
    }
}

impl ToDevice<'_> {
    fn source(&self, src: MigratePfn) -> Option<Box<Bytes>> {
        match src.pfn() {
            None => Some(Box::new([0; PAGE_SIZE])),
            Some(page) if page.is_device() => {
                let found = self.peers.iter().find_map(|peer| peer.contents(page));
                if found.is_none() {
                    self.driver.breach(format!("source {page:?} is free"));
                }
                found
            }
            Some(frame) => Some(read_frame(frame)),
        }
    }
}

impl MigrateOps for ToDevice<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        for index in 0..batch.src.len() {
            let src = batch.src[index];
            if !src.migrates() || (self.leave != 0 && index % self.leave == 0) {
                continue;
            }
            let Some(bytes) = self.source(src) else { continue };
            let Some(page) = self.driver.allocate(&bytes) else { break };
            self.allocated.push(page);
            batch.dst[index] = MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
        }
        happen(&self.driver.interruption);
    }

    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        self.allocated.clear();
        happen(&self.driver.late_interruption);
        let mut table = self.driver.table.lock();
        for (index, (src, dst)) in batch.src.iter().zip(&*batch.dst).enumerate() {
            let Some(page) = dst.pfn().filter(|_| src.migrates()) else { continue };
            self.moved += 1;
            let write = src.pfn().is_none() || src.flags().contains(MigrateFlags::WRITE);
            table.insert(batch.range.page_at(index).get(), Mirrored { page, write });
        }
    }
}

fn read_frame(frame: Pfn) -> Box<Bytes> {
    let mut bytes = Box::new([0; PAGE_SIZE]);
    let address = frame.to_addr().unwrap().as_ptr();
    // SAFETY: the core lends this frame, a whole page, for the length of the callback; nobody else touches it.
    unsafe { std::ptr::copy_nonoverlapping(address, bytes.as_mut_ptr(), PAGE_SIZE) };
    bytes
}

fn write_frame(frame: Pfn, bytes: &Bytes) {
    let address = frame.to_addr().unwrap().as_ptr();
    // SAFETY: as in `read_frame`; it was handed out as a destination.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address, PAGE_SIZE) };
}

impl Device {
    /// A device with `pages` pages of memory that mirrors `range`.
    pub(crate) fn new(mm: &Arc<Mm>, range: AddrRange, pages: usize) -> Result<Self, Error> {
        let owner = OwnerId::unique();
        let driver = Arc::new(Driver {
            owner,
            first: OnceLock::new(),
            memory: Mutex::new(vec![None; pages]),
            table: Mutex::default(),
            lost: Mutex::default(),
            short_of_memory: AtomicUsize::new(0),
            breaches: Mutex::default(),
            releases: AtomicUsize::new(0),
            freed: AtomicUsize::new(0),
            fault_around: AtomicUsize::new(1),
            interruption: Mutex::new(None),
            late_interruption: Mutex::new(None),
        });
        let devmem = Devmem::add(driver.clone(), owner, pages)?;
        driver.first.set(devmem.pfn_first()).unwrap();
        let notifier = mm.notifier_insert(range, driver.clone())?;
        Ok(Self { driver, devmem, notifier, mm: mm.clone() })
    }

    /// Who it is, to the library.
    pub(crate) fn owner(&self) -> OwnerId {
        self.driver.owner
    }

    /// Takes system pages of a range to this device. Returns how many moved.
    pub(crate) fn migrate(&self, range: AddrRange, leave: usize) -> Result<usize, Error> {
        self.pull(range, Select::SYSTEM, Some(self.owner()), &[], leave)
    }

    /// Takes the pages that another device has in a range to this one.
    pub(crate) fn pull_from(&self, other: &Device, range: AddrRange) -> Result<usize, Error> {
        let peers = [other.driver.clone()];
        self.pull(range, Select::DEVICE, Some(other.owner()), &peers, 0)
    }

    fn pull(
        &self,
        range: AddrRange,
        select: Select,
        owner: Option<OwnerId>,
        peers: &[Arc<Driver>],
        leave: usize,
    ) -> Result<usize, Error> {
        let request = MigrateRequest { range, select, owner, fault_page: None };
        let mut ops =
            ToDevice { driver: &self.driver, peers, leave, moved: 0, allocated: Vec::new() };
        migrate(&self.mm, &request, &mut ops)?;
        Ok(ops.moved)
    }

    /// Brings the pages that this device has in a range home.
    pub(crate) fn bring_home(&self, range: AddrRange) -> Result<usize, Error> {
        let (select, owner) = (Select::DEVICE, Some(self.owner()));
        let request = MigrateRequest { range, select, owner, fault_page: None };
        let mut ops = ToSystem { driver: &self.driver, moved: 0 };
        migrate(&self.mm, &request, &mut ops)?;
        Ok(ops.moved)
    }

    /// The device's own load, within one page, through its page table.
    pub(crate) fn load(&self, addr: VirtAddr, out: &mut [u8]) -> Result<(), Error> {
        self.access(addr.page(), Access::Read, |mapped| {
            let at = addr.offset_in_page();
            if mapped.page.is_device() {
                let end = at + out.len();
                let copy = |bytes: &mut Bytes| out.copy_from_slice(&bytes[at..end]);
                self.driver.with_page(mapped.page, copy).is_some()
            } else {
                self.mm.peek(addr, out)
            }
        })
    }

    /// The device's own store, within one page.
    pub(crate) fn store(&self, addr: VirtAddr, data: &[u8]) -> Result<(), Error> {
        self.access(addr.page(), Access::Write, |mapped| {
            let at = addr.offset_in_page();
            if mapped.page.is_device() {
                let copy = |bytes: &mut Bytes| bytes[at..at + data.len()].copy_from_slice(data);
                self.driver.with_page(mapped.page, copy).is_some()
            } else {
                self.mm.poke(addr, data)
            }
        })
    }

    /// Finds the page in the device's page table, filling it if need be, and works on it under the table's lock.
    fn access(
        &self,
        page: VirtAddr,
        access: Access,
        mut work: impl FnMut(Mirrored) -> bool,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            {
                let mut table = self.driver.table.lock();
                let wants_write = access == Access::Write;
                let found = table.get(&page.get()).filter(|one| one.write || !wants_write);
                if let Some(mapped) = found {
                    if work(*mapped) {
                        return Ok(());
                    }
                    if mapped.page.is_device() {
                        self.driver
                            .breach(format!("the mirror maps {:?}, a free page", mapped.page));
                    }
                    table.remove(&page.get());
                }
            }
            self.populate(page, access)?;
        }
        Err(Error::Busy { address: page, what: "the device cannot map the page" })
    }

    /// The populate loop of hmm.txt for one page.
    fn populate(&self, page: VirtAddr, access: Access) -> Result<(), Error> {
        let range = AddrRange::new(page.get(), page.get() + PAGE_SIZE as u64)?;
        let tracker = self.mm.track(range)?;
        let deadline = Instant::now() + PATIENCE;
        let request = RangeRequest { range, owner: Some(self.owner()) };
        while Instant::now() < deadline {
            let sequence = tracker.begin()?;
            let mut entries = [PfnEntry::default()];
            self.mm.range_fault(&request, access, &mut entries)?;
            let mut table = self.driver.table.lock();
            if tracker.changed(sequence) {
                continue;
            }
            let Some(found) = entries[0].pfn() else {
                let what = "range_fault left an entry without a pfn";
                return Err(Error::Fault { address: page, what });
            };
            let write = entries[0].flags().contains(PfnFlags::WRITE);
            table.insert(page.get(), Mirrored { page: found, write });
            return Ok(());
        }
        Err(Error::Busy { address: page, what: "the range kept changing" })
    }

    /// The driver learned from elsewhere that the protection of a range changed: no event tells (DESIGN: mprotect).
    pub(crate) fn forget(&self, range: AddrRange) {
        self.driver.forget(range);
    }

    /// The device cannot return what it holds of a page.
    pub(crate) fn lose(&self, page: VirtAddr) {
        let mapped = self.mirrored()[&page.get()];
        self.driver.lost.lock().insert(mapped.page);
    }

    /// The device's page table.
    pub(crate) fn mirrored(&self) -> BTreeMap<u64, Mirrored> {
        self.driver.table.lock().clone()
    }

    pub(crate) fn pages_in_use(&self) -> usize {
        self.driver.memory.lock().iter().flatten().count()
    }

    /// Rules that the library broke so far.
    pub(crate) fn breaches(&self) -> Vec<String> {
        self.driver.breaches.lock().clone()
    }

    /// How often `release` was called, plus 100 for each invalidation that announced it.
    pub(crate) fn releases(&self) -> usize {
        self.driver.releases.load(Ordering::Relaxed)
    }

    /// How often `free` was called.
    pub(crate) fn frees(&self) -> usize {
        self.driver.freed.load(Ordering::Relaxed)
    }

    /// Ends the mirror and gives the pfn window back.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        self.notifier.remove()?;
        self.devmem.remove()
    }
}
