//! Device memory that the CPU reaches, and pages that a device has for itself.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::Card;
use hmm_core::{
    AddrRange, CpuFault, Devmem, DevmemOps, Error, FaultError, HmmPfn, InvalidateEvent,
    Invalidation, MigrateFlags, MigratePfn, MigrateRequest, Mm, NotifierOps, OwnerId, PAGE_SIZE,
    Pfn, RangeFault, Residency, Select, VirtAddr, unlock_exclusive,
};
use hmm_tests::{Region, mm_or_skip, needs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PAGES: usize = 8;

/// Counts pages that were freed, and remembers what it is told.
#[derive(Default)]
struct Observer {
    freed: AtomicUsize,
    told: Mutex<Vec<(InvalidateEvent, Option<OwnerId>)>>,
}

impl DevmemOps for Observer {
    fn free(&self, _: &Devmem, _: Pfn) {
        self.freed.fetch_add(1, Ordering::SeqCst);
    }
    fn fault(&self, _: &Devmem, _: &CpuFault<'_>) -> Result<(), FaultError> {
        Err(FaultError::SigBus)
    }
}

impl NotifierOps for Observer {
    fn invalidate(&self, update: &Invalidation) {
        self.told.lock().unwrap().push((update.event, update.owner));
    }
}

fn fill(region: &Region) {
    (0..region.pages()).for_each(|page| {
        region.word(page * PAGE_SIZE / 8).store(100 + page as u64, Ordering::Relaxed);
    });
}

fn holds(region: &Region) -> bool {
    let word = |page: usize| region.word(page * PAGE_SIZE / 8).load(Ordering::Relaxed);
    (0..region.pages()).all(|page| word(page) == 100 + page as u64)
}

/// Moves a range to the coherent pages from the first one on; returns how many moved.
fn to_coherent(mm: &Arc<Mm>, devmem: &Devmem, range: AddrRange, select: Select) -> usize {
    let request = MigrateRequest { range, select, owner: None, fault_page: None };
    let mut src = vec![MigratePfn::default(); range.pages()];
    let mut migration = mm.migrate_setup(&request, &mut src).unwrap();
    let page = |index: usize| Pfn::new(devmem.pfn_first().get() + index as u64);
    let dst: Vec<_> = (0..range.pages())
        .map(|index| MigratePfn::new(page(index), MigrateFlags::LOCKED))
        .collect();
    migration.pages(&mut src, &dst).unwrap();
    let moved = src.iter().filter(|page| page.migrates()).count();
    migration.finalize(&src);
    moved
}

fn look(mm: &Mm, range: AddrRange, owner: OwnerId) -> Vec<HmmPfn> {
    let mut hmm_pfns = vec![HmmPfn::default(); range.pages()];
    let (default_flags, pfn_flags_mask) = (0, 0);
    let mut fault =
        RangeFault { range, owner, default_flags, pfn_flags_mask, hmm_pfns: &mut hmm_pfns };
    mm.hmm_range_fault(&mut fault, &|| true).unwrap();
    hmm_pfns
}

fn settles(devmem: &Devmem, pages: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(2);
    while devmem.in_use() != pages && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    devmem.in_use() == pages
}

#[test]
fn coherent_pages_stay_within_reach_and_count_as_the_devices() {
    let mm = mm_or_skip!();
    let observer = Arc::new(Observer::default());
    let owner = OwnerId::from_word(0x5000);
    let devmem = Devmem::add_coherent(observer.clone(), owner, PAGES).unwrap();
    let region = Region::new(PAGES);
    fill(&region);
    assert_eq!(to_coherent(&mm, &devmem, region.range(), Select::SYSTEM), PAGES);
    assert_eq!(devmem.in_use(), PAGES);
    let faults = mm.counters().device_faults;
    assert!(holds(&region));
    assert_eq!((mm.counters().device_faults, devmem.in_use()), (faults, PAGES), "no touch moves");
    let mut places = [Residency::None; PAGES];
    mm.residency(region.range(), &mut places).unwrap();
    assert_eq!(places[3], Residency::Device(Pfn::new(devmem.pfn_first().get() + 3)));
    for (index, entry) in look(&mm, region.range(), OwnerId::from_word(0)).iter().enumerate() {
        let page = devmem.pfn_first().get() + index as u64;
        assert_eq!((entry.pfn(), entry.is_writable()), (Some(Pfn::new(page)), true));
    }
    assert_eq!(to_coherent(&mm, &devmem, region.range(), Select::SYSTEM), 0, "not system pages");
    mm.check_accounts().unwrap();
    // Its pages become system pages where they are, on request and with a pin.
    assert_eq!(devmem.evict(devmem.pfn_first(), 2).unwrap(), 2);
    assert!(settles(&devmem, PAGES - 2) && holds(&region));
    mm.pin_range(region.part(2, 1)).unwrap();
    assert!(settles(&devmem, PAGES - 3) && holds(&region));
    mm.unpin_range(region.part(2, 1)).unwrap();
    devmem.remove().unwrap();
    assert!(holds(&region));
    assert_eq!(observer.freed.load(Ordering::SeqCst), PAGES);
    assert_eq!(mm.counters().device_pages, 0);
}

#[test]
fn coherent_pages_migrate_home_and_to_other_devices() {
    let mm = mm_or_skip!();
    let observer = Arc::new(Observer::default());
    let owner = OwnerId::unique();
    let devmem = Devmem::add_coherent(observer.clone(), owner, PAGES).unwrap();
    let card = Card::new(&mm, PAGES).pinned();
    let region = Region::new(PAGES);
    fill(&region);
    assert_eq!(to_coherent(&mm, &devmem, region.range(), Select::SYSTEM), PAGES);
    // Home: what it holds is in the reserved page already.
    let part = region.part(0, 4);
    let (select, fault_page) = (Select::COHERENT, None);
    let foreign = Some(OwnerId::unique());
    let mut src = vec![MigratePfn::default(); part.pages()];
    let request = MigrateRequest { range: part, select, owner: foreign, fault_page };
    drop(mm.migrate_setup(&request, &mut src).unwrap());
    assert!(!src.iter().any(|page| page.migrates()), "another owner's");
    let request = MigrateRequest { owner: Some(owner), ..request };
    let mut migration = mm.migrate_setup(&request, &mut src).unwrap();
    let page = |index| MigratePfn::new(migration.system_page(index).unwrap(), MigrateFlags::LOCKED);
    let mut dst: Vec<_> = (0..4).map(page).collect();
    dst[3] = MigratePfn::default();
    migration.pages(&mut src, &dst).unwrap();
    migration.finalize(&src);
    assert!(settles(&devmem, PAGES - 3) && holds(&region));
    // On to a device out of reach, and home again by the touch.
    let rest = region.part(4, 4);
    let (mut src, mut dst) = (vec![MigratePfn::default(); 4], vec![MigratePfn::default(); 4]);
    src.fill(MigratePfn::default());
    let request = MigrateRequest { range: rest, select, owner: Some(owner), fault_page };
    let mut migration = mm.migrate_setup(&request, &mut src).unwrap();
    for (index, dst) in dst.iter_mut().enumerate() {
        let from = migration.system_page(index).unwrap().to_addr().unwrap();
        let page = Pfn::new(card.devmem.pfn_first().get() + index as u64);
        // SAFETY: both are whole pages that belong to the running migration alone.
        unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), card.driver.frame(page), PAGE_SIZE);
        }
        *dst = MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
    }
    migration.pages(&mut src, &dst).unwrap();
    migration.finalize(&src);
    assert!(settles(&devmem, 1) && card.devmem.in_use() == 4);
    assert!(holds(&region) && settles(&card.devmem, 0));
    devmem.remove().unwrap();
}

