//! hmm.txt section 4, looking at ranges: what is reported, and what a look changes.

use crate::common::{
    WORDS, drop_contents, end_of, filled, fork, get, is_whole, map, map_again, memory_file,
    pagemap, protect, set, unmap,
};
use crate::driver::{Card, on_device};
use crate::gpu::Gpu;
use hmm_core::{
    Access, AddrRange, Error, Mm, PAGE_SIZE, Pfn, PfnEntry, PfnFlags, RangeRequest, Residency,
    VirtAddr,
};
use hmm_tests::{Capabilities, Region, lack, mm_or_skip, present};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

fn snapshot(mm: &Mm, range: AddrRange) -> Vec<PfnEntry> {
    let mut pfns = vec![PfnEntry::default(); range.pages()];
    mm.snapshot(&RangeRequest { range, owner: None }, &mut pfns).unwrap();
    pfns
}

fn fault(mm: &Mm, range: AddrRange, access: Access) -> Result<Vec<PfnEntry>, Error> {
    let mut pfns = vec![PfnEntry::default(); range.pages()];
    mm.range_fault(&RangeRequest { range, owner: None }, access, &mut pfns)?;
    Ok(pfns)
}

const READABLE: PfnFlags = PfnFlags::VALID.union(PfnFlags::READ);

