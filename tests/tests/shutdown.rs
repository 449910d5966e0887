//! The end: closing, leaving, being killed, forking, and what is said when nothing works.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, Ended, child_of, is_child, on_device, on_each};
use hmm_core::{Error, Mm, PfnEntry, RangeRequest, Residency, VirtAddr};
use hmm_tests::{Region, mm_or_skip};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Runs the rest of a test in a child; `None` when it was skipped there.
fn child(test: &str) -> Option<Ended> {
    let ended = child_of(test, Duration::from_secs(4));
    if let Some(reason) = ended.skipped() {
        eprintln!("skipped: {reason}");
        return None;
    }
    Some(ended)
}

fn good_child(test: &str) {
    if let Some(ended) = child(test) {
        assert!(ended.is_good(), "{ended:?}");
    }
}

fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    region.fill(7);
    region
}

fn is_whole(region: &Region) -> bool {
    let value = u64::from_ne_bytes([7; 8]);
    (0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == value)
}

fn leave(status: i32) -> ! {
    // SAFETY: ends the process without any handlers.
    unsafe { libc::_exit(status) }
}

#[test]
fn closing_brings_everything_home_and_later_calls_say_gone() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 600), filled(600));
    let tracker = mm.track(region.range()).unwrap();
    assert_eq!(card.all_to_device(region.range()), 600);
    mm.close().unwrap();
    mm.close().unwrap();
    assert_eq!(card.driver.free_pages(), 600);
    assert!(is_whole(&region));
    let gone = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Gone { .. })));
    gone(card.to_device(region.range()).map(|_| ()));
    gone(mm.track(region.range()).map(|_| ()));
    gone(mm.find_vma(VirtAddr::new(region.addr())).map(|_| ()));
    gone(mm.pin_range(region.range()));
    gone(mm.make_present(region.range(), true).map(|_| ()));
    gone(mm.residency(region.range(), &mut [Residency::None; 600]));
    gone(mm.read(VirtAddr::new(region.addr()), &mut [0; 8]).map(|_| ()));
    let request = RangeRequest { range: region.range(), owner: None };
    gone(mm.snapshot(&request, &mut [PfnEntry::default(); 600]));
    assert!(!mm.peek(VirtAddr::new(region.addr()), &mut [0; 8]));
    card.devmem.remove().unwrap();
    drop(tracker);
    let again = Mm::current().unwrap();
    assert!(!Arc::ptr_eq(&mm, &again));
    let card = Card::new(&again, 600);
    assert_eq!(card.all_to_device(region.range()), 600);
    assert!(is_whole(&region));
}

#[test]
fn memory_never_touched_is_usable_after_closing_without_spare_descriptors() {
    if !is_child() {
        return good_child(
            "memory_never_touched_is_usable_after_closing_without_spare_descriptors",
        );
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), Region::new(8));
    card.to_device(region.range()).unwrap();
    card.to_system(region.range()).unwrap();
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 1024 };
    // SAFETY: the limit is a plain struct.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
    mm.close().unwrap();
    // SAFETY: the page belongs to this test.
    unsafe { libc::madvise(region.as_ptr().cast(), 4096, libc::MADV_DONTNEED) };
    assert_eq!(region.word(0).load(Ordering::Relaxed), 0);
}

static AT_EXIT: OnceLock<(Card, Region)> = OnceLock::new();

extern "C" fn look_at_exit() {
    let (card, region) = AT_EXIT.get().unwrap();
    let away = on_device(&card.mm, region.range());
    let good = away > 0 && is_whole(region) && on_device(&card.mm, region.range()) == 0;
    leave(if good { 42 } else { 43 });
}

