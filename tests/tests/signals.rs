//! Engines that answer touches in handlers of SIGSEGV or SIGBUS, in programs that have handlers of their own: each gets
//! what is its own, and a crash stays a crash.
//!
//! Each test runs in children, one for each engine that is meant, so that all are tried wherever they can be opened.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod handlers;

use driver::{Card, Ended, Variables, is_child, on_device, on_each};
use handlers::*;
use hmm_core::{Error, Mm, PAGE_SIZE};
use hmm_tests::{Region, mm_or_skip, skip};
use libc::{SIGBUS, SIGSEGV, SIGTERM, SIGUSR1, SIGUSR2};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);
const INLINE: &Variables = &[("HMM_ENGINE", "uffd-inline")];
const SIGNAL: &Variables = &[("HMM_ENGINE", "signal")];
const WORDS: usize = PAGE_SIZE / 8;
/// `si_code` of a touch that a protection forbids, and of one where nothing is mapped or no file is behind.
const SEGV_ACCERR: i32 = 2;
const SEGV_MAPERR: i32 = 1;
const BUS_ADRERR: i32 = 2;

fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    (0..region.words()).for_each(|word| region.word(word).store(word as u64, Ordering::Relaxed));
    region
}

fn is_whole(region: &Region) -> bool {
    (0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == word as u64)
}

fn well(ended: &Ended) {
    assert!(ended.is_good(), "{ended:?}");
}

/// In a child: what it was asked to try.
fn case() -> String {
    std::env::var("HMM_TEST_CASE").unwrap_or_default()
}

/// In a child: the rest is what ends it.
fn now_it_ends() {
    eprintln!("now it ends");
}

/// The child came as far as [`now_it_ends`], and was ended by a signal.
fn ended_by(signal: i32) -> impl Fn(&Ended) {
    move |ended| {
        assert!(ended.stderr.contains("now it ends"), "{ended:?}");
        assert_eq!(ended.signal(), Some(signal), "{ended:?}");
    }
}

/// The signals in whose handlers the engine of a child works, its main one first.
fn signals_of(mm: &Mm) -> &'static [i32] {
    if mm.engine_name() == "signal" { &[SIGSEGV] } else { &[SIGBUS, SIGSEGV] }
}

/// Two kinds of faults of the program's own in turn, which a handler jumps back from, while pages come home.
fn fault_often(card: &Card, check: impl Fn(u64, i32, i32)) {
    let region = filled(64);
    let (forbidden, empty) = (forbidden_page(), page_without_file());
    let faults = [
        (forbidden.addr() + 123, SIGSEGV, SEGV_ACCERR),
        (8, SIGSEGV, SEGV_MAPERR),
        (empty + 7, SIGBUS, BUS_ADRERR),
    ];
    for round in 0..1024 {
        let page = round % 64;
        if page == 0 {
            assert_eq!(card.all_to_device(region.range()), 64);
        }
        let (address, signal, code) = faults[round % 3];
        assert!(!probe(address, signal == SIGSEGV && round % 2 == 0), "{address:#x}");
        assert_eq!(CALLS.load(Ordering::SeqCst), round + 1);
        check(address, signal, code);
        assert!(was_blocked(SIGUSR1) && was_blocked(SIGTERM) && !was_blocked(SIGUSR2));
        let now = blocked();
        assert!(is_in(&now, SIGTERM) && !is_in(&now, SIGUSR1) && !is_in(&now, signal));
        assert!(page != 63 || is_whole(&region));
        assert_eq!(
            region.word(page * WORDS + 1).load(Ordering::Relaxed),
            (page * WORDS + 1) as u64
        );
    }
}

/// Sends pages away and touches them until told to stop.
fn move_all_the_while(card: &Card, stop: &AtomicBool) {
    let region = filled(16);
    while !stop.load(Ordering::SeqCst) {
        assert_eq!(card.all_to_device(region.range()), 16);
        assert!(is_whole(&region));
    }
}

fn own_faults(handler: usize, flags: i32, check: impl Fn(u64, i32, i32)) {
    block(SIGTERM, libc::SIG_BLOCK);
    for signal in [SIGSEGV, SIGBUS] {
        install(signal, handler, flags, &[SIGUSR1]);
    }
    let mm = mm_or_skip!();
    let (card, stop) = (Card::new(&mm, 80), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| move_all_the_while(&card, &stop));
        fault_often(&card, check);
        stop.store(true, Ordering::SeqCst);
    });
    assert!(card.settles_at(0));
    assert_eq!(mm.counters().self_faults, 0);
}

