//! hmm.txt section 6: what migrates, what stays, and what is told.

use crate::common::{
    Lists, WORDS, copy_all, end_of, filled, fork, get, is_whole, map, memory_file, migrate,
    protect, set, unmap, wait_for,
};
use crate::driver::{Card, on_device};
use crate::gpu::Gpu;
use hmm_core::{
    Access, MigrateBatch, MigrateFlags, MigratePfn, PAGE_SIZE, PfnFlags, Select, VirtAddr,
};
use hmm_tests::{Capabilities, Region, hold, lack, mm_or_skip, needs, present};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn to_device(card: &Card, range: hmm_core::AddrRange) -> Lists {
    migrate(card, range, Select::SYSTEM, |batch| copy_all(card, batch), |_| ())
}

#[test]
fn promise_57_any_number_of_pages_of_a_mapping_go_in_one_call() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1025), filled(1025));
    for (first, count) in [(0, 1), (1, 2), (3, 509), (512, 513)] {
        assert_eq!(card.all_to_device(region.part(first, count)), count);
    }
    assert_eq!(on_device(&mm, region.range()), 1025);
    assert_eq!(card.to_system(region.range()), Ok(1025));
    assert!(is_whole(&region));
}

#[test]
fn promise_58_pages_that_cannot_go_are_left_out() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    mm.pin_range(region.part(3, 2)).unwrap();
    // And two that another migration holds.
    let (held, go_on) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let wait = |_: &mut MigrateBatch<'_>| {
                held.store(true, Ordering::SeqCst);
                wait_for("the other migration", || go_on.load(Ordering::SeqCst));
            };
            migrate(&card, region.part(8, 2), Select::SYSTEM, wait, |_| ());
        });
        wait_for("its hold", || held.load(Ordering::SeqCst));
        let lists = to_device(&card, region.range());
        go_on.store(true, Ordering::SeqCst);
        other.join().unwrap();
        let moved: Vec<_> = (0..16).filter(|page| lists.src[*page].migrates()).collect();
        assert!([3, 4, 8, 9].iter().all(|page| !moved.contains(page)), "{moved:?}");
        assert!(moved.len() >= 10, "{moved:?}");
        assert_eq!(on_device(&mm, region.range()), moved.len());
    });
    assert!(is_whole(&region));
    mm.unpin_range(region.part(3, 2)).unwrap();
}

#[test]
fn promise_60_a_page_without_a_destination_stays_as_it_was() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let odd = |batch: &mut MigrateBatch<'_>| {
        for index in (1..8).step_by(2).filter(|index| batch.src[*index].migrates()) {
            batch.dst[index] = card.driver.destination(batch, index);
        }
    };
    let lists = migrate(&card, region.range(), Select::SYSTEM, odd, |_| ());
    for page in (0..8).step_by(2) {
        assert!(!lists.src[page].migrates());
        assert!(present(region.page_addr(page)), "page {page} left the processor's table");
        assert_eq!(get(&region, page * WORDS), (page * WORDS) as u64);
        set(&region, page * WORDS, (page * WORDS) as u64);
    }
    assert_eq!(card.driver.faults.load(Ordering::SeqCst), 0);
    assert_eq!(on_device(&mm, region.range()), lists.moved());
    assert!(is_whole(&region));
}

#[test]
fn promise_62_finalize_is_told_exactly_what_moved() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 10), filled(16));
    // The device has no room for all; one page goes away while it is copied, where that is told.
    let unmaps = lack(&mm, Capabilities::EVENTS | Capabilities::MOVE).is_none();
    let mut told = Vec::new();
    let copy = |batch: &mut MigrateBatch<'_>| {
        copy_all(&card, batch);
        if unmaps {
            std::thread::scope(|scope| _ = scope.spawn(|| unmap(&region, 2, 1)));
            mm.sync();
        }
    };
    let finish = |batch: &MigrateBatch<'_>| told.extend(batch.src.iter().map(|src| src.migrates()));
    let lists = migrate(&card, region.range(), Select::SYSTEM, copy, finish);
    let mut places = [hmm_core::Residency::None; 16];
    mm.residency(region.range(), &mut places).unwrap();
    let moved = places.map(|place| matches!(place, hmm_core::Residency::Device(_)));
    assert_eq!(told, moved);
    assert_eq!(lists.src.iter().map(|src| src.migrates()).collect::<Vec<_>>(), moved);
    assert!(lists.moved() > 0 && lists.moved() <= 10 && !(unmaps && moved[2]));
    // What was named for the others came back.
    assert!(card.settles_at(lists.moved()));
    assert_eq!(card.driver.free_pages(), 10 - lists.moved());
}

