//! A region of private anonymous memory, as a program would map it.

use hmm_core::{AddrRange, PAGE_SIZE};
use std::sync::atomic::AtomicU64;

/// Mapped memory of this process: private, anonymous, readable and writable; unmapped on drop.
///
/// It hands out atomics and copies, never slices: its pages change underneath.
#[derive(Debug)]
pub struct Region {
    addr: u64,
    len: usize,
}

impl Region {
    /// Maps `pages` pages.
    ///
    /// # Panics
    /// When the system has no room for it.
    pub fn new(pages: usize) -> Self {
        let len = pages * PAGE_SIZE;
        Self { addr: map(len), len }
    }

    /// Maps `pages` pages at a multiple of `align` bytes (a power of two, at least a page).
    ///
    /// # Panics
    /// When the system has no room for it.
    pub fn aligned(pages: usize, align: u64) -> Self {
        let len = pages * PAGE_SIZE;
        let room = len + align as usize;
        let start = map(room);
        let addr = start.next_multiple_of(align);
        unmap(start, (addr - start) as usize);
        let end = addr + len as u64;
        unmap(end, (start + room as u64 - end) as usize);
        Self { addr, len }
    }

    /// Address of the first byte.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Address of a page.
    pub fn page_addr(&self, page: usize) -> u64 {
        self.addr + (page * PAGE_SIZE) as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Length in pages.
    pub fn pages(&self) -> usize {
        self.len / PAGE_SIZE
    }

    /// Length in words of 64 bits.
    pub fn words(&self) -> usize {
        self.len / 8
    }

    /// The whole region.
    ///
    /// # Panics
    /// When it is empty.
    pub fn range(&self) -> AddrRange {
        self.part(0, self.pages())
    }

    /// `count` pages from page `first` on.
    ///
    /// # Panics
    /// When they do not lie in the region.
    pub fn part(&self, first: usize, count: usize) -> AddrRange {
        assert!(first + count <= self.pages(), "the part lies in the region");
        AddrRange::new(self.page_addr(first), self.page_addr(first + count)).expect("a valid range")
    }

    /// A pointer to the first byte, for system calls.
    pub fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.addr as usize)
    }

    /// The word of 64 bits with this index.
    ///
    /// # Panics
    /// When there is no such word.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words(), "word {index} of {}", self.words());
        // SAFETY: the word lies in the mapping, is aligned, and is only ever reached as an atomic; the borrow of self
        // keeps the mapping.
        unsafe { AtomicU64::from_ptr(self.as_ptr().cast::<u64>().add(index)) }
    }

    /// Sets every byte, as the program itself would.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the mapping is writable and len bytes long, and no reference to its bytes exists.
        unsafe { self.as_ptr().write_bytes(byte, self.len) }
    }

    /// Copies bytes out from `offset` on.
    ///
    /// # Panics
    /// When they do not lie in the region.
    pub fn read(&self, offset: usize, out: &mut [u8]) {
        assert!(offset + out.len() <= self.len, "the bytes lie in the region");
        // SAFETY: both sides are valid for the length, which was checked, and out is not part of the region, since no
        // reference to the region's bytes exists.
        unsafe { self.as_ptr().add(offset).copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes in from `offset` on.
    ///
    /// # Panics
    /// When they do not lie in the region.
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.len, "the bytes lie in the region");
        // SAFETY: as for read, the other way round.
        unsafe { self.as_ptr().add(offset).copy_from_nonoverlapping(data.as_ptr(), data.len()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        unmap(self.addr, self.len);
    }
}

/// Maps memory at a place of the kernel's choice.
fn map(len: usize) -> u64 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let pointer = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
    assert_ne!(pointer, libc::MAP_FAILED, "the system has {len} bytes of address space");
    pointer.expose_provenance() as u64
}

/// Unmaps memory that a region owned.
fn unmap(addr: u64, len: usize) {
    if len == 0 {
        return;
    }
    let pointer = std::ptr::with_exposed_provenance_mut(addr as usize);
    // SAFETY: the bytes belong to a mapping of a region, and nothing refers to them any more.
    let result = unsafe { libc::munmap(pointer, len) };
    assert_eq!(result, 0, "the region can be unmapped");
}