#[test]
fn faults_of_the_program_reach_the_handler_that_it_had() {
    if !is_child() {
        let test = "faults_of_the_program_reach_the_handler_that_it_had";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    own_faults(jump_back as WithInfo as usize, flags, |address, signal, code| {
        assert_eq!(ADDRESS.load(Ordering::SeqCst), address);
        assert_eq!(CODE.load(Ordering::SeqCst), code);
        assert!(was_blocked(signal));
    });
}

#[test]
fn faults_of_the_program_reach_a_plain_handler_that_it_had() {
    if !is_child() {
        let test = "faults_of_the_program_reach_a_plain_handler_that_it_had";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    own_faults(jump_back_plainly as Plain as usize, libc::SA_NODEFER, |_, signal, _| {
        assert!(!was_blocked(signal));
    });
}

#[test]
fn a_handler_that_wants_one_signal_gets_one() {
    if !is_child() {
        let test = "a_handler_that_wants_one_signal_gets_one";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], ended_by(SIGSEGV));
    }
    let flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
    install(SIGSEGV, jump_back as WithInfo as usize, flags, &[]);
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    assert!(!probe(8, true));
    assert!(is_whole(&region));
    now_it_ends();
    probe(8, true);
}

#[test]
fn a_handler_installed_later_is_put_behind_the_librarys() {
    if !is_child() {
        let test = "a_handler_installed_later_is_put_behind_the_librarys";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], |ended| {
            well(ended);
            assert!(ended.stderr.contains("the program replaced the handler of SIG"), "{ended:?}");
        });
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    assert!(is_whole(&region));
    let forbidden = forbidden_page();
    for signal in signals_of(&mm) {
        install_with_info(*signal, jump_back);
        assert_eq!(card.all_to_device(region.range()), 8);
        assert!(is_whole(&region));
        let address = if *signal == SIGBUS { page_without_file() } else { forbidden.addr() + 9 };
        assert!(!probe(address, false));
        assert_eq!(ADDRESS.load(Ordering::SeqCst), address);
        assert_eq!(card.all_to_device(region.range()), 8);
        assert!(is_whole(&region));
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), signals_of(&mm).len());
}

#[test]
fn a_handler_replaced_again_and_again_ends_migration_and_loses_nothing() {
    if !is_child() {
        let test = "a_handler_replaced_again_and_again_ends_migration_and_loses_nothing";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region, away) = (Card::new(&mm, 16), filled(8), filled(8));
    assert_eq!(card.all_to_device(away.range()), 8);
    let signal = signals_of(&mm)[0];
    for round in 0..16 {
        install_with_info(signal, [jump_back, note][round % 2]);
        assert_eq!(card.all_to_device(region.range()), 8, "round {round}");
        assert!(is_whole(&region));
    }
    install_with_info(signal, jump_back);
    match card.to_device(region.range()) {
        Err(Error::Unsupported { what }) => assert!(what.contains("replaced"), "{what}"),
        other => panic!("{other:?}"),
    }
    // A touch would reach the wrong handler; what is away comes home on request, and when the mm is closed.
    assert_eq!((on_device(&mm, region.range()), on_device(&mm, away.range())), (0, 8));
    assert!(is_whole(&region));
    assert_eq!(card.to_system(away.part(0, 4)).unwrap(), 4);
    mm.close().unwrap();
    assert!(is_whole(&away));
    assert_eq!(CALLS.load(Ordering::SeqCst), 0);
}

/// Becomes nobody, who may not open a userfaultfd that serves the kernel, but still owns itself.
fn become_nobody() -> bool {
    // SAFETY: no pointers; the process gives up its rights for good.
    unsafe {
        libc::setgid(65534) == 0
            && libc::setuid(65534) == 0
            && libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
    }
}

const IGNORED: [&Variables; 4] = [
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "SIGSEGV")],
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "SIGBUS")],
    // Every userfaultfd is refused: what is left is refused, too.
    &[("HMM_ENGINE", "auto"), ("HMM_UFFD_DISABLE", "events"), ("HMM_TEST_CASE", "SIGSEGV")],
    &[("HMM_ENGINE", "auto"), ("HMM_TEST_CASE", "SIGBUS, nobody")],
];