#[test]
fn promise_65_holes_and_pages_of_zeros_can_be_filled_on_the_device() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), Region::new(8));
    // The lower half was read, the upper one never touched; the device's own pages hold garbage before.
    (0..4).for_each(|page| assert_eq!(get(&region, page * WORDS), 0));
    let mut sources = Vec::new();
    let copy = |batch: &mut MigrateBatch<'_>| {
        sources.extend_from_slice(batch.src);
        copy_all(&card, batch);
    };
    let lists = migrate(&card, region.range(), Select::SYSTEM, copy, |_| ());
    assert_eq!(lists.moved(), 8);
    assert!(sources.iter().all(|src| src.migrates() && src.pfn().is_none()), "{sources:?}");
    assert_eq!(on_device(&mm, region.range()), 8);
    assert!((0..region.words()).all(|word| get(&region, word) == 0));
}

/// Lets the kernel pin pages as for a device driver, through a ring with registered buffers. `None`: not here.
fn kernel_pin(region: &Region, first: usize, count: usize) -> Option<i32> {
    const SETUP: libc::c_long = libc::SYS_io_uring_setup;
    let mut parameters = [0_u8; 120];
    // SAFETY: the parameters are of the kernel's size, all zeros.
    let ring = unsafe { libc::syscall(SETUP, 1, parameters.as_mut_ptr()) } as i32;
    if ring < 0 {
        return None;
    }
    let start = region.page_addr(first) as *mut libc::c_void;
    let buffer = libc::iovec { iov_base: start, iov_len: count * PAGE_SIZE };
    // SAFETY: registers one buffer, which lies in the region.
    let done = unsafe {
        libc::syscall(libc::SYS_io_uring_register, ring, 0, std::ptr::from_ref(&buffer), 1)
    };
    (done == 0).then_some(ring)
}

#[test]
fn promise_66_pinned_pages_stay() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    mm.pin_range(region.part(0, 2)).unwrap();
    let guard = mm.guard(region.part(2, 1), true).unwrap();
    // What the kernel pins, an engine that copies pages cannot see.
    let kernels =
        if lack(&mm, Capabilities::MOVE).is_none() { kernel_pin(&region, 4, 2) } else { None };
    let before = crate::common::pagemap(region.part(4, 2));
    let lists = to_device(&card, region.range());
    assert!(lists.src[..3].iter().all(|src| !src.migrates()));
    assert!((0..3).all(|page| present(region.page_addr(page))));
    if let Some(ring) = kernels {
        assert!(lists.src[4..6].iter().all(|src| !src.migrates()));
        assert_eq!(crate::common::pagemap(region.part(4, 2)), before, "the frames changed");
        // SAFETY: the ring belongs to this test.
        unsafe { libc::close(ring) };
    }
    assert!(is_whole(&region));
    drop(guard);
    mm.unpin_range(region.part(0, 2)).unwrap();
    if kernels.is_none() {
        hmm_tests::skip!("engine {}: pins of the kernel are not seen", mm.engine_name());
    }
}

#[test]
fn promise_66_pages_that_the_library_pinned_stay() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    mm.pin_range(region.part(0, 2)).unwrap();
    let guard = mm.guard(region.part(2, 1), true).unwrap();
    let lists = to_device(&card, region.range());
    assert!(lists.src[..3].iter().all(|src| !src.migrates()));
    assert!((0..3).all(|page| present(region.page_addr(page))));
    assert!(is_whole(&region));
    drop(guard);
    mm.unpin_range(region.part(0, 2)).unwrap();
    assert_eq!(card.all_to_device(region.range()), 8);
}

