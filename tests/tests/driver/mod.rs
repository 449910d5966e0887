//! A driver for tests on real memory, on the public API alone, whose callbacks do what a test asks; and children: a
//! test run again in a process of its own, which may crash or hang.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod child;

#[allow(unused_imports, reason = "each test uses a part")]
pub(crate) use child::{Ended, Variables, child_of, child_with, is_child, on_each};

use hmm_core::{
    AddrRange, CpuFault, Devmem, DevmemOps, Error, FaultError, FaultFlags, MigrateBatch,
    MigrateFlags, MigrateOps, MigratePfn, MigrateRequest, Mm, OwnerId, PAGE_SIZE, Pfn, Residency,
    Select,
};
use hmm_tests::Region;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a test lets a callback do.
pub(crate) type Hook = Arc<dyn Fn() + Send + Sync>;

/// The same, for a page.
pub(crate) type PageHook = Arc<dyn Fn(Pfn) + Send + Sync>;

/// What the callbacks use.
pub(crate) struct Driver {
    memory: Region,
    /// Indices of free pages.
    free: Mutex<Vec<usize>>,
    first: Mutex<Option<Pfn>>,
    pub(crate) owner: OwnerId,
    /// Calls of `fault`.
    pub(crate) faults: AtomicUsize,
    /// Calls of `free`.
    pub(crate) frees: AtomicUsize,
    /// Pages that were freed while they were free.
    pub(crate) double_frees: AtomicUsize,
    /// `fault` says that the data is lost, for this page of the address space.
    pub(crate) lost: Mutex<Option<u64>>,
    /// `fault` says that the data is lost, for every page.
    pub(crate) dead: AtomicBool,
    /// So often will `fault` say that there is no memory.
    pub(crate) short_of_memory: AtomicUsize,
    /// Copying this page of the address space home fails.
    pub(crate) broken: Mutex<Option<u64>>,
    /// `alloc_and_copy` names no destination.
    pub(crate) refuses: AtomicBool,
    /// `fault` may run in the thread that touched the page, in a signal handler.
    pub(crate) signal_safe: AtomicBool,
    /// Calls of `fault` for a write.
    pub(crate) writes: AtomicUsize,
    /// Kernel id of the thread that ran `fault` last.
    pub(crate) answered_by: AtomicI32,
    /// Runs in `fault`, before anything else.
    pub(crate) on_fault: Mutex<Option<Hook>>,
    /// Runs in `alloc_and_copy`, after the copy.
    pub(crate) on_copy: Mutex<Option<Hook>>,
    /// Runs in `free`, before the page is free.
    pub(crate) on_free: Mutex<Option<PageHook>>,
}

/// A device with memory of its own.
pub(crate) struct Card {
    pub(crate) mm: Arc<Mm>,
    pub(crate) driver: Arc<Driver>,
    pub(crate) devmem: Arc<Devmem>,
}

fn run(hook: &Mutex<Option<Hook>>) {
    let hook = hook.lock().unwrap().clone();
    if let Some(hook) = hook {
        hook();
    }
}

impl Driver {
    /// Where the device has a page.
    pub(crate) fn frame(&self, page: Pfn) -> *mut u8 {
        let index = page.get() - self.first.lock().unwrap().unwrap().get();
        std::ptr::with_exposed_provenance_mut(self.memory.page_addr(index as usize) as usize)
    }

    fn allocate(&self) -> Option<Pfn> {
        let index = self.free.lock().unwrap().pop()?;
        let first = (*self.first.lock().unwrap())?;
        Some(Pfn::new(first.get() + index as u64))
    }

    pub(crate) fn free_pages(&self) -> usize {
        self.free.lock().unwrap().len()
    }

    /// Copies a page that migrates, to the device or from it; returns where.
    pub(crate) fn destination(&self, batch: &mut MigrateBatch<'_>, index: usize) -> MigratePfn {
        let src = batch.src[index];
        let nothing = MigratePfn::default();
        if src.flags().contains(MigrateFlags::DEVICE) {
            if *self.broken.lock().unwrap() == Some(batch.range.page_at(index).get()) {
                return MigratePfn::bare(MigrateFlags::ERROR);
            }
            let Some(to) = batch.alloc_system_page(batch.range.page_at(index)) else {
                return nothing;
            };
            copy(self.frame(src.pfn().unwrap()), to.to_addr().unwrap().as_ptr());
            return MigratePfn::new(to, MigrateFlags::LOCKED);
        }
        let Some(page) = self.allocate() else { return nothing };
        match src.pfn().and_then(Pfn::to_addr) {
            Some(frame) => copy(frame.as_ptr(), self.frame(page)),
            // SAFETY: the page was free, so nobody else uses it.
            None => unsafe { self.frame(page).write_bytes(0, PAGE_SIZE) },
        }
        MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE)
    }
}

