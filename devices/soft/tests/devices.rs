//! Several devices, several jobs, and CPU threads on the same memory.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Region, WORDS, device, device_with_threads, mm, scramble, sum_of};
use hmm_core::AddrRange;
use hmm_soft::{Kernel, Policy};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn two_devices_share_overlapping_ranges() {
    let mm = mm();
    let (one, other) = (device(&mm, 64, Policy::OnRequest), device(&mm, 64, Policy::OnTouch));
    let region = Region::counting(40, 0);
    assert_eq!(one.migrate(region.range().sub(0, 30)).unwrap(), 30);
    assert_eq!(other.migrate(region.range().sub(20, 20)).unwrap(), 20);
    assert_eq!(region.pages_on_devices(&mm), 40);
    // Only its own pages.
    assert_eq!(one.bring_home(region.range()).unwrap(), 20);
    let sum = |add: u64| (0..region.words() as u64).map(|index| index + add).sum::<u64>();
    let add = Kernel::AddU64 {
        addr: region.address(),
        count: region.words() as u64,
        stride: 8,
        value: 1,
    };
    for round in 0..10 {
        assert_eq!(one.run(sum_of(&region)).unwrap(), sum(2 * round));
        one.run(add).unwrap();
        other.run(add).unwrap();
        assert_eq!(other.run(sum_of(&region)).unwrap(), sum(2 * round + 2));
        one.migrate(region.range().sub(round as usize, 8)).unwrap();
    }
    one.close().unwrap();
    assert_eq!(other.run(sum_of(&region)).unwrap(), sum(20));
    other.close().unwrap();
    assert!(region.all_words().iter().enumerate().all(|(at, word)| *word == at as u64 + 20));
}

#[test]
fn atomic_adds_of_two_jobs_lose_nothing() {
    let mm = mm();
    let device = device_with_threads(&mm, 16, 2);
    let region = Region::new(2);
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (device, region) = (&device, &region);
            scope.spawn(move || {
                for round in 0..2000 {
                    let addr = region.word_address((scramble(round) % 2) as usize * WORDS);
                    device.run(Kernel::AtomicAddU64 { addr, value: 1 + thread }).unwrap();
                }
            });
        }
    });
    assert_eq!(region.get(0) + region.get(WORDS), 2000 + 4000);
    device.close().unwrap();
}

#[test]
fn atomic_adds_of_the_device_and_the_cpu_lose_nothing() {
    let mm = mm();
    let device = device_with_threads(&mm, 16, 2);
    let region = Region::new(1);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let addr = region.word_address(8);
                    device.run(Kernel::AtomicAddU64 { addr, value: 1 }).unwrap();
                }
            });
        }
        for _ in 0..2000 {
            region.word(8).fetch_add(1, Ordering::Relaxed);
            std::thread::yield_now();
        }
    });
    assert_eq!(region.get(8), 3000);
    device.close().unwrap();
}

#[test]
fn atomic_adds_of_two_devices_lose_nothing() {
    let mm = mm();
    let devices = [device(&mm, 4, Policy::OnRequest), device(&mm, 4, Policy::OnTouch)];
    let region = Region::new(1);
    std::thread::scope(|scope| {
        for device in &devices {
            let addr = region.word_address(3);
            scope.spawn(move || {
                for _ in 0..200 {
                    device.run(Kernel::AtomicAddU64 { addr, value: 1 }).unwrap();
                }
            });
        }
    });
    assert_eq!(region.get(3), 400);
    devices.iter().for_each(|device| device.close().unwrap());
}

/// CPU threads and jobs count up words of their own, on pages that everyone uses, while pages move both ways.
fn count_together(policy: Policy, pages: usize, rounds: u64) {
    let mm = mm();
    let config =
        hmm_soft::SoftConfig { memory: 48 * 4096, policy, threads: 2, ..Default::default() };
    let device = hmm_soft::SoftDevice::new(&mm, config).unwrap();
    let region = Region::new(pages);
    let stop = AtomicBool::new(false);
    let jobs = |lane: usize| Kernel::AddU64 {
        addr: region.word_address(lane),
        count: pages as u64 * WORDS as u64 / 64,
        stride: 8 * 64,
        value: 1,
    };
    std::thread::scope(|scope| {
        for lane in [0, 1] {
            let region = &region;
            scope.spawn(move || {
                for _ in 0..rounds {
                    for index in (lane..region.words()).step_by(64) {
                        region.set(index, region.get(index) + 1);
                    }
                }
            });
        }
        let mover = scope.spawn(|| {
            let mut number = 0;
            while policy != Policy::Never && !stop.load(Ordering::Relaxed) {
                number += 1;
                let first = scramble(number) as usize % (pages - 8);
                let part: AddrRange = region.range().sub(first, 8);
                device.migrate(part).unwrap();
                if number % 3 == 0 {
                    device.bring_home(part).unwrap();
                }
            }
        });
        for _ in 0..rounds {
            let [one, other] = [2, 3].map(|lane| device.submit(jobs(lane)).unwrap());
            one.wait(Duration::from_secs(60)).unwrap();
            other.wait(Duration::from_secs(60)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        mover.join().unwrap();
    });
    device.close().unwrap();
    for index in 0..region.words() {
        let expected = if index % 64 < 4 { rounds } else { 0 };
        assert_eq!(region.get(index), expected, "{policy:?}: word {index}");
    }
}

#[test]
fn counters_end_right_with_policy_never() {
    count_together(Policy::Never, 64, 20);
}

#[test]
fn counters_end_right_with_policy_on_request() {
    count_together(Policy::OnRequest, 64, 20);
}

#[test]
fn counters_end_right_with_policy_on_touch() {
    count_together(Policy::OnTouch, 64, 20);
}
