//! Threads that answer their own touches: on small stacks and deep ones, from signal handlers, many at once, across
//! forks; and which thread runs a driver's `fault`.
//!
//! Each test runs in children, one for each engine that is meant, so that all are tried wherever they can be opened.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod handlers;

use driver::{Card, Ended, Variables, is_child, on_device, on_each, thread_id};
use handlers::{block, reset};
use hmm_core::{AddrRange, Mm, PAGE_SIZE};
use hmm_tests::{Region, mm_or_skip};
use std::hint::black_box;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);
const INLINE: &Variables = &[("HMM_ENGINE", "uffd-inline")];
const SIGNAL: &Variables = &[("HMM_ENGINE", "signal")];
const WORDS: usize = PAGE_SIZE / 8;

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

/// The smallest alternate stack that this processor's state fits on.
fn smallest_stack() -> usize {
    const AT_MINSIGSTKSZ: libc::c_ulong = 51;
    // SAFETY: asks for a number.
    let told = unsafe { libc::getauxval(AT_MINSIGSTKSZ) } as usize;
    told.max(libc::MINSIGSTKSZ)
}

/// The calling thread's signals are handled on `bytes` bytes between two pages that nobody may touch; on its own stack
/// without any.
fn use_alternate_stack(bytes: usize) {
    let mut stack =
        libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
    if bytes > 0 {
        let area = bytes.next_multiple_of(PAGE_SIZE) + 2 * PAGE_SIZE;
        let (access, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of which the inner part becomes usable; it is never unmapped.
        unsafe {
            let start = libc::mmap(ptr::null_mut(), area, access, flags, -1, 0).cast::<u8>();
            let inner = start.add(PAGE_SIZE);
            let access = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(inner.cast(), area - 2 * PAGE_SIZE, access), 0);
            stack = libc::stack_t { ss_sp: inner.cast(), ss_flags: 0, ss_size: bytes };
        }
    }
    // SAFETY: the stack is free and stays mapped; or there is none.
    assert_eq!(unsafe { libc::sigaltstack(&stack, ptr::null_mut()) }, 0, "{bytes} bytes");
}

/// Calls itself until so many bytes of the stack below `top` are in use, and looks from there.
#[inline(never)]
fn from_below(top: usize, bytes: usize, look: &dyn Fn() -> bool) -> bool {
    let frame = black_box([0_u8; 512]);
    let is_deep = ptr::from_ref(&frame).addr() + bytes < top;
    let found = if is_deep { look() } else { from_below(top, bytes, look) };
    found && black_box(frame[9]) == 0
}

fn touch_on(stack: usize, depth: usize, card: &Card, region: &Region) {
    let thread = std::thread::Builder::new().stack_size(256 << 10);
    std::thread::scope(|scope| {
        let touch = || {
            use_alternate_stack(stack);
            let top = ptr::from_ref(&stack).addr();
            for _ in 0..10 {
                assert_eq!(card.all_to_device(region.range()), region.pages());
                assert!(
                    from_below(top, depth, &|| is_whole(region)),
                    "stack {stack}, depth {depth}"
                );
            }
            use_alternate_stack(0);
        };
        thread.spawn_scoped(scope, touch).unwrap().join().unwrap();
    });
}

