//! Several devices and mirrors on one address space: who is told of what, when a mirror may be taken down, and what a
//! range tracker says.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, Ended, child_of, is_child, on_device};
use hmm_core::{
    Error, Invalidation, MigratePfn, Mm, Notifier, NotifierOps, OwnerId, RangeTracker, Select,
};
use hmm_tests::{Capabilities, Region, lack, mm_or_skip};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A mirror that notes what it hears, and does as a test asks.
#[derive(Default)]
struct Mirror {
    calls: AtomicUsize,
    running: AtomicUsize,
    owners: Mutex<Vec<Option<OwnerId>>>,
    pause: Mutex<Duration>,
    panics: AtomicBool,
    mine: Mutex<Option<Arc<Notifier>>>,
    closes: Mutex<Option<Arc<Mm>>>,
    said: Mutex<Vec<Result<(), Error>>>,
}

impl Mirror {
    /// Tries to take itself down from inside a callback.
    fn take_down(&self) {
        let notifier = self.mine.lock().unwrap().clone();
        if let Some(notifier) = notifier {
            self.said.lock().unwrap().push(notifier.remove());
        }
        let mm = self.closes.lock().unwrap().clone();
        if let Some(mm) = mm {
            self.said.lock().unwrap().push(mm.close());
        }
    }

    fn refusals(&self) -> usize {
        let said = self.said.lock().unwrap();
        said.iter().filter(|said| matches!(said, Err(Error::Deadlock { .. }))).count()
    }
}

impl NotifierOps for Mirror {
    fn invalidate(&self, update: &Invalidation) {
        self.running.fetch_add(1, Ordering::SeqCst);
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.owners.lock().unwrap().push(update.owner);
        assert!(!self.panics.load(Ordering::SeqCst), "a callback that panics on purpose");
        let pause = *self.pause.lock().unwrap();
        std::thread::sleep(pause);
        self.take_down();
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    fn release(&self) {
        self.take_down();
    }
}

fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    region.fill(7);
    region
}

fn drop_contents(region: &Region, page: usize) {
    let start = region.page_addr(page) as *mut libc::c_void;
    // SAFETY: the page lies in the region, to which nothing holds references.
    assert_eq!(unsafe { libc::madvise(start, 4096, libc::MADV_DONTNEED) }, 0);
}

#[test]
fn a_mirror_that_was_removed_runs_no_callback() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let mirror = Arc::new(Mirror::default());
    *mirror.pause.lock().unwrap() = Duration::from_millis(200);
    let notifier = mm.mirror_register(mirror.clone()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| card.to_device(region.range()).unwrap());
        while mirror.running.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        notifier.remove().unwrap();
        assert_eq!(mirror.running.load(Ordering::SeqCst), 0);
    });
    let calls = mirror.calls.load(Ordering::SeqCst);
    card.to_system(region.range()).unwrap();
    drop_contents(&region, 0);
    mm.sync();
    assert_eq!(mirror.calls.load(Ordering::SeqCst), calls);
    notifier.remove().unwrap();
}

#[test]
fn removing_a_mirror_from_its_own_callback_is_refused_at_once() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let mirror = Arc::new(Mirror::default());
    let notifier = mm.mirror_register(mirror.clone()).unwrap();
    *mirror.mine.lock().unwrap() = Some(notifier.clone());
    *mirror.closes.lock().unwrap() = Some(mm.clone());
    let started = Instant::now();
    assert_eq!(card.all_to_device(region.range()), 8);
    assert!(started.elapsed() < Duration::from_secs(2));
    assert_eq!(mirror.refusals(), 2, "{:?}", mirror.said.lock().unwrap());
    *mirror.mine.lock().unwrap() = None;
    *mirror.closes.lock().unwrap() = None;
    notifier.remove().unwrap();
}

/// Runs the rest of a test in a child; `None` when it was skipped there.
fn good_child(test: &str) -> Option<Ended> {
    let ended = child_of(test, Duration::from_secs(4));
    if let Some(reason) = ended.skipped() {
        eprintln!("skipped: {reason}");
        return None;
    }
    assert!(ended.is_good(), "{ended:?}");
    Some(ended)
}

