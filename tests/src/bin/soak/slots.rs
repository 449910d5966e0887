//! Mappings that come, change and go: munmap, mmap over them, mremap, mprotect, madvise. What each page holds is known.

use crate::world::{Random, SLOTS, Worker, World};
use hmm_core::{AddrRange, Capabilities, PAGE_SIZE};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Scope;

/// Pages of a slot.
const PAGES: usize = 24;
const WORDS: usize = PAGE_SIZE / 8;
/// Pages between the two places where a slot can be, and of both together.
const PLACE: usize = (PAGES + 1) * PAGE_SIZE;
const AREA: usize = 2 * PAGES + 2;
/// One word in so many is written and compared.
const STEP: usize = 37;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, world: &'scope World) {
    for number in 0..SLOTS {
        scope.spawn(move || {
            let mut slot = Slot::map(world, number);
            let mut random = Random(number as u64 + 100);
            while world.goes_on() {
                slot.write(&mut random);
                std::thread::sleep(std::time::Duration::from_micros(random.below(500) as u64));
                slot.change(&mut random);
                slot.compare();
                world.step(Worker::Slots);
            }
            slot.unmap();
        });
    }
}

/// Addresses that are the slot's alone: migrations may ask for where it was a moment ago, and must not meet memory of
/// somebody else there, which may have to stay (a stack for signals, say).
struct Slot<'a> {
    world: &'a World,
    number: usize,
    area: usize,
    start: usize,
    /// What each page was filled with; 0: zeros.
    pages: [u64; PAGES],
}

impl<'a> Slot<'a> {
    fn map(world: &'a World, number: usize) -> Self {
        let area = map_at(0, AREA, 0, libc::PROT_NONE);
        let start = map_at(area, PAGES, libc::MAP_FIXED, READ_WRITE);
        let slot = Self { world, number, area, start, pages: [0; PAGES] };
        slot.publish();
        slot
    }

    fn range(&self, first: usize, count: usize) -> AddrRange {
        let start = (self.start + first * PAGE_SIZE) as u64;
        AddrRange::covering(start, (count * PAGE_SIZE) as u64).unwrap()
    }

    fn publish(&self) {
        *self.world.slots[self.number].lock().unwrap() = Some(self.range(0, PAGES));
    }

    fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        let address = self.start + page * PAGE_SIZE + word * 8;
        // SAFETY: the slot is mapped as long as this value lives, and words are only used atomically.
        unsafe { &*std::ptr::with_exposed_provenance::<AtomicU64>(address) }
    }

    fn write(&mut self, random: &mut Random) {
        let (first, tag) = (random.below(PAGES), random.below(1 << 30) as u64 + 1);
        for page in first..PAGES.min(first + 8) {
            for word in (0..WORDS).step_by(STEP) {
                self.word(page, word).store(tag + word as u64, Ordering::Relaxed);
            }
            self.pages[page] = tag;
        }
    }

    fn compare(&self) {
        for (page, tag) in self.pages.iter().enumerate() {
            for word in (0..WORDS).step_by(STEP) {
                let expected = if *tag == 0 { 0 } else { tag + word as u64 };
                let seen = self.word(page, word).load(Ordering::Relaxed);
                assert_eq!(seen, expected, "slot {} page {page} word {word}", self.number);
            }
        }
    }

    /// Some change of a part of the slot.
    fn change(&mut self, random: &mut Random) {
        let first = random.below(PAGES);
        let count = 1 + random.below(PAGES - first);
        let _gate = self.world.changing();
        match random.below(6) {
            0 => self.drop_contents(first, count),
            1 => self.map_over(first, count),
            2 => self.move_all(),
            3 => self.protect(first, count, libc::PROT_READ),
            4 => self.protect(first, count, libc::PROT_NONE),
            _ => {}
        }
    }

    fn drop_contents(&mut self, first: usize, count: usize) {
        let start = std::ptr::with_exposed_provenance_mut(self.start + first * PAGE_SIZE);
        // SAFETY: the pages are the slot's; words of them are only used by this thread.
        let done = unsafe { libc::madvise(start, count * PAGE_SIZE, libc::MADV_DONTNEED) };
        assert_eq!(done, 0);
        self.pages[first..first + count].fill(0);
    }

    fn map_over(&mut self, first: usize, count: usize) {
        let address = self.start + first * PAGE_SIZE;
        map_at(address, count, libc::MAP_FIXED, READ_WRITE);
        self.pages[first..first + count].fill(0);
    }

    fn move_all(&mut self) {
        self.bring_home(0, PAGES);
        let place = if self.start == self.area { self.area + PLACE } else { self.area };
        map_at(place, PAGES, libc::MAP_FIXED, READ_WRITE);
        // The old place stays mapped, and empty.
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // A vma that was cut, by mprotect or by a mapping over a part, moves in pieces.
        for page in 0..PAGES {
            let (from, to) = (self.start + page * PAGE_SIZE, place + page * PAGE_SIZE);
            let pointer = std::ptr::with_exposed_provenance_mut::<libc::c_void>;
            // SAFETY: the page is the slot's, and the other place was mapped for it above.
            let moved =
                unsafe { libc::mremap(pointer(from), PAGE_SIZE, PAGE_SIZE, flags, pointer(to)) };
            assert_eq!(moved.addr(), to, "{}", std::io::Error::last_os_error());
        }
        map_at(self.start, PAGES, libc::MAP_FIXED, libc::PROT_NONE);
        self.start = place;
        self.publish();
    }

    /// For a moment; the contents are the same afterwards.
    fn protect(&self, first: usize, count: usize, access: i32) {
        self.bring_home(first, count);
        let start = std::ptr::with_exposed_provenance_mut(self.start + first * PAGE_SIZE);
        let set = |access| {
            // SAFETY: the pages are the slot's, and nobody touches them now but migrations.
            unsafe { libc::mprotect(start, count * PAGE_SIZE, access) }
        };
        assert_eq!(set(access), 0);
        if access == libc::PROT_READ {
            self.compare();
        }
        assert_eq!(set(READ_WRITE), 0);
    }

    /// What the signal engine asks of programs before such changes.
    fn bring_home(&self, first: usize, count: usize) {
        if !self.world.mm.capabilities().contains(Capabilities::EVENTS) {
            let range = self.range(first, count);
            while self.world.mm.make_present(range, false).is_err() {
                std::thread::yield_now();
            }
        }
    }

    fn unmap(self) {
        *self.world.slots[self.number].lock().unwrap() = None;
        let _gate = self.world.changing();
        map_at(self.area, AREA, libc::MAP_FIXED, libc::PROT_NONE);
    }
}

fn map_at(address: usize, pages: usize, flags: i32, access: i32) -> usize {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let start = std::ptr::with_exposed_provenance_mut(address);
    // SAFETY: without MAP_FIXED nothing is replaced; with it, pages of the caller's that nobody refers to.
    let mapped = unsafe { libc::mmap(start, pages * PAGE_SIZE, access, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED);
    mapped.expose_provenance()
}
