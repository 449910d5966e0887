//! The CPU's side: touches bring pages home, and what the process does to its mappings reaches the device.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{POLICIES, Region, WORDS, device, hold, mm, sum_of};
use hmm_core::{Capabilities, PAGE_SIZE, Residency};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

#[test]
fn touched_pages_come_home_with_the_right_bytes() {
    let mm = mm();
    let device = device(&mm, 256, Policy::OnRequest);
    let region = Region::counting(200, 7);
    assert_eq!(device.migrate(region.range()).unwrap(), 200);
    assert!(region.residency(&mm).iter().all(|page| matches!(page, Residency::Device(_))));
    // Scattered, by reads and by writes.
    for page in [150, 3, 77, 199, 0] {
        assert_eq!(region.get(page * WORDS + 5), (page * WORDS) as u64 + 12);
        region.set((page ^ 1) * WORDS + 9, 1);
    }
    let after = region.pages_on_devices(&mm);
    assert!((150..=192).contains(&after), "{after}");
    for page in [150, 3, 77, 199, 0] {
        region.set((page ^ 1) * WORDS + 9, ((page ^ 1) * WORDS + 9) as u64 + 7);
    }
    assert!(region.all_words().iter().enumerate().all(|(index, word)| *word == index as u64 + 7));
    assert_eq!(region.pages_on_devices(&mm), 0);
    assert_eq!(device.counters().pages_to_system, 200);
    device.close().unwrap();
}

#[test]
fn sequential_touches_bring_neighbours() {
    let mm = mm();
    let config = SoftConfig { fault_around: 64, ..SoftConfig::default() };
    let device = SoftDevice::new(&mm, config).unwrap();
    let region = Region::counting(1024, 0);
    assert_eq!(device.migrate(region.range()).unwrap(), 1024);
    assert!((0..1024).all(|page| region.get(page * WORDS) == (page * WORDS) as u64));
    let counters = device.counters();
    assert_eq!(counters.pages_to_system, 1024);
    assert!(counters.cpu_faults < 100, "{counters:?}");
    device.close().unwrap();
}

#[test]
fn stores_of_the_device_are_seen_by_the_cpu_and_the_other_way_round() {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 64, policy);
        let region = Region::counting(20, 0);
        let add = Kernel::AddU64 {
            addr: region.address(),
            count: region.words() as u64,
            stride: 8,
            value: 1,
        };
        for round in 0..20 {
            if policy != Policy::Never {
                device.migrate(region.range()).unwrap();
            }
            device.run(add).unwrap();
            for page in 0..region.pages() {
                let index = page * WORDS + round;
                region.set(index, region.get(index) + 100);
            }
        }
        for index in 0..region.words() {
            let bonus = if index % WORDS < 20 { 100 } else { 0 };
            assert_eq!(region.get(index), index as u64 + 20 + bonus, "{policy:?} {index}");
        }
        device.close().unwrap();
    }
}

#[test]
fn system_calls_wait_for_migrated_pages() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::counting(8, 1);
    assert_eq!(device.migrate(region.range()).unwrap(), 8);
    let (mut from, to) = std::io::pipe().unwrap();
    let held = hold(&mm, Capabilities::KERNEL_FAULTS, &region);
    region.write_to(&to);
    drop(held);
    let mut back = vec![0; 8 * PAGE_SIZE];
    from.read_exact(&mut back).unwrap();
    assert_eq!(back, region.all_bytes());
    assert_eq!(device.migrate(region.range()).unwrap(), 8);
    let mut out = vec![0; 100];
    assert_eq!(mm.read(region.page(3).start(), &mut out).unwrap(), 100);
    assert_eq!(out, region.all_bytes()[3 * PAGE_SIZE..3 * PAGE_SIZE + 100]);
    device.close().unwrap();
}