#[test]
fn taking_everything_down_from_a_release_callback_is_refused_at_once() {
    if !is_child() {
        good_child("taking_everything_down_from_a_release_callback_is_refused_at_once");
        return;
    }
    let mm = mm_or_skip!();
    let mirror = Arc::new(Mirror::default());
    *mirror.mine.lock().unwrap() = Some(mm.mirror_register(mirror.clone()).unwrap());
    mm.close().unwrap();
    // Once in the invalidation that announces the end, and once in the release.
    assert_eq!(mirror.refusals(), 2, "{:?}", mirror.said.lock().unwrap());
    let mm = Mm::current().unwrap();
    *mirror.mine.lock().unwrap() = None;
    *mirror.closes.lock().unwrap() = Some(mm.clone());
    mm.mirror_register(mirror.clone()).unwrap();
    mm.close().unwrap();
    assert_eq!(mirror.refusals(), 4, "{:?}", mirror.said.lock().unwrap());
}

#[test]
fn a_mirror_that_panics_leaves_the_range_usable() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let mirror = Arc::new(Mirror::default());
    mirror.panics.store(true, Ordering::SeqCst);
    let notifier = mm.mirror_register(mirror.clone()).unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| card.to_device(region.range()))).is_err());
    mirror.panics.store(false, Ordering::SeqCst);
    assert!((0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) != 0));
    assert_eq!(card.all_to_device(region.range()), 8);
    notifier.remove().unwrap();
}

#[test]
fn every_overlapping_mirror_hears_of_every_device() {
    let mm = mm_or_skip!();
    let (one, two, region) = (Card::new(&mm, 16), Card::new(&mm, 16), filled(16));
    let mirrors: Vec<_> = (0..3).map(|_| Arc::new(Mirror::default())).collect();
    let parts = [region.part(0, 8), region.part(4, 8), region.part(12, 4)];
    let notifiers: Vec<_> = mirrors
        .iter()
        .zip(parts)
        .map(|(mirror, part)| mm.notifier_insert(part, mirror.clone()).unwrap())
        .collect();
    let calls = || mirrors.iter().map(|one| one.calls.load(Ordering::SeqCst)).collect::<Vec<_>>();
    one.to_device(region.part(0, 4)).unwrap();
    assert_eq!(calls(), [1, 0, 0]);
    two.to_device(region.part(4, 4)).unwrap();
    assert_eq!(calls(), [2, 1, 0]);
    assert_eq!(mirrors[1].owners.lock().unwrap()[0], Some(two.driver.owner));
    // Each device brings home only what it has.
    assert_eq!(two.to_system(region.range()).unwrap(), 4);
    assert_eq!(on_device(&mm, region.range()), 4);
    one.devmem.remove().unwrap();
    assert_eq!(on_device(&mm, region.range()), 0);
    assert_eq!(one.driver.free_pages(), 16);
    assert_eq!(one.driver.double_frees.load(Ordering::SeqCst), 0);
    notifiers.iter().for_each(|one| one.remove().unwrap());
}

/// Whether a tracker that was asked before says that its range changed by `change`.
fn changes(tracker: &RangeTracker, mm: &Mm, change: impl FnOnce()) -> bool {
    let sequence = tracker.begin().unwrap();
    assert!(!tracker.changed(sequence));
    change();
    mm.sync();
    tracker.changed(sequence)
}