#[test]
fn dropped_coherent_pages_are_free() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let observer = Arc::new(Observer::default());
    let devmem = Devmem::add_coherent(observer.clone(), OwnerId::unique(), PAGES).unwrap();
    let region = Region::new(PAGES);
    fill(&region);
    // Holes become pages of zeros.
    let holes = Region::new(2);
    assert_eq!(to_coherent(&mm, &devmem, holes.range(), Select::SYSTEM), 2);
    assert!(devmem.in_use() == 2 && holes.word(0).load(Ordering::Relaxed) == 0);
    drop(holes);
    assert!(settles(&devmem, 0));
    assert_eq!(to_coherent(&mm, &devmem, region.range(), Select::SYSTEM), PAGES);
    // SAFETY: the region's own pages.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), 2 * PAGE_SIZE, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
    assert!(settles(&devmem, PAGES - 2));
    assert_eq!(region.word(0).load(Ordering::Relaxed), 0);
    drop(region);
    assert!(settles(&devmem, 0));
    devmem.remove().unwrap();
}

#[test]
fn an_exclusive_page_is_the_devices_until_the_cpu_touches_it() {
    let mm = mm_or_skip!();
    let observer = Arc::new(Observer::default());
    let region = Region::new(PAGES);
    fill(&region);
    let _notifier = mm.notifier_insert(region.range(), observer.clone()).unwrap();
    let owner = OwnerId::from_word(0x7000);
    let addr = VirtAddr::new(region.page_addr(1));
    let page = mm.make_exclusive(addr, owner, false).unwrap();
    let told = std::mem::take(&mut *observer.told.lock().unwrap());
    assert_eq!(told.last(), Some(&(InvalidateEvent::Exclusive, Some(owner))));
    let word = page.to_addr().unwrap().as_ptr().cast::<u64>();
    // SAFETY: the page is exclusive, and locked.
    assert_eq!(unsafe { word.read() }, 101);
    assert_eq!(look(&mm, region.part(1, 1), owner)[0].pfn(), None, "not there for anybody else");
    std::thread::scope(|scope| {
        let toucher = scope.spawn(|| region.word(PAGE_SIZE / 8).fetch_add(1, Ordering::SeqCst));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!toucher.is_finished(), "locked");
        // SAFETY: as above.
        unsafe { word.write(1000) };
        assert!(unlock_exclusive(page) && !unlock_exclusive(page));
        assert_eq!(toucher.join().unwrap(), 1000);
    });
    let told = observer.told.lock().unwrap().clone();
    assert_eq!(told.last().map(|last| last.0), Some(InvalidateEvent::Clear));
    assert_eq!(region.word(PAGE_SIZE / 8).load(Ordering::SeqCst), 1001);
    assert_eq!(mm.counters().device_pages, 0);
}