#[test]
fn an_ignored_signal_is_a_reason_to_refuse_and_to_take_another_engine() {
    if !is_child() {
        let test = "an_ignored_signal_is_a_reason_to_refuse_and_to_take_another_engine";
        return on_each(test, LIMIT, &IGNORED, well);
    }
    let case = case();
    let (name, nobody) = case.split_once(", ").unwrap_or((&case, ""));
    let signal = if name == "SIGSEGV" { SIGSEGV } else { SIGBUS };
    if !nobody.is_empty() && !become_nobody() {
        skip!("this process may not become another user");
    }
    install(signal, libc::SIG_IGN, 0, &[]);
    match Mm::current() {
        Err(Error::Unsupported { what }) if nobody.is_empty() => {
            if what.contains("lacks EVENT_")
                && std::env::var("HMM_ENGINE").unwrap() == "uffd-inline"
            {
                skip!("{what}");
            }
            assert!(what.contains(name) || what.contains("userfaultfd is refused"), "{what}");
            let is_forced = std::env::var("HMM_ENGINE").unwrap() != "auto";
            assert!(is_forced || what.contains("uffd: ") && what.contains("signal: "), "{what}");
        }
        Ok(mm) if !nobody.is_empty() => {
            assert_ne!(mm.engine_name(), "uffd-inline");
            let (card, region) = (Card::new(&mm, 8), filled(8));
            assert_eq!(card.all_to_device(region.range()), 8);
            assert!(is_whole(&region));
        }
        other => panic!("{other:?}"),
    }
}

const CRASHES: [&Variables; 4] = [
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "SIGSEGV")],
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "SIGBUS")],
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "SIGSEGV")],
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "SIGBUS")],
];

#[test]
fn a_crash_is_a_crash() {
    if !is_child() {
        let (segv, bus): (Vec<_>, Vec<_>) =
            CRASHES.into_iter().partition(|one| one.contains(&("HMM_TEST_CASE", "SIGSEGV")));
        on_each("a_crash_is_a_crash", LIMIT, &segv, ended_by(SIGSEGV));
        return on_each("a_crash_is_a_crash", LIMIT, &bus, ended_by(SIGBUS));
    }
    let empty = page_without_file();
    [SIGSEGV, SIGBUS].into_iter().for_each(reset);
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    now_it_ends();
    probe(if case() == "SIGBUS" { empty } else { 0 }, case() == "SIGSEGV");
}

/// What was there before the handler under test.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

fn previous() -> &'static libc::sigaction {
    // SAFETY: it was leaked before the handler could run.
    unsafe { &*PREVIOUS.load(Ordering::SeqCst) }
}

/// As Python's faulthandler.
extern "C" fn restore_and_raise(number: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    exchange(number, previous());
    // SAFETY: no pointers.
    unsafe { libc::raise(number) };
}

const CHAINS: [&Variables; 4] = [
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "before")],
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "later")],
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "before")],
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "later")],
];

#[test]
fn handlers_that_pass_a_crash_on_end_it() {
    if !is_child() {
        let test = "handlers_that_pass_a_crash_on_end_it";
        return on_each(test, LIMIT, &CHAINS, ended_by(SIGSEGV));
    }
    reset(SIGSEGV);
    let handler = restore_and_raise as WithInfo;
    let install = || {
        // As faulthandler installs it.
        let flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        let before = Box::leak(Box::new(install(SIGSEGV, libc::SIG_DFL, 0, &[])));
        PREVIOUS.store(before, Ordering::SeqCst);
        install(SIGSEGV, handler as usize, flags, &[]);
    };
    if case() == "before" {
        install();
    }
    let mm = mm_or_skip!();
    if case() != "before" {
        install();
    }
    let (card, region) = (Card::new(&mm, 8), filled(8));
    if case() != "later" {
        // Puts the library's handler first.
        assert_eq!(card.all_to_device(region.range()), 8);
    }
    now_it_ends();
    probe(0, true);
}

const SENT: [&Variables; 3] = [
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "SIGBUS")],
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_TEST_CASE", "SIGSEGV")],
    &[("HMM_ENGINE", "signal"), ("HMM_TEST_CASE", "SIGSEGV")],
];

