//! hmm.txt section 5: device memory and its two callbacks.

use crate::common::{WORDS, drop_contents, filled, get, in_child, is_whole, set, wait_for};
use crate::driver::{Card, is_child, on_device};
use hmm_core::{
    CpuFault, Devmem, DevmemOps, FaultError, FaultFlags, OwnerId, PAGE_SIZE, Pfn, Residency,
};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::{mm_or_skip, resident_bytes};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};

/// Device memory of which nothing is ever used.
struct Nothing;

impl DevmemOps for Nothing {
    fn free(&self, _: &Devmem, _: Pfn) {}
    fn fault(&self, _: &Devmem, _: &CpuFault<'_>) -> Result<(), FaultError> {
        Err(FaultError::SigBus)
    }
}

#[test]
fn promise_47_device_memory_is_numbers_and_needs_no_memory_behind_it() {
    drop(mm_or_skip!());
    let before = resident_bytes();
    let pages = 4 << 18; // 4 GiB
    let devmem = Devmem::add(Arc::new(Nothing), OwnerId::unique(), pages).unwrap();
    assert_eq!(devmem.pfn_last().get() - devmem.pfn_first().get(), pages as u64);
    let ends = [devmem.pfn_first(), Pfn::new(devmem.pfn_last().get() - 1)];
    for page in ends {
        assert!(page.is_device() && page.to_addr().is_none());
        devmem.set_drvdata(page, page.get());
        assert_eq!(devmem.drvdata(page), page.get());
    }
    assert!(Devmem::find(devmem.pfn_last()).is_none());
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < (pages * PAGE_SIZE / 32) as u64, "{grown} bytes for descriptors");
    devmem.remove().unwrap();
}

#[test]
fn promise_48_free_runs_once() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 6), filled(6));
    assert_eq!(card.all_to_device(region.range()), 6);
    let frees = || card.driver.frees.load(Ordering::SeqCst);
    assert_eq!(frees(), 0);
    card.to_system(region.part(0, 2)).unwrap();
    assert_eq!(frees(), 2, "came home on request");
    assert_eq!(get(&region, 2 * WORDS), 2 * WORDS as u64);
    assert!(card.settles_at(3));
    assert_eq!(frees(), 3, "came home by a touch");
    drop_contents(&region, 3, 2);
    mm.sync();
    assert_eq!(frees(), 5, "dropped");
    mm.close().unwrap();
    assert_eq!((frees(), card.driver.double_frees.load(Ordering::SeqCst)), (6, 0));
    assert_eq!(card.driver.free_pages(), 6);
}

#[test]
fn promise_48_a_freed_page_can_be_used_at_once() {
    let mm = mm_or_skip!();
    let (card, one, two) = (Card::new(&mm, 4), filled(4), filled(4));
    // The device has room for one of the two: each round the other takes the pages that were just freed.
    for _ in 0..20 {
        assert_eq!(card.all_to_device(one.range()), 4);
        card.to_system(one.range()).unwrap();
        assert_eq!(card.all_to_device(two.range()), 4);
        assert!(is_whole(&one) && is_whole(&two));
        assert!(card.settles_at(0));
    }
}

/// What `fault` was told.
#[derive(Default)]
struct Told {
    addr: AtomicUsize,
    page: AtomicUsize,
    flags: AtomicUsize,
}

struct Asked {
    card: Arc<crate::driver::Driver>,
    told: Told,
}

impl DevmemOps for Asked {
    fn free(&self, devmem: &Devmem, page: Pfn) {
        self.card.free(devmem, page);
    }
    fn fault(&self, devmem: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        assert!(fault.vma.range.contains(fault.addr));
        self.told.addr.store(fault.addr.get() as usize, Ordering::SeqCst);
        self.told.page.store(fault.page.get() as usize, Ordering::SeqCst);
        self.told.flags.store(fault.flags.bits() as usize, Ordering::SeqCst);
        self.card.fault(devmem, fault)
    }
}

#[test]
fn promise_49_fault_is_called_for_each_access_with_all_that_it_needs() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let asked = Arc::new(Asked { card: Arc::clone(&card.driver), told: Told::default() });
    // The same driver, with other callbacks in front.
    let card = card.with_ops(asked.clone());
    assert_eq!(card.all_to_device(region.range()), 4);
    let mut places = [Residency::None; 4];
    mm.residency(region.range(), &mut places).unwrap();
    let check = |page: usize, write: bool| {
        let told = &asked.told;
        assert_eq!(told.addr.load(Ordering::SeqCst) as u64, region.page_addr(page));
        let Residency::Device(device_page) = places[page] else { panic!("{places:?}") };
        assert_eq!(told.page.load(Ordering::SeqCst) as u64, device_page.get());
        let flags = FaultFlags::from_bits_retain(told.flags.load(Ordering::SeqCst) as u32);
        assert_eq!(flags.contains(FaultFlags::WRITE), write);
    };
    assert_eq!(get(&region, 2 * WORDS), 2 * WORDS as u64);
    check(2, false);
    set(&region, 0, 0);
    check(0, true);
    assert_eq!(card.driver.faults.load(Ordering::SeqCst), 2);
    assert!(is_whole(&region));
}

#[test]
fn promise_50_neighbours_may_come_along() {
    let mm = mm_or_skip!();
    let config = SoftConfig { fault_around: 64, ..SoftConfig::default() };
    let (device, region) = (SoftDevice::new(&mm, config).unwrap(), filled(256));
    assert_eq!(device.migrate(region.range()), Ok(256));
    for page in 0..256 {
        // The faulting page is always served, whatever else comes.
        assert_eq!(get(&region, page * WORDS), (page * WORDS) as u64);
    }
    let faults = device.counters().cpu_faults;
    assert!(faults > 0 && faults < 128, "{faults} faults for 256 pages");
    assert!(is_whole(&region));
}

