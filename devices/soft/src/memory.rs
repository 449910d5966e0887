//! Device memory: pages that no pointer of the process leads to, and the list of those that are free.
//!
//! Unsafe code is here because copies between frames and device memory go by address: neither may ever be behind a
//! Rust reference.

use crate::mapped::Mapped;
use hmm_core::sync::Mutex;
use hmm_core::{Error, PAGE_SIZE, Result, VirtAddr};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The device's own memory. A page is reached by its index; what is in it belongs to whoever holds the index: the
/// free list, a migration between `take` and commit, or the page table.
#[derive(Debug)]
pub(crate) struct Memory {
    map: MmapRaw,
    pages: usize,
    free: Mutex<FreeList>,
    free_pages: AtomicUsize,
}

/// A stack: pages used last are handed out first, while they are still in the caches.
#[derive(Debug)]
struct FreeList {
    stack: Mapped<u32>,
    count: usize,
}

impl Memory {
    /// # Errors
    /// `NoMemory` when the mappings cannot be had.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let count = u32::try_from(pages).map_err(|_| Error::NoMemory { what: "device pages" })?;
        let mut stack = Mapped::new(pages)?;
        // The lowest page is on top, so that neighbours in memory are handed out as neighbours.
        for (slot, page) in stack.iter_mut().zip((0..count).rev()) {
            *slot = page;
        }
        Ok(Self {
            map: map_memory(pages)?,
            pages,
            free: Mutex::new(FreeList { stack, count: pages }),
            free_pages: AtomicUsize::new(pages),
        })
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Pages on the free list now.
    pub(crate) fn free_pages(&self) -> usize {
        self.free_pages.load(Ordering::Acquire)
    }

    /// Takes a page off the free list. Its contents are whatever was there.
    pub(crate) fn allocate(&self) -> Option<u32> {
        let mut free = self.free.lock();
        let top = free.count.checked_sub(1)?;
        free.count = top;
        self.free_pages.store(top, Ordering::Release);
        free.stack.get(top).copied()
    }

    /// Puts a page back on the free list.
    pub(crate) fn free(&self, page: u32) {
        let mut free = self.free.lock();
        let top = free.count;
        if let Some(slot) = free.stack.get_mut(top) {
            *slot = page;
            free.count = top + 1;
            self.free_pages.store(top + 1, Ordering::Release);
        }
    }

    /// Copies a whole page in from a frame that the CPU can read.
    pub(crate) fn copy_in(&self, page: u32, frame: VirtAddr) {
        // SAFETY: the frame belongs to the running migration, which promises that it is readable and that nobody
        // writes it; the page was just taken off the free list, so nobody else reaches it.
        unsafe { std::ptr::copy_nonoverlapping(frame.as_ptr(), self.at(page, 0), PAGE_SIZE) }
    }

    /// Copies a whole page out to a frame that the CPU can write.
    pub(crate) fn copy_out(&self, page: u32, frame: VirtAddr) {
        // SAFETY: the frame was allocated by the running migration for this page; the page's translations were
        // dropped before the migration began to copy, so nobody writes it.
        unsafe { std::ptr::copy_nonoverlapping(self.at(page, 0), frame.as_ptr(), PAGE_SIZE) }
    }

    /// Fills a page that was just taken off the free list with zeros.
    pub(crate) fn clear(&self, page: u32) {
        // SAFETY: nobody else reaches a page between the free list and its commit.
        unsafe { std::ptr::write_bytes(self.at(page, 0), 0, PAGE_SIZE) }
    }

    /// Reads bytes of one page. The caller holds the page table's lock and has found the page in it.
    pub(crate) fn load(&self, page: u32, offset: usize, out: &mut [u8]) {
        let len = clamp(offset, out.len());
        // SAFETY: the bytes lie in one page of the mapping, and `out` is no part of it. Jobs that race on the same
        // bytes get some mixture of them, as on any device; no reference to device memory exists.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(page, offset), out.as_mut_ptr(), len);
        }
    }

    /// Writes bytes of one page. The caller holds the page table's lock and has found the page in it, writable.
    pub(crate) fn store(&self, page: u32, offset: usize, data: &[u8]) {
        let len = clamp(offset, data.len());
        // SAFETY: as in `load`.
        unsafe {
            std::ptr::copy_nonoverlapping(data.as_ptr(), self.at(page, offset), len);
        }
    }

    /// One aligned 64-bit word of a page, under the same conditions. Rounded down to its alignment.
    pub(crate) fn word(&self, page: u32, offset: usize) -> &AtomicU64 {
        let offset = (offset % PAGE_SIZE) & !7;
        // SAFETY: 8 aligned bytes inside the mapping, which lives as long as `self`; words that jobs share are only
        // reached through atomics.
        unsafe { AtomicU64::from_ptr(self.at(page, offset).cast()) }
    }

    /// Address of a byte. The index came from this object's free list, so it is inside.
    fn at(&self, page: u32, offset: usize) -> *mut u8 {
        let page = page as usize;
        assert!(page < self.pages && offset < PAGE_SIZE, "device page out of range");
        // SAFETY: `page * PAGE_SIZE + offset` is below the mapping's length, as just checked.
        unsafe { self.map.as_mut_ptr().add(page * PAGE_SIZE + offset) }
    }
}

/// The part of `len` bytes from `offset` on that lies in the page.
fn clamp(offset: usize, len: usize) -> usize {
    len.min(PAGE_SIZE.saturating_sub(offset))
}

/// A memfd, so that device pages do not count as anonymous memory of the process: its rss falls as pages leave.
/// Where memfds are refused, an anonymous mapping does the same work.
fn map_memory(pages: usize) -> Result<MmapRaw> {
    let no_memory = Error::NoMemory { what: "a mapping for the device's memory" };
    let bytes = pages.checked_mul(PAGE_SIZE).ok_or_else(|| no_memory.clone())?;
    if let Ok(descriptor) = rustix::fs::memfd_create("hmm-soft", MemfdFlags::CLOEXEC) {
        let file = File::from(descriptor);
        if file.set_len(bytes as u64).is_ok()
            && let Ok(map) = MmapOptions::new().len(bytes).map_raw(&file)
        {
            return Ok(map);
        }
    }
    let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon().map_err(|_| no_memory)?;
    Ok(map.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_handed_out_once_and_come_back() {
        let memory = Memory::new(3).unwrap();
        let pages: Vec<_> = std::iter::from_fn(|| memory.allocate()).collect();
        assert_eq!(pages, [0, 1, 2]);
        assert_eq!(memory.free_pages(), 0);
        memory.free(1);
        assert_eq!((memory.allocate(), memory.allocate()), (Some(1), None));
    }

    #[test]
    fn bytes_and_words_are_the_same_memory() {
        let memory = Memory::new(2).unwrap();
        memory.store(1, 4088, &7_u64.to_ne_bytes());
        memory.word(1, 4088).fetch_add(3, Ordering::Relaxed);
        let mut bytes = [0; 8];
        memory.load(1, 4088, &mut bytes);
        assert_eq!(u64::from_ne_bytes(bytes), 10);
        memory.clear(1);
        assert_eq!(memory.word(1, 4088).load(Ordering::Relaxed), 0);
    }
}
