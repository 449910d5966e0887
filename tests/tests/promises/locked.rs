//! hmm.txt section 6: pages under migration are out of everybody's reach, and migrations do not get in each other's way.

use crate::common::{
    WORDS, copy_all, filled, get, is_whole, map_again, migrate, set, unmap, wait_for,
};
use crate::driver::{Card, on_device};
use crate::gpu::Gpu;
use hmm_core::{MigrateBatch, PAGE_SIZE, Residency, Select};
use hmm_tests::{Region, mm_or_skip, needs, present};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The bytes of a page that is being migrated.
fn contents(batch: &MigrateBatch<'_>, index: usize) -> Option<Vec<u8>> {
    let frame = batch.src[index].pfn()?.to_addr()?.as_ptr();
    let mut bytes = vec![0; PAGE_SIZE];
    // SAFETY: a source page can be read during the callback.
    unsafe { frame.copy_to(bytes.as_mut_ptr(), PAGE_SIZE) };
    Some(bytes)
}

#[test]
fn promise_61_contents_stand_still_during_the_copy() {
    let mm = mm_or_skip!();
    let (card, region, stop) = (Card::new(&mm, 4), Region::new(4), AtomicBool::new(false));
    region.fill(0);
    let totals = std::thread::scope(|scope| {
        let store = |thread: usize| {
            let (region, stop) = (&region, &stop);
            move || {
                let mut count = 0;
                while !stop.load(Ordering::SeqCst) {
                    for page in 0..4 {
                        region.word(page * WORDS + thread).fetch_add(1, Ordering::SeqCst);
                    }
                    count += 1;
                }
                count
            }
        };
        let threads: Vec<_> = (0..3).map(|thread| scope.spawn(store(thread))).collect();
        let mut compared = 0;
        for _ in 0..20 {
            let copy = |batch: &mut MigrateBatch<'_>| {
                let look = || (0..4).map(|index| contents(batch, index)).collect::<Vec<_>>();
                let before = look();
                assert!((0..4).all(|page| !batch.src[page].migrates() || !present(region.page_addr(page))));
                std::thread::sleep(Duration::from_millis(5));
                assert!(before == look(), "contents changed while they were copied");
                compared += before.iter().flatten().count();
                copy_all(&card, batch);
            };
            migrate(&card, region.range(), Select::SYSTEM, copy, |_| ());
        }
        stop.store(true, Ordering::SeqCst);
        assert!(compared > 0);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<u64>>()
    });
    for (thread, total) in totals.into_iter().enumerate() {
        assert!(
            (0..4).all(|page| get(&region, page * WORDS + thread) == total),
            "a store was lost"
        );
    }
}

#[test]
fn promise_63_in_finalize_the_pages_are_still_locked() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    let (touched, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let finish = |batch: &MigrateBatch<'_>| {
            let mut place = [Residency::None; 4];
            mm.residency(batch.range, &mut place).unwrap();
            assert_eq!(place, [Residency::Migrating; 4]);
            scope.spawn(|| {
                assert_eq!(get(&region, 0), 0);
                touched.store(true, Ordering::SeqCst);
                assert!(ended.load(Ordering::SeqCst), "the touch did not wait");
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!touched.load(Ordering::SeqCst));
            // The device's table is written here; what changes later is told.
            let mut entries = gpu.table.entries.lock().unwrap();
            for (entry, dst) in entries.iter_mut().zip(&*batch.dst) {
                let flags = hmm_core::PfnFlags::VALID | hmm_core::PfnFlags::DEVICE;
                *entry = hmm_core::PfnEntry::new(dst.pfn().unwrap(), flags);
            }
            ended.store(true, Ordering::SeqCst);
        };
        let copy = |batch: &mut MigrateBatch<'_>| copy_all(&card, batch);
        assert_eq!(migrate(&card, region.range(), Select::SYSTEM, copy, finish).moved(), 4);
    });
    assert!(gpu.load(region.addr()).is_none(), "an entry that the touch made stale is still there");
    assert_eq!(gpu.load(region.page_addr(1)), Some(WORDS as u64));
    assert!(is_whole(&region));
}