#[test]
fn touches_are_answered_on_any_stack() {
    if !is_child() {
        let test = "touches_are_answered_on_any_stack";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    for is_safe in [false, true] {
        card.driver.signal_safe.store(is_safe, Ordering::SeqCst);
        for stack in [0, 32 << 10, 8 << 10, smallest_stack() + 2048] {
            for depth in [0, 100 << 10, 200 << 10] {
                touch_on(stack, depth, &card, &region);
            }
        }
    }
    assert_eq!(mm.counters().self_faults, 0);
}

/// Where a thread sleeps in a read, and its frames there.
struct Sleeper {
    pipe: [RawFd; 2],
    frames: [AtomicU64; 2],
}

impl Sleeper {
    fn new() -> Self {
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
        Self { pipe, frames: [const { AtomicU64::new(0) }; 2] }
    }

    /// Sleeps below a large frame, and returns the sum of what that holds.
    #[inline(never)]
    fn sleep_deep(&self) -> u64 {
        let mut numbers = black_box([0_u64; 16 << 10]);
        numbers.iter_mut().enumerate().for_each(|(at, number)| *number = at as u64);
        let top = ptr::from_ref(&numbers).expose_provenance() + size_of_val(&numbers);
        self.sleep(top as u64);
        black_box(&numbers).iter().sum()
    }

    #[inline(never)]
    fn sleep(&self, top: u64) {
        static BYTE: AtomicU64 = AtomicU64::new(0);
        let here = 0_u8;
        let lowest = ptr::from_ref(black_box(&here)).expose_provenance() as u64;
        self.frames[1].store(top, Ordering::SeqCst);
        self.frames[0].store(lowest, Ordering::SeqCst);
        // SAFETY: the byte is not on the stack, and the kernel alone writes it.
        let read = unsafe { libc::read(self.pipe[0], BYTE.as_ptr().cast(), 1) };
        assert_eq!(read, 1);
    }

    /// The pages of the sleeping thread's frames, from the lowest on.
    fn pages(&self) -> AddrRange {
        while self.frames[0].load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        // It is in the system call soon after.
        std::thread::sleep(Duration::from_millis(100));
        let [low, top] = [0, 1].map(|at| self.frames[at].load(Ordering::SeqCst));
        // Some frames of the C library lie below.
        let start = (low & !(PAGE_SIZE as u64 - 1)) - PAGE_SIZE as u64;
        AddrRange::new(start, top & !(PAGE_SIZE as u64 - 1)).unwrap()
    }

    fn wake(&self) {
        // SAFETY: one byte of a constant.
        assert_eq!(unsafe { libc::write(self.pipe[1], [1_u8].as_ptr().cast(), 1) }, 1);
    }
}

/// Migrates the stack of a thread that sleeps in a system call, and wakes the thread.
fn migrate_a_stack(mm: &Arc<Mm>, alternate: usize) {
    let (card, sleeper) = (Card::new(mm, 64), Arc::new(Sleeper::new()));
    let other = Arc::clone(&sleeper);
    let thread = std::thread::spawn(move || {
        use_alternate_stack(alternate);
        other.sleep_deep()
    });
    let pages = sleeper.pages();
    assert_eq!(card.all_to_device(pages), pages.pages());
    assert_eq!(on_device(mm, pages), pages.pages());
    eprintln!("now it wakes up");
    sleeper.wake();
    let count = 16 << 10;
    assert_eq!(thread.join().unwrap(), count * (count - 1) / 2);
    assert!(card.driver.faults.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_stack_may_be_away_while_its_thread_sleeps_if_there_is_another_for_signals() {
    if !is_child() {
        let test = "a_stack_may_be_away_while_its_thread_sleeps_if_there_is_another_for_signals";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    migrate_a_stack(&mm_or_skip!(), 32 << 10);
}

#[test]
fn a_stack_away_without_another_for_signals_ends_the_program() {
    if !is_child() {
        let test = "a_stack_away_without_another_for_signals_ends_the_program";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], |ended| {
            assert!(ended.stderr.contains("now it wakes up"), "{ended:?}");
            assert_eq!(ended.signal(), Some(libc::SIGSEGV), "{ended:?}");
        });
    }
    migrate_a_stack(&mm_or_skip!(), 0);
}

#[test]
fn many_threads_that_touch_one_page_bring_it_home_once() {
    if !is_child() {
        let test = "many_threads_that_touch_one_page_bring_it_home_once";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    const THREADS: usize = 80; // More than there are stacks for handlers.
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1), filled(1));
    card.when_faulting(|| std::thread::sleep(Duration::from_millis(2)));
    for round in 0..10 {
        card.driver.signal_safe.store(round % 2 == 1, Ordering::SeqCst);
        assert_eq!(card.all_to_device(region.range()), 1);
        let barrier = Barrier::new(THREADS);
        std::thread::scope(|scope| {
            for word in 0..THREADS {
                let (barrier, region) = (&barrier, &region);
                scope.spawn(move || {
                    barrier.wait();
                    assert_eq!(region.word(word).load(Ordering::Relaxed), word as u64);
                });
            }
        });
        assert!(card.settles_at(0));
        assert_eq!(mm.counters().migrated_to_system, round + 1);
    }
}

/// What the handler of SIGALRM works on.
static ALARMED: AtomicPtr<Region> = AtomicPtr::new(ptr::null_mut());
static ALARMS: AtomicUsize = AtomicUsize::new(0);
/// In which thread.
static TOUCHER: AtomicI32 = AtomicI32::new(0);

extern "C" fn count_alarm(number: i32) {
    let toucher = TOUCHER.load(Ordering::SeqCst);
    if toucher != thread_id() {
        // The kernel gave it to another thread of the process.
        // SAFETY: no pointers; a thread that is gone gets nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), toucher, number) };
        return;
    }
    // SAFETY: the region lives until the timer is stopped.
    let region = unsafe { &*ALARMED.load(Ordering::SeqCst) };
    let page = ALARMS.fetch_add(1, Ordering::SeqCst) % region.pages();
    let word = region.word(page * WORDS + 7);
    word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

fn alarm_every(microseconds: i64) {
    let period = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let timer = libc::itimerval { it_interval: period, it_value: period };
    // SAFETY: the timer is a plain struct.
    let done = unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, ptr::null_mut()) };
    assert_eq!(done, 0);
}

