//! hmm.txt section 4, mirrors: who is told of what, and when.

use crate::common::{WORDS, drop_contents, filled, get, in_child, in_fork, is_whole, set, unmap};
use crate::driver::{Card, is_child, on_device};
use crate::gpu::Gpu;
use hmm_core::{Access, AddrRange, PAGE_SIZE};
use hmm_tests::{Capabilities, Region, lack, mm_or_skip, present};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

#[test]
fn promise_20_each_of_several_mirrors_hears_everything() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    let gpus: Vec<_> = (0..4).map(|_| Gpu::new(&mm, region.range())).collect();
    let all_heard = |range| gpus.iter().all(|gpu| gpu.table.heard_of(range));
    assert!(!gpus.iter().any(|gpu| gpu.table.heard_of(region.range())));
    assert_eq!(card.all_to_device(region.range()), 16);
    assert!(all_heard(region.range()), "to the device");
    assert_eq!(get(&region, 0), 0);
    assert!(all_heard(region.part(0, 1)), "a touch");
    card.to_system(region.part(4, 4)).unwrap();
    assert!(all_heard(region.part(4, 4)), "home");
    drop_contents(&region, 8, 4);
    mm.sync();
    assert!(all_heard(region.part(8, 4)), "dropped");
    unmap(&region, 12, 4);
    mm.sync();
    assert!(all_heard(region.part(12, 4)), "unmapped");
}

fn move_pages(region: &Region, first: usize, count: usize, to: &Region) {
    let (from, len) = (region.page_addr(first) as *mut libc::c_void, count * PAGE_SIZE);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both places belong to the test, and nothing refers to their contents.
    let moved = unsafe { libc::mremap(from, len, len, flags, to.as_ptr()) };
    assert_ne!(moved, libc::MAP_FAILED);
}

#[test]
fn promise_21_every_change_is_told() {
    let mm = mm_or_skip!();
    let (card, region, place) = (Card::new(&mm, 32), filled(32), Region::new(32));
    let gpu = Gpu::of(&card, region.range());
    gpu.map(region.range(), Access::Read).unwrap();
    let heard = |range: AddrRange, what: &str| {
        mm.sync();
        assert!(gpu.table.heard_of(range), "{what}");
    };
    // Where nobody reports what the program does, it is found out of pages that are away.
    let reported = lack(&mm, Capabilities::EVENTS).is_none();
    assert_eq!(card.all_to_device(region.part(0, 16)), 16);
    heard(region.part(0, 16), "migration to a device");
    assert_eq!(get(&region, 0), 0);
    heard(region.part(0, 1), "a touch");
    drop_contents(&region, 1, 1);
    heard(region.part(1, 1), "contents of a device page dropped");
    unmap(&region, 2, 2);
    heard(region.part(2, 2), "device pages unmapped");
    if reported {
        move_pages(&region, 4, 2, &place);
        heard(region.part(4, 2), "device pages moved");
        drop_contents(&region, 16, 1);
        heard(region.part(16, 1), "contents of a system page dropped");
        unmap(&region, 17, 1);
        heard(region.part(17, 1), "a system page unmapped");
    }
    assert!(in_fork(|| get(&region, 6 * WORDS) == 6 * WORDS as u64));
    heard(region.part(6, 10), "fork, which brings pages home");
    mm.close().unwrap();
    assert!(gpu.table.heard_of(region.range()), "the end of the address space");
    assert_eq!(gpu.table.releases.load(Ordering::SeqCst), 1);
}

#[test]
fn promise_22_what_is_told_is_never_smaller_than_the_change() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let gpu = Gpu::of(&card, region.range());
    for (first, count) in [(0, 64), (3, 1), (63, 1), (10, 7), (31, 2)] {
        let part = region.part(first, count);
        assert_eq!(card.all_to_device(part), count);
        assert!(gpu.table.heard_of(part), "{count} from {first} on left");
        card.to_system(part).unwrap();
        assert!(gpu.table.heard_of(part), "{count} from {first} on came home");
        assert_eq!(card.all_to_device(part), count);
        assert!(gpu.table.heard_of(part));
        drop_contents(&region, first, count);
        mm.sync();
        assert!(gpu.table.heard_of(part), "{count} from {first} on were dropped");
        (first * WORDS..(first + count) * WORDS).for_each(|word| set(&region, word, 1));
    }
}

