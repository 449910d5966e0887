//! Pages that one device has for itself: the CPU loses its access until it asks for it (`make_device_exclusive`).
//!
//! Such a page lies on a device of the library's own, whose memory the driver reaches directly. So a touch, a fork, an
//! unmap, and whoever else wants the page find what they would find with any other device page, and the touch brings it
//! home: that is how exclusive access is revoked.

use super::batch::Collect;
use super::{Job, MigrateBatch};
use crate::addr::{AddrRange, PAGE_SIZE, Pfn, VirtAddr};
use crate::arena::Buffer;
use crate::devmem::Devmem;
use crate::engine::VmaKind;
use crate::error::{Error, Result};
use crate::flags::{MigrateFlags, MigratePfn, Protection, Select};
use crate::limits::{EXCLUSIVE_PAGES, RANGE_DEADLINE};
use crate::mm::Mm;
use crate::ops::{CpuFault, DevmemOps, FaultError, InvalidateEvent, MigrateOps, OwnerId};
use crate::stay::Stay;
use crate::sync::{Mutex, yield_now};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Instant;

/// The store of this process, made at first use. It is never freed; a forked child makes one of its own.
static STORE: AtomicPtr<Store> = AtomicPtr::new(ptr::null_mut());

/// The library's own device.
struct Store {
    devmem: Arc<Devmem>,
    contents: Arc<Contents>,
}

/// Its memory, shared so that the kernel joins it with no mapping of the program's, and nobody takes it for one.
struct Contents {
    memory: AddrRange,
    /// A driver sets up its own tables for the page: it must not be revoked yet.
    locked: Buffer<AtomicBool>,
    free: Mutex<FreeList>,
}

struct FreeList {
    pages: Buffer<u32>,
    count: usize,
}

impl Contents {
    fn new() -> Result<Self> {
        let no_memory = || Error::NoMemory { what: "memory for exclusive pages" };
        let bytes = EXCLUSIVE_PAGES * PAGE_SIZE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, anywhere.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), bytes, access, flags) };
        let start = start.map_err(|_| no_memory())?;
        let pages = Buffer::new(EXCLUSIVE_PAGES, |index| (EXCLUSIVE_PAGES - 1 - index) as u32);
        let locked = Buffer::new(EXCLUSIVE_PAGES, |_| AtomicBool::new(false));
        let free = FreeList { pages: pages.ok_or_else(no_memory)?, count: EXCLUSIVE_PAGES };
        Ok(Self {
            memory: AddrRange::covering(VirtAddr::from_ptr(start).get(), bytes as u64)?,
            locked: locked.ok_or_else(no_memory)?,
            free: Mutex::new(free),
        })
    }

    /// A page that is free, locked from now on.
    fn take(&self) -> Option<usize> {
        let mut free = self.free.lock();
        free.count = free.count.checked_sub(1)?;
        let index = free.pages[free.count] as usize;
        self.locked[index].store(true, Ordering::Release);
        Some(index)
    }

    fn put(&self, index: usize) {
        self.locked[index].store(false, Ordering::Release);
        let mut free = self.free.lock();
        let count = free.count;
        if let Some(place) = free.pages.get_mut(count) {
            *place = index as u32;
            free.count += 1;
        }
    }

    fn page(&self, index: usize) -> VirtAddr {
        self.memory.page_at(index)
    }

    fn copy(from: VirtAddr, to: VirtAddr) {
        // SAFETY: one side is a page of the store that a migration has for itself, the other a frame of that migration;
        // both are mapped, and they are never the same.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), PAGE_SIZE) };
    }
}

impl Store {
    fn new() -> Result<Self> {
        let contents = Arc::new(Contents::new()?);
        let ops: Arc<dyn DevmemOps> = Arc::clone(&contents) as Arc<dyn DevmemOps>;
        let devmem = Devmem::add(ops, OwnerId::unique(), EXCLUSIVE_PAGES)?;
        Ok(Self { devmem, contents })
    }

    /// The store, made if need be.
    fn get() -> Result<&'static Self> {
        loop {
            let current = STORE.load(Ordering::Acquire);
            // SAFETY: what was stored there is never freed.
            if let Some(store) = unsafe { current.as_ref() }
                && !store.devmem.is_inherited()
            {
                return Ok(store);
            }
            let made = Box::into_raw(Box::new(Self::new()?));
            let done = STORE.compare_exchange(current, made, Ordering::AcqRel, Ordering::Relaxed);
            if done.is_err() {
                // SAFETY: it was made here, and nobody has seen it.
                let made = unsafe { Box::from_raw(made) };
                made.devmem.unlink();
            }
        }
    }

    fn current() -> Option<&'static Self> {
        // SAFETY: what was stored there is never freed.
        let store = unsafe { STORE.load(Ordering::Acquire).as_ref() };
        store.filter(|store| !store.devmem.is_inherited())
    }

    fn index_of(&self, page: Pfn) -> Option<usize> {
        let memory = self.contents.memory;
        let address = page.to_addr().filter(|address| memory.contains(*address))?;
        Some(memory.index_of(address))
    }
}

fn index_of(devmem: &Devmem, page: Pfn) -> usize {
    (page.get() - devmem.pfn_first().get()) as usize
}

