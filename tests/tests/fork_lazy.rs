//! Lazy forks: pages stay on their devices, parent and child share them, and each brings its own copy home.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod children;
mod driver;

use children::{Child, Ended, fork_and};
use driver::{Card, on_device};
use hmm_core::{AddrRange, ForkMode, Mm};
use hmm_soft::{Kernel, SoftConfig, SoftDevice};
use hmm_tests::{Region, mm_or_skip};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn set_all(region: &Region, value: u64) {
    (0..region.words())
        .for_each(|word| region.word(word).store(value + word as u64, Ordering::Relaxed));
}

fn all_are(region: &Region, value: u64) -> bool {
    let is_right = |word| region.word(word).load(Ordering::Relaxed) == value + word as u64;
    (0..region.words()).all(is_right)
}

/// A card, and a region all of whose pages are on it.
fn on_card(mm: &Arc<Mm>, pages: usize, value: u64) -> (Card, Region) {
    mm.set_fork_mode(ForkMode::Lazy).unwrap();
    let (card, region) = (Card::new(mm, 2 * pages), Region::new(pages));
    set_all(&region, value);
    assert_eq!(card.all_to_device(region.range()), pages);
    (card, region)
}

/// Waits until every page is free, each once.
fn all_free(card: &Card, pages: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while card.driver.free_pages() < pages && Instant::now() < deadline {
        card.mm.sync();
        std::thread::sleep(Duration::from_millis(2));
    }
    card.driver.free_pages() == pages && card.driver.double_frees.load(Ordering::SeqCst) == 0
}

#[test]
fn parent_and_child_share_pages_and_each_has_its_own_changes() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 64, 10);
    let child = Child::start(|go| {
        go.wait();
        let same = all_are(&region, 10);
        set_all(&region, 7000);
        same && all_are(&region, 7000)
    });
    assert_eq!(on_device(&mm, region.range()), 64, "nothing came home");
    assert_eq!(card.driver.faults.load(Ordering::SeqCst), 0);
    set_all(&region, 9000);
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert!(all_are(&region, 9000));
    assert!(all_free(&card, 128), "promise 79: free ran once both had let go");
}

#[test]
fn the_child_has_the_pages_when_the_parent_dropped_them() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 5);
    let child = Child::start(|go| {
        go.wait();
        all_are(&region, 5)
    });
    // SAFETY: the parent's own pages are dropped; it does not look at them again.
    unsafe { libc::madvise(region.as_ptr().cast(), region.len(), libc::MADV_DONTNEED) };
    mm.sync();
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert!(all_free(&card, 64));
}

#[test]
fn what_the_child_never_touches_is_released_when_it_ends() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 5);
    assert_eq!(fork_and(|| region.word(0).load(Ordering::Relaxed) == 5), Ended::Well);
    assert!(all_are(&region, 5));
    assert!(all_free(&card, 64));
}

#[test]
fn pages_of_children_that_end_while_others_are_forked_are_released() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 5);
    for _ in 0..30 {
        assert_eq!(fork_and(|| true), Ended::Well);
    }
    assert!(all_are(&region, 5));
    assert!(all_free(&card, 64));
}

#[test]
fn a_device_of_the_parents_writes_to_its_own_copy() {
    let mm = mm_or_skip!();
    mm.set_fork_mode(ForkMode::Lazy).unwrap();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(16);
    set_all(&region, 1);
    device.migrate(region.range()).unwrap();
    let add = Kernel::AtomicAddU64 { addr: region.addr(), value: 100 };
    device.run(add).unwrap();
    let child = Child::start(|go| {
        go.wait();
        let first = region.word(0).load(Ordering::Relaxed);
        first == 101
            && (1..region.words())
                .all(|word| region.word(word).load(Ordering::Relaxed) == 1 + word as u64)
    });
    device.run(add).unwrap();
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert_eq!(region.word(0).load(Ordering::Relaxed), 201);
}

#[test]
fn the_child_lives_on_when_the_parent_exits() {
    let mm = mm_or_skip!();
    // A process between this one and the child, which is the parent there.
    let (mut reader, writer) = std::io::pipe().unwrap();
    let middle = Child::start(|_| {
        let mm = Mm::current().unwrap();
        let (_card, region) = on_card(&mm, 32, 77);
        let region = std::mem::ManuallyDrop::new(region);
        // SAFETY: the child waits until its parent is gone, looks, and leaves by _exit.
        unsafe {
            let parent = libc::getpid();
            if libc::fork() == 0 {
                libc::alarm(40);
                while libc::getppid() == parent {
                    libc::usleep(1000);
                }
                let good = all_are(&region, 77);
                use std::io::Write;
                (&writer).write_all(if good { b"good" } else { b"bad!" }).unwrap();
                libc::_exit(0);
            }
            libc::exit(0)
        }
    });
    assert_eq!(middle.end(), Ended::Well);
    drop(writer);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut reader, &mut said).unwrap();
    assert_eq!(said, "good");
    drop(mm);
}

#[test]
fn the_child_gets_sigbus_and_no_zeros_when_the_parent_is_killed() {
    let mm = mm_or_skip!();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let middle = Child::start(|_| {
        let mm = Mm::current().unwrap();
        let (_card, region) = on_card(&mm, 32, 77);
        // SAFETY: as above; the child tells what it saw by how it ends.
        unsafe {
            let parent = libc::getpid();
            let child = libc::fork();
            if child == 0 {
                libc::alarm(40);
                while libc::getppid() == parent {
                    libc::usleep(1000);
                }
                // Its own child, so that somebody can tell.
                libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
                let ended = fork_and(|| all_are(&region, 77));
                use std::io::Write;
                write!(&writer, "{ended:?}").unwrap();
                libc::_exit(0);
            }
            libc::kill(libc::getpid(), libc::SIGKILL);
        }
        false
    });
    assert_eq!(middle.end(), Ended::By(libc::SIGKILL));
    drop(writer);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut reader, &mut said).unwrap();
    let ways = [libc::SIGBUS, libc::SIGSEGV].map(|signal| format!("{:?}", Ended::By(signal)));
    assert!(ways.contains(&said), "{said:?}");
    drop(mm);
}

