//! Device memory at its limits, on real memory: full, evicted, removed; devices that fail. What goes wrong with a page
//! stays with that page.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, Ended, away, child_of, home, is_child, on_device};
use hmm_core::{
    AddrRange, Devmem, Error, MigratePfn, Mm, PAGE_SIZE, Pfn, Residency, Select, VirtAddr,
};
use hmm_tests::{Region, mm_or_skip};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const WORDS: usize = PAGE_SIZE / 8;

fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    (0..region.words()).for_each(|word| region.word(word).store(!(word as u64), Ordering::Relaxed));
    region
}

fn page_is_whole(region: &Region, page: usize) -> bool {
    let mut words = page * WORDS..(page + 1) * WORDS;
    words.all(|word| region.word(word).load(Ordering::Relaxed) == !(word as u64))
}

fn is_whole(region: &Region) -> bool {
    (0..region.pages()).all(|page| page_is_whole(region, page))
}

fn where_is(mm: &Mm, region: &Region, page: usize) -> Residency {
    let mut place = [Residency::None];
    mm.residency(region.part(page, 1), &mut place).unwrap();
    place[0]
}

/// Migrates, and tells for each page whether it moved.
fn moved(card: &Card, range: AddrRange) -> Vec<bool> {
    let mut src = vec![MigratePfn::default(); range.pages()];
    let mut dst = src.clone();
    let count = card.migrate_with(range, Select::SYSTEM, &mut src, &mut dst).unwrap();
    let each: Vec<_> = src.iter().map(|page| page.migrates()).collect();
    assert_eq!(each.iter().filter(|moved| **moved).count(), count);
    each
}

#[test]
fn a_full_device_takes_what_fits_and_says_which_pages_moved() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 10), filled(16));
    // What something holds for a moment is not what this is about.
    away(&card, region.part(0, 10));
    home(&card, region.range());
    let first = moved(&card, region.range());
    let moved_now = first.iter().filter(|moved| **moved).count();
    assert!((1..=10).contains(&moved_now), "{first:?}");
    for (page, moved) in first.iter().enumerate() {
        let place = where_is(&mm, &region, page);
        assert_eq!(matches!(place, Residency::Device(_)), *moved, "page {page} is {place:?}");
    }
    assert_eq!((card.devmem.in_use(), card.driver.free_pages()), (moved_now, 10 - moved_now));
    // A full device moves nothing more, and says no error.
    while card.driver.free_pages() > 0 {
        card.to_device(region.range()).unwrap();
    }
    assert_eq!(moved(&card, region.range()), [false; 16]);
    mm.check_accounts().unwrap();
    // Those that stayed are as usable as ever; what comes home makes room for them.
    assert!(is_whole(&region));
    assert!(card.settles_at(0));
    away(&card, region.part(6, 10));
    assert!(is_whole(&region));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}

#[test]
fn a_driver_makes_room_by_evicting_before_it_migrates() {
    let mm = mm_or_skip!();
    let (card, old, new) = (Card::new(&mm, 16), filled(16), filled(8));
    away(&card, old.range());
    assert_eq!(moved(&card, new.range()), [false; 8]);
    // Half of the device, whatever is there.
    let first = card.devmem.pfn_first();
    assert_eq!(card.devmem.evict(first, 8).unwrap(), 8);
    assert_eq!((card.devmem.in_use(), on_device(&mm, old.range())), (8, 8));
    away(&card, new.range());
    for page in 0..8 {
        let Residency::Device(at) = where_is(&mm, &new, page) else { panic!("page {page}") };
        assert!((first..Pfn::new(first.get() + 8)).contains(&at), "{at:?}");
    }
    assert_eq!(card.devmem.evict(first, 16).unwrap(), 16);
    assert_eq!(card.devmem.evict(first, 16).unwrap(), 0);
    assert!(is_whole(&old) && is_whole(&new));
    assert!(matches!(card.devmem.evict(first, 17), Err(Error::Invalid { .. })));
}

#[test]
fn evicting_from_inside_a_copy_is_refused_at_once() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    away(&card, region.part(0, 4));
    let (devmem, said) = (Arc::clone(&card.devmem), Arc::new(Mutex::new(Vec::new())));
    let says = Arc::clone(&said);
    card.when_copying(move || says.lock().unwrap().push(devmem.evict(devmem.pfn_first(), 8)));
    away(&card, region.part(4, 4));
    card.calm();
    let said = said.lock().unwrap();
    assert!(said.iter().all(|said| matches!(said, Err(Error::Deadlock { .. }))), "{said:?}");
    assert!(!said.is_empty() && is_whole(&region));
}

#[test]
fn removing_device_memory_brings_all_home_and_waits_for_slow_drivers() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    away(&card, region.range());
    card.driver.short_of_memory.store(20, Ordering::SeqCst);
    card.devmem.remove().unwrap();
    assert_eq!((on_device(&mm, region.range()), card.devmem.in_use()), (0, 0));
    assert!(is_whole(&region));
    assert_eq!(card.driver.free_pages(), 64);
    // Nothing is placed there any more, and its numbers are no pages.
    assert_eq!(moved(&card, region.range()), [false; 64]);
    assert!(Devmem::find(card.devmem.pfn_first()).is_none());
    assert!(matches!(card.devmem.remove(), Err(Error::Invalid { .. })));
    assert!(is_whole(&region));
}

