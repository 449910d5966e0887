//! What a child gets of pages that are away: a copy, or no mapping; never zeros. And nothing of it stays in the parent.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod children;

use children::{Child, Ended, fork_and};
use hmm_core::{AddrRange, Error, ForkMode, Mm};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::{Region, mm_or_skip, needs, skip};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The mm in a mode, and a device.
fn device_in(mm: &Arc<Mm>, mode: ForkMode) -> Arc<SoftDevice> {
    mm.set_fork_mode(mode).unwrap();
    assert_eq!(mm.fork_mode(), mode);
    SoftDevice::new(mm, SoftConfig::default()).unwrap()
}

fn set_all(region: &Region, value: u64) {
    (0..region.words())
        .for_each(|word| region.word(word).store(value + word as u64, Ordering::Relaxed));
}

fn all_are(region: &Region, value: u64) -> bool {
    let is_right = |word| region.word(word).load(Ordering::Relaxed) == value + word as u64;
    (0..region.words()).all(is_right)
}

/// The word at the start of a page.
fn first_word(region: &Region, page: usize) -> u64 {
    region.word(page * 512).load(Ordering::Relaxed)
}

/// Every line of this process's maps that lies in a range: the cuts that the kernel made.
fn mappings_in(range: AddrRange) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let within = |line: &&str| {
        let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let bound = |text| u64::from_str_radix(text, 16).unwrap();
        bound(start) < range.end().get() && bound(end) > range.start().get()
    };
    maps.lines().filter(within).map(String::from).collect()
}

/// Whether a part of a range is left out of children (`dc` in smaps).
fn is_left_out(range: AddrRange) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut is_within = false;
    let mut found = false;
    for line in smaps.lines() {
        let bounds = line.split(' ').next().and_then(|word| word.split_once('-'));
        let bound = |text| u64::from_str_radix(text, 16);
        if let Some((Ok(start), Ok(end))) = bounds.map(|(start, end)| (bound(start), bound(end))) {
            is_within = start < range.end().get() && end > range.start().get();
        }
        found |= is_within && line.starts_with("VmFlags") && line.contains(" dc");
    }
    found
}

#[test]
fn pages_on_a_device_are_not_copied_and_the_rest_is() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(64);
    set_all(&region, 9);
    assert_eq!(device.migrate(region.part(16, 8)).unwrap(), 8);
    let before = mappings_in(region.range());
    for page in [16, 20, 23] {
        assert_eq!(
            fork_and(|| first_word(&region, page) != 0),
            Ended::By(libc::SIGSEGV),
            "page {page}"
        );
    }
    for page in [0, 15, 24, 63] {
        assert_eq!(fork_and(|| first_word(&region, page) == 9 + page as u64 * 512), Ended::Well);
    }
    assert_eq!(mm.counters().device_pages, 8, "nothing came home for it");
    assert_eq!(mappings_in(region.range()), before, "the cuts are joined again");
    assert!(!is_left_out(region.range()));
    assert!(all_are(&region, 9));
}

#[test]
fn children_get_everything_again_once_it_is_home() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(128);
    set_all(&region, 3);
    assert_eq!(device.migrate(region.range()).unwrap(), 128);
    assert_eq!(fork_and(|| true), Ended::Well);
    device.bring_home(region.range()).unwrap();
    assert_eq!(fork_and(|| all_are(&region, 3)), Ended::Well);
    mm.set_fork_mode(ForkMode::Home).unwrap();
    assert_eq!(device.migrate(region.range()).unwrap(), 128);
    assert_eq!(fork_and(|| all_are(&region, 3)), Ended::Well);
    assert_eq!(mm.counters().device_pages, 0);
}

#[test]
fn what_the_program_left_out_stays_left_out() {
    let mm = mm_or_skip!();
    if std::fs::OpenOptions::new().write(true).open("/proc/self/mem").is_err() {
        skip!(
            "without /proc/self/mem a page comes home as a new mapping, without the program's advice"
        );
    }
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(32);
    set_all(&region, 1);
    // SAFETY: only children miss the region.
    let result =
        unsafe { libc::madvise(region.as_ptr().cast(), region.len(), libc::MADV_DONTFORK) };
    assert_eq!(result, 0);
    assert_eq!(device.migrate(region.part(4, 4)).unwrap(), 4);
    assert_eq!(fork_and(|| first_word(&region, 0) == 1), Ended::By(libc::SIGSEGV));
    assert_eq!(fork_and(|| first_word(&region, 5) == 1), Ended::By(libc::SIGSEGV));
    assert!(is_left_out(region.part(4, 4)), "the program said so, and did not take it back");
    assert!(all_are(&region, 1));
}

#[test]
fn a_fork_that_fails_leaves_nothing_behind() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(64);
    set_all(&region, 4);
    device.migrate(region.part(8, 40)).unwrap();
    let before = mappings_in(region.range());
    if let Err(reason) = children::forbid_forks() {
        skip!("forks cannot be made to fail here: {reason}");
    }
    // SAFETY: a child would leave at once; there is none.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    assert_eq!(child, -1);
    assert_eq!(mappings_in(region.range()), before);
    assert!(!is_left_out(region.range()));
    assert_eq!(device.migrate(region.part(0, 8)).unwrap(), 8, "pages may leave again");
    assert!(all_are(&region, 4));
}