#[test]
fn promise_23_the_cpus_side_waits_for_the_callbacks() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let (gpu, other) = (Gpu::of(&card, region.range()), Gpu::new(&mm, region.range()));
    let done = Arc::new(AtomicUsize::new(0));
    for table in [&gpu.table, &other.table] {
        let done = Arc::clone(&done);
        table.in_callbacks(move || {
            std::thread::sleep(Duration::from_millis(30));
            done.fetch_add(1, Ordering::SeqCst);
        });
    }
    // Both were called, and returned, before a page is copied.
    let seen = Arc::clone(&done);
    card.when_copying(move || assert_eq!(seen.load(Ordering::SeqCst), 2));
    card.to_device(region.range()).unwrap();
    card.calm();
    let all_done = |what: &str| {
        assert!(done.swap(0, Ordering::SeqCst) >= 2, "{what}");
        let running = gpu.table.running.load(Ordering::SeqCst);
        assert_eq!(running + other.table.running.load(Ordering::SeqCst), 0, "{what}");
    };
    all_done("migration");
    assert_eq!(card.all_to_device(region.range()), 8);
    done.store(0, Ordering::SeqCst);
    assert_eq!(get(&region, 0), 0);
    all_done("a touch");
    drop_contents(&region, 1, 1);
    mm.sync();
    all_done("contents dropped");
    unmap(&region, 2, 1);
    mm.sync();
    all_done("unmapped");
}

#[test]
fn promise_24_the_cpu_has_no_new_page_while_the_device_has_the_old() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    gpu.map(region.range(), Access::Read).unwrap();
    // While mirrors are told of a migration, the processor still has the old pages.
    let (addr, old) = (region.addr(), Arc::new(AtomicUsize::new(0)));
    let seen = Arc::clone(&old);
    gpu.table.in_callbacks(move || {
        let still = (0..4).filter(|page| present(addr + page * 4096)).count();
        seen.store(still, Ordering::SeqCst);
    });
    card.to_device(region.range()).unwrap();
    assert_eq!((old.load(Ordering::SeqCst), on_device(&mm, region.range())), (4, 4));
    gpu.map(region.range(), Access::Read).unwrap();
    // While they are told of a homecoming, it has none; the new page is there afterwards.
    old.store(99, Ordering::SeqCst);
    card.to_system(region.range()).unwrap();
    assert_eq!(old.load(Ordering::SeqCst), 0);
    assert!((0..4).all(|page| present(region.page_addr(page))));
    assert!((0..4).all(|page| gpu.load(region.page_addr(page)).is_none()));
    assert!(is_whole(&region));
}

#[test]
fn promise_25_no_access_uses_an_old_translation_after_the_callback() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1), filled(1));
    let (gpu, stop) = (Gpu::of(&card, region.range()), AtomicBool::new(false));
    set(&region, 0, 0);
    std::thread::scope(|scope| {
        let device = scope.spawn(|| {
            let (mut last, mut loads) = (0, 0);
            while !stop.load(Ordering::SeqCst) {
                let now = gpu.read(region.addr()).unwrap();
                assert!(now >= last, "the device read {now} after {last}: an old page");
                (last, loads) = (now, loads + 1);
            }
            loads
        });
        for round in 1..300 {
            card.to_device(region.range()).unwrap();
            set(&region, 0, round);
        }
        stop.store(true, Ordering::SeqCst);
        assert!(device.join().unwrap() > 0);
    });
    assert_eq!(gpu.read(region.addr()), Ok(299));
}

#[test]
fn promise_41_several_devices_update_at_once() {
    let mm = mm_or_skip!();
    let (one, two, region) = (Card::new(&mm, 32), Card::new(&mm, 32), filled(32));
    let gpus = [Gpu::of(&one, region.range()), Gpu::of(&two, region.range())];
    std::thread::scope(|scope| {
        // All are started, then awaited one after the other.
        let mut threads = Vec::new();
        for (gpu, card) in gpus.iter().zip([&one, &two]) {
            let region = &region;
            threads.push(scope.spawn(move || {
                for page in 0..32 {
                    let value = gpu.read(region.page_addr(page)).unwrap();
                    assert_eq!(value, (page * WORDS) as u64);
                    card.to_device(region.part(page, 1)).unwrap();
                    card.to_system(region.part(31 - page, 1)).unwrap();
                }
            }));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert!(is_whole(&region));
    for page in 0..32 {
        let values = gpus.each_ref().map(|gpu| gpu.read(region.page_addr(page)));
        assert_eq!(values, [Ok((page * WORDS) as u64), Ok((page * WORDS) as u64)]);
    }
    assert_eq!(one.driver.double_frees.load(Ordering::SeqCst), 0);
}

#[test]
fn promise_43_release_comes_once_when_the_address_space_ends() {
    if !is_child() {
        return in_child("mirror::promise_43_release_comes_once_when_the_address_space_ends", None);
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpus = [Gpu::of(&card, region.range()), Gpu::new(&mm, region.range())];
    assert_eq!(card.all_to_device(region.range()), 4);
    mm.close().unwrap();
    mm.close().unwrap();
    for gpu in &gpus {
        assert_eq!(gpu.table.releases.load(Ordering::SeqCst), 1);
        // It can make no new mappings, and is still the driver's to take down.
        assert!(gpu.map(region.range(), Access::Read).is_err());
        gpu.notifier.remove().unwrap();
        assert_eq!(gpu.table.releases.load(Ordering::SeqCst), 1);
    }
    assert!(is_whole(&region));
}