#[test]
fn a_signal_handler_touches_what_its_thread_touches() {
    if !is_child() {
        let test = "a_signal_handler_touches_what_its_thread_touches";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region, stop) = (Card::new(&mm, 32), Region::new(32), AtomicBool::new(false));
    region.fill(0);
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    ALARMED.store(ptr::from_ref(&region).cast_mut(), Ordering::SeqCst);
    let handler = count_alarm as handlers::Plain as usize;
    handlers::install(libc::SIGALRM, handler, libc::SA_RESTART, &[]);
    // The handler must not run in a thread that is in the library.
    block(libc::SIGALRM, libc::SIG_BLOCK);
    let rounds = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                card.to_device(region.range()).unwrap();
            }
        });
        let toucher = scope.spawn(|| {
            TOUCHER.store(thread_id(), Ordering::SeqCst);
            block(libc::SIGALRM, libc::SIG_UNBLOCK);
            let (mut rounds, start) = (0, Instant::now());
            while start.elapsed() < Duration::from_secs(3) {
                for page in 0..region.pages() {
                    let word = region.word(page * WORDS);
                    word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                }
                rounds += 1;
            }
            rounds
        });
        alarm_every(1000);
        let rounds = toucher.join().unwrap();
        alarm_every(0);
        stop.store(true, Ordering::SeqCst);
        rounds
    });
    let sum = |first: usize| {
        let words = (0..region.pages()).map(|page| region.word(page * WORDS + first));
        words.map(|word| word.load(Ordering::Relaxed)).sum::<u64>()
    };
    let alarms = ALARMS.load(Ordering::SeqCst) as u64;
    eprintln!("{rounds} rounds, {alarms} alarms, {:?}", mm.counters());
    assert_eq!((sum(0), sum(7)), (rounds * region.pages() as u64, alarms));
    assert!(alarms > 100 && mm.counters().device_faults > 100);
}

#[test]
fn reads_are_told_from_writes() {
    if !is_child() {
        return on_each("reads_are_told_from_writes", LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 1), filled(1));
    let touches: [(&dyn Fn(), usize); 4] = [
        (&|| _ = black_box(region.word(3).load(Ordering::Relaxed)), 0),
        (&|| region.word(3).store(3, Ordering::Relaxed), 1),
        (&|| _ = black_box(region.word(3).swap(3, Ordering::Relaxed)), 1),
        (&|| region.read(9, black_box(&mut [0; 100])), 0),
    ];
    for is_safe in [false, true] {
        card.driver.signal_safe.store(is_safe, Ordering::SeqCst);
        for (touch, writes) in &touches {
            assert_eq!(card.all_to_device(region.range()), 1);
            let before =
                [&card.driver.faults, &card.driver.writes].map(|one| one.load(Ordering::SeqCst));
            touch();
            assert_eq!(card.driver.faults.load(Ordering::SeqCst), before[0] + 1);
            assert_eq!(card.driver.writes.load(Ordering::SeqCst), before[1] + writes);
            // Whatever it was, the page may be read and written from now on.
            let faults = mm.counters().cpu_faults;
            region.word(4).store(region.word(4).load(Ordering::Relaxed), Ordering::Relaxed);
            assert!(is_whole(&region));
            assert_eq!(mm.counters().cpu_faults, faults);
        }
    }
}

