//! What a program does to its mappings while their pages are on a device: munmap, mremap, MADV_DONTNEED. No stale data,
//! no lost data, device pages freed exactly once.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use hmm_core::{AddrRange, Error, PAGE_SIZE, Residency};
use hmm_soft::{Kernel, SoftConfig, SoftDevice};
use hmm_tests::{Capabilities, Region, hold, mm_or_skip, needs, present};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGE: u64 = PAGE_SIZE as u64;

fn map_at(addr: u64, pages: usize) {
    let (len, flags) =
        (pages * PAGE_SIZE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the caller owns the addresses.
    let mapped = unsafe { libc::mmap(addr as *mut _, len, protection, flags, -1, 0) };
    assert_eq!(mapped.addr() as u64, addr);
}

fn unmap(addr: u64, pages: usize) {
    // SAFETY: the caller owns the addresses.
    assert_eq!(unsafe { libc::munmap(addr as *mut _, pages * PAGE_SIZE) }, 0);
}

fn drop_contents(addr: u64, pages: usize) {
    let len = pages * PAGE_SIZE;
    // SAFETY: the caller owns the addresses.
    assert_eq!(unsafe { libc::madvise(addr as *mut _, len, libc::MADV_DONTNEED) }, 0);
}

fn remap(from: u64, pages: usize, to: u64) {
    let (len, flags) = (pages * PAGE_SIZE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: the caller owns both places.
    let moved = unsafe { libc::mremap(from as *mut _, len, len, flags, to as *mut libc::c_void) };
    assert_eq!(moved.addr() as u64, to);
}

fn word(addr: u64) -> &'static AtomicU64 {
    // SAFETY: the address is mapped and aligned while the caller uses it.
    unsafe { AtomicU64::from_ptr(addr as *mut u64) }
}

fn write_pattern(addr: u64, pages: usize, seed: u64) {
    for page in 0..pages as u64 {
        for at in [0, 8 * 100, PAGE - 8] {
            word(addr + page * PAGE + at).store(seed + page + at, Ordering::Relaxed);
        }
    }
}

fn has_pattern(addr: u64, pages: usize, seed: u64) -> bool {
    (0..pages as u64).all(|page| {
        [0, 8 * 100, PAGE - 8]
            .into_iter()
            .all(|at| word(addr + page * PAGE + at).load(Ordering::Relaxed) == seed + page + at)
    })
}

fn is_zero(addr: u64, pages: usize) -> bool {
    (0..pages as u64 * PAGE / 8).all(|at| word(addr + at * 8).load(Ordering::Relaxed) == 0)
}

fn range(addr: u64, pages: usize) -> AddrRange {
    AddrRange::new(addr, addr + pages as u64 * PAGE).unwrap()
}

#[test]
fn migrated_pages_leave_the_cpu_page_table_and_come_home_with_their_bytes() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(1024);
    write_pattern(region.addr(), 1024, 5);
    assert_eq!(device.migrate(region.range()).unwrap(), 1024);
    assert!((0..1024).all(|page| !present(region.page_addr(page))));
    let mut places = vec![Residency::Unmapped; 1024];
    mm.residency(region.range(), &mut places).unwrap();
    assert!(places.iter().all(|place| matches!(place, Residency::Device(_))));
    assert!(has_pattern(region.addr(), 1024, 5));
    assert!((0..1024).all(|page| present(region.page_addr(page))));
}

