//! Reasons of the moment: what another migration, the program or the driver did while a page was to migrate.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, on_device};
use hmm_core::{
    MigrateBatch, MigrateFlags, MigrateOps, MigratePfn, MigrateRequest, PAGE_SIZE, Pfn, Select,
    Stay,
};
use hmm_tests::{mm_or_skip, needs};
use kind::{Memory, check_migrates, send};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGES: usize = 8;

#[test]
fn a_page_that_another_migration_holds_says_so() {
    let mm = mm_or_skip!();
    let (card, memory) = (Arc::new(Card::new(&mm, 2 * PAGES)), Arc::new(Memory::filled(PAGES)));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (other, range, said) = (Arc::clone(&card), memory.range(), Arc::clone(&seen));
    card.when_copying(move || {
        other.calm();
        let (other, said) = (Arc::clone(&other), Arc::clone(&said));
        let second = std::thread::spawn(move || *said.lock().unwrap() = send(&other, range));
        second.join().unwrap();
    });
    assert_eq!(send(&card, memory.range()), [None; PAGES]);
    assert_eq!(*seen.lock().unwrap(), [Some(Stay::Migrating); PAGES]);
    assert_eq!(memory.wrong_pages(), 0);
    check_migrates(&card, &memory);
}

#[test]
fn a_page_that_the_program_unmaps_meanwhile_says_so() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    needs!(mm, MOVE);
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let gone = memory.part(2, 3);
    let other = Arc::clone(&mm);
    card.when_copying(move || {
        let mm = Arc::clone(&other);
        // Not on this thread: the call waits until a service thread has read of it, and then it is still to be applied.
        let unmapping = std::thread::spawn(move || {
            let start = std::ptr::with_exposed_provenance_mut(gone.start().get() as usize);
            // SAFETY: the pages are the test's, and nothing refers to them.
            assert_eq!(unsafe { libc::munmap(start, gone.len() as usize) }, 0);
            mm.sync();
        });
        unmapping.join().unwrap();
    });
    let said = send(&card, memory.range());
    for (page, said) in said.iter().enumerate() {
        let is_gone = (2..5).contains(&page);
        assert_eq!(*said, is_gone.then_some(Stay::Changing), "page {page}");
    }
    card.calm();
    assert!([0, 1, 5, 6, 7].iter().all(|page| memory.has_pattern(*page)));
    assert!(card.settles_at(0));
}

#[test]
fn contents_that_were_just_dropped_stay_for_a_moment_and_say_so() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    card.to_system(memory.range()).unwrap();
    // A drop in the middle of a migration: what is present then may be what is about to go.
    let dropped = memory.part(0, 4);
    let (mut reasons, until) = (Vec::new(), Instant::now() + Duration::from_secs(20));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let start = std::ptr::with_exposed_provenance_mut(dropped.start().get() as usize);
                // SAFETY: the pages are the test's.
                unsafe { libc::madvise(start, dropped.len() as usize, libc::MADV_DONTNEED) };
                (0..4).for_each(|page| memory.fill_page(page));
            }
        });
        while Instant::now() < until && !reasons.contains(&Some(Stay::Dropped)) {
            reasons = send(&card, memory.range());
            card.to_system(memory.range()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reasons.contains(&Some(Stay::Dropped)), "{reasons:?}");
    assert!((4..PAGES).all(|page| memory.has_pattern(page)));
}

/// Names what no page may go to.
struct Wrong(Pfn);

impl MigrateOps for Wrong {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        batch.dst[0] = MigratePfn::new(self.0, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
        batch.dst[1] = MigratePfn::new(Pfn::new(1), MigrateFlags::LOCKED);
        batch.dst[2] = MigratePfn::new(Pfn::new(Pfn::DEVICE_BASE - 1), MigrateFlags::LOCKED);
    }

    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        // The callback reads them, too, and the pfn is still there.
        let said: Vec<_> = batch.src.iter().map(|entry| entry.reason()).collect();
        assert_eq!(said[..3], [Some(Stay::BadDestination); 3]);
        assert_eq!(said[3..], [Some(Stay::LeftOut); PAGES - 3]);
        assert!(batch.src.iter().all(|entry| entry.pfn().is_some_and(|pfn| !pfn.is_device())));
    }
}

#[test]
fn a_destination_that_is_none_says_so() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let taken = Memory::filled(1);
    let (mut src, mut dst) = ([MigratePfn::default(); 1], [MigratePfn::default(); 1]);
    card.migrate_with(taken.range(), Select::SYSTEM, &mut src, &mut dst).unwrap();
    let in_use = dst[0].pfn().unwrap();
    let request = MigrateRequest {
        range: memory.range(),
        select: Select::SYSTEM,
        owner: None,
        fault_page: None,
    };
    let (mut src, mut dst) = ([MigratePfn::default(); PAGES], [MigratePfn::default(); PAGES]);
    mm.migrate(&request, &mut Wrong(in_use), &mut src, &mut dst).unwrap();
    assert_eq!(src.map(MigratePfn::reason)[..3], [Some(Stay::BadDestination); 3]);
    assert_eq!(on_device(&mm, memory.range()), 0);
    assert_eq!(memory.wrong_pages() + taken.wrong_pages(), 0);
    assert_eq!(memory.len(), PAGES * PAGE_SIZE);
    check_migrates(&card, &memory);
}