#[test]
fn a_device_that_is_not_signal_safe_is_asked_by_another_thread() {
    if !is_child() {
        let test = "a_device_that_is_not_signal_safe_is_asked_by_another_thread";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    for is_safe in [false, true, false, true] {
        card.driver.signal_safe.store(is_safe, Ordering::SeqCst);
        for page in 0..8 {
            assert_eq!(card.all_to_device(region.range()), 8);
            assert_eq!(region.word(page * WORDS).load(Ordering::Relaxed), (page * WORDS) as u64);
            let answered_by = card.driver.answered_by.load(Ordering::SeqCst);
            assert_eq!(answered_by == thread_id(), is_safe, "thread {answered_by}");
        }
    }
    assert_eq!(mm.counters().self_faults, 0);
}

/// It should not, but must not ruin anybody: the toucher's own frames lie on its alternate stack meanwhile.
#[test]
fn a_fault_callback_that_faults_itself_harms_nobody() {
    if !is_child() {
        let test = "a_fault_callback_that_faults_itself_harms_nobody";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region, others) = (Card::new(&mm, 8), filled(4), Arc::new(filled(4)));
    card.driver.signal_safe.store(true, Ordering::SeqCst);
    let (needed, next) = (Arc::clone(&others), AtomicUsize::new(0));
    card.when_faulting(move || {
        let page = next.fetch_add(1, Ordering::SeqCst);
        if page < 4 {
            let word = page * WORDS + 1;
            assert_eq!(needed.word(word).load(Ordering::Relaxed), word as u64);
        }
    });
    assert_eq!(card.all_to_device(region.range()), 4);
    assert_eq!(card.all_to_device(others.range()), 4);
    for page in 0..4 {
        let word = page * WORDS + 1;
        assert_eq!(region.word(word).load(Ordering::Relaxed), word as u64);
    }
    assert!(is_whole(&region) && is_whole(&others));
    assert!(card.settles_at(0));
}

/// How a child that was just made ends: its exit code, or minus the signal.
fn end_of(child: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    if libc::WIFSIGNALED(status) { -libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

fn leave(status: i32) -> ! {
    // SAFETY: ends the process without any handlers.
    unsafe { libc::_exit(status) }
}

#[test]
fn a_fork_with_pages_away_gives_both_their_data() {
    if !is_child() {
        let test = "a_fork_with_pages_away_gives_both_their_data";
        return on_each(test, LIMIT, &[INLINE, SIGNAL], well);
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    for round in 0..10 {
        card.driver.signal_safe.store(round % 2 == 0, Ordering::SeqCst);
        assert_eq!(card.all_to_device(region.range()), 64);
        // SAFETY: the child works on its own copy and leaves by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let good = is_whole(&region);
            region.fill(1);
            let mine = Mm::current().unwrap();
            let card = Card::new(&mine, 64);
            let away = card.all_to_device(region.range()) == 64;
            let word = region.word(5).load(Ordering::Relaxed);
            leave(i32::from(!(good && away && word == u64::from_ne_bytes([1; 8]))));
        }
        assert_eq!(end_of(child), 0, "round {round}");
        assert!(is_whole(&region));
    }
}

/// A child without fork handlers: it has the vmas, but nobody who brings its pages home.
fn bare_clone(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: as fork, without the C library's part: the child only reads memory and leaves by _exit.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        leave(work());
    }
    end_of(child as libc::pid_t)
}

/// The kernel forgets a child's registration with userfaultfd, and gives it zeros: README.md says so. What is hidden by
/// its protection stays hidden.
#[test]
fn a_bare_clone_reads_zeros_only_where_the_kernel_leaves_no_choice() {
    if !is_child() {
        let test = "a_bare_clone_reads_zeros_only_where_the_kernel_leaves_no_choice";
        return on_each(test, LIMIT, &[&[("HMM_ENGINE", "uffd")], INLINE, SIGNAL], well);
    }
    reset(libc::SIGSEGV);
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    let ended = bare_clone(|| 100 + i32::from(region.word(5).load(Ordering::Relaxed) == 5));
    let expected = if mm.engine_name() == "signal" { -libc::SIGSEGV } else { 100 };
    assert_eq!(ended, expected);
    assert_eq!(on_device(&mm, region.range()), 8);
    assert!(is_whole(&region));
    assert_eq!(bare_clone(|| 100 + i32::from(region.word(5).load(Ordering::Relaxed) == 5)), 101);
}
