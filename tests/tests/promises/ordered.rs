//! Layout changes that libhmm_preload.so announces before they are made: what is observed in part otherwise is whole then.
//! `cargo xtask promises` runs these tests (`…_in_order`) under it.

use crate::common::{
    WORDS, copy_all, drop_contents, filled, get, is_whole, map_again, migrate, protect, set, unmap,
    wait_for,
};
use crate::driver::Card;
use crate::gpu::Gpu;
use hmm_core::{Access, MigrateBatch, PAGE_SIZE, PfnEntry, PfnFlags, Select, VirtAddr};
use hmm_tests::{Region, mm_or_skip, needs, present};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

/// Moves pages to another place.
fn move_pages(region: &Region, first: usize, count: usize, to: &Region) {
    let (from, len) = (region.page_addr(first) as *mut libc::c_void, count * PAGE_SIZE);
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both places belong to the test, and nothing refers to their contents.
    let moved = unsafe { libc::mremap(from, len, len, flags, to.as_ptr()) };
    assert_ne!(moved, libc::MAP_FAILED);
}

#[test]
fn promise_21_every_change_is_told_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let (card, region, place) = (Card::new(&mm, 16), filled(16), Region::new(16));
    let gpu = Gpu::of(&card, region.range());
    gpu.map(region.range(), Access::Read).unwrap();
    let changes: [(&str, &dyn Fn(usize)); 5] = [
        ("protected", &|page| protect(&region, page, 1, libc::PROT_READ)),
        ("allowed", &|page| protect(&region, page, 1, libc::PROT_READ | libc::PROT_WRITE)),
        ("dropped", &|page| drop_contents(&region, page, 1)),
        ("moved", &|page| move_pages(&region, page, 1, &place)),
        ("replaced", &|page| map_again(&region, page, 1)),
    ];
    // Of pages in system memory, and of pages that are away; without waiting for anything.
    for page in [2, 5] {
        for (what, change) in changes {
            if page == 5 && what != "replaced" {
                card.to_device(region.part(page, 1)).unwrap();
            }
            gpu.table.heard_of(region.part(page, 1));
            change(page);
            assert!(gpu.table.heard_of(region.part(page, 1)), "page {page} {what}");
        }
    }
    unmap(&region, 7, 1);
    assert!(gpu.table.heard_of(region.part(7, 1)));
    map_again(&region, 7, 1);
    assert!((8..16).all(|page| get(&region, page * WORDS) == (page * WORDS) as u64));
}

#[test]
fn promise_23_the_cpus_side_waits_for_the_callbacks_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let (card, region, place) = (Card::new(&mm, 8), filled(8), Region::new(8));
    let gpu = Gpu::of(&card, region.range());
    gpu.map(region.range(), Access::Read).unwrap();
    assert_eq!(card.all_to_device(region.part(4, 4)), 4);
    gpu.table.in_callbacks(|| std::thread::sleep(Duration::from_millis(20)));
    let waits = |what: &str, change: &dyn Fn()| {
        let before = gpu.table.calls.load(Ordering::SeqCst);
        change();
        assert!(gpu.table.calls.load(Ordering::SeqCst) > before, "{what} did not wait");
    };
    for first in [0, 4] {
        waits("mprotect", &|| protect(&region, first, 1, libc::PROT_READ));
        waits("madvise", &|| drop_contents(&region, first + 1, 1));
        waits("mremap", &|| move_pages(&region, first + 2, 1, &place));
        waits("munmap", &|| unmap(&region, first + 3, 1));
        map_again(&region, first + 2, 2);
    }
}

