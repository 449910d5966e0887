//! What the tests share: mapped memory that is only touched through raw pointers and system calls, hence the unsafe
//! code, and devices.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use hmm_core::{AddrRange, Capabilities, Mm, PAGE_SIZE, PresentGuard, Residency};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const WORDS: usize = PAGE_SIZE / 8;
pub(crate) const POLICIES: [Policy; 3] = [Policy::Never, Policy::OnRequest, Policy::OnTouch];

/// An anonymous private mapping.
#[derive(Debug)]
pub(crate) struct Region {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the memory is only accessed through raw pointers and atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    pub(crate) fn new(pages: usize) -> Self {
        Self::map(pages, libc::MAP_PRIVATE, libc::PROT_READ | libc::PROT_WRITE)
    }

    pub(crate) fn map(pages: usize, sharing: i32, protection: i32) -> Self {
        let bytes = pages * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(ptr::null_mut(), bytes, protection, sharing | libc::MAP_ANONYMOUS, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), bytes }
    }

    /// Words that count up from `first`.
    pub(crate) fn counting(pages: usize, first: u64) -> Self {
        let region = Self::new(pages);
        (0..region.words()).for_each(|index| region.set(index, first.wrapping_add(index as u64)));
        region
    }

    /// `f64`s made from their index.
    pub(crate) fn floats(pages: usize, value: impl Fn(usize) -> f64) -> Self {
        let region = Self::new(pages);
        (0..region.words()).for_each(|index| region.set(index, value(index).to_bits()));
        region
    }

    pub(crate) fn address(&self) -> u64 {
        self.start.addr() as u64
    }
    pub(crate) fn word_address(&self, index: usize) -> u64 {
        self.address() + 8 * index as u64
    }
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }
    pub(crate) fn words(&self) -> usize {
        self.bytes / 8
    }
    pub(crate) fn pages(&self) -> usize {
        self.bytes / PAGE_SIZE
    }
    pub(crate) fn range(&self) -> AddrRange {
        AddrRange::covering(self.address(), self.bytes()).unwrap()
    }
    pub(crate) fn page(&self, index: usize) -> AddrRange {
        self.range().sub(index, 1)
    }

    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words());
        // SAFETY: an aligned word of the mapping, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.start.cast::<u64>().add(index)) }
    }
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }
    pub(crate) fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }
    pub(crate) fn all_words(&self) -> Vec<u64> {
        (0..self.words()).map(|index| self.get(index)).collect()
    }
    pub(crate) fn all_bytes(&self) -> Vec<u8> {
        self.all_words().into_iter().flat_map(u64::to_ne_bytes).collect()
    }

    fn at(&self, page: usize) -> *mut libc::c_void {
        self.range().page_at(page).as_ptr().cast()
    }

    pub(crate) fn advise(&self, first: usize, pages: usize, advice: i32) {
        // SAFETY: inside the mapping; the tests expect contents to change.
        let done = unsafe { libc::madvise(self.at(first), pages * PAGE_SIZE, advice) };
        assert_eq!(done, 0);
    }

    /// The test does not touch these pages again.
    pub(crate) fn unmap_pages(&self, first: usize, pages: usize) {
        // SAFETY: pages of our own mapping, which nobody uses any more.
        assert_eq!(unsafe { libc::munmap(self.at(first), pages * PAGE_SIZE) }, 0);
    }

    /// The test does not write these pages again.
    pub(crate) fn make_read_only(&self, first: usize, pages: usize) {
        // SAFETY: pages of our own mapping, which nobody writes any more.
        let done = unsafe { libc::mprotect(self.at(first), pages * PAGE_SIZE, libc::PROT_READ) };
        assert_eq!(done, 0);
    }

    /// A new mapping in the same place.
    pub(crate) fn replace(&self) {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces our own mapping, whose contents nobody needs.
        let again = unsafe { libc::mmap(self.at(0), self.bytes, protection, flags, -1, 0) };
        assert_eq!(again, self.at(0));
    }

    /// Moves the mapping onto another one of the same size.
    pub(crate) fn move_onto(self, place: &Self) {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both mappings are ours; the contents are only used at the new place afterwards.
        let moved = unsafe { libc::mremap(self.at(0), self.bytes, self.bytes, flags, place.at(0)) };
        assert_eq!(moved, place.at(0));
        // Somebody else has the mapping now.
        let _ = std::mem::ManuallyDrop::new(self);
    }

    /// Pages that the kernel has in core for this mapping, and that are its own: its shared page of zeros may stand
    /// where a page went away.
    pub(crate) fn pages_in_core(&self) -> usize {
        const PRESENT: u64 = 1 << 63;
        const OWN: u64 = 1 << 56 | 1 << 61;
        let mut entries = vec![0_u8; 8 * self.pages()];
        let offset = 8 * (self.address() / PAGE_SIZE as u64);
        let Ok(pagemap) = File::open("/proc/self/pagemap") else {
            // The runner reads the line; what follows could show nothing.
            let _ = std::io::stderr().write_all(b"skipped: there is no /proc/self/pagemap\n");
            std::process::exit(0);
        };
        pagemap.read_exact_at(&mut entries, offset).unwrap();
        let entries = entries.as_chunks::<8>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
        entries.filter(|entry| entry & PRESENT != 0 && entry & OWN != 0).count()
    }

    /// Lets the kernel read everything, in one system call.
    pub(crate) fn write_to(&self, file: &impl AsRawFd) {
        // SAFETY: the kernel reads `bytes` mapped bytes.
        let written = unsafe { libc::write(file.as_raw_fd(), self.at(0), self.bytes) };
        assert_eq!(written, self.bytes as isize);
    }

    pub(crate) fn residency(&self, mm: &Mm) -> Vec<Residency> {
        let mut out = vec![Residency::None; self.pages()];
        mm.residency(self.range(), &mut out).unwrap();
        out
    }
    pub(crate) fn pages_on_devices(&self, mm: &Mm) -> usize {
        self.residency(mm).iter().filter(|page| matches!(page, Residency::Device(_))).count()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}

pub(crate) fn mm() -> Arc<Mm> {
    Mm::current().unwrap()
}

/// Keeps a region present for what the kernel does to it, where the engine lacks the capability to serve that.
pub(crate) fn hold(mm: &Arc<Mm>, without: Capabilities, region: &Region) -> Option<PresentGuard> {
    let is_needed = !mm.capabilities().contains(without);
    is_needed.then(|| mm.guard(region.range(), false).unwrap())
}

/// A device with so many pages of memory.
pub(crate) fn device(mm: &Arc<Mm>, pages: usize, policy: Policy) -> Arc<SoftDevice> {
    let memory = (pages * PAGE_SIZE) as u64;
    SoftDevice::new(mm, SoftConfig { memory, policy, ..SoftConfig::default() }).unwrap()
}

pub(crate) fn device_with_threads(mm: &Arc<Mm>, pages: usize, threads: u32) -> Arc<SoftDevice> {
    let memory = (pages * PAGE_SIZE) as u64;
    SoftDevice::new(mm, SoftConfig { memory, threads, ..SoftConfig::default() }).unwrap()
}

pub(crate) fn sum_of(region: &Region) -> Kernel {
    Kernel::SumU64 { src: region.address(), count: region.words() as u64 }
}

/// A cheap sequence of numbers without a pattern.
pub(crate) fn scramble(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