#[test]
fn promise_26_a_look_reports_what_is_there_and_changes_nothing() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1), Region::new(4));
    // Page 0 is a hole, 1 the page of zeros, 2 has contents, 3 is on a device.
    assert_eq!(get(&region, WORDS), 0);
    set(&region, 2 * WORDS, 7);
    set(&region, 3 * WORDS, 8);
    assert_eq!(card.all_to_device(region.part(3, 1)), 1);
    let before = pagemap(region.range());
    let looks = [snapshot(&mm, region.range()), snapshot(&mm, region.range())];
    assert_eq!(pagemap(region.range()), before);
    assert_eq!(looks[0], looks[1]);
    assert_eq!(looks[0][0], PfnEntry::bare(PfnFlags::EMPTY));
    assert_eq!(looks[0][1].flags(), READABLE);
    assert_eq!(looks[0][2].flags(), READABLE | PfnFlags::WRITE);
    assert_eq!(looks[0][3].flags(), READABLE | PfnFlags::WRITE | PfnFlags::DEVICE);
    assert_eq!((on_device(&mm, region.range()), card.driver.faults.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn promise_27_a_fault_makes_pages_present_as_an_access_would() {
    let mm = mm_or_skip!();
    // Filled with zeros.
    let region = Region::new(4);
    fault(&mm, region.range(), Access::Write).unwrap();
    assert!((0..4).all(|page| present(region.page_addr(page)) && get(&region, page * WORDS) == 0));
    // Read from a file, of which no page is mapped yet.
    let file = memory_file(4 * PAGE_SIZE);
    file.write_all_at(&[6; 4 * PAGE_SIZE], 0).unwrap();
    let mapped = map(4, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd());
    let pfns = fault(&mm, mapped, Access::Read).unwrap();
    assert!(pfns.iter().all(|pfn| pfn.flags() == READABLE), "{pfns:?}");
    assert!(pagemap(mapped).iter().all(|entry| entry >> 63 == 1));
    assert_eq!(Gpu::new(&mm, mapped).read(mapped.start().get()), Ok(0x0606_0606_0606_0606));
    // Swapped in, where there is room to swap out to.
    let swapped = filled(16);
    // SAFETY: the pages lie in the region; their contents stay.
    unsafe { libc::madvise(swapped.as_ptr().cast(), swapped.len(), libc::MADV_PAGEOUT) };
    let out = pagemap(swapped.range()).iter().filter(|entry| *entry >> 62 & 1 == 1).count();
    eprintln!("{out} pages are swapped out");
    fault(&mm, swapped.range(), Access::Read).unwrap();
    assert!(pagemap(swapped.range()).iter().all(|entry| entry >> 63 == 1));
    assert!(is_whole(&swapped));
    // Private to a mapping of a file: a write makes a copy, and the file stays.
    let flags = libc::MAP_PRIVATE;
    let private = map(1, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd());
    Gpu::new(&mm, private).write(private.start().get(), 9).unwrap();
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [6; 8]);
}

/// A child that lives until it is told, and then says whether it finds `value` in the first word.
fn waiting_child(region: &Region, value: u64) -> (libc::pid_t, i32) {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = fork(|| {
        let mut byte = [0];
        // SAFETY: closes the child's copy of the writing end, and waits for the end of the pipe.
        unsafe { libc::close(ends[1]) };
        // SAFETY: as above.
        unsafe { libc::read(ends[0], byte.as_mut_ptr().cast(), 1) };
        get(region, 0) == value
    });
    (child, ends[1])
}

#[test]
fn promise_28_with_write_a_shared_copy_becomes_an_own_page() {
    let mm = mm_or_skip!();
    let region = filled(2);
    set(&region, 0, 5);
    let (child, end) = waiting_child(&region, 5);
    let gpu = Gpu::new(&mm, region.range());
    // Shared with the child, and not writable without a copy: a read leaves it so.
    let shared = pagemap(region.part(0, 1));
    gpu.map(region.part(0, 1), Access::Read).unwrap();
    assert_eq!(gpu.load(region.addr()), Some(5));
    assert_eq!(pagemap(region.part(0, 1)), shared);
    // With write it becomes a page of this process alone, before the device stores.
    gpu.map(region.part(0, 1), Access::Write).unwrap();
    const EXCLUSIVE: u64 = 1 << 56;
    assert_ne!(pagemap(region.part(0, 1))[0] & EXCLUSIVE, 0, "still shared with the child");
    assert!(gpu.store(region.addr(), 6));
    assert_eq!(get(&region, 0), 6);
    // SAFETY: ends the pipe, for which the child waits.
    unsafe { libc::close(end) };
    assert!(end_of(child), "the child lost its own value");
}

#[test]
fn promise_29_a_write_without_permission_fails_and_writes_nothing() {
    let mm = mm_or_skip!();
    let region = filled(2);
    protect(&region, 0, 2, libc::PROT_READ);
    let gpu = Gpu::new(&mm, region.range());
    let refused = gpu.map(region.range(), Access::Write);
    assert!(matches!(refused, Err(Error::Permission { .. })), "{refused:?}");
    gpu.map(region.range(), Access::Read).unwrap();
    assert!(!gpu.table.entry(region.addr()).flags().contains(PfnFlags::WRITE));
    assert!(!gpu.store(region.addr() + 8, 99));
    assert_eq!((gpu.load(region.addr() + 8), get(&region, 1)), (Some(1), 1));
}

#[test]
fn promise_34_device_pages_are_reported_as_such_and_stay() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    assert_eq!(card.all_to_device(region.range()), 4);
    let all = READABLE | PfnFlags::WRITE | PfnFlags::DEVICE;
    let looks = [
        snapshot(&mm, region.range()),
        fault(&mm, region.range(), Access::Read).unwrap(),
        fault(&mm, region.range(), Access::Write).unwrap(),
    ];
    for pfns in looks {
        assert!(pfns.iter().all(|pfn| pfn.flags() == all && pfn.pfn().unwrap().is_device()));
    }
    assert_eq!((on_device(&mm, region.range()), card.driver.faults.load(Ordering::SeqCst)), (4, 0));
}

#[test]
fn promise_35_the_page_of_zeros_is_read_only_until_a_write_replaces_it() {
    let mm = mm_or_skip!();
    let region = Region::new(2);
    assert_eq!((get(&region, 0), get(&region, WORDS)), (0, 0));
    let of_zeros = |pfns: Vec<PfnEntry>| pfns.iter().all(|pfn| pfn.flags() == READABLE);
    assert!(of_zeros(snapshot(&mm, region.range())));
    assert!(of_zeros(fault(&mm, region.range(), Access::Read).unwrap()));
    assert!(!present(region.addr()));
    let pfns = fault(&mm, region.range(), Access::Write).unwrap();
    assert!(pfns.iter().all(|pfn| pfn.flags() == READABLE | PfnFlags::WRITE));
    assert!(present(region.addr()) && get(&region, 0) == 0);
}