#[test]
fn promise_24_the_cpu_has_no_new_page_while_the_device_has_the_old_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    assert_eq!(card.all_to_device(region.part(2, 2)), 2);
    gpu.map(region.range(), Access::Read).unwrap();
    // While the mirror is told, the processor has what it had: the old page, or none. (An engine that the kernel reports
    // to tells a second time, when it has come about.)
    let (addr, seen) = (region.addr(), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&seen);
    gpu.table.in_callbacks(move || {
        let there = (0..4).filter(|page| present(addr + page * 4096)).count();
        let _ = count.compare_exchange(0, there + 10, Ordering::SeqCst, Ordering::SeqCst);
    });
    let with = |expected: usize, change: &dyn Fn()| {
        seen.store(0, Ordering::SeqCst);
        change();
        assert_eq!(seen.load(Ordering::SeqCst), expected + 10);
    };
    with(2, &|| drop_contents(&region, 0, 1));
    with(1, &|| map_again(&region, 1, 2));
    // What is new is the processor's alone: the device has nothing of it.
    (0..4).for_each(|page| assert!(page == 3 || gpu.load(region.page_addr(page)).is_none()));
    (0..3).for_each(|page| assert_eq!(get(&region, page * WORDS), 0));
    assert_eq!(gpu.read(region.page_addr(3)), Ok(3 * WORDS as u64));
}

#[test]
fn promise_36_a_change_inside_makes_a_look_stale_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let region = filled(4);
    let tracker = mm.track(region.range()).unwrap();
    let gpu = Gpu::new(&mm, region.range());
    for (page, change) in [drop_contents, unmap].into_iter().enumerate() {
        let sequence = tracker.begin().unwrap();
        gpu.map(region.range(), Access::Read).unwrap();
        assert!(!tracker.changed(sequence));
        change(&region, page, 1);
        assert!(tracker.changed(sequence), "page {page}");
        map_again(&region, page, 1);
    }
}

#[test]
fn promise_39_no_interleaving_leaves_a_stale_entry_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    const PAGES: usize = 16;
    let (card, region) = (Card::new(&mm, PAGES), filled(PAGES));
    let (gpu, stop) = (Gpu::of(&card, region.range()), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                gpu.map(region.range(), Access::Read).unwrap();
            }
        });
        for round in 0..200 {
            let page = round * 7 % PAGES;
            set(&region, page * WORDS, round as u64);
            if round % 3 == 0 {
                card.to_device(region.range()).unwrap();
            }
            // From its return on, the device cannot find what was there before.
            drop_contents(&region, page, 1);
            let found = gpu.load(region.page_addr(page)).unwrap_or(0);
            assert_eq!(found, 0, "page {page} in round {round}");
        }
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn promise_63_nobody_unmaps_what_finalize_is_told_of_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    let (unmapped, told) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let finish = |batch: &MigrateBatch<'_>| {
            scope.spawn(|| {
                unmap(&region, 1, 1);
                unmapped.store(true, Ordering::SeqCst);
                assert!(told.load(Ordering::SeqCst), "munmap did not wait");
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!unmapped.load(Ordering::SeqCst));
            let mut entries = gpu.table.entries.lock().unwrap();
            for (entry, dst) in entries.iter_mut().zip(&*batch.dst) {
                *entry = PfnEntry::new(dst.pfn().unwrap(), PfnFlags::VALID | PfnFlags::DEVICE);
            }
            told.store(true, Ordering::SeqCst);
        };
        let copy = |batch: &mut MigrateBatch<'_>| copy_all(&card, batch);
        assert_eq!(migrate(&card, region.range(), Select::SYSTEM, copy, finish).moved(), 4);
    });
    wait_for("munmap", || unmapped.load(Ordering::SeqCst));
    assert_eq!(gpu.load(region.page_addr(1)), None);
    map_again(&region, 1, 1);
    assert_eq!(get(&region, 2 * WORDS), 2 * WORDS as u64);
}

#[test]
fn promise_68_the_permission_to_write_follows_the_page_in_order() {
    let mm = mm_or_skip!();
    needs!(mm, ORDERED);
    let (card, region) = (Card::new(&mm, 4), filled(4));
    assert_eq!(card.all_to_device(region.range()), 4);
    // Protected while they are away, on every engine.
    protect(&region, 0, 4, libc::PROT_READ);
    assert!(is_whole(&region));
    assert!(mm.write(VirtAddr::new(region.addr()), &[1]).is_err());
    protect(&region, 0, 4, libc::PROT_READ | libc::PROT_WRITE);
    assert!(is_whole(&region));
}
