//! A program that drops contents, and gets no processor time in the middle of it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::Card;
use hmm_tests::{Region, mm_or_skip, needs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The calling thread runs on processor 0 only, and only when nobody else wants to (with `idle`).
fn stay_on_first_processor(idle: bool) {
    // SAFETY: all zeros is an empty set.
    let mut set = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    // SAFETY: processor 0 lies in the set.
    unsafe { libc::CPU_SET(0, &mut set) };
    // SAFETY: the set is initialised.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    if idle {
        let priority = libc::sched_param { sched_priority: 0 };
        // SAFETY: the parameter is a plain struct.
        unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &priority) };
    }
}

#[test]
fn contents_dropped_by_a_thread_that_seldom_runs_do_not_come_back() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, region) = (Card::new(&mm, 16), Region::new(16));
    region.fill(7);
    assert_eq!(card.all_to_device(region.range()), 16);
    card.to_system(region.range()).unwrap();
    let (stop, round) = (AtomicBool::new(false), AtomicU64::new(0));
    let started = Instant::now();
    let stale = std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                stay_on_first_processor(false);
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let dropper = scope.spawn(|| {
            stay_on_first_processor(true);
            while !stop.load(Ordering::SeqCst) {
                region.fill(7);
                // SAFETY: the region is mapped, and nothing refers to its contents.
                unsafe { libc::madvise(region.as_ptr().cast(), region.len(), libc::MADV_DONTNEED) };
                round.fetch_add(1, Ordering::SeqCst);
                let stale = (0..region.words())
                    .filter(|word| region.word(*word).load(Ordering::Relaxed) != 0)
                    .count();
                if stale > 0 {
                    return stale;
                }
            }
            0
        });
        while started.elapsed() < Duration::from_secs(2) && !dropper.is_finished() {
            card.to_device(region.range()).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        dropper.join().unwrap()
    });
    assert_eq!(stale, 0, "words came back in round {}", round.load(Ordering::SeqCst));
}