#[test]
fn many_scattered_pages_are_left_out_one_by_one() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(2048);
    set_all(&region, 6);
    for page in (0..2048).step_by(8) {
        device.migrate(region.part(page, 1)).unwrap();
    }
    // Leaves that are hidden as a whole come home.
    let away = mm.counters().device_pages;
    assert!(away > 0);
    let home_or_killed = fork_and(|| first_word(&region, 8) == 6 + 8 * 512);
    assert!(matches!(home_or_killed, Ended::Well | Ended::By(libc::SIGSEGV)));
    let at_home = |page: &usize| !page.is_multiple_of(8);
    let is_right = |page| first_word(&region, page) == 6 + page as u64 * 512;
    assert_eq!(fork_and(|| (0..2048).filter(at_home).all(is_right)), Ended::Well);
    assert!(!is_left_out(region.range()));
    assert!(all_are(&region, 6));
}

#[test]
fn forks_while_pages_come_and_go_never_show_zeros() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::DontCopy);
    let region = Region::new(64);
    set_all(&region, 1 << 40);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                device.migrate(region.range()).unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert!(all_are(&region, 1 << 40));
            }
        });
        for round in 0..40 {
            let page = round % 64;
            let ended = fork_and(|| first_word(&region, page) == (1 << 40) + page as u64 * 512);
            assert!(matches!(ended, Ended::Well | Ended::By(libc::SIGSEGV)), "{ended:?}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(all_are(&region, 1 << 40));
    assert!(!is_left_out(region.range()));
}

/// Where a mapping moves to in the moment between the library's fork handler and the fork.
static MOVES: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

extern "C" fn move_now() {
    let [from, to] = [&MOVES[0], &MOVES[1]].map(|place| place.load(Ordering::Relaxed));
    if from != 0 {
        children::move_mapping_to(from, 16 * 4096, to);
    }
}

#[test]
fn a_mapping_that_moves_during_a_fork_is_whole_for_the_next_child() {
    // Handlers run in the opposite order: this one after the library's.
    // SAFETY: the handler moves a mapping of this test's own.
    assert_eq!(unsafe { libc::pthread_atfork(Some(move_now), None, None) }, 0);
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let device = device_in(&mm, ForkMode::DontCopy);
    let (region, room) = (Region::new(16), Region::new(16));
    set_all(&region, 5);
    device.migrate(region.range()).unwrap();
    MOVES[0].store(region.addr(), Ordering::Relaxed);
    MOVES[1].store(room.addr(), Ordering::Relaxed);
    assert_eq!(fork_and(|| first_word(&room, 0) == 5), Ended::By(libc::SIGSEGV));
    MOVES[0].store(0, Ordering::Relaxed);
    assert!(!is_left_out(room.range()));
    assert!(all_are(&room, 5));
    assert_eq!(fork_and(|| all_are(&room, 5)), Ended::Well);
    // The region unmaps it again.
    children::move_mapping_to(room.addr(), 16 * 4096, region.addr());
    drop(room);
}

#[test]
fn the_parent_migrates_again_while_the_child_lives() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::Home);
    let region = Region::new(256);
    set_all(&region, 100);
    device.migrate(region.range()).unwrap();
    let child = Child::start(|go| {
        let same = all_are(&region, 100);
        go.wait();
        // The parent changed its copy meanwhile.
        let still = all_are(&region, 100);
        set_all(&region, 300);
        same && still && all_are(&region, 300)
    });
    // Its pages are shared with the child by now: a store makes them private.
    assert_eq!(device.migrate(region.range()).unwrap(), 256, "promise 69");
    set_all(&region, 200);
    assert_eq!(device.migrate(region.range()).unwrap(), 256);
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert!(all_are(&region, 200));
    device.migrate(region.range()).unwrap();
    assert!(all_are(&region, 200));
}

#[test]
fn grandchildren_open_mms_of_their_own() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::Home);
    let region = Region::new(64);
    set_all(&region, 1);
    device.migrate(region.range()).unwrap();
    let ended = fork_and(|| {
        let refused = device.migrate(region.range());
        let mine = Mm::current().unwrap();
        let own = SoftDevice::new(&mine, SoftConfig::default()).unwrap();
        set_all(&region, 2);
        let moved = own.migrate(region.range()).unwrap();
        let grandchild = fork_and(|| {
            let mine = Mm::current().unwrap();
            let own = SoftDevice::new(&mine, SoftConfig::default()).unwrap();
            let same = all_are(&region, 2);
            set_all(&region, 3);
            let moved = own.migrate(region.range()).unwrap();
            same && moved > 0 && all_are(&region, 3) && mine.close().is_ok()
        });
        // What the parent opened can be let go of here: it is the parent's.
        drop(device.close());
        matches!(refused, Err(Error::Gone { .. }))
            && moved > 0
            && grandchild == Ended::Well
            && all_are(&region, 2)
            && own.close().is_ok()
            && mine.close().is_ok()
    });
    assert_eq!(ended, Ended::Well);
    assert!(all_are(&region, 1));
}

#[test]
fn the_parent_closes_its_mm_while_a_child_lives() {
    let mm = mm_or_skip!();
    let device = device_in(&mm, ForkMode::Home);
    let region = Region::new(64);
    set_all(&region, 8);
    device.migrate(region.range()).unwrap();
    let child = Child::start(|go| {
        go.wait();
        all_are(&region, 8)
    });
    device.close().unwrap();
    mm.close().unwrap();
    drop(Region::new(16));
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert!(all_are(&region, 8));
}