#[test]
fn children_of_children_have_the_pages_too() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 3);
    for mode in [ForkMode::Home, ForkMode::Lazy] {
        let ended = fork_and(|| {
            Mm::current().unwrap().set_fork_mode(mode).unwrap();
            let grandchild = fork_and(|| {
                let same = all_are(&region, 3);
                set_all(&region, 50);
                same && all_are(&region, 50)
            });
            let same = all_are(&region, 3);
            set_all(&region, 60);
            grandchild == Ended::Well && same && all_are(&region, 60)
        });
        assert_eq!(ended, Ended::Well, "{mode:?}");
    }
    assert!(all_are(&region, 3));
    assert!(all_free(&card, 64));
}

#[test]
fn the_child_migrates_what_it_shares_to_a_device_of_its_own() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 3);
    let ended = fork_and(|| {
        let mine = Mm::current().unwrap();
        let own = SoftDevice::new(&mine, SoftConfig::default()).unwrap();
        let moved = own.migrate(region.range()).unwrap();
        let same = all_are(&region, 3);
        moved == 32 && same && own.close().is_ok() && mine.close().is_ok() && all_are(&region, 3)
    });
    assert_eq!(ended, Ended::Well);
    assert!(all_are(&region, 3));
    assert!(all_free(&card, 64));
}

#[test]
fn what_the_child_does_to_its_mappings_is_followed() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 3);
    let ended = fork_and(|| {
        let mine = Mm::current().unwrap();
        let len = region.len() / 2;
        // SAFETY: the first half is dropped, and found as zeros.
        unsafe { libc::madvise(region.as_ptr().cast(), len, libc::MADV_DONTNEED) };
        let dropped =
            (0..region.words() / 2).all(|word| region.word(word).load(Ordering::Relaxed) == 0);
        let rest = (region.words() / 2..region.words())
            .all(|word| region.word(word).load(Ordering::Relaxed) == 3 + word as u64);
        let _ = mine;
        (dropped
            || !hmm_tests::current_mm()
                .unwrap()
                .capabilities()
                .contains(hmm_tests::Capabilities::EVENTS))
            && rest
    });
    assert_eq!(ended, Ended::Well);
    assert!(all_are(&region, 3));
    assert!(all_free(&card, 64));
}

#[test]
fn closing_the_parents_mm_leaves_the_child_its_pages() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 32, 12);
    let child = Child::start(|go| {
        go.wait();
        all_are(&region, 12)
    });
    mm.close().unwrap();
    assert_eq!(card.driver.free_pages(), 64);
    set_all(&region, 13);
    child.go();
    assert_eq!(child.end(), Ended::Well);
    assert!(all_are(&region, 13));
}

#[test]
fn a_lost_page_is_lost_for_both() {
    let mm = mm_or_skip!();
    let (card, region) = on_card(&mm, 8, 12);
    *card.driver.lost.lock().unwrap() = None;
    let child = Child::start(|go| {
        go.wait();
        region.word(0).load(Ordering::Relaxed) == 12
    });
    card.driver.refuses.store(true, Ordering::SeqCst);
    child.go();
    std::thread::sleep(Duration::from_millis(50));
    card.driver.refuses.store(false, Ordering::SeqCst);
    assert_eq!(child.end(), Ended::Well, "a device that is slow is waited for");
    assert!(all_are(&region, 12));
}

#[test]
fn lazy_forks_while_pages_come_and_go_are_whole() {
    let mm = mm_or_skip!();
    mm.set_fork_mode(ForkMode::Lazy).unwrap();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = Region::new(32);
    set_all(&region, 1 << 40);
    (0..32).for_each(|page| region.word(page * 512 + 9).store(0, Ordering::Relaxed));
    let stop = AtomicBool::new(false);
    let mut ends = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                device.migrate(region.range()).unwrap();
                std::thread::yield_now();
            }
        });
        // Counts up, last page first: a child that sees a count in one page sees no smaller one in a later page.
        scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                (0..32)
                    .rev()
                    .for_each(|page| region.word(page * 512 + 9).store(count, Ordering::SeqCst));
            }
        });
        for _ in 0..25 {
            let ended = fork_and(|| {
                let counts: Vec<_> = (0..32)
                    .map(|page| region.word(page * 512 + 9).load(Ordering::SeqCst))
                    .collect();
                let others = (0..32).all(|page| {
                    region.word(page * 512 + 1).load(Ordering::Relaxed)
                        == (1 << 40) + page as u64 * 512 + 1
                });
                counts.is_sorted() && others
            });
            ends.push(ended);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(ends.iter().all(|ended| *ended == Ended::Well), "{ends:?}");
    device.close().unwrap();
}

#[test]
fn what_the_program_left_out_is_not_shared() {
    let mm = mm_or_skip!();
    let (_card, region) = on_card(&mm, 8, 1);
    // SAFETY: only children miss the region.
    unsafe { libc::madvise(region.as_ptr().cast(), region.len(), libc::MADV_DONTFORK) };
    assert_eq!(fork_and(|| region.word(0).load(Ordering::Relaxed) == 1), Ended::By(libc::SIGSEGV));
    let whole = AddrRange::new(region.addr(), region.addr() + region.len() as u64).unwrap();
    assert_eq!(on_device(&mm, whole), 8);
}
