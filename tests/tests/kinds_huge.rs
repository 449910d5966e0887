//! Transparent huge pages: whole units of 2 MiB leave and come home as they are, where the engine moves pages.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, on_device};
use hmm_core::{LEAF_PAGES, LEAF_SIZE};
use hmm_tests::{mm_or_skip, needs, skip};
use kind::{Memory, PRIVATE, READ_WRITE, check_under_writes};
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

/// Memory of whole units of 2 MiB, in huge pages if the kernel has any.
struct Huge {
    memory: Memory,
    _around: Memory,
}

impl Huge {
    fn new(units: usize) -> Self {
        let around = Memory::map((units + 1) * LEAF_PAGES, READ_WRITE, PRIVATE, -1);
        let start = around.addr().next_multiple_of(LEAF_SIZE);
        let memory = Memory::lent(start, units * LEAF_PAGES);
        memory.advise(libc::MADV_HUGEPAGE);
        for page in (0..memory.pages()).step_by(LEAF_PAGES) {
            memory.word(page, 0).store(1, Ordering::Relaxed);
        }
        memory.fill();
        Self { memory, _around: around }
    }

    /// How many units are one huge page each, as the kernel says.
    fn count(&self) -> usize {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut inside, mut kilobytes) = (false, 0);
        let (first, end) = (self.memory.addr(), self.memory.addr() + self.memory.len() as u64);
        for line in text.lines() {
            let bounds = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            if let Some((start, _)) = bounds
                && let Some(start) = number(start)
            {
                inside = (first..end).contains(&start) || {
                    let last = bounds.and_then(|(_, last)| number(last)).unwrap();
                    start < first && last > first
                };
            }
            if let (true, Some(rest)) = (inside, line.strip_prefix("AnonHugePages:")) {
                kilobytes += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        (kilobytes << 10) as usize / LEAF_SIZE as usize
    }
}

#[test]
fn whole_huge_pages_leave_and_come_home_huge() {
    let mm = mm_or_skip!();
    needs!(mm, MOVE);
    // As many as keep their frames when nothing migrates for a moment.
    const UNITS: usize = hmm_core::limits::RESTING_BLOCKS;
    let huge = Huge::new(UNITS);
    let memory = &huge.memory;
    if huge.count() < UNITS {
        skip!("the kernel made {} huge pages of {UNITS}", huge.count());
    }
    let card = Card::new(&mm, memory.pages());
    for round in 0..6 {
        assert_eq!(card.to_device(memory.range()).unwrap(), memory.pages(), "round {round}");
        assert_eq!(huge.count(), 0);
        assert_eq!(card.to_system(memory.range()).unwrap(), memory.pages());
        assert_eq!(huge.count(), UNITS, "round {round}");
        assert_eq!(memory.wrong_pages(), 0);
    }
}

/// Whether the kernel tells which pages are huge (`PAGEMAP_SCAN`, which kernels that move pages have).
fn tells_huge_pages() -> bool {
    const SCAN: libc::Ioctl = 0xc060_6610;
    let Ok(pagemap) = std::fs::File::open("/proc/self/pagemap") else { return false };
    let mut nothing = [0_u64; 12];
    // SAFETY: the kernel reads and writes a structure of this size; it asks for nothing.
    unsafe { libc::ioctl(pagemap.as_raw_fd(), SCAN, nothing.as_mut_ptr()) };
    std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

#[test]
fn huge_pages_stay_huge_after_frames_were_used_page_by_page() {
    let mm = mm_or_skip!();
    needs!(mm, MOVE);
    if !tells_huge_pages() {
        skip!("there is no PAGEMAP_SCAN to tell huge pages by");
    }
    // As many as keep their frames when nothing migrates for a moment.
    const UNITS: usize = hmm_core::limits::RESTING_BLOCKS;
    // Small pages leave blocks of frames with page tables, and with pages here and there.
    let small = Memory::filled(2 * LEAF_PAGES);
    let card = Card::new(&mm, (UNITS + 2) * LEAF_PAGES);
    for _ in 0..3 {
        card.to_device(small.range()).unwrap();
        assert_eq!(small.wrong_pages(), 0);
        card.to_device(small.part(100, 300)).unwrap();
        card.to_system(small.range()).unwrap();
    }
    let huge = Huge::new(UNITS);
    let memory = &huge.memory;
    if huge.count() < UNITS {
        skip!("the kernel made {} huge pages of {UNITS}", huge.count());
    }
    for round in 0..4 {
        assert_eq!(card.to_device(memory.range()).unwrap(), memory.pages(), "round {round}");
        assert_eq!(card.to_system(memory.range()).unwrap(), memory.pages());
        assert_eq!(huge.count(), UNITS, "round {round}");
        assert_eq!(memory.wrong_pages(), 0);
        card.to_device(small.part(0, 77)).unwrap();
        assert_eq!(small.wrong_pages(), 0);
    }
}

#[test]
fn parts_of_huge_pages_migrate_with_their_data() {
    let mm = mm_or_skip!();
    let huge = Huge::new(2);
    let memory = &huge.memory;
    let card = Card::new(&mm, memory.pages());
    for (first, count) in [(3, 1), (500, 24), (100, 300), (0, 512), (511, 513)] {
        assert_eq!(card.all_to_device(memory.part(first, count)), count);
        assert_eq!(memory.wrong_pages(), 0);
        assert_eq!(card.all_to_device(memory.part(first, count)), count);
        card.to_system(memory.range()).unwrap();
        assert_eq!(memory.wrong_pages(), 0);
        assert_eq!(on_device(&mm, memory.range()), 0);
    }
    check_under_writes(&card, memory);
}
