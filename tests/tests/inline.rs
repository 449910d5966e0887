//! Ranges that are answered inline beside a blocking descriptor: who answers, what system calls say, what layout changes
//! do to them, and that the two kinds do not disturb one another.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, on_device, thread_id};
use hmm_core::{AddrRange, Error, Mm, PAGE_SIZE, VirtAddr};
use hmm_tests::{Region, mm_or_skip, present};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORDS: usize = PAGE_SIZE / 8;

/// Makes a range inline, or leaves the test: on an engine that answers all touches alike, with its reason.
macro_rules! inline_or_skip {
    ($mm:expr, $range:expr) => {
        match $mm.inline_range($range) {
            Ok(()) => {}
            Err(reason @ Error::Unsupported { .. }) => hmm_tests::skip!("{reason}"),
            Err(other) => panic!("{other}"),
        }
    };
}

/// An mm whose engine serves the kernel: elsewhere nothing tells inline ranges from others.
macro_rules! blocking_mm_or_skip {
    () => {{
        let mm = mm_or_skip!();
        hmm_tests::needs!(mm, KERNEL_FAULTS);
        mm
    }};
}

fn fill(region: &Region, seed: u64) {
    (0..region.words()).for_each(|word| {
        region.word(word).store(seed + word as u64, Ordering::Relaxed);
    });
}

fn is_whole(region: &Region, seed: u64) -> bool {
    (0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == seed + word as u64)
}

fn file() -> OwnedFd {
    // SAFETY: the name is a terminated string; the result is checked, and owned by nobody else.
    unsafe {
        let fd = libc::memfd_create(c"inline".as_ptr(), 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// What `pwrite` of a page's first word to a file says: 8, or minus the errno.
fn written(file: &OwnedFd, region: &Region, page: usize) -> i64 {
    let start = region.word(page * WORDS).as_ptr();
    // SAFETY: the word lies in the region; the kernel checks it.
    match unsafe { libc::pwrite(file.as_raw_fd(), start.cast(), 8, 0) } {
        -1 => -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap()),
        count => count as i64,
    }
}

/// Sends one page away, touches it, and tells whether the toucher ran the device's `fault`.
fn answers_itself(card: &Card, region: &Region, page: usize) -> bool {
    assert_eq!(card.all_to_device(region.part(page, 1)), 1, "page {page} leaves");
    assert!(!present(region.page_addr(page)));
    card.driver.answered_by.store(0, Ordering::SeqCst);
    region.word(page * WORDS).load(Ordering::Relaxed);
    let by = card.driver.answered_by.load(Ordering::SeqCst);
    assert_ne!(by, 0, "page {page} came home by a fault");
    by == thread_id()
}

#[test]
fn the_toucher_answers_on_an_inline_range() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), Region::new(64));
    fill(&region, 3);
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    let is_inline = !mm.serves_kernel();
    inline_or_skip!(mm, region.part(16, 16));
    assert!(answers_itself(&card, &region, 16), "first page of the range");
    assert!(answers_itself(&card, &region, 31), "last page of the range");
    assert_eq!(answers_itself(&card, &region, 15), is_inline, "below it");
    assert_eq!(answers_itself(&card, &region, 32), is_inline, "above it");
    card.driver.signal_safe.store(false, Ordering::SeqCst);
    assert!(!answers_itself(&card, &region, 20), "a device that is not safe there");
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    mm.blocking_range(region.part(20, 4)).unwrap();
    assert_eq!(answers_itself(&card, &region, 21), is_inline, "blocking again");
    assert!(answers_itself(&card, &region, 19) && answers_itself(&card, &region, 24));
    for _ in 0..3 {
        mm.inline_range(region.range()).unwrap();
        assert!((0..64).step_by(9).all(|page| answers_itself(&card, &region, page)));
        mm.blocking_range(region.range()).unwrap();
        assert!((0..64).step_by(9).all(|page| answers_itself(&card, &region, page) == is_inline));
    }
    assert!(is_whole(&region, 3));
    assert_eq!(mm.counters().self_faults, 0);
    assert!(card.settles_at(0));
}