#[test]
fn a_signal_that_was_sent_is_the_programs() {
    if !is_child() {
        let test = "a_signal_that_was_sent_is_the_programs";
        return on_each(test, LIMIT, &SENT, |ended| {
            let by_bus = ended.stderr.contains("SIGBUS is tried");
            ended_by(if by_bus { SIGBUS } else { SIGSEGV })(ended);
        });
    }
    eprintln!("{} is tried", case());
    let signal = if case() == "SIGBUS" { SIGBUS } else { SIGSEGV };
    install_with_info(signal, note);
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    let send_away = || assert_eq!(card.all_to_device(region.range()), 8);
    for calls in 1..10 {
        send_away();
        send(signal);
        // Any thread of the process may take it.
        let deadline = Instant::now() + Duration::from_secs(2);
        while CALLS.load(Ordering::SeqCst) < calls && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(CALLS.load(Ordering::SeqCst), calls);
        assert!(CODE.load(Ordering::SeqCst) <= 0 && was_blocked(signal));
        // SAFETY: no pointers.
        assert_eq!(SENDER.load(Ordering::SeqCst), unsafe { libc::getpid() });
        assert!(is_whole(&region));
    }
    install(signal, libc::SIG_IGN, 0, &[]);
    send_away();
    send(signal);
    assert!(is_whole(&region));
    reset(signal);
    send_away();
    now_it_ends();
    send(signal);
    std::thread::sleep(LIMIT);
}

#[expect(unconditional_recursion, reason = "on purpose")]
fn overflow(stack: &[u64; 64]) -> u64 {
    let mine = std::hint::black_box([stack[3]; 64]);
    overflow(&mine) + mine[5]
}

#[test]
fn a_stack_overflow_is_told_as_ever() {
    if !is_child() {
        return on_each("a_stack_overflow_is_told_as_ever", LIMIT, &[INLINE, SIGNAL], |ended| {
            assert!(ended.stderr.contains("has overflowed its stack"), "{ended:?}");
            ended_by(libc::SIGABRT)(ended);
        });
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    let deep = std::thread::Builder::new().stack_size(256 << 10).spawn(|| {
        now_it_ends();
        overflow(&[0; 64])
    });
    let _ = deep.unwrap().join();
}

const EVERY_ENGINE: [&Variables; 5] = [
    &[("HMM_ENGINE", "uffd")],
    &[("HMM_ENGINE", "uffd"), ("HMM_UFFD_DISABLE", "poison")],
    INLINE,
    &[("HMM_ENGINE", "uffd-inline"), ("HMM_UFFD_DISABLE", "poison")],
    SIGNAL,
];

/// In a child: pages on a device that lost the middle one.
fn lose(mm: &std::sync::Arc<Mm>) -> (Card, Region) {
    let (card, region) = (Card::new(mm, 3), filled(3));
    assert_eq!(card.all_to_device(region.range()), 3);
    *card.driver.lost.lock().unwrap() = Some(region.page_addr(1));
    assert_eq!(region.word(0).load(Ordering::Relaxed), 0);
    assert_eq!(region.word(2 * WORDS).load(Ordering::Relaxed), 2 * WORDS as u64);
    (card, region)
}

#[test]
fn lost_data_ends_a_program_that_does_not_mind_sigbus() {
    if !is_child() {
        let test = "lost_data_ends_a_program_that_does_not_mind_sigbus";
        return on_each(test, LIMIT, &EVERY_ENGINE, ended_by(SIGBUS));
    }
    reset(SIGBUS);
    let mm = mm_or_skip!();
    let (_card, region) = lose(&mm);
    now_it_ends();
    region.word(WORDS + 5).load(Ordering::Relaxed);
}

#[test]
fn lost_data_tells_its_address_to_a_handler_of_sigbus() {
    if !is_child() {
        let test = "lost_data_tells_its_address_to_a_handler_of_sigbus";
        return on_each(test, LIMIT, &EVERY_ENGINE, well);
    }
    install_with_info(SIGBUS, jump_back);
    let mm = mm_or_skip!();
    let (card, region) = lose(&mm);
    for (calls, at) in [40, 0, 4000, 8].into_iter().enumerate() {
        let address = region.page_addr(1) + at;
        assert!(!probe(address, at == 0), "zeros instead of lost data");
        assert_eq!(CALLS.load(Ordering::SeqCst), calls + 1);
        let told = ADDRESS.load(Ordering::SeqCst);
        assert_eq!(told & !(PAGE_SIZE as u64 - 1), region.page_addr(1), "{told:#x}");
    }
    // As a system call would: an error, no signal.
    let address = hmm_core::VirtAddr::new(region.page_addr(1));
    assert!(mm.read(address, &mut [0; 8]).is_err());
    assert_eq!(CALLS.load(Ordering::SeqCst), 4);
    assert_eq!(mm.counters().poisoned, 1);
    assert!(card.settles_at(0));
    assert_eq!(region.word(WORDS - 1).load(Ordering::Relaxed), WORDS as u64 - 1);
}