#[test]
fn a_tracker_tells_changes_inside_from_changes_outside() {
    let mm = mm_or_skip!();
    let (one, two, region) = (Card::new(&mm, 32), Card::new(&mm, 32), filled(32));
    let place = Region::new(32);
    let tracker = mm.track(region.part(8, 8)).unwrap();
    // Where nobody reports what the program does, it is found out for pages that are away.
    let unreported = lack(&mm, Capabilities::EVENTS).is_some();
    let send_away = |page| assert!(!unreported || one.all_to_device(region.part(page, 1)) == 1);
    for (first, expected) in [(0, false), (16, false), (8, true), (15, true)] {
        let part = region.part(first, 1);
        let changed = |change: &dyn Fn()| changes(&tracker, &mm, change);
        assert_eq!(changed(&|| assert_eq!(one.all_to_device(part), 1)), expected);
        assert_eq!(changed(&|| assert_eq!(one.to_system(part).unwrap(), 1)), expected);
        assert_eq!(changed(&|| assert_eq!(two.all_to_device(part), 1)), expected);
        let word = first * 512;
        assert_eq!(changed(&|| _ = region.word(word).load(Ordering::Relaxed)), expected);
        send_away(first);
        assert_eq!(changed(&|| drop_contents(&region, first)), expected);
    }
    // A change before the number was taken does not count.
    drop_contents(&region, 9);
    mm.sync();
    assert!(!changes(&tracker, &mm, || ()));
    let moved = || {
        let (from, to) = (region.page_addr(10) as *mut libc::c_void, place.as_ptr());
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both places belong to this test; the hole is mapped again below.
        let result = unsafe { libc::mremap(from, 4096, 4096, flags, to) };
        assert_ne!(result, libc::MAP_FAILED);
    };
    assert!(unreported || changes(&tracker, &mm, moved));
    [20, 12].into_iter().for_each(send_away);
    // SAFETY: the page belongs to this test.
    let unmap = |page| unsafe { libc::munmap(region.page_addr(page) as *mut libc::c_void, 4096) };
    assert!(!changes(&tracker, &mm, || assert_eq!(unmap(20), 0)));
    assert!(changes(&tracker, &mm, || assert_eq!(unmap(12), 0)));
    assert_eq!(tracker.invalidated(), Some(region.part(8, 8)));
}

#[test]
fn more_threads_than_places_migrate_without_an_error() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 200);
    card.when_copying(|| std::thread::sleep(Duration::from_millis(10)));
    let regions: Vec<_> = (0..100).map(|_| filled(1)).collect();
    std::thread::scope(|scope| {
        let work = |region: &Region| {
            for _ in 0..3 {
                card.to_device(region.range()).unwrap();
                card.to_system(region.range()).unwrap();
            }
        };
        let threads: Vec<_> =
            regions.iter().map(|region| scope.spawn(move || work(region))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    assert_eq!(card.driver.free_pages(), 200);
}

#[test]
fn two_migrations_may_have_their_lists_in_each_others_ranges() {
    if !is_child() {
        good_child("two_migrations_may_have_their_lists_in_each_others_ranges");
        return;
    }
    let mm = mm_or_skip!();
    let (card, mirror) = (Card::new(&mm, 64), Arc::new(Mirror::default()));
    *mirror.pause.lock().unwrap() = Duration::from_millis(100);
    let notifier = mm.mirror_register(mirror).unwrap();
    card.when_copying(|| std::thread::sleep(Duration::from_millis(50)));
    let (one, two) = (filled(8), filled(8));
    std::thread::scope(|scope| {
        for (mine, other) in [(&one, &two), (&two, &one)] {
            let card = &card;
            scope.spawn(move || {
                let start = other.as_ptr().cast::<MigratePfn>();
                // SAFETY: 16 aligned words of a mapping that outlives the thread; nobody else uses them.
                let lists = unsafe { std::slice::from_raw_parts_mut(start, 16) };
                let (src, dst) = lists.split_at_mut(8);
                card.migrate_with(mine.range(), Select::SYSTEM, src, dst).unwrap();
            });
        }
    });
    notifier.remove().unwrap();
}

#[test]
fn an_allocator_that_drops_pages_all_the_while_does_not_stop_a_migration() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    assert_eq!(card.all_to_device(region.range()), 64);
    assert_eq!(card.to_system(region.range()).unwrap(), 64);
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) && started.elapsed() < Duration::from_secs(4) {
                drop_contents(&region, 0);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        let result = card.to_device(region.range());
        stop.store(true, Ordering::SeqCst);
        result.unwrap();
    });
    assert!(started.elapsed() < Duration::from_secs(2), "it waited until the drops ended");
}

#[test]
fn device_memory_is_removed_while_pages_leave_for_it() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                card.to_device(region.range()).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        let removed = card.devmem.remove();
        stop.store(true, Ordering::SeqCst);
        mover.join().unwrap();
        removed.unwrap();
    });
    assert_eq!((on_device(&mm, region.range()), card.devmem.in_use()), (0, 0));
    assert!((0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) != 0));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}