impl DevmemOps for Driver {
    fn free(&self, devmem: &Devmem, page: Pfn) {
        self.frees.fetch_add(1, Ordering::SeqCst);
        let hook = self.on_free.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(page);
        }
        let index = (page.get() - devmem.pfn_first().get()) as usize;
        let mut free = self.free.lock().unwrap();
        if free.contains(&index) {
            self.double_frees.fetch_add(1, Ordering::SeqCst);
        } else {
            free.push(index);
        }
    }

    fn fault(&self, _: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        self.faults.fetch_add(1, Ordering::SeqCst);
        let is_write = fault.flags.contains(FaultFlags::WRITE);
        self.writes.fetch_add(usize::from(is_write), Ordering::SeqCst);
        self.answered_by.store(thread_id(), Ordering::SeqCst);
        run(&self.on_fault);
        let is_lost = *self.lost.lock().unwrap() == Some(fault.addr.get());
        if is_lost || self.dead.load(Ordering::SeqCst) {
            return Err(FaultError::SigBus);
        }
        let one_less = |count: usize| count.checked_sub(1);
        let short = &self.short_of_memory;
        if short.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok() {
            return Err(FaultError::OutOfMemory);
        }
        let (mut src, mut dst) = ([MigratePfn::default()], [MigratePfn::default()]);
        let request = MigrateRequest {
            range: AddrRange::covering(fault.addr.get(), 1).unwrap(),
            select: Select::DEVICE,
            owner: Some(self.owner),
            fault_page: Some(fault.page),
        };
        let mut ops = Copier { driver: self, moved: 0 };
        let done = fault.mm.migrate(&request, &mut ops, &mut src, &mut dst);
        done.map_err(|_| FaultError::OutOfMemory)
    }

    fn is_signal_safe(&self) -> bool {
        self.signal_safe.load(Ordering::SeqCst)
    }
}

/// The calling thread's kernel id.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: asks for a number.
    unsafe { libc::gettid() }
}

/// Copies pages to the device, or from it.
struct Copier<'a> {
    driver: &'a Driver,
    moved: usize,
}

fn copy(from: *const u8, to: *mut u8) {
    // SAFETY: both are whole pages that belong to the running migration alone.
    unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE_SIZE) }
}

impl MigrateOps for Copier<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        if !self.driver.refuses.load(Ordering::SeqCst) {
            for index in 0..batch.src.len() {
                if batch.src[index].migrates() {
                    batch.dst[index] = self.driver.destination(batch, index);
                }
            }
        }
        run(&self.driver.on_copy);
    }

    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        self.moved += batch.src.iter().filter(|src| src.migrates()).count();
    }
}

impl Card {
    /// A device with `pages` pages.
    pub(crate) fn new(mm: &Arc<Mm>, pages: usize) -> Self {
        let memory = Region::new(pages);
        memory.fill(0xdd);
        let owner = OwnerId::unique();
        let driver = Arc::new(Driver {
            memory,
            free: Mutex::new((0..pages).rev().collect()),
            first: Mutex::new(None),
            owner,
            faults: AtomicUsize::new(0),
            frees: AtomicUsize::new(0),
            double_frees: AtomicUsize::new(0),
            lost: Mutex::new(None),
            dead: AtomicBool::new(false),
            short_of_memory: AtomicUsize::new(0),
            broken: Mutex::new(None),
            refuses: AtomicBool::new(false),
            signal_safe: AtomicBool::new(false),
            writes: AtomicUsize::new(0),
            answered_by: AtomicI32::new(0),
            on_fault: Mutex::new(None),
            on_copy: Mutex::new(None),
            on_free: Mutex::new(None),
        });
        let devmem = Devmem::add(driver.clone(), owner, pages).unwrap();
        *driver.first.lock().unwrap() = Some(devmem.pfn_first());
        Self { mm: Arc::clone(mm), driver, devmem }
    }

