//! Forks from inside a driver's callbacks, and with devices that fail: nothing can be waited for there, and still no
//! child reads zeros. Programs that are started there, too.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod children;
mod driver;

use children::{Ended, fork_and};
use driver::{Card, on_device};
use hmm_tests::{Region, mm_or_skip};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

fn word(region: &Region, page: usize) -> u64 {
    region.word(page * 512).load(Ordering::Relaxed)
}

fn filled(pages: usize) -> Arc<Region> {
    let region = Arc::new(Region::new(pages));
    region.fill(0x5a);
    region
}

const FILLED: u64 = 0x5a5a_5a5a_5a5a_5a5a;

#[test]
fn a_device_that_fails_leaves_no_zeros_to_the_child() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(32);
    assert_eq!(card.all_to_device(region.part(4, 20)), 20);
    *card.driver.lost.lock().unwrap() = Some(region.page_addr(10));
    for page in 4..24 {
        let ended = fork_and(|| word(&region, page) == FILLED);
        assert!(matches!(ended, Ended::Well | Ended::By(_)), "page {page}: {ended:?}");
    }
    let lost = fork_and(|| word(&region, 10) == FILLED);
    assert!(matches!(lost, Ended::By(libc::SIGSEGV | libc::SIGBUS)), "{lost:?}");
    assert_eq!(fork_and(|| word(&region, 3) == FILLED && word(&region, 24) == FILLED), Ended::Well);
    *card.driver.lost.lock().unwrap() = None;
    for page in (4..24).filter(|page| *page != 10) {
        assert_eq!(word(&region, page), FILLED);
    }
}

/// Forks in a callback, and tells how children ended that touched a page at home, and each of some others.
struct Forks {
    region: Arc<Region>,
    away: Vec<usize>,
    ends: Mutex<Vec<(usize, Ended)>>,
    done: AtomicBool,
}

impl Forks {
    fn new(region: &Arc<Region>, away: &[usize]) -> Arc<Self> {
        let (ends, done) = (Mutex::default(), AtomicBool::new(false));
        Arc::new(Self { region: Arc::clone(region), away: away.to_vec(), ends, done })
    }

    /// Once.
    fn run(&self) {
        if self.done.swap(true, Ordering::SeqCst) {
            return;
        }
        for page in [0].iter().chain(&self.away) {
            let ended = fork_and(|| word(&self.region, *page) == FILLED);
            self.ends.lock().unwrap().push((*page, ended));
        }
    }

    fn check(&self) {
        let ends = self.ends.lock().unwrap();
        assert_eq!(ends.len(), 1 + self.away.len());
        assert_eq!(ends[0].1, Ended::Well, "page 0 is at home");
        for (page, ended) in &ends[1..] {
            assert_eq!(*ended, Ended::By(libc::SIGSEGV), "page {page}");
        }
    }
}

#[test]
fn a_fork_inside_fault_leaves_out_what_is_away() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(32);
    assert_eq!(card.all_to_device(region.part(8, 16)), 16);
    let forks = Forks::new(&region, &[8, 12, 23]);
    let inside = Arc::clone(&forks);
    card.when_faulting(move || inside.run());
    assert_eq!(word(&region, 12), FILLED);
    card.calm();
    forks.check();
    assert!((0..32).all(|page| word(&region, page) == FILLED));
    assert!(card.settles_at(0));
}

#[test]
fn a_fork_inside_a_migration_leaves_out_what_it_holds() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(32);
    assert_eq!(card.all_to_device(region.part(8, 4)), 4);
    let forks = Forks::new(&region, &[8, 16, 19]);
    let inside = Arc::clone(&forks);
    card.when_copying(move || inside.run());
    assert!(card.to_device(region.part(16, 4)).unwrap() > 0);
    card.calm();
    forks.check();
    assert_eq!(fork_and(|| (0..32).all(|page| word(&region, page) == FILLED)), Ended::Well);
    assert!((0..32).all(|page| word(&region, page) == FILLED));
}

#[test]
fn programs_are_started_inside_callbacks() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(16);
    assert_eq!(card.all_to_device(region.range()), 16);
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    card.when_faulting(move || {
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            let status = Command::new("sh").args(["-c", "exit 5"]).status().unwrap();
            assert_eq!(status.code(), Some(5));
        }
    });
    assert_eq!(word(&region, 3), FILLED);
    card.calm();
    assert!(started.load(Ordering::SeqCst) > 0);
    assert!((0..16).all(|page| word(&region, page) == FILLED));
}

#[test]
fn programs_are_started_while_pages_come_and_go() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(32);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                card.to_device(region.range()).unwrap();
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert!((0..32).all(|page| word(&region, page) == FILLED));
            }
        });
        for round in 0..20 {
            let mut command = Command::new("sh");
            command.args(["-c", "exit 4"]);
            if round % 2 == 0 {
                // SAFETY: makes it a fork instead of a posix_spawn; nothing else happens there.
                unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, || Ok(())) };
            }
            assert_eq!(command.status().unwrap().code(), Some(4));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!((0..32).all(|page| word(&region, page) == FILLED));
    assert!(on_device(&mm, region.range()) <= 32);
}

#[test]
fn system_and_vfork_leave_pages_where_they_are() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, 64);
    let region = filled(16);
    assert_eq!(card.all_to_device(region.range()), 16);
    // SAFETY: a command in a string that ends with 0.
    let status = unsafe { libc::system(c"exit 3".as_ptr()) };
    assert_eq!(libc::WEXITSTATUS(status), 3);
    assert_eq!(Command::new("true").status().unwrap().code(), Some(0));
    assert_eq!(on_device(&mm, region.range()), 16);
    assert!((0..16).all(|page| word(&region, page) == FILLED));
}