#[test]
fn exit_handlers_see_the_data_of_pages_that_are_away() {
    if !is_child() {
        let ended = child("exit_handlers_see_the_data_of_pages_that_are_away");
        return ended.iter().for_each(|ended| assert_eq!(ended.code(), Some(42), "{ended:?}"));
    }
    let mm = mm_or_skip!();
    let (card, region) = AT_EXIT.get_or_init(|| (Card::new(&mm, 512), filled(256)));
    let busy = Region::new(128);
    busy.fill(1);
    assert_eq!(card.all_to_device(region.range()), 256);
    // SAFETY: the handler is a function of this test.
    assert_eq!(unsafe { libc::atexit(look_at_exit) }, 0);
    let started = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for half in [busy.part(0, 64), busy.part(64, 64)] {
            let started = &started;
            scope.spawn(move || {
                loop {
                    card.to_device(half).unwrap();
                    card.to_system(half).unwrap();
                    started.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        while started.load(Ordering::SeqCst) < 4 {
            std::thread::yield_now();
        }
        // SAFETY: the handlers run in this thread, as in any C program.
        unsafe { libc::exit(0) };
    });
}

#[test]
fn a_program_killed_half_way_is_gone_at_once() {
    if !is_child() {
        let ended = child("a_program_killed_half_way_is_gone_at_once");
        let killed = Some(libc::SIGKILL);
        return ended.iter().for_each(|ended| {
            assert!(ended.status.is_some() && ended.signal() == killed, "{ended:?}");
        });
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let other = filled(8);
    card.to_device(other.range()).unwrap();
    // SAFETY: ends this process.
    card.when_copying(|| _ = unsafe { libc::kill(libc::getpid(), libc::SIGKILL) });
    let _ = card.to_device(region.range());
}

#[test]
fn a_fault_callback_that_touches_migrated_memory_is_named() {
    if !is_child() {
        let ended = child("a_fault_callback_that_touches_migrated_memory_is_named");
        return ended.iter().for_each(|ended| {
            assert!(ended.stderr.contains("libhmm: a driver callback"), "{ended:?}");
        });
    }
    let mm = mm_or_skip!();
    let (card, region, other) = (Card::new(&mm, 8), filled(1), Arc::new(filled(1)));
    assert_eq!(card.all_to_device(region.range()), 1);
    assert_eq!(card.all_to_device(other.range()), 1);
    let (needed, once) = (Arc::clone(&other), AtomicBool::new(false));
    card.when_faulting(move || {
        if !once.swap(true, Ordering::SeqCst) {
            needed.word(0).load(Ordering::Relaxed);
        }
    });
    assert!(is_whole(&region));
}

#[test]
fn nobody_is_told_why_it_does_not_work() {
    if !is_child() {
        let test = "nobody_is_told_why_it_does_not_work";
        let well = |ended: &Ended| assert!(ended.is_good(), "{ended:?}");
        return on_each(test, Duration::from_secs(4), &[&[("HMM_ENGINE", "uffd")]], well);
    }
    // SAFETY: no pointers; the process gives up its rights for good.
    if unsafe { libc::setgid(65534) != 0 || libc::setuid(65534) != 0 } {
        hmm_tests::skip!("this process may not become another user");
    }
    match Mm::current() {
        Ok(_) => hmm_tests::skip!("userfaultfd is allowed to everybody here"),
        Err(Error::Unsupported { what }) => assert!(what.contains("userfaultfd"), "{what}"),
        Err(other) => panic!("{other}"),
    }
}

/// Forks; true when the child says that `work` is true. A child that hangs is ended by its alarm.
fn fork_and(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child reads memory and leaves by _exit. A fork handler that hangs never gets as far as here, so
    // the parent must not wait for ever.
    let child = unsafe { libc::fork() };
    if child == 0 {
        leave(i32::from(!work()));
    }
    let mut status = 0;
    for _ in 0..2000 {
        // SAFETY: asks for the child just made.
        if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
            return libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // SAFETY: ends the child just made.
    unsafe { libc::kill(child, libc::SIGKILL) };
    // SAFETY: waits for it.
    unsafe { libc::waitpid(child, &mut status, 0) };
    false
}

#[test]
fn forks_by_several_threads_lose_nothing_and_hang_nowhere() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 128), filled(128));
    let (stop, bad) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                let _ = card.to_device(region.range());
            }
        });
        let fork_often = || {
            for _ in 0..20 {
                let good = fork_and(|| is_whole(&region));
                bad.fetch_add(usize::from(!good), Ordering::SeqCst);
                if !good {
                    return;
                }
            }
        };
        let forkers: Vec<_> = (0..3).map(|_| scope.spawn(fork_often)).collect();
        forkers.into_iter().for_each(|forker| forker.join().unwrap());
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(bad.load(Ordering::SeqCst), 0);
}

#[test]
fn a_fork_while_another_thread_opens_the_mm_leaves_the_child_able_to() {
    drop(mm_or_skip!());
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                Mm::current().unwrap().close().unwrap();
            }
        });
        let good = (0..10).all(|_| fork_and(|| Mm::current().is_ok()));
        stop.store(true, Ordering::SeqCst);
        assert!(good, "a child could not open an mm");
    });
}