#[test]
fn promise_36_a_change_inside_makes_a_look_stale() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let tracker = mm.track(region.range()).unwrap();
    let look = || {
        let sequence = tracker.begin().unwrap();
        snapshot(&mm, region.range());
        assert!(!tracker.changed(sequence));
        sequence
    };
    let sequence = look();
    assert_eq!(card.all_to_device(region.part(3, 1)), 1);
    assert!(tracker.changed(sequence), "one page left");
    let sequence = look();
    assert_eq!(get(&region, 3 * WORDS), 3 * WORDS as u64);
    assert!(tracker.changed(sequence), "it came home");
    assert!(tracker.changed(sequence), "and it stays changed");
    // What the program does itself. Where nobody reports it, it is found out of pages that are away.
    let reported = lack(&mm, Capabilities::EVENTS).is_none();
    for page in 0..2 {
        assert!(reported || card.all_to_device(region.part(page, 1)) == 1);
        let sequence = look();
        if page == 0 {
            drop_contents(&region, 0, 1)
        } else {
            unmap(&region, 1, 1)
        }
        mm.sync();
        assert!(tracker.changed(sequence), "page {page}");
        map_again(&region, page, 1);
        mm.sync();
    }
}

#[test]
fn promise_37_changes_before_or_outside_do_not_count() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.part(2, 4)), 4);
    card.to_system(region.part(2, 4)).unwrap();
    let tracker = mm.track(region.part(2, 4)).unwrap();
    let sequence = tracker.begin().unwrap();
    snapshot(&mm, region.part(2, 4));
    assert_eq!(card.all_to_device(region.part(0, 2)), 2);
    assert_eq!(card.all_to_device(region.part(6, 2)), 2);
    assert_eq!(get(&region, 0), 0);
    card.to_system(region.part(6, 2)).unwrap();
    assert!(!tracker.changed(sequence));
}

/// Entries of a table that are not true any more.
fn stale(gpu: &Gpu, region: &Region) -> Vec<(usize, PfnEntry, Residency)> {
    gpu.mm.sync();
    let mut places = vec![Residency::None; region.pages()];
    gpu.mm.residency(region.range(), &mut places).unwrap();
    let entry = |page: usize| gpu.table.entry(region.page_addr(page));
    let all = places.iter().enumerate().map(|(page, place)| (page, entry(page), *place));
    all.filter(|(page, entry, place)| {
        let system = Pfn::of_addr(VirtAddr::new(region.page_addr(*page)));
        match (entry.pfn(), place) {
            (None, _) => false,
            (Some(pfn), Residency::Device(now)) => pfn != *now,
            (Some(pfn), Residency::System) => pfn != system,
            _ => true,
        }
    })
    .collect()
}

#[test]
fn promise_39_no_interleaving_leaves_a_stale_entry() {
    let mm = mm_or_skip!();
    const PAGES: usize = 16;
    let (card, region) = (Card::new(&mm, PAGES), filled(PAGES));
    let (gpu, stop) = (Gpu::of(&card, region.range()), AtomicBool::new(false));
    let reported = lack(&mm, Capabilities::EVENTS | Capabilities::MOVE).is_none();
    std::thread::scope(|scope| {
        // Two threads fill the table, while pages leave, come home by request and by touches, and lose their contents.
        for access in [Access::Read, Access::Write] {
            let (gpu, region, stop) = (&gpu, &region, &stop);
            scope.spawn(move || {
                for round in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    gpu.map(region.part(round * 5 % (PAGES - 3), 4), access).unwrap();
                }
            });
        }
        for step in 0..1200 {
            let first = step * 7 % (PAGES - 4);
            match step % 4 {
                0 | 1 => _ = card.to_device(region.part(first, 5)).unwrap(),
                2 => _ = card.to_system(region.part(first, 3)).unwrap(),
                _ if reported && step % 3 == 0 => drop_contents(&region, first, 1),
                _ => assert!([0, (first * WORDS) as u64].contains(&get(&region, first * WORDS))),
            }
            // Whatever the device finds through its table is the page's contents, or zeros once they were dropped.
            let page = step * 11 % PAGES;
            let found = gpu.load(region.page_addr(page)).unwrap_or(0);
            assert!(found == 0 || found == (page * WORDS) as u64, "page {page}: {found}");
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(stale(&gpu, &region), vec![]);
    gpu.map(region.range(), Access::Read).unwrap();
    assert_eq!(stale(&gpu, &region), vec![]);
    assert!((0..PAGES).all(|page| gpu.load(region.page_addr(page)).is_some()));
}
