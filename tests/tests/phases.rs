//! Migration in three calls, by address and by device page, as drivers of today's kernels do it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, on_device};
use hmm_core::{
    AddrRange, Error, MigrateFlags, MigratePfn, MigrateRequest, Migration, PAGE_SIZE, Pfn, Select,
};
use hmm_tests::{Region, mm_or_skip};
use std::sync::atomic::Ordering;
use std::time::Duration;

const PAGES: usize = 16;

fn request(card: &Card, range: AddrRange, select: Select) -> MigrateRequest {
    MigrateRequest { range, select, owner: Some(card.driver.owner), fault_page: None }
}

fn copy(from: *const u8, to: *mut u8) {
    // SAFETY: both are whole pages that belong to the running migration alone.
    unsafe { std::ptr::copy_nonoverlapping(from, to, PAGE_SIZE) }
}

/// Names device page `index` for page `index` of the range, and copies.
fn to_device(card: &Card, src: &[MigratePfn]) -> Vec<MigratePfn> {
    let flags = MigrateFlags::LOCKED | MigrateFlags::DEVICE;
    let name = |(index, src): (usize, &MigratePfn)| {
        if !src.migrates() {
            return MigratePfn::default();
        }
        let page = Pfn::new(card.devmem.pfn_first().get() + index as u64);
        match src.pfn().and_then(Pfn::to_addr) {
            Some(from) => copy(from.as_ptr(), card.driver.frame(page)),
            // SAFETY: the page is free.
            None => unsafe { card.driver.frame(page).write_bytes(0, PAGE_SIZE) },
        }
        MigratePfn::new(page, flags)
    };
    src.iter().enumerate().map(name).collect()
}

fn go_to_device(card: &Card, region: &Region) -> usize {
    let mut src = vec![MigratePfn::default(); region.pages()];
    let wanted = request(card, region.range(), Select::SYSTEM);
    let mut migration = card.mm.migrate_setup(&wanted, &mut src).unwrap();
    let dst = to_device(card, &src);
    migration.pages(&mut src, &dst).unwrap();
    let moved = src.iter().filter(|page| page.migrates()).count();
    migration.finalize(&src);
    moved
}

/// Fills page `index` with its number and something.
fn fill(region: &Region, plus: u64) {
    for page in 0..region.pages() {
        region.word(page * PAGE_SIZE / 8).store(page as u64 + plus, Ordering::Relaxed);
    }
}

fn holds(region: &Region, plus: u64) -> bool {
    let word = |page: usize| region.word(page * PAGE_SIZE / 8).load(Ordering::Relaxed);
    (0..region.pages()).all(|page| word(page) == page as u64 + plus)
}

#[test]
fn pages_leave_and_come_home_in_three_calls() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, PAGES).pinned();
    let region = Region::new(PAGES);
    fill(&region, 7);
    assert_eq!(go_to_device(&card, &region), PAGES);
    assert_eq!(on_device(&mm, region.range()), PAGES);
    let mut src = vec![MigratePfn::default(); PAGES];
    let mut dst = src.clone();
    let wanted = request(&card, region.range(), Select::DEVICE);
    let mut migration = mm.migrate_setup(&wanted, &mut src).unwrap();
    for index in 0..PAGES {
        let (from, to) = (src[index].pfn().unwrap(), migration.system_page(index).unwrap());
        copy(card.driver.frame(from), to.to_addr().unwrap().as_ptr());
        dst[index] = MigratePfn::new(to, MigrateFlags::LOCKED);
    }
    migration.pages(&mut src, &dst).unwrap();
    assert!(src.iter().all(|page| page.migrates()));
    migration.finalize(&src);
    assert!(holds(&region, 7) && card.settles_at(0));
    assert_eq!(card.driver.faults.load(Ordering::SeqCst), 0, "no touch brought them");
}