#[test]
fn exclusive_access_is_refused_with_a_reason() {
    let mm = mm_or_skip!();
    let region = Region::new(2);
    let owner = OwnerId::from_word(0x7000);
    assert!(matches!(
        mm.make_exclusive(VirtAddr::new(4096), owner, false),
        Err(Error::Fault { .. })
    ));
    // SAFETY: the region's own page.
    let done = unsafe { libc::mprotect(region.as_ptr().cast(), PAGE_SIZE, libc::PROT_READ) };
    assert_eq!(done, 0);
    let addr = VirtAddr::new(region.addr());
    assert!(matches!(mm.make_exclusive(addr, owner, false), Err(Error::Fault { .. })));
    let second = VirtAddr::new(region.page_addr(1));
    mm.pin_range(region.part(1, 1)).unwrap();
    assert!(matches!(mm.make_exclusive(second, owner, false), Err(Error::Busy { .. })));
    mm.unpin_range(region.part(1, 1)).unwrap();
    // Twice: the second takes it from the first.
    let first = mm.make_exclusive(second, owner, false).unwrap();
    assert!(unlock_exclusive(first));
    let again = mm.make_exclusive(second, owner, false).unwrap();
    assert!(unlock_exclusive(again));
    assert_eq!(region.word(PAGE_SIZE / 8).load(Ordering::SeqCst), 0);
}

