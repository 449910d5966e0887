//! The program whose memory is managed: its loads, stores and system calls, on the model and on real memory.

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelEngine, ModelFaults, PageCondition};
use hmm_core::{AddrRange, Error, LEAF_SIZE, Mm, PAGE_SIZE, Protection, VirtAddr};
use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes of one page.
pub(crate) type Bytes = [u8; PAGE_SIZE];

/// A program's memory. All of it is private and anonymous.
pub(crate) trait CpuMemory: Send + Sync {
    /// Address space with nothing in it, in which page `boundary` begins a leaf (2 MiB). All of the leaves that it
    /// touches are the caller's.
    fn reserve(&self, pages: usize, boundary: usize) -> AddrRange;
    /// Maps memory, readable and writable, over whatever is there.
    fn map(&self, range: AddrRange);
    fn unmap(&self, range: AddrRange);
    /// Moves a mapping, all of which is there, over whatever is at the new place.
    fn remap(&self, from: AddrRange, to: VirtAddr);
    /// `MADV_DONTNEED` on a range that is mapped.
    fn drop_contents(&self, range: AddrRange);
    fn protect(&self, range: AddrRange, writable: bool);
    /// A load within one page.
    fn load(&self, addr: VirtAddr, out: &mut [u8]) -> Result<(), Error>;
    /// A store within one page.
    fn store(&self, addr: VirtAddr, data: &[u8]) -> Result<(), Error>;
    /// An atomic add.
    fn add(&self, addr: VirtAddr, value: u64) -> Result<u64, Error>;
    /// The contents of a page that is in system memory, without disturbing anything.
    fn inspect(&self, mm: &Mm, page: VirtAddr, out: &mut Bytes) -> bool;
    /// Whether a bad load or store is an error, and not the end of the process.
    fn survives_bad_accesses(&self) -> bool;
    /// Whether threads of the engine may still tidy up after an access has returned.
    fn settles_later(&self) -> bool;
    /// Whether somebody tells the library, and it its mirrors, that a page at home was unmapped or dropped.
    fn reports_changes(&self) -> bool {
        true
    }
    /// Puts the pages present in a range into a condition. False when that cannot be done here.
    fn set_condition(&self, range: AddrRange, condition: PageCondition) -> bool;
    /// Nothing happens for a moment.
    fn idle(&self);
    /// Sets what goes wrong. False when nothing can be made to.
    fn set_faults(&self, faults: ModelFaults) -> bool;
    /// Forks a child that compares these pages. The first that is wrong there; `None`: there is no process to fork.
    fn fork(&self, pages: &[(VirtAddr, &[u8])]) -> Option<Result<(), String>>;
}

const READ_WRITE: Protection = Protection::READ.union(Protection::WRITE);

impl CpuMemory for ModelEngine {
    fn reserve(&self, pages: usize, boundary: usize) -> AddrRange {
        let start = (1 << 44) + LEAF_SIZE - (boundary * PAGE_SIZE) as u64;
        AddrRange::new(start, start + (pages * PAGE_SIZE) as u64).unwrap()
    }
    fn map(&self, range: AddrRange) {
        self.mmap_fixed(range, READ_WRITE, VmaKind::Anonymous);
    }
    fn unmap(&self, range: AddrRange) {
        self.munmap(range);
    }
    fn remap(&self, from: AddrRange, to: VirtAddr) {
        self.mremap(from, to).unwrap();
    }
    fn drop_contents(&self, range: AddrRange) {
        self.madvise_dontneed(range).unwrap();
    }
    fn protect(&self, range: AddrRange, writable: bool) {
        self.mprotect(range, if writable { READ_WRITE } else { Protection::READ }).unwrap();
    }
    fn load(&self, addr: VirtAddr, out: &mut [u8]) -> Result<(), Error> {
        self.cpu_read(addr, out)
    }
    fn store(&self, addr: VirtAddr, data: &[u8]) -> Result<(), Error> {
        self.cpu_write(addr, data)
    }
    fn add(&self, addr: VirtAddr, value: u64) -> Result<u64, Error> {
        self.cpu_fetch_add(addr, value)
    }
    fn inspect(&self, _: &Mm, page: VirtAddr, out: &mut Bytes) -> bool {
        ModelEngine::inspect(self, page, out)
    }
    fn survives_bad_accesses(&self) -> bool {
        true
    }
    fn settles_later(&self) -> bool {
        false
    }
    fn set_condition(&self, range: AddrRange, condition: PageCondition) -> bool {
        ModelEngine::set_condition(self, range, condition);
        true
    }
    fn idle(&self) {
        ModelEngine::idle(self);
    }
    fn set_faults(&self, faults: ModelFaults) -> bool {
        ModelEngine::set_faults(self, faults);
        true
    }
    fn fork(&self, _: &[(VirtAddr, &[u8])]) -> Option<Result<(), String>> {
        None
    }
}

/// The memory of this process, for engines that manage it.
///
/// Areas lie low in the address space, where the kernel places nothing of its own accord: a hole that a test makes
/// stays a hole.
#[derive(Debug, Default)]
pub(crate) struct RealMemory;

impl RealMemory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self)
    }
}