#[test]
fn resident_memory_falls_as_pages_leave() {
    let mm = mm_or_skip!();
    const PAGES: usize = 32 << 10; // 128 MiB, well above what idle frames keep
    let memory = (PAGES * PAGE_SIZE) as u64;
    let device = SoftDevice::new(&mm, SoftConfig { memory, ..SoftConfig::default() }).unwrap();
    // The device's memory stands for memory elsewhere, but here it is memory of this process: it must be resident
    // before, so that only the leaving pages change the count.
    let warm = Region::new(PAGES);
    warm.fill(1);
    assert_eq!(device.migrate(warm.range()).unwrap(), PAGES);
    device.bring_home(warm.range()).unwrap();
    drop(warm);
    let region = Region::new(PAGES);
    region.fill(3);
    let before = hmm_tests::resident_bytes();
    assert_eq!(device.migrate(region.range()).unwrap(), PAGES);
    // Half of it at once; the frames that stay for the next migration are given back when nothing moves.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut fell = before.saturating_sub(hmm_tests::resident_bytes());
    assert!(fell > memory * 4 / 10, "at once it fell by {fell} of {memory}");
    while fell < memory * 9 / 10 {
        assert!(Instant::now() < deadline, "resident memory fell by {fell} of {memory}");
        std::thread::sleep(Duration::from_millis(50));
        fell = before.saturating_sub(hmm_tests::resident_bytes());
    }
    assert_eq!(mm.counters().device_pages, PAGES as u64);
}

#[test]
fn unmapped_device_pages_are_freed_and_a_new_mapping_is_clean() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(64);
    for round in 0..50 {
        write_pattern(region.addr(), 64, round);
        assert_eq!(device.migrate(region.range()).unwrap(), 64);
        unmap(region.page_addr(16), 32);
        mm.sync();
        assert_eq!(mm.counters().device_pages, 32);
        let sum = device.run(Kernel::SumU64 { src: region.page_addr(16), count: 1 });
        assert!(matches!(sum, Err(Error::Fault { .. })), "{sum:?}");
        map_at(region.page_addr(16), 32);
        let sum = Kernel::SumU64 { src: region.page_addr(16), count: 32 * PAGE / 8 };
        assert_eq!(device.run(sum).unwrap(), 0);
        assert!(is_zero(region.page_addr(16), 32));
        assert!(has_pattern(region.addr(), 16, round));
    }
    drop(region);
    mm.sync();
    assert_eq!(mm.counters().device_pages, 0);
}

#[test]
fn dropped_contents_read_as_zeros_on_both_sides() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(32);
    for round in 1..20 {
        write_pattern(region.addr(), 32, round);
        device.migrate(region.range()).unwrap();
        drop_contents(region.page_addr(4), 8);
        let sum = Kernel::SumU64 { src: region.page_addr(4), count: 8 * PAGE / 8 };
        assert_eq!(device.run(sum).unwrap(), 0);
        assert!(is_zero(region.page_addr(4), 8));
        assert!(has_pattern(region.addr(), 4, round));
    }
}

#[test]
fn a_moved_mapping_takes_its_device_pages_along() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let (region, other) = (Region::new(600), Region::new(600));
    for round in 0..20 {
        write_pattern(region.addr(), 600, round);
        device.migrate(region.part(100, 400)).unwrap();
        // To an engine that is not told of it, the pages must not be away meanwhile.
        let held = hold(&mm, Capabilities::EVENTS, region.part(50, 500), false);
        remap(region.page_addr(50), 500, other.page_addr(37));
        mm.sync();
        assert_eq!(mm.counters().device_pages, if held.is_none() { 400 } else { 0 });
        map_at(region.page_addr(50), 500);
        assert!(is_zero(region.page_addr(50), 500));
        let first = Kernel::SumU64 { src: other.page_addr(87), count: 1 };
        assert_eq!(device.run(first).unwrap(), round + 100);
        assert!(has_pattern(other.page_addr(37), 500, round + 50));
        map_at(other.page_addr(37), 500);
    }
}

fn slots(count: usize, pages: usize) -> Vec<Region> {
    // The unmapped page behind each keeps the kernel from joining them.
    let region = |_| {
        let region = Region::new(pages + 1);
        unmap(region.page_addr(pages), 1);
        region
    };
    (0..count).map(region).collect()
}