#[test]
fn system_calls_on_absent_pages_fail_on_an_inline_range_alone() {
    let mm = blocking_mm_or_skip!();
    let (card, region, file) = (Card::new(&mm, 32), Region::new(32), file());
    fill(&region, 9);
    inline_or_skip!(mm, region.part(0, 16));
    assert!(mm.serves_kernel());
    assert_eq!(card.all_to_device(region.range()), 32);
    assert_eq!(written(&file, &region, 3), -i64::from(libc::EFAULT));
    assert_eq!(written(&file, &region, 20), 8, "an ordinary range");
    let guard = mm.guard(region.part(0, 16), false).unwrap();
    assert_eq!(written(&file, &region, 3), 8, "guarded");
    assert_eq!(card.to_device(region.part(0, 16)).unwrap(), 0);
    drop(guard);
    assert_eq!(card.all_to_device(region.range()), 32);
    // The library's own accesses cross the border, and wait on both sides.
    let mut bytes = vec![0; 4 * PAGE_SIZE];
    let from = VirtAddr::new(region.page_addr(14));
    assert!(!mm.peek(from, &mut bytes));
    assert_eq!(mm.read(from, &mut bytes).unwrap(), bytes.len());
    assert_eq!(bytes[..8], (9 + 14 * WORDS as u64).to_le_bytes());
    assert_eq!(card.all_to_device(region.range()), 32);
    assert_eq!(mm.write(from, &bytes).unwrap(), bytes.len());
    assert_eq!(mm.make_present(region.range(), true).unwrap(), 28);
    assert!(is_whole(&region, 9));
    mm.blocking_range(region.range()).unwrap();
    assert_eq!(card.all_to_device(region.range()), 32);
    assert_eq!(written(&file, &region, 3), 8, "blocking again");
}

#[test]
fn pages_come_home_before_a_range_changes() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), Region::new(64));
    for round in 0..4 {
        fill(&region, round);
        assert_eq!(card.all_to_device(region.range()), 64);
        inline_or_skip!(mm, region.part(8, 40));
        assert_eq!(on_device(&mm, region.range()), 24, "round {round}");
        assert_eq!(card.all_to_device(region.range()), 64);
        mm.blocking_range(region.part(30, 30)).unwrap();
        assert_eq!(on_device(&mm, region.range()), 34, "round {round}");
        assert!(is_whole(&region, round));
    }
    // What was never touched is zeros, whoever answers, and however it is reached first.
    let fresh = Region::new(64);
    mm.inline_range(fresh.range()).unwrap();
    fresh.word(0).store(1, Ordering::Relaxed);
    assert_eq!(card.all_to_device(fresh.part(0, 1)), 1);
    assert!((1..fresh.words()).all(|word| fresh.word(word).load(Ordering::Relaxed) == 0));
    assert_eq!(fresh.word(0).load(Ordering::Relaxed), 1);
}

#[test]
fn what_cannot_be_inline_is_refused() {
    let mm = mm_or_skip!();
    let region = Region::new(8);
    inline_or_skip!(mm, region.part(0, 1));
    // SAFETY: the last pages of the region; nothing refers to them.
    unsafe { libc::munmap(region.as_ptr().add(6 * PAGE_SIZE).cast(), PAGE_SIZE) };
    let refused = |range| matches!(mm.inline_range(range), Err(Error::Invalid { .. }));
    assert!(refused(region.range()), "a hole in the mapping");
    let (len, file) = (PAGE_SIZE, file());
    // SAFETY: a new mapping of a file of one page.
    let shared = unsafe {
        assert_eq!(libc::ftruncate(file.as_raw_fd(), len as i64), 0);
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, fd, 0)
    };
    assert_ne!(shared, libc::MAP_FAILED);
    let start = shared.addr() as u64;
    assert!(refused(AddrRange::covering(start, 1).unwrap()), "shared memory");
    assert!(matches!(mm.blocking_range(region.range()), Err(Error::Invalid { .. })));
    mm.inline_range(region.part(0, 6)).unwrap();
    let card = Card::new(&mm, 8);
    let (inner, deadlock) = (Arc::clone(&mm), Arc::new(AtomicBool::new(false)));
    let (part, seen) = (region.part(0, 1), Arc::clone(&deadlock));
    let ops = Notice(Box::new(move || {
        let refused = matches!(inner.inline_range(part), Err(Error::Deadlock { .. }));
        seen.store(refused, Ordering::SeqCst);
    }));
    let notifier = mm.notifier_insert(region.part(0, 2), Arc::new(ops)).unwrap();
    card.to_device(region.part(0, 2)).unwrap();
    assert!(deadlock.load(Ordering::SeqCst), "from a callback");
    notifier.remove().unwrap();
}

