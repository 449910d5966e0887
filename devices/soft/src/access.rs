//! How kernels reach bytes: through the device's page table, under its lock, one page at a time.

use crate::memory::Memory;
use crate::table::{Place, Radix};
use hmm_core::sync::RwLockReadGuard;
use hmm_core::{Mm, PAGE_SIZE, VirtAddr};
use std::sync::atomic::Ordering;

/// A kernel's hold on the page table. While it lives no translation changes, so invalidations wait: it is dropped
/// after at most a page-sized piece of work, and before anything that could wait for a page.
///
/// Every access stays inside one page. It fails when the table has no suitable entry, or when a system page is not
/// there any more; nothing was read or written then, and the kernel takes a device fault.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) radix: RwLockReadGuard<'a, Radix>,
    pub(crate) memory: &'a Memory,
    pub(crate) mm: &'a Mm,
}

impl View<'_> {
    fn locate(&self, addr: VirtAddr, write: bool) -> Option<Place> {
        let found = self.radix.get(addr)?;
        (found.write || !write).then_some(found.place)
    }

    pub(crate) fn load(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        match self.locate(addr, false) {
            Some(Place::Device(page)) => self.memory.load(page, addr.offset_in_page(), out),
            Some(Place::System) => return self.mm.peek(addr, out),
            None => return false,
        }
        true
    }

    pub(crate) fn store(&self, addr: VirtAddr, data: &[u8]) -> bool {
        match self.locate(addr, true) {
            Some(Place::Device(page)) => self.memory.store(page, addr.offset_in_page(), data),
            Some(Place::System) => return self.mm.poke(addr, data),
            None => return false,
        }
        true
    }

    /// An aligned word.
    pub(crate) fn load_word(&self, addr: VirtAddr) -> Option<u64> {
        match self.locate(addr, false)? {
            Place::Device(page) => {
                let word = self.memory.word(page, addr.offset_in_page());
                Some(word.load(Ordering::Relaxed))
            }
            Place::System => {
                let mut bytes = [0; 8];
                self.mm.peek(addr, &mut bytes).then(|| u64::from_ne_bytes(bytes))
            }
        }
    }

    /// Reads aligned words, lets `change` change them, and writes them back: all of them or none.
    pub(crate) fn update(
        &self,
        addr: VirtAddr,
        words: &mut [u8],
        change: impl FnOnce(&mut [u8]),
    ) -> bool {
        match self.locate(addr, true) {
            Some(Place::Device(page)) => {
                self.memory.load(page, addr.offset_in_page(), words);
                change(words);
                self.memory.store(page, addr.offset_in_page(), words);
                true
            }
            Some(Place::System) => {
                if !self.mm.peek(addr, words) {
                    return false;
                }
                change(words);
                self.mm.poke(addr, words)
            }
            None => false,
        }
    }

    /// Adds to an aligned word in device memory, atomically. Returns the old value.
    pub(crate) fn fetch_add(&self, addr: VirtAddr, value: u64) -> Option<u64> {
        match self.locate(addr, true)? {
            Place::Device(page) => {
                let word = self.memory.word(page, addr.offset_in_page());
                Some(word.fetch_add(value, Ordering::AcqRel))
            }
            // The CPU may write it at any moment, and `poke` is no atomic operation.
            Place::System => None,
        }
    }
}

/// Walks through a range of bytes in pieces that stay inside a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor {
    next: u64,
    end: u64,
}

impl Cursor {
    /// The range was validated.
    pub(crate) fn new(address: u64, len: u64) -> Self {
        Self { next: address, end: address + len }
    }

    /// Where the next piece starts, and its bytes.
    pub(crate) fn piece(&self) -> (VirtAddr, usize) {
        let addr = VirtAddr::new(self.next);
        let in_page = PAGE_SIZE - addr.offset_in_page();
        let rest = usize::try_from(self.end - self.next).unwrap_or(usize::MAX);
        (addr, in_page.min(rest))
    }

    pub(crate) fn is_done(&self) -> bool {
        self.next == self.end
    }

    pub(crate) fn advance(&mut self, bytes: usize) -> Step {
        self.next += bytes as u64;
        if self.is_done() { Step::Done } else { Step::More }
    }

    /// The next piece is not in the table.
    pub(crate) fn miss(&self, write: bool) -> Step {
        Step::Miss(Touch { addr: VirtAddr::new(self.next), end: self.end, write, device: false })
    }
}

/// What became of one step of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step {
    /// It got further.
    More,
    /// It is finished.
    Done,
    /// It could do nothing until this is resolved. A step that got further first says `More`, so that waiting for one
    /// page is told apart from progress through many.
    Miss(Touch),
}

/// An access that needs a device fault.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Touch {
    pub(crate) addr: VirtAddr,
    /// End of what the kernel will touch from `addr` on: the fault prepares more than one page where that helps.
    pub(crate) end: u64,
    pub(crate) write: bool,
    /// Only device memory will do.
    pub(crate) device: bool,
}

impl Touch {
    /// One aligned word.
    pub(crate) fn word(addr: VirtAddr, write: bool) -> Self {
        Self { addr, end: addr.get() + 8, write, device: false }
    }
}