    /// The same driver with other callbacks in front, which pass on to it; its first device memory is never used.
    pub(crate) fn with_ops(&self, ops: Arc<dyn DevmemOps>) -> Self {
        let devmem = Devmem::add(ops, self.driver.owner, self.devmem.len()).unwrap();
        *self.driver.first.lock().unwrap() = Some(devmem.pfn_first());
        Self { mm: Arc::clone(&self.mm), driver: Arc::clone(&self.driver), devmem }
    }

    /// The device's memory never becomes inaccessible with pages beside it, as it may where mappings are short.
    pub(crate) fn pinned(self) -> Self {
        self.mm.pin_range(self.driver.memory.range()).unwrap();
        self
    }

    /// Lets `hook` run in `fault` from now on.
    pub(crate) fn when_faulting(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.driver.on_fault.lock().unwrap() = Some(Arc::new(hook));
    }

    /// Lets `hook` run in `alloc_and_copy` from now on.
    pub(crate) fn when_copying(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.driver.on_copy.lock().unwrap() = Some(Arc::new(hook));
    }

    /// Lets callbacks do nothing special any more.
    pub(crate) fn calm(&self) {
        *self.driver.on_fault.lock().unwrap() = None;
        *self.driver.on_copy.lock().unwrap() = None;
    }

    /// Waits until so many pages are in use: the last reference of a page that came home is dropped a moment after
    /// whoever touched it goes on.
    pub(crate) fn settles_at(&self, pages: usize) -> bool {
        let deadline = Instant::now() + Duration::from_secs(2);
        let settled =
            || self.devmem.in_use() == pages && self.mm.counters().device_pages == pages as u64;
        while !settled() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        settled()
    }

    /// As [`Card::settles_at`], where other devices have pages, too.
    pub(crate) fn settles_at_own(&self, pages: usize) -> bool {
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.devmem.in_use() != pages && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.devmem.in_use() == pages
    }

    /// As [`Card::to_device`], with lists of the caller's.
    pub(crate) fn migrate_with(
        &self,
        range: AddrRange,
        select: Select,
        src: &mut [MigratePfn],
        dst: &mut [MigratePfn],
    ) -> Result<usize, Error> {
        let owner = Some(self.driver.owner);
        let request = MigrateRequest { range, select, owner, fault_page: None };
        let mut ops = Copier { driver: &self.driver, moved: 0 };
        self.mm.migrate(&request, &mut ops, src, dst)?;
        Ok(ops.moved)
    }

    fn migrate(&self, range: AddrRange, select: Select) -> Result<usize, Error> {
        let mut src = vec![MigratePfn::default(); range.pages()];
        let mut dst = src.clone();
        self.migrate_with(range, select, &mut src, &mut dst)
    }

    /// Moves pages of a range to the device; returns how many.
    pub(crate) fn to_device(&self, range: AddrRange) -> Result<usize, Error> {
        self.migrate(range, Select::SYSTEM)
    }

    /// As [`Card::to_device`], and comes back for pages that something held for a moment, as drivers do. Returns how
    /// many pages of the range are on a device then.
    pub(crate) fn all_to_device(&self, range: AddrRange) -> usize {
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            self.to_device(range).unwrap();
            let there = on_device(&self.mm, range);
            if there == range.pages() || Instant::now() >= deadline {
                return there;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Moves this device's pages of a range home; returns how many.
    pub(crate) fn to_system(&self, range: AddrRange) -> Result<usize, Error> {
        self.migrate(range, Select::DEVICE)
    }
}

impl Drop for Card {
    /// After every test that migrates: the sums agree.
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        match self.mm.check_accounts() {
            Ok(()) | Err(Error::Gone { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Sends pages away, however long it takes on a busy machine.
pub(crate) fn away(card: &Card, range: AddrRange) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while card.all_to_device(range) < range.pages() {
        assert!(Instant::now() < deadline, "some pages of {range:?} do not leave");
    }
}

/// Brings pages home, however long it takes.
pub(crate) fn home(card: &Card, range: AddrRange) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while on_device(&card.mm, range) > 0 {
        card.to_system(range).unwrap();
        assert!(Instant::now() < deadline, "some pages of {range:?} do not come home");
    }
}

/// How many pages of a range are on a device.
pub(crate) fn on_device(mm: &Mm, range: AddrRange) -> usize {
    let mut places = vec![Residency::None; range.pages()];
    mm.residency(range, &mut places).unwrap();
    places.iter().filter(|place| matches!(place, Residency::Device(_))).count()
}