struct Notice(Box<dyn Fn() + Send + Sync>);

impl hmm_core::NotifierOps for Notice {
    fn invalidate(&self, _: &hmm_core::Invalidation) {
        (self.0)();
    }
}

fn move_mapping(from: u64, old: usize, new: usize, to: u64) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (old, new) = (old * PAGE_SIZE, new * PAGE_SIZE);
    // SAFETY: both places are the callers'.
    let moved = unsafe { libc::mremap(from as *mut _, old, new, flags, to as *mut libc::c_void) };
    assert_eq!(moved.addr() as u64, to);
}

fn map_over(region: &Region, first: usize, pages: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let (start, access) = (region.page_addr(first), libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: the pages are the region's, and nothing refers to their contents.
    let mapped = unsafe { libc::mmap(start as *mut _, pages * PAGE_SIZE, access, flags, -1, 0) };
    assert_eq!(mapped.addr() as u64, start);
}

#[test]
fn layout_changes_of_inline_ranges_are_noticed() {
    let mm = mm_or_skip!();
    hmm_tests::needs!(mm, EVENTS);
    let (card, region, file) = (Card::new(&mm, 64), Region::new(64), file());
    fill(&region, 5);
    inline_or_skip!(mm, region.part(0, 32));
    assert_eq!(card.all_to_device(region.range()), 64);
    // A drop: half of it on an inline range, half beside.
    let (start, len) = (region.page_addr(24), 16 * PAGE_SIZE);
    // SAFETY: the pages are the region's, and nothing refers to their contents.
    assert_eq!(unsafe { libc::madvise(start as *mut _, len, libc::MADV_DONTNEED) }, 0);
    mm.sync();
    assert!(card.settles_at(48));
    assert!((24..40).all(|page| region.word(page * WORDS + 7).load(Ordering::Relaxed) == 0));
    // A new mapping over both: both descriptors report it.
    map_over(&region, 16, 32);
    mm.sync();
    assert!(card.settles_at(32));
    assert!((16 * WORDS..48 * WORDS).all(|word| region.word(word).load(Ordering::Relaxed) == 0));
    if mm.serves_kernel() {
        region.word(20 * WORDS).store(1, Ordering::Relaxed);
        assert_eq!(card.all_to_device(region.part(20, 1)), 1);
        assert_eq!(written(&file, &region, 20), 8, "the new mapping is an ordinary one");
    }
    let whole = |pages: std::ops::Range<usize>| {
        let mut words = pages.flat_map(|page| page * WORDS..(page + 1) * WORDS);
        words.all(|word| region.word(word).load(Ordering::Relaxed) == 5 + word as u64)
    };
    assert!(whole(0..16) && whole(48..64));
    assert!(card.settles_at(0));
}

#[test]
fn what_mremap_moves_and_enlarges_stays_inline() {
    let mm = mm_or_skip!();
    hmm_tests::needs!(mm, EVENTS);
    let (card, region) = (Card::new(&mm, 64), Region::new(16));
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    let space = Region::new(128);
    fill(&region, 8);
    inline_or_skip!(mm, region.range());
    assert_eq!(card.all_to_device(region.range()), 16);
    // With all its pages away, to a place of twice its size.
    move_mapping(region.addr(), 16, 32, space.addr());
    map_over(&region, 0, 16);
    mm.sync();
    assert_eq!(on_device(&mm, space.part(0, 16)), 16);
    let word = |word: usize| space.word(word).load(Ordering::Relaxed);
    assert!((0..16 * WORDS).all(|at| word(at) == 8 + at as u64));
    assert!((16 * WORDS..32 * WORDS).all(|at| word(at) == 0));
    assert!(answers_itself(&card, &space, 3), "what moved");
    (20 * WORDS..21 * WORDS).for_each(|at| space.word(at).store(7, Ordering::Relaxed));
    assert!(answers_itself(&card, &space, 20), "what was added");
    // What was added is followed, too.
    assert_eq!(card.all_to_device(space.part(0, 32)), 32);
    move_mapping(space.addr(), 32, 32, space.page_addr(64));
    mm.sync();
    assert_eq!(on_device(&mm, space.part(64, 32)), 32);
    assert_eq!(word((64 + 20) * WORDS), 7);
    map_over(&space, 0, 128);
    mm.sync();
    assert!(card.settles_at(0));
    assert!((0..128 * WORDS).all(|at| word(at) == 0));
}

#[test]
fn a_child_of_fork_has_ordinary_memory() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), Region::new(16));
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    fill(&region, 2);
    inline_or_skip!(mm, region.range());
    for _ in 0..5 {
        assert_eq!(card.all_to_device(region.range()), 16);
        // SAFETY: the child reads memory, makes system calls, and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let fine = is_whole(&region, 2) && written(&file(), &region, 3) == 8;
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(i32::from(!fine)) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(is_whole(&region, 2));
    }
    assert!(answers_itself(&card, &region, 3), "the parent goes on");
}