/// One slot of a region that a thread changes in every way, and checks after each change.
fn change_one_slot(addr: u64, spare: u64, pages: usize, rounds: u64, stop: &AtomicBool) {
    let mut seed = addr;
    for round in 0..rounds {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let pattern = seed >> 20;
        write_pattern(addr, pages, pattern);
        std::thread::sleep(Duration::from_micros(seed >> 54));
        match (seed >> 33) % 4 {
            0 => {
                unmap(addr, pages);
                map_at(addr, pages);
                assert!(is_zero(addr, pages), "stale data after munmap, round {round}");
            }
            1 => {
                drop_contents(addr, pages);
                assert!(is_zero(addr, pages), "stale data after MADV_DONTNEED, round {round}");
            }
            2 => {
                remap(addr, pages, spare);
                map_at(addr, pages);
                assert!(has_pattern(spare, pages, pattern), "lost by mremap, round {round}");
                assert!(is_zero(addr, pages), "stale data after mremap, round {round}");
                remap(spare, pages, addr);
                assert!(has_pattern(addr, pages, pattern), "lost on the way back, round {round}");
                map_at(spare, pages);
            }
            _ => assert!(has_pattern(addr, pages, pattern), "lost while migrating, round {round}"),
        }
    }
}

#[test]
fn stress_of_layout_changes_loses_and_keeps_exactly_what_it_should() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    needs!(mm, MOVE);
    const SLOTS: usize = 8;
    const SLOT: usize = 96;
    let long = std::env::var("HMM_STRESS").as_deref() == Ok("long");
    let rounds = if long { 20_000 } else { 400 };
    let device = SoftDevice::new(&mm, SoftConfig { threads: 2, ..SoftConfig::default() }).unwrap();
    // A mapping of its own for each slot: the kernel does not move pieces of several as one.
    let (region, spare) = (slots(SLOTS, SLOT), slots(SLOTS, SLOT));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changers: Vec<_> = (0..2)
            .map(|half| {
                let (region, spare, stop) = (&region, &spare, &stop);
                scope.spawn(move || {
                    for turn in 0..rounds / 10 {
                        let slot = half * SLOTS / 2 + turn as usize % (SLOTS / 2);
                        let (at, to) = (region[slot].addr(), spare[slot].addr());
                        change_one_slot(at, to, SLOT, 10, stop);
                    }
                })
            })
            .collect();
        let started = Instant::now();
        let mut at = 0;
        while changers.iter().any(|thread| !thread.is_finished()) {
            assert!(started.elapsed() < Duration::from_secs(600), "{:?}", mm.counters());
            at = (at + 61) % (SLOTS * (SLOT - 64));
            let (slot, first) = (at % SLOTS, (at / SLOTS) as u64 * PAGE);
            for base in [region[slot].addr() + first, spare[slot].addr() + first] {
                // The range may be cut by a hole at this moment: that is refused, and no harm.
                let _ = device.migrate(range(base, 64));
                let _ = device.run(Kernel::SumU64 { src: base, count: 64 });
            }
        }
        changers.into_iter().for_each(|thread| thread.join().unwrap());
    });
    eprintln!("{:?}\n{:?}", mm.counters(), device.counters());
    drop((region, spare));
    mm.sync();
    assert_eq!(mm.counters().device_pages, 0);
    device.close().unwrap();
}

#[test]
fn first_touches_of_a_vma_with_device_pages_read_zeros_and_keep_stores() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    const PAGES: usize = 3000;
    let region = Region::new(PAGES);
    write_pattern(region.addr(), 8, 9);
    assert_eq!(device.migrate(region.part(0, 8)).unwrap(), 8);
    let before = mm.counters().zero_faults;
    for page in 8..PAGES {
        let first = word(region.page_addr(page));
        if page % 3 == 0 {
            assert_eq!(first.load(Ordering::Relaxed), 0);
        }
        first.store(page as u64, Ordering::Relaxed);
    }
    assert!(
        (8..PAGES).all(|page| word(region.page_addr(page)).load(Ordering::Relaxed) == page as u64)
    );
    assert!(has_pattern(region.addr(), 8, 9));
    // A sweep is answered in runs, not page by page.
    assert!(mm.counters().zero_faults - before < PAGES as u64 / 4);
}
