//! No byte is lost to a fork: parent and child see the same data, and each its own changes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use hmm_core::Mm;
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::{Region, mm_or_skip};
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs `work` in a child; true when it says so.
fn in_child(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child only reads memory and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let status = if work() { 0 } else { 1 };
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

fn all_are(region: &Region, value: u64) -> bool {
    (0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == value)
}

fn set_all(region: &Region, value: u64) {
    (0..region.words()).for_each(|word| region.word(word).store(value, Ordering::Relaxed));
}

#[test]
fn a_child_sees_what_was_on_the_device_and_the_parent_goes_on() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(256);
    for round in 1..20 {
        set_all(&region, round);
        assert_eq!(device.migrate(region.range()).unwrap(), 256, "round {round}");
        assert!(in_child(|| {
            let same = all_are(&region, round);
            set_all(&region, 1000);
            same && all_are(&region, 1000) && mm.find_vma(hmm_core::VirtAddr::new(4096)).is_err()
        }));
        assert!(all_are(&region, round));
    }
}

#[test]
fn a_child_can_open_an_mm_of_its_own() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(64);
    set_all(&region, 5);
    device.migrate(region.range()).unwrap();
    assert!(in_child(|| {
        let mine = Mm::current().unwrap();
        let device = SoftDevice::new(&mine, SoftConfig::default()).unwrap();
        let moved = device.migrate(region.range()).unwrap();
        moved > 0 && all_are(&region, 5)
    }));
    assert!(all_are(&region, 5));
}

#[test]
fn forks_while_pages_migrate_lose_nothing() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(512);
    set_all(&region, 77);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                device.migrate(region.range()).unwrap();
            }
        });
        for _ in 0..30 {
            assert!(in_child(|| all_are(&region, 77)));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(all_are(&region, 77));
}