#[test]
fn what_is_dropped_or_not_committed_is_undone() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, PAGES).pinned();
    let region = Region::new(PAGES);
    fill(&region, 1);
    let wanted = request(&card, region.range(), Select::SYSTEM);
    for finalized in [false, true] {
        let mut src = vec![MigratePfn::default(); PAGES];
        let migration = mm.migrate_setup(&wanted, &mut src).unwrap();
        assert!(src.iter().all(|page| page.migrates()));
        if finalized {
            migration.finalize(&src)
        } else {
            drop(migration)
        }
        assert!(holds(&region, 1) && card.settles_at(0));
    }
}

#[test]
fn touches_wait_from_setup_to_finalize() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, PAGES).pinned();
    let region = Region::new(PAGES);
    fill(&region, 3);
    let wanted = request(&card, region.range(), Select::SYSTEM);
    let mut src = vec![MigratePfn::default(); PAGES];
    let mut migration = mm.migrate_setup(&wanted, &mut src).unwrap();
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| region.word(0).fetch_add(1, Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!toucher.is_finished());
        let dst = to_device(&card, &src);
        migration.pages(&mut src, &dst).unwrap();
        migration.finalize(&src);
        assert_eq!(toucher.join().unwrap(), 3);
    });
    assert_eq!(region.word(0).load(Ordering::SeqCst), 4);
}

#[test]
fn wrong_lists_and_second_migrations_are_told() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, PAGES).pinned();
    let region = Region::new(PAGES);
    fill(&region, 0);
    let wanted = request(&card, region.range(), Select::SYSTEM);
    let refused = |done: Result<Migration, Error>| matches!(done, Err(Error::Invalid { .. }));
    assert!(refused(mm.migrate_setup(&wanted, &mut [MigratePfn::default(); PAGES - 1])));
    let mut src = vec![MigratePfn::default(); PAGES];
    let mut migration = mm.migrate_setup(&wanted, &mut src).unwrap();
    assert!(migration.pages(&mut src, &[]).is_err());
    let mut again = vec![MigratePfn::default(); PAGES];
    let second = mm.migrate_setup(&wanted, &mut again).unwrap();
    assert!(!again.iter().any(|page| page.migrates()), "the first one has them");
    drop((second, migration));
    assert!(holds(&region, 0));
}

#[test]
fn a_device_is_emptied_by_page_numbers() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 2 * PAGES).pinned();
    let (here, there) = (Region::new(PAGES), Region::new(PAGES / 2));
    fill(&here, 5);
    fill(&there, 50);
    assert_eq!(go_to_device(&card, &here), PAGES);
    let first = card.devmem.pfn_first();
    let far = Pfn::new(first.get() + PAGES as u64);
    assert!(matches!(
        card.devmem.migrate_setup(far, &mut [MigratePfn::default(); PAGES + 1]),
        Err(Error::Invalid { .. })
    ));
    let mut src = vec![MigratePfn::default(); PAGES + 4];
    let mut dst = src.clone();
    let mut migration = card.devmem.migrate_setup(first, &mut src).unwrap();
    assert_eq!(src.iter().filter(|page| page.migrates()).count(), PAGES, "free pages have nothing");
    for index in (0..PAGES).filter(|index| index % 4 != 3) {
        let from = src[index].pfn().unwrap();
        assert_eq!(from.get(), first.get() + index as u64);
        let to = migration.system_page(index).unwrap();
        copy(card.driver.frame(from), to.to_addr().unwrap().as_ptr());
        dst[index] = MigratePfn::new(to, MigrateFlags::LOCKED);
    }
    migration.pages(&mut src, &dst).unwrap();
    migration.finalize();
    assert_eq!(src.iter().filter(|page| page.migrates()).count(), PAGES * 3 / 4);
    assert!(card.settles_at(PAGES / 4), "what got no destination stays");
    assert!(holds(&here, 5) && holds(&there, 50) && card.settles_at(0));
}

#[test]
fn more_than_one_batch_is_held_at_once() {
    let mm = mm_or_skip!();
    let pages = 3 * 8192;
    let card = Card::new(&mm, pages).pinned();
    let region = Region::new(pages);
    fill(&region, 9);
    assert_eq!(go_to_device(&card, &region), pages);
    assert!(holds(&region, 9) && card.settles_at(0));
}