#[test]
fn entries_ask_and_are_answered_one_by_one() {
    let mm = mm_or_skip!();
    let region = Region::new(PAGES);
    region.word(0).store(1, Ordering::Relaxed);
    let range = region.range();
    let mut hmm_pfns = vec![HmmPfn::default(); PAGES];
    hmm_pfns[2] = HmmPfn(HmmPfn::VALID | HmmPfn::WRITE);
    hmm_pfns[5] = HmmPfn(HmmPfn::VALID | 1 << 60);
    let owner = OwnerId::from_word(1);
    let (default_flags, pfn_flags_mask) = (0, HmmPfn::VALID | HmmPfn::WRITE);
    let mut fault =
        RangeFault { range, owner, default_flags, pfn_flags_mask, hmm_pfns: &mut hmm_pfns };
    mm.hmm_range_fault(&mut fault, &|| true).unwrap();
    let pfn = |index: usize| Some(Pfn::of_addr(VirtAddr::new(region.page_addr(index))));
    assert_eq!((hmm_pfns[0].pfn(), hmm_pfns[0].is_writable()), (pfn(0), true));
    assert_eq!((hmm_pfns[1].0, hmm_pfns[4].0), (0, 0), "not asked for");
    assert_eq!((hmm_pfns[2].pfn(), hmm_pfns[2].is_writable()), (pfn(2), true));
    assert_eq!(hmm_pfns[5].pfn(), pfn(5));
    assert_ne!(hmm_pfns[5].0 & 1 << 60, 0, "the driver's bit");
    // A changed number stops what would have to fault.
    let mut more = vec![HmmPfn::default(); PAGES];
    let mut fault = RangeFault {
        range,
        owner,
        default_flags: HmmPfn::VALID,
        pfn_flags_mask: 0,
        hmm_pfns: &mut more,
    };
    assert!(matches!(mm.hmm_range_fault(&mut fault, &|| false), Err(Error::Busy { .. })));
    assert_eq!(more[0].pfn(), pfn(0), "before the failure: final");
    assert_eq!(more[1].0, 0, "from there on: as it came in");
}

#[test]
fn holes_and_unreadable_mappings_are_errors_only_when_asked_for() {
    let mm = mm_or_skip!();
    let region = Region::new(PAGES);
    let start: *mut libc::c_void = region.as_ptr().cast();
    // SAFETY: the region's own pages, which nobody uses.
    let done = unsafe {
        (
            libc::mprotect(start, PAGE_SIZE, libc::PROT_NONE),
            libc::munmap(start.wrapping_byte_add(PAGE_SIZE), PAGE_SIZE),
            libc::mprotect(start.wrapping_byte_add(2 * PAGE_SIZE), PAGE_SIZE, libc::PROT_READ),
        )
    };
    assert_eq!(done, (0, 0, 0));
    let found = look(&mm, region.range(), OwnerId::from_word(1));
    assert!(found[0].is_error() && found[1].is_error() && !found[2].is_error());
    let ask = |first: usize, flags: u64| {
        let mut entry = [HmmPfn::default()];
        let (range, owner) = (region.part(first, 1), OwnerId::from_word(1));
        let (default_flags, pfn_flags_mask) = (flags, 0);
        let mut fault =
            RangeFault { range, owner, default_flags, pfn_flags_mask, hmm_pfns: &mut entry };
        mm.hmm_range_fault(&mut fault, &|| true).map(|()| entry[0])
    };
    assert!(matches!(ask(0, HmmPfn::VALID), Err(Error::Fault { .. })));
    assert!(matches!(ask(1, HmmPfn::VALID), Err(Error::Fault { .. })));
    assert!(matches!(ask(2, HmmPfn::VALID | HmmPfn::WRITE), Err(Error::Permission { .. })));
    assert!(!ask(2, HmmPfn::VALID).unwrap().is_writable());
}