#[test]
fn promise_67_shared_and_file_memory_is_refused_page_by_page() {
    let mm = mm_or_skip!();
    let (card, file) = (Card::new(&mm, 8), memory_file(4 * PAGE_SIZE));
    let read_write = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = map(4, read_write, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    let mapped = map(4, read_write, libc::MAP_SHARED, file.as_raw_fd());
    for range in [anonymous, mapped] {
        assert_eq!(mm.write(range.start(), &[7; 4 * PAGE_SIZE]), Ok(4 * PAGE_SIZE));
        let lists = to_device(&card, range);
        assert!(lists.src.iter().all(|src| !src.migrates()), "{:?}", lists.src);
        let mut bytes = [0; 4 * PAGE_SIZE];
        assert_eq!(mm.read(range.start(), &mut bytes), Ok(4 * PAGE_SIZE));
        assert!(bytes.iter().all(|byte| *byte == 7));
        // It can be mirrored where it is.
        let gpu = Gpu::new(&mm, range);
        gpu.write(range.start().get(), 1).unwrap();
        assert_eq!(mm.read(range.start(), &mut bytes[..8]), Ok(8));
        assert_eq!(u64::from_ne_bytes(*bytes.first_chunk().unwrap()), 1);
    }
    assert_eq!((card.driver.free_pages(), mm.counters().migrated_to_device), (8, 0));
}

#[test]
fn promise_68_the_permission_to_write_follows_the_page() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    let writable = |page: usize| {
        gpu.map(region.part(page, 1), Access::Read).unwrap();
        gpu.table.entry(region.page_addr(page)).flags().contains(PfnFlags::WRITE)
    };
    // Writable pages are writable there, and at home again.
    let lists = to_device(&card, region.range());
    assert!(lists.src.iter().all(|src| src.flags().contains(MigrateFlags::WRITE)));
    assert!((0..4).all(writable));
    card.to_system(region.part(0, 2)).unwrap();
    assert!((0..4).all(writable));
    set(&region, 0, 0);
    // What became read-only meanwhile is read-only there, and comes home so.
    let held = hold(&mm, Capabilities::EVENTS, region.part(2, 2), false);
    protect(&region, 2, 2, libc::PROT_READ);
    assert_eq!((writable(2), writable(3)), (false, false));
    card.to_system(region.part(2, 1)).unwrap();
    assert_eq!(get(&region, 3 * WORDS), 3 * WORDS as u64);
    assert!((2..4).all(|page| !writable(page)));
    assert!((2..4).all(|page| mm.write(VirtAddr::new(region.page_addr(page)), &[1]).is_err()));
    drop(held);
    // A read-only page that is at home is as read-only after a migration was asked for.
    to_device(&card, region.part(2, 2));
    assert!((2..4).all(|page| !writable(page)));
    protect(&region, 2, 2, libc::PROT_READ | libc::PROT_WRITE);
    assert!(is_whole(&region));
}

#[test]
fn promise_69_a_page_shared_with_a_child_can_migrate() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = fork(|| {
        let mut byte = [0];
        // SAFETY: closes the child's copy of the writing end.
        unsafe { libc::close(ends[1]) };
        // SAFETY: waits for the end of the pipe.
        unsafe { libc::read(ends[0], byte.as_mut_ptr().cast(), 1) };
        is_whole(&region)
    });
    assert_eq!(card.all_to_device(region.range()), 4);
    // SAFETY: lets the child go on.
    unsafe { libc::close(ends[1]) };
    assert!(end_of(child), "the child lost data");
    assert_eq!(on_device(&mm, region.range()), 4);
    assert!(is_whole(&region));
}

#[test]
fn promise_72_destinations_that_are_not_used_come_back() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(4));
    assert_eq!(card.all_to_device(region.part(0, 1)), 1);
    // The device's memory is taken away while pages are copied to it; the page that is there holds that up.
    let (asked, go_on) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (says, waits) = (Arc::clone(&asked), Arc::clone(&go_on));
    card.when_faulting(move || {
        says.store(true, Ordering::SeqCst);
        wait_for("the migration", || waits.load(Ordering::SeqCst));
    });
    std::thread::scope(|scope| {
        let mut remover = None;
        let copy = |batch: &mut MigrateBatch<'_>| {
            copy_all(&card, batch);
            remover = Some(scope.spawn(|| card.devmem.remove()));
            wait_for("the removal", || asked.load(Ordering::SeqCst));
        };
        let lists = migrate(&card, region.part(1, 3), Select::SYSTEM, copy, |_| ());
        assert_eq!(lists.moved(), 0);
        assert!(lists.dst.iter().all(|dst| dst.flags().contains(MigrateFlags::DEVICE)));
        go_on.store(true, Ordering::SeqCst);
        remover.unwrap().join().unwrap().unwrap();
    });
    assert_eq!((card.driver.free_pages(), card.driver.frees.load(Ordering::SeqCst)), (8, 4));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
    assert!(is_whole(&region));
}