#[test]
fn a_touch_waits_until_there_is_memory_for_the_page() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    away(&card, region.range());
    card.driver.short_of_memory.store(5, Ordering::SeqCst);
    assert!(page_is_whole(&region, 2));
    assert_eq!(card.driver.short_of_memory.load(Ordering::SeqCst), 0);
    // What finds no place stays where it is, on the device as well.
    card.driver.refuses.store(true, Ordering::SeqCst);
    assert_eq!(card.to_system(region.part(0, 2)).unwrap(), 0);
    assert_eq!(on_device(&mm, region.part(0, 2)), 2);
    card.driver.refuses.store(false, Ordering::SeqCst);
    home(&card, region.part(0, 2));
    assert!(is_whole(&region));
}

/// Addresses at which SIGBUS was raised.
static RAISED: Mutex<Vec<u64>> = Mutex::new(Vec::new());
static TOUCHES: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes valid information.
    let address = unsafe { (*info).si_addr() } as u64;
    RAISED.lock().unwrap().push(address & !(PAGE_SIZE as u64 - 1));
    // SAFETY: replaces what is out of reach by a page that can be read, so that the touch goes on. Nothing else is at
    // that address: the test's own memory is.
    unsafe {
        let page = (address & !(PAGE_SIZE as u64 - 1)) as *mut libc::c_void;
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
        );
        libc::mmap(page, PAGE_SIZE, protection, flags, -1, 0);
    }
    TOUCHES.fetch_add(1, Ordering::SeqCst);
}

/// The program's own handler of SIGBUS, installed before the library.
fn note_bus_errors() {
    // SAFETY: a handler of this test, whose structure is complete.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
    }
}

fn in_good_child(test: &str) -> Option<Ended> {
    let ended = child_of(test, Duration::from_secs(20));
    if let Some(reason) = ended.skipped() {
        eprintln!("skipped: {reason}");
        return None;
    }
    assert!(ended.is_good(), "{ended:?}");
    Some(ended)
}

#[test]
fn a_page_whose_copy_fails_raises_sigbus_and_its_neighbours_do_not() {
    if !is_child() {
        in_good_child("a_page_whose_copy_fails_raises_sigbus_and_its_neighbours_do_not");
        return;
    }
    note_bus_errors();
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    away(&card, region.range());
    *card.driver.broken.lock().unwrap() = Some(region.page_addr(3));
    // In one batch with its neighbours.
    home(&card, region.range());
    assert_eq!(where_is(&mm, &region, 3), Residency::Poisoned);
    assert_eq!((mm.counters().poisoned, card.devmem.in_use()), (1, 0));
    assert!((0..8).filter(|page| *page != 3).all(|page| page_is_whole(&region, page)));
    let refused = mm.read(VirtAddr::new(region.page_addr(3)), &mut [0; 8]);
    assert!(matches!(refused, Err(Error::Fault { .. })), "{refused:?}");
    assert_eq!(TOUCHES.load(Ordering::SeqCst), 0);
    let _ = region.word(3 * WORDS).load(Ordering::Relaxed);
    assert_eq!(*RAISED.lock().unwrap(), [region.page_addr(3)]);
    mm.sync();
    // The others go on: away and home again.
    *card.driver.broken.lock().unwrap() = None;
    for part in [region.part(0, 3), region.part(4, 4)] {
        away(&card, part);
        home(&card, part);
    }
    assert!((0..8).filter(|page| *page != 3).all(|page| page_is_whole(&region, page)));
}

#[test]
fn a_device_that_is_gone_costs_its_own_pages_and_no_others() {
    if !is_child() {
        in_good_child("a_device_that_is_gone_costs_its_own_pages_and_no_others");
        return;
    }
    note_bus_errors();
    let mm = mm_or_skip!();
    let (gone, other) = (Card::new(&mm, 8), Card::new(&mm, 8));
    let (lost, kept, home) = (filled(8), filled(8), filled(8));
    away(&gone, lost.range());
    away(&other, kept.range());
    gone.driver.dead.store(true, Ordering::SeqCst);
    // A touch, a request, and the rest with the device itself.
    let _ = lost.word(5 * WORDS + 7).load(Ordering::Relaxed);
    assert_eq!(*RAISED.lock().unwrap(), [lost.page_addr(5)]);
    let asked = mm.make_present(lost.part(0, 2), false);
    assert!(matches!(asked, Err(Error::Lost { .. })), "{asked:?}");
    let removed = gone.devmem.remove();
    assert!(matches!(removed, Err(Error::Lost { .. })), "{removed:?}");
    assert_eq!((gone.devmem.in_use(), other.devmem.in_use()), (0, 8));
    gone.devmem.remove().unwrap();
    for page in [0, 1, 2, 3, 4, 6, 7] {
        assert_eq!(where_is(&mm, &lost, page), Residency::Poisoned, "page {page}");
    }
    assert_eq!(mm.counters().poisoned, 8);
    assert!(is_whole(&home) && is_whole(&kept));
    assert!(other.settles_at(0));
    away(&other, home.range());
    assert!(is_whole(&home));
}