/// Where the next area is reserved.
static NEXT_AREA: AtomicU64 = AtomicU64::new(1 << 37);

fn map_at(range: AddrRange) {
    let (protection, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED);
    let start = range.start().as_ptr().cast();
    // SAFETY: tests map only inside areas that they reserved, where nothing but their own test memory lies.
    unsafe { rustix::mm::mmap_anonymous(start, range.len() as usize, protection, flags) }.unwrap();
}

fn move_to(from: AddrRange, to: VirtAddr) -> rustix::io::Result<()> {
    let (old, length) = (from.start().as_ptr().cast(), from.len() as usize);
    // SAFETY: both places lie inside an area of the test's own, to which nothing holds references.
    unsafe {
        rustix::mm::mremap_fixed(old, length, length, MremapFlags::MAYMOVE, to.as_ptr().cast())
    }
    .map(|_| ())
}

fn is_mapped(page: AddrRange) -> bool {
    let mut there = 0;
    // SAFETY: mincore writes one byte for the one page, and only looks at the mapping.
    unsafe { libc::mincore(page.start().as_ptr().cast(), PAGE_SIZE, &raw mut there) == 0 }
}

impl CpuMemory for RealMemory {
    fn reserve(&self, pages: usize, boundary: usize) -> AddrRange {
        let room = ((pages * PAGE_SIZE) as u64).next_multiple_of(LEAF_SIZE) + 2 * LEAF_SIZE;
        let base = NEXT_AREA.fetch_add(room, Ordering::Relaxed) + LEAF_SIZE;
        let start = base.next_multiple_of(LEAF_SIZE) + LEAF_SIZE - (boundary * PAGE_SIZE) as u64;
        AddrRange::new(start, start + (pages * PAGE_SIZE) as u64).unwrap()
    }
    fn map(&self, range: AddrRange) {
        map_at(range);
    }
    fn unmap(&self, range: AddrRange) {
        // SAFETY: the range lies inside an area of the test's own.
        unsafe { rustix::mm::munmap(range.start().as_ptr().cast(), range.len() as usize) }.unwrap();
    }
    fn remap(&self, from: AddrRange, to: VirtAddr) {
        // The kernel moves no range that watching has cut into several mappings, or only the first of them: page by
        // page then.
        if move_to(from, to).is_err() {
            let pages = (0..from.pages()).map(|index| from.sub(index, 1));
            for (index, page) in pages.enumerate().filter(|(_, page)| is_mapped(*page)) {
                let offset = (index * PAGE_SIZE) as u64;
                move_to(page, to.checked_add(offset).unwrap()).unwrap();
            }
        }
    }
    fn drop_contents(&self, range: AddrRange) {
        let (start, length) = (range.start().as_ptr().cast(), range.len() as usize);
        // SAFETY: the range lies inside an area of the test's own.
        unsafe { rustix::mm::madvise(start, length, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
    }
    fn protect(&self, range: AddrRange, writable: bool) {
        let write = if writable { MprotectFlags::WRITE } else { MprotectFlags::empty() };
        let (start, length) = (range.start().as_ptr().cast(), range.len() as usize);
        // SAFETY: the range lies inside an area of the test's own.
        unsafe { rustix::mm::mprotect(start, length, MprotectFlags::READ | write) }.unwrap();
    }
    fn load(&self, addr: VirtAddr, out: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the world checks that the page is mapped and readable; no other thread stores to it meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(addr.as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }
    fn store(&self, addr: VirtAddr, data: &[u8]) -> Result<(), Error> {
        // SAFETY: the world checks that the page is mapped and writable; no other thread accesses it meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), addr.as_ptr(), data.len()) };
        Ok(())
    }
    fn add(&self, addr: VirtAddr, value: u64) -> Result<u64, Error> {
        // SAFETY: the world checks that the page is mapped and writable, and the address aligned.
        let word = unsafe { AtomicU64::from_ptr(addr.as_ptr().cast()) };
        Ok(word.fetch_add(value, Ordering::Relaxed))
    }
    fn inspect(&self, mm: &Mm, page: VirtAddr, out: &mut Bytes) -> bool {
        mm.peek(page, out)
    }
    fn survives_bad_accesses(&self) -> bool {
        false
    }
    fn settles_later(&self) -> bool {
        true
    }
    fn set_condition(&self, _: AddrRange, _: PageCondition) -> bool {
        false
    }
    fn idle(&self) {}
    fn set_faults(&self, _: ModelFaults) -> bool {
        false
    }
    fn fork(&self, pages: &[(VirtAddr, &[u8])]) -> Option<Result<(), String>> {
        // SAFETY: the child compares memory and ends: it neither allocates nor takes a lock.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let same = pages.iter().all(|(page, bytes)| {
                // SAFETY: the world names mapped, readable pages; the child has one thread.
                unsafe { libc::memcmp(page.as_ptr().cast(), bytes.as_ptr().cast(), PAGE_SIZE) == 0 }
            });
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(if same { 0 } else { 9 }) }
        }
        let mut status = 0;
        // SAFETY: waits for the child that was just made.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        let good = child > 0 && waited == child && status == 0;
        Some(good.then_some(()).ok_or_else(|| format!("a forked child: status {status:#x}")))
    }
}