#[test]
fn promise_73_mirrors_let_go_before_anything_is_copied() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpus = [Gpu::of(&card, region.range()), Gpu::new(&mm, region.range())];
    for select in [Select::SYSTEM, Select::DEVICE] {
        gpus.iter().for_each(|gpu| gpu.map(region.range(), Access::Read).unwrap());
        // Only the driver's own may know pages of its device.
        let known =
            |gpu: &Gpu| (0..4).filter(|page| gpu.load(region.page_addr(*page)).is_some()).count();
        if select == Select::DEVICE {
            assert_eq!(card.all_to_device(region.range()), 4);
            gpus[0].map(region.range(), Access::Read).unwrap();
        }
        assert_eq!(known(&gpus[0]), 4);
        let copies = AtomicUsize::new(0);
        let copy = |batch: &mut MigrateBatch<'_>| {
            copies.fetch_add(1, Ordering::SeqCst);
            assert_eq!((known(&gpus[0]), known(&gpus[1])), (0, 0));
            batch.dst.fill(MigratePfn::default());
        };
        migrate(&card, region.range(), select, copy, |_| ());
        assert_eq!(copies.load(Ordering::SeqCst), 1);
    }
    assert!(is_whole(&region));
}

#[test]
fn promise_74_a_driver_that_skips_a_homecoming_is_asked_again() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2), filled(2));
    assert_eq!(card.all_to_device(region.range()), 2);
    // It says that all is well, and brings nothing: the access waits, and never gets zeros.
    card.driver.refuses.store(true, Ordering::SeqCst);
    let (driver, asked) = (Arc::downgrade(&card.driver), AtomicUsize::new(0));
    card.when_faulting(move || {
        if asked.fetch_add(1, Ordering::SeqCst) == 3 {
            driver.upgrade().unwrap().refuses.store(false, Ordering::SeqCst);
        }
    });
    assert_eq!(get(&region, 7), 7);
    assert!(card.driver.faults.load(Ordering::SeqCst) >= 4);
    card.calm();
    // Data that cannot be recovered is the exception: promise 52.
    assert!(is_whole(&region));
}

#[test]
fn promise_80_a_pin_of_the_library_brings_the_page_home_first() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    assert_eq!(card.all_to_device(region.range()), 4);
    mm.pin_range(region.part(0, 1)).unwrap();
    let guard = mm.guard(region.part(1, 1), true).unwrap();
    assert!(present(region.addr()) && present(region.page_addr(1)));
    assert_eq!((on_device(&mm, region.range()), card.devmem.in_use()), (2, 2));
    to_device(&card, region.range());
    assert!(present(region.addr()) && present(region.page_addr(1)));
    drop(guard);
    mm.unpin_range(region.part(0, 1)).unwrap();
    assert!(is_whole(&region));
}

#[test]
fn promise_80_a_pin_of_the_kernel_brings_the_page_home_first() {
    let mm = mm_or_skip!();
    needs!(mm, KERNEL_FAULTS);
    let (card, region) = (Card::new(&mm, 4), filled(4));
    assert_eq!(card.all_to_device(region.range()), 4);
    let Some(ring) = kernel_pin(&region, 1, 2) else {
        hmm_tests::skip!("there is no io_uring here");
    };
    assert_eq!(on_device(&mm, region.range()), 2);
    assert!((1..3).all(|page| present(region.page_addr(page))));
    // An engine that copies pages cannot see the pin (promise 66).
    if lack(&mm, Capabilities::MOVE).is_none() {
        to_device(&card, region.range());
        assert!((1..3).all(|page| present(region.page_addr(page))));
    }
    // SAFETY: the ring belongs to this test.
    unsafe { libc::close(ring) };
    assert!(is_whole(&region));
}