#[test]
fn a_new_mm_begins_without_inline_ranges() {
    for _ in 0..3 {
        let mm = mm_or_skip!();
        let (card, region) = (Card::new(&mm, 8), Region::new(8));
        card.driver.signal_safe.store(true, Ordering::SeqCst);
        fill(&region, 1);
        let is_inline = !mm.serves_kernel();
        assert_eq!(mm.engine_name() == "signal", mm.inline_range(region.range()).is_err());
        assert_eq!(card.all_to_device(region.range()), 8);
        mm.close().unwrap();
        assert!(is_whole(&region, 1));
        assert!(matches!(mm.inline_range(region.range()), Err(Error::Gone { .. })));
        let mm = mm_or_skip!();
        let card = Card::new(&mm, 8);
        card.driver.signal_safe.store(true, Ordering::SeqCst);
        assert_eq!(answers_itself(&card, &region, 3), is_inline);
        mm.close().unwrap();
    }
}

fn random(state: &mut u64) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 33) as usize
}

fn some_part(region: &Region, state: &mut u64) -> AddrRange {
    let count = 1 + random(state) % 48;
    region.part(random(state) % (region.pages() - count), count)
}

fn migrate_until(card: &Card, region: &Region, seed: u64, end: Instant) -> usize {
    let (mut moved, mut state) = (0, seed);
    while Instant::now() < end {
        let range = some_part(region, &mut state);
        let out = random(&mut state).is_multiple_of(2);
        moved += if out { card.to_device(range) } else { card.to_system(range) }.unwrap();
    }
    moved
}