#[test]
fn promise_51_the_page_of_a_fault_is_a_hint() {
    let mm = mm_or_skip!();
    let (card, region) = (Arc::new(Card::new(&mm, 2)), filled(2));
    assert_eq!(card.all_to_device(region.range()), 2);
    // Somebody else is faster: when the driver comes to migrate the page, it is home.
    let (other, range) = (Arc::downgrade(&card), region.part(0, 1));
    card.when_faulting(move || _ = other.upgrade().unwrap().to_system(range).unwrap());
    assert_eq!(get(&region, 0), 0);
    card.calm();
    assert!(card.settles_at(1));
    assert_eq!(card.driver.frees.load(Ordering::SeqCst), 1);
    assert!(is_whole(&region));
}

#[test]
fn promise_52_lost_data_is_sigbus_at_its_page_only() {
    if !is_child() {
        let test = "devmem::promise_52_lost_data_is_sigbus_at_its_page_only";
        return in_child(test, Some(libc::SIGBUS));
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 3), filled(3));
    assert_eq!(card.all_to_device(region.range()), 3);
    *card.driver.lost.lock().unwrap() = Some(region.page_addr(1));
    assert!(mm.make_present(region.part(1, 1), false).is_err());
    assert_eq!(get(&region, 0), 0);
    set(&region, 2 * WORDS, 5);
    assert_eq!(get(&region, 2 * WORDS), 5);
    get(&region, WORDS); // SIGBUS
    std::process::exit(3);
}

#[test]
fn promise_52_a_driver_without_memory_is_asked_again() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2), filled(2));
    assert_eq!(card.all_to_device(region.range()), 2);
    card.driver.short_of_memory.store(5, Ordering::SeqCst);
    assert_eq!(get(&region, 0), 0);
    assert_eq!(card.driver.short_of_memory.load(Ordering::SeqCst), 0);
    assert!(is_whole(&region));
}

#[test]
fn promise_53_the_drivers_word_lasts_until_the_page_is_free() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    assert_eq!(card.all_to_device(region.range()), 4);
    let mut places = [Residency::None; 4];
    mm.residency(region.range(), &mut places).unwrap();
    let pages = places.map(|place| match place {
        Residency::Device(page) => page,
        other => panic!("{other:?}"),
    });
    pages.iter().for_each(|page| card.devmem.set_drvdata(*page, !page.get()));
    let (devmem, seen) = (Arc::downgrade(&card.devmem), Arc::new(AtomicUsize::new(0)));
    let right = Arc::clone(&seen);
    *card.driver.on_free.lock().unwrap() = Some(Arc::new(move |page| {
        let word = devmem.upgrade().map_or(0, |devmem| devmem.drvdata(page));
        right.fetch_add(usize::from(word == !page.get()), Ordering::SeqCst);
    }));
    card.to_system(region.part(0, 2)).unwrap();
    assert_eq!(card.devmem.drvdata(pages[3]), !pages[3].get());
    assert!(is_whole(&region));
    assert!(card.settles_at(0));
    assert_eq!(seen.load(Ordering::SeqCst), 4, "it was there in free, each time");
}

#[test]
fn promise_54_removing_device_memory_empties_it_first() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    assert_eq!(card.all_to_device(region.range()), 64);
    let first = card.devmem.pfn_first();
    card.devmem.remove().unwrap();
    assert_eq!((card.driver.free_pages(), card.devmem.in_use()), (64, 0));
    assert_eq!(on_device(&mm, region.range()), 0);
    assert!(Devmem::find(first).is_none(), "a descriptor is still found");
    assert_eq!(card.to_device(region.range()).unwrap(), 0, "nothing goes there any more");
    assert!(is_whole(&region));
}

#[test]
fn promise_55_many_threads_on_one_page_bring_it_home_once() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1), filled(1));
    for round in 0..20 {
        assert_eq!(card.all_to_device(region.range()), 1);
        let before = mm.counters().migrated_to_system;
        let barrier = Barrier::new(8);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (region, barrier) = (&region, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    assert_eq!(get(region, 64 * thread + 1), (64 * thread + 1) as u64);
                });
            }
        });
        assert!(card.settles_at(0));
        assert_eq!(mm.counters().migrated_to_system, before + 1, "round {round}");
        assert_eq!(card.driver.frees.load(Ordering::SeqCst), round + 1);
    }
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}

#[test]
fn promise_56_in_free_the_page_is_the_drivers_alone() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    // What is freed is destroyed inside the callback: if anybody still used it, data would be lost.
    let (driver, frees) = (Arc::downgrade(&card.driver), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&frees);
    *card.driver.on_free.lock().unwrap() = Some(Arc::new(move |page| {
        let driver = driver.upgrade().unwrap();
        // SAFETY: the page is this driver's, and nobody else's any more.
        unsafe { driver.frame(page).write_bytes(0xee, PAGE_SIZE) };
        count.fetch_add(1, Ordering::SeqCst);
    }));
    for round in 1..10 {
        assert_eq!(card.all_to_device(region.range()), 16);
        card.to_system(region.part(0, 8)).unwrap();
        assert!(is_whole(&region));
        wait_for("every page to be freed", || frees.load(Ordering::SeqCst) == round * 16);
    }
}