#[test]
fn dropped_contents_are_gone_on_the_device_too() {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 64, policy);
        let region = Region::counting(16, 1);
        if policy != Policy::Never {
            device.migrate(region.range()).unwrap();
        }
        let all = device.run(sum_of(&region)).unwrap();
        region.advise(4, 8, libc::MADV_DONTNEED);
        let kept = |index: usize| !(4..12).contains(&(index / WORDS));
        let expected: u64 =
            (0..region.words()).filter(|index| kept(*index)).map(|index| index as u64 + 1).sum();
        assert!(expected < all);
        assert_eq!(device.run(sum_of(&region)).unwrap(), expected, "{policy:?}");
        assert_eq!(region.all_words().iter().sum::<u64>(), expected);
        device.close().unwrap();
    }
}

#[test]
fn a_new_mapping_at_an_old_address_is_clean() {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 64, policy);
        for round in 0..10 {
            let region = Region::counting(16, 1 << 30);
            if policy != Policy::Never {
                device.migrate(region.range()).unwrap();
            }
            device.run(sum_of(&region)).unwrap();
            region.replace();
            region.set(3, round);
            assert_eq!(device.run(sum_of(&region)).unwrap(), round, "{policy:?}");
            assert_eq!(region.all_words().iter().sum::<u64>(), round);
        }
        device.close().unwrap();
    }
}

#[test]
fn moved_mappings_keep_their_contents() {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 64, policy);
        let (region, place) = (Region::counting(12, 1), Region::new(12));
        if policy != Policy::Never {
            device.migrate(region.range()).unwrap();
        }
        let sum = device.run(sum_of(&region)).unwrap();
        let held = hold(&mm, Capabilities::EVENTS, &region);
        region.move_onto(&place);
        drop(held);
        assert_eq!(device.run(sum_of(&place)).unwrap(), sum, "{policy:?}");
        assert_eq!(place.all_words().iter().sum::<u64>(), sum);
        device.close().unwrap();
    }
}

#[test]
fn unmapping_under_a_running_kernel_ends_it_with_an_error() {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 512, policy);
        let region = Region::counting(256, 1);
        let kernel = sum_of(&region);
        let job = device.submit(Kernel::AddU64 {
            addr: region.address(),
            count: region.words() as u64,
            stride: 8,
            value: 1,
        });
        drop(region);
        match job.unwrap().wait(Duration::from_secs(20)) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.errno(), libc::EFAULT, "{policy:?} {error}"),
        }
        assert_eq!(device.run(kernel).unwrap_err().errno(), libc::EFAULT);
        device.close().unwrap();
    }
}

#[test]
fn layout_changes_while_kernels_and_migrations_run() {
    let mm = mm();
    let device = device(&mm, 128, Policy::OnTouch);
    let steady = Region::counting(64, 5);
    let expected = steady.all_words().iter().sum::<u64>();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let region = Region::counting(16, 1);
                let _ = device.migrate(region.range());
                region.advise(3, 5, libc::MADV_DONTNEED);
                assert_eq!(region.get(4 * WORDS), 0);
                assert_eq!(region.get(9 * WORDS), 9 * WORDS as u64 + 1);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            assert_eq!(device.run(sum_of(&steady)).unwrap(), expected);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(steady.all_words().iter().sum::<u64>(), expected);
    device.close().unwrap();
}

#[test]
fn migrated_pages_leave_the_cpus_page_table_and_rss() {
    let mm = mm();
    // More than the core keeps as idle frames.
    let pages = 160 << 8;
    let device = device(&mm, pages, Policy::OnRequest);
    let region = Region::counting(pages, 1);
    let before = anonymous_rss();
    assert_eq!(device.migrate(region.range()).unwrap(), pages);
    assert_eq!(region.pages_in_core(), 0);
    assert!(anonymous_rss() + 20_000 < before, "{} pages before, {} now", before, anonymous_rss());
    device.close().unwrap();
    assert_eq!(region.get(512), 513);
}

/// Pages of anonymous memory that the kernel counts for this process.
fn anonymous_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 4
}
