//! Calls to the kernel, allocations and callbacks fail now and then: no byte is lost, no device page leaks, and when the
//! failures end everything works again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::Card;
use hmm_core::PAGE_SIZE;
use hmm_core::inject::{self, Point};
use hmm_tests::{Region, mm_or_skip};
use std::sync::atomic::{AtomicBool, Ordering};

const PAGES: usize = 96;
const WORDS: usize = PAGE_SIZE / 8;
const ROUNDS: u64 = 60;
/// One word in so many is written and compared.
const STEP: usize = 61;

fn word_of(round: u64, word: usize) -> u64 {
    round << 32 | word as u64
}

/// Writes every page, sends what can leave to the device, brings a part home, drops a part, and compares all of it.
fn one_round(card: &Card, region: &Region, round: u64) {
    let samples = || (0..region.words()).step_by(STEP);
    samples().for_each(|word| region.word(word).store(word_of(round, word), Ordering::Relaxed));
    // What fails leaves pages where they are.
    let _ = card.to_device(region.range());
    let _ = card.to_system(region.part(PAGES / 2, PAGES / 8));
    let dropped = region.part(PAGES / 4, 4);
    let start: *mut libc::c_void = dropped.start().as_ptr().cast();
    // SAFETY: the pages are the region's, and nothing refers to their contents.
    unsafe { libc::madvise(start, dropped.len() as usize, libc::MADV_DONTNEED) };
    for word in samples() {
        let is_dropped = dropped.contains(hmm_core::VirtAddr::new(region.page_addr(word / WORDS)));
        let expected = if is_dropped { 0 } else { word_of(round, word) };
        let seen = region.word(word).load(Ordering::Relaxed);
        assert_eq!(seen, expected, "word {word} of round {round}");
    }
}

/// Rounds under these rules, with a thread that counts in a page of its own all the while; then without any.
fn survives(points: &[Point], rules: &str) {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, PAGES + 1).pinned(), Region::new(PAGES));
    let counted = Region::new(1);
    inject::configure(rules).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let counter = scope.spawn(|| {
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                counted.word(7).fetch_add(1, Ordering::Relaxed);
            }
            count
        });
        for round in 1..=ROUNDS {
            let _ = card.to_device(counted.range());
            one_round(&card, &region, round);
        }
        stop.store(true, Ordering::Relaxed);
        assert_eq!(counter.join().unwrap(), counted.word(7).load(Ordering::Relaxed));
    });
    let failures: u64 = points.iter().map(|point| inject::failures(*point)).sum();
    eprintln!("{rules}: {failures} failures, {:?}", mm.counters());
    inject::configure("").unwrap();
    assert_eq!(card.all_to_device(region.range()), PAGES);
    assert!(region.word(0).load(Ordering::Relaxed) == word_of(ROUNDS, 0));
    mm.close().unwrap();
    assert_eq!((card.devmem.in_use(), card.driver.free_pages()), (0, PAGES + 1));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
    assert_eq!(mm.counters().poisoned, 0);
}

macro_rules! survivals {
    ($($name:ident: $rules:literal, [$($point:ident),*];)*) => {
        $(#[test] fn $name() { survives(&[$(Point::$point),*], $rules); })*
    };
}

survivals! {
    moves_that_are_busy: "move=EBUSY/3", [Move];
    moves_that_must_be_tried_again: "move=EAGAIN/3", [Move];
    moves_without_memory: "move=ENOMEM/3", [Move];
    moves_of_pages_that_are_gone: "move=ENOENT/5", [Move];
    copies_that_must_be_tried_again: "copy=EAGAIN/3", [Copy];
    copies_without_memory: "copy=ENOMEM/3", [Copy];
    zero_pages_without_memory: "zero=ENOMEM/3", [Zero];
    protection_that_must_be_tried_again: "wp=EAGAIN/3", [WriteProtect];
    registrations_without_memory: "register=ENOMEM/2", [Register];
    mprotect_without_mappings: "mprotect=ENOMEM/4", [Protect];
    mremap_without_mappings: "mremap=ENOMEM/4", [Remap];
    proc_mem_that_fails: "mem=EIO/4", [Memory];
    populating_without_memory: "populate=ENOMEM/3", [Populate];
    lookups_of_mappings_that_fail: "mappings=ENOMEM/5", [Mappings];
    lookups_of_pages_that_fail: "scan=ENOMEM/3", [Scan];
    no_memory_for_the_library: "arena/3", [Arena];
    no_frames: "frames/3", [Frames];
    drivers_without_memory: "fault/3", [Fault];
    drivers_that_leave_pages_out: "alloc/3", [Allocate];
    everything_fails_now_and_then: "all/20", [Move, Copy, Protect, Memory, Mappings, Arena, Frames, Fault];
}