#[test]
fn counters_on_both_kinds_survive_migration_and_changes_of_kind() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 256), Region::new(256));
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    inline_or_skip!(mm, region.part(64, 64));
    let end = Instant::now() + Duration::from_millis(2500);
    let (moved, changes, rounds) = std::thread::scope(|scope| {
        let counters: Vec<_> = (0..3)
            .map(|own: usize| {
                let region = &region;
                scope.spawn(move || {
                    let mut rounds = 0_u64;
                    while Instant::now() < end {
                        for page in 0..region.pages() {
                            region.word(page * WORDS).fetch_add(1, Ordering::Relaxed);
                            let mine = region.word(page * WORDS + 1 + own);
                            mine.store(mine.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let changer = scope.spawn(|| {
            let (mut state, mut changes) = (77, 0_usize);
            while Instant::now() < end {
                let part = some_part(&region, &mut state);
                let inline = random(&mut state).is_multiple_of(2);
                if inline { mm.inline_range(part) } else { mm.blocking_range(part) }.unwrap();
                changes += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            changes
        });
        let movers = [1, 2].map(|seed| {
            let (card, region) = (&card, &region);
            scope.spawn(move || migrate_until(card, region, seed, end))
        });
        let moved: usize = movers.into_iter().map(|mover| mover.join().unwrap()).sum();
        let rounds: Vec<_> = counters.into_iter().map(|one| one.join().unwrap()).collect();
        (moved, changer.join().unwrap(), rounds)
    });
    for page in 0..region.pages() {
        let word = |at: usize| region.word(page * WORDS + at).load(Ordering::Relaxed);
        assert_eq!(word(0), rounds.iter().sum::<u64>(), "page {page}");
        assert!((0..3).all(|own| word(1 + own) == rounds[own]), "page {page}");
    }
    assert!(moved > 500 && changes > 20, "{moved} pages moved, {changes} changes");
    assert!(card.settles_at(0));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}

/// Maps over a slot again and again, parts of it inline, and looks whether it has what was written since.
fn remap_until(mm: &Arc<Mm>, region: &Region, first: usize, pages: usize, end: Instant) -> u64 {
    let (mut state, mut rounds) = (first as u64, 0);
    while Instant::now() < end {
        rounds += 1;
        map_over(region, first, pages);
        let skip = random(&mut state) % pages;
        if !skip.is_multiple_of(3) {
            mm.inline_range(region.part(first + skip, pages - skip)).unwrap();
        }
        let words = || (first * WORDS..(first + pages) * WORDS).step_by(64);
        assert!(words().all(|at| region.word(at).load(Ordering::Relaxed) == 0), "stale contents");
        words().for_each(|at| region.word(at).store(rounds, Ordering::Relaxed));
        std::thread::sleep(Duration::from_micros(random(&mut state) as u64 % 300));
        for at in words() {
            assert_eq!(region.word(at).load(Ordering::Relaxed), rounds, "word {at}");
        }
    }
    rounds
}

#[test]
fn remapped_slots_of_both_kinds_keep_exactly_what_was_written() {
    let mm = mm_or_skip!();
    hmm_tests::needs!(mm, EVENTS);
    // Without MOVE, what is mapped over in the moment of a drop is not told from what was there before.
    hmm_tests::needs!(mm, MOVE);
    let (card, region) = (Card::new(&mm, 128), Region::new(128));
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    inline_or_skip!(mm, region.part(0, 8));
    let end = Instant::now() + Duration::from_millis(2500);
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let slots = [0, 48, 96].map(|first| {
            let (mm, region, stop) = (&mm, &region, &stop);
            scope.spawn(move || {
                let rounds = remap_until(mm, region, first, 32, end);
                stop.fetch_add(1, Ordering::SeqCst);
                rounds
            })
        });
        let mut state = 5;
        let mut moved = 0;
        while stop.load(Ordering::SeqCst) < 3 && Instant::now() < end + Duration::from_secs(5) {
            let first = [0, 48, 96][random(&mut state) % 3] + random(&mut state) % 16;
            // A slot may be unmapped just now.
            moved += card.to_device(region.part(first, 16)).unwrap_or(0);
        }
        let rounds: u64 = slots.into_iter().map(|slot| slot.join().unwrap()).sum();
        assert!(rounds > 100 && moved > 100, "{rounds} rounds, {moved} pages moved");
    });
    map_over(&region, 0, 128);
    mm.sync();
    assert!(card.settles_at(0));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}