#[test]
fn promise_63_a_table_written_in_finalize_hears_of_an_unmapping() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    needs!(mm, MOVE);
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::of(&card, region.range());
    let finish = |batch: &MigrateBatch<'_>| {
        std::thread::scope(|scope| _ = scope.spawn(|| unmap(&region, 1, 1)));
        let mut entries = gpu.table.entries.lock().unwrap();
        for (entry, dst) in entries.iter_mut().zip(&*batch.dst) {
            let flags = hmm_core::PfnFlags::VALID | hmm_core::PfnFlags::DEVICE;
            *entry = hmm_core::PfnEntry::new(dst.pfn().unwrap(), flags);
        }
    };
    let copy = |batch: &mut MigrateBatch<'_>| copy_all(&card, batch);
    migrate(&card, region.range(), Select::SYSTEM, copy, finish);
    mm.sync();
    assert_eq!(gpu.load(region.page_addr(1)), None, "the device uses a page that was unmapped");
    assert_eq!(gpu.read(region.page_addr(2)), Ok(2 * WORDS as u64));
    map_again(&region, 1, 1);
}

#[test]
fn promise_70_accesses_wait_until_the_migration_is_over() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2), filled(2));
    for select in [Select::SYSTEM, Select::DEVICE] {
        let (begun, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let copy = |batch: &mut MigrateBatch<'_>| {
                for page in 0..2 {
                    let (region, begun, over) = (&region, &begun, &over);
                    scope.spawn(move || {
                        begun.fetch_add(1, Ordering::SeqCst);
                        let word = region.word(page * WORDS + 1);
                        assert_eq!(word.fetch_add(0, Ordering::SeqCst), (page * WORDS + 1) as u64);
                        assert!(over.load(Ordering::SeqCst), "the access did not wait");
                    });
                }
                wait_for("the touches", || begun.load(Ordering::SeqCst) == 2);
                std::thread::sleep(Duration::from_millis(50));
                copy_all(&card, batch);
                over.store(true, Ordering::SeqCst);
            };
            if select == Select::DEVICE {
                assert_eq!(card.all_to_device(region.range()), 2);
            }
            migrate(&card, region.range(), select, copy, |_| ());
            assert!(over.load(Ordering::SeqCst), "nothing was copied");
        });
    }
    assert!(is_whole(&region));
}

#[test]
fn promise_71_overlapping_migrations_end_and_share_the_pages() {
    let mm = mm_or_skip!();
    let (one, two, region) = (Card::new(&mm, 48), Card::new(&mm, 48), filled(48));
    let started = Instant::now();
    for round in 0..30 {
        let moved = std::thread::scope(|scope| {
            // Both ways round, so that each meets what the other holds.
            let migration = |card, first: usize, count| {
                let region = &region;
                scope.spawn(move || {
                    let copy = |batch: &mut MigrateBatch<'_>| copy_all(card, batch);
                    migrate(card, region.part(first, count), Select::SYSTEM, copy, |_| ())
                })
            };
            let threads = [migration(&one, 0, 32), migration(&two, 16, 32)];
            threads.map(|thread| thread.join().unwrap())
        });
        for page in 16..32 {
            let both = moved[0].src[page].migrates() && moved[1].src[page - 16].migrates();
            assert!(!both, "page {page} went twice in round {round}");
        }
        let sum = moved[0].moved() + moved[1].moved();
        assert_eq!(on_device(&mm, region.range()), sum, "round {round}");
        assert_eq!(one.devmem.in_use() + two.devmem.in_use(), sum);
        assert!(is_whole(&region), "round {round}");
        assert!(one.settles_at_own(0) && two.settles_at_own(0));
    }
    assert!(started.elapsed() < Duration::from_secs(30));
    set(&region, 0, 0);
}