impl DevmemOps for Contents {
    fn free(&self, devmem: &Devmem, page: Pfn) {
        self.put(index_of(devmem, page));
    }

    fn fault(&self, devmem: &Devmem, fault: &CpuFault<'_>) -> std::result::Result<(), FaultError> {
        if self.locked[index_of(devmem, fault.page)].load(Ordering::Acquire) {
            // Tried again, until whoever made it exclusive is done with its tables.
            return Err(FaultError::OutOfMemory);
        }
        let owner = Some(devmem.owner());
        let (select, event) = (Select::DEVICE, InvalidateEvent::Clear);
        let collect = Collect { select, owner, pages: None, event, waits: true };
        let job = Job { mm: fault.mm, vma: &fault.vma, collect };
        let page = AddrRange::page_of(fault.addr);
        let mut home = Home { contents: self, devmem };
        job.run_one(page, &mut home).map_or(Err(FaultError::OutOfMemory), |_| Ok(()))
    }
}

/// A page leaves for the store.
struct Away<'a> {
    store: &'a Store,
    index: usize,
    /// It was named as a destination: if it is none in the end, it goes back by `free`.
    is_named: bool,
}

impl MigrateOps for Away<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let Some(source) = batch.src[0].pfn().and_then(Pfn::to_addr) else { return };
        Contents::copy(source, self.store.contents.page(self.index));
        self.is_named = true;
        let page = Pfn::new(self.store.devmem.pfn_first().get() + self.index as u64);
        batch.dst[0] = MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
    }

    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

/// A page comes back from it.
struct Home<'a> {
    contents: &'a Contents,
    devmem: &'a Devmem,
}

impl MigrateOps for Home<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let start = batch.range.start();
        if let Some(source) = batch.src[0].pfn()
            && let Some(frame) = batch.alloc_system_page(start)
            && let Some(address) = frame.to_addr()
        {
            let index = index_of(self.devmem, source);
            Contents::copy(self.contents.page(index), address);
            batch.dst[0] = MigratePfn::new(frame, MigrateFlags::LOCKED);
        }
    }

    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

impl Mm {
    /// Takes a page from the CPU for a device alone (`make_device_exclusive`); made present and writable before, if need
    /// be. Mirrors are told `Exclusive`, with the owner. The next access by the CPU, or by anybody else, revokes it:
    /// mirrors are told `Clear`, and the page is home again.
    ///
    /// Returns the page that has the contents meanwhile, for the device to use at `pfn.to_addr()`. It is *locked*: nobody
    /// revokes it before [`unlock_exclusive`], which follows as soon as the device's tables are set up, within the
    /// seconds that touches wait. `holds_others`: the caller has such pages locked. A fork waits for these, so they must
    /// not wait for it.
    ///
    /// # Errors
    /// `Fault` where nothing is mapped or the mapping is not writable; `Unsupported` for other than private anonymous
    /// memory; `Busy` when the page is pinned, shared, or under way for a second, or while the process forks; `NoMemory`
    /// when 65,536 pages are exclusive already; `Deadlock` from a callback; `Gone`.
    pub fn make_exclusive(
        self: &Arc<Self>,
        addr: VirtAddr,
        owner: OwnerId,
        holds_others: bool,
    ) -> Result<Pfn> {
        self.check_not_closing()?;
        let page = AddrRange::page_of(addr.page());
        let address = page.start();
        if self.is_in_callback() {
            return Err(Error::Deadlock {
                what: "a page is made exclusive from inside a callback",
            });
        }
        let vma = self.vma_covering(page)?;
        if !vma.protection.contains(Protection::READ | Protection::WRITE) {
            return Err(Error::Fault { address, what: "the vma is not writable" });
        }
        if vma.kind != VmaKind::Anonymous {
            let what = format!("only private anonymous memory becomes exclusive, not {address:?}");
            return Err(Error::Unsupported { what });
        }
        let store = Store::get()?;
        let collect = Collect {
            select: Select::SYSTEM,
            owner: Some(owner),
            pages: None,
            event: InvalidateEvent::Exclusive,
            waits: !holds_others,
        };
        let deadline = Instant::now() + RANGE_DEADLINE;
        loop {
            self.bring_home(page)?;
            self.engine.populate(page, true)?;
            self.engine.check_ready(page)?;
            let no_memory = Error::NoMemory { what: "pages for exclusive access" };
            let index = store.contents.take().ok_or(no_memory)?;
            let job = Job { mm: self, vma: &vma, collect };
            let mut away = Away { store, index, is_named: false };
            let entry = job.run_one(page, &mut away);
            if !away.is_named {
                store.contents.put(index);
            }
            let entry = entry?;
            if entry.migrates() {
                return Ok(Pfn::of_addr(store.contents.page(index)));
            }
            if Instant::now() >= deadline || entry.reason() == Some(Stay::Pinned) {
                return Err(Error::Busy { address, what: "the page is in use elsewhere" });
            }
            yield_now();
        }
    }
}

/// The device's tables are set up: from now on [`Mm::make_exclusive`]'s page can be revoked. False when it is no such
/// page.
pub fn unlock_exclusive(page: Pfn) -> bool {
    let Some(store) = Store::current() else { return false };
    let Some(index) = store.index_of(page) else { return false };
    store.contents.locked[index].swap(false, Ordering::AcqRel)
}
