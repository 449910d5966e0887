//! Signals that are not ours go to the program's handler, as the kernel would deliver them.

use super::actions::{self, Signal};
use crate::addr::VirtAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Threads that may be in the program's handler at once, as far as recursion is recognised.
const THREADS: usize = 64;
/// So deep may calls of the program's handler nest in one thread.
const DEPTH: u32 = 4;
const CANARY: u64 = 0x6c69_6268_6d6d_2121;

/// A thread that is in the program's handler because of us.
///
/// Some handlers pass on what they do not want to whoever was there before them, which is us, without an end. And a
/// handler may leave by `longjmp`, and never come back here. So nesting counts only as long as the older call's frame is
/// still there, above the present one.
struct Inside {
    thread: AtomicU32,
    depth: AtomicU32,
    /// Address of the latest call's canary.
    frame: AtomicU64,
}

static INSIDE: [Inside; THREADS] = [const {
    Inside { thread: AtomicU32::new(0), depth: AtomicU32::new(0), frame: AtomicU64::new(0) }
}; THREADS];

impl Inside {
    /// The place of a thread, claimed if need be.
    fn of(thread: u32) -> Option<&'static Self> {
        let holds = |one: &&Self| one.thread.load(Ordering::Relaxed) == thread;
        let claims = |one: &&Self| {
            let free = one.thread.load(Ordering::Relaxed) == 0;
            let order = Ordering::Relaxed;
            free && one.thread.compare_exchange(0, thread, order, order).is_ok()
        };
        INSIDE.iter().find(holds).or_else(|| INSIDE.iter().find(claims))
    }

    /// How many calls of the program's handler this one is inside of.
    fn enter(&self, canary: &u64) -> u32 {
        let here = VirtAddr::from_ptr(canary).get();
        let frame = self.frame.swap(here, Ordering::Relaxed);
        let is_nested = here < frame && {
            // SAFETY: the frame lies above this one, on a stack of this thread that is in use up to its top.
            unsafe { VirtAddr::new(frame).as_ptr().cast::<u64>().read_volatile() == CANARY }
        };
        let depth = if is_nested { self.depth.load(Ordering::Relaxed) } else { 0 };
        self.depth.store(depth + 1, Ordering::Relaxed);
        depth
    }

    /// Whether a call of the program's handler is still there, above `here`.
    fn is_below(&self, here: u64) -> bool {
        let frame = self.frame.load(Ordering::Relaxed);
        // SAFETY: as in `enter`.
        here < frame
            && unsafe { VirtAddr::new(frame).as_ptr().cast::<u64>().read_volatile() } == CANARY
    }

    fn leave(&self) {
        self.depth.store(0, Ordering::Relaxed);
        self.frame.store(0, Ordering::Relaxed);
        self.thread.store(0, Ordering::Relaxed);
    }
}

/// In the child of a fork: no thread of the parent's is inside.
pub(super) fn forget_after_fork() {
    INSIDE.iter().for_each(Inside::leave);
}

/// A signal that was sent while this thread is in the program's handler: who raises it itself wants the default action.
/// Looked at first of all, since the stack may be short by now.
pub(super) fn is_raised_inside() -> bool {
    let here = 0_u64;
    let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    let mine = INSIDE.iter().find(|one| one.thread.load(Ordering::Relaxed) == thread);
    mine.is_some_and(|one| one.is_below(VirtAddr::from_ptr(&raw const here).get()))
}

/// What the program wants to happen.
///
/// # Safety
/// The kernel's arguments to a handler with `SA_SIGINFO`.
pub(super) unsafe fn to_program(
    signal: Signal,
    info: *mut libc::siginfo_t,
    raw: *mut libc::c_void,
) {
    let mut canary = CANARY;
    let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    let inside = Inside::of(thread);
    let depth = inside.map_or(0, |place| place.enter(&canary));
    // SAFETY: by the caller's promise.
    let was_sent = unsafe { (*info).si_code } <= 0;
    // A handler that raises the signal itself wants the default action.
    let endless = depth >= DEPTH || (depth > 0 && was_sent);
    let program = actions::of_program(signal).filter(|_| !endless);
    match program.map_or(libc::SIG_DFL, |action| action.sa_sigaction) {
        libc::SIG_IGN if was_sent => {}
        // The kernel does not let a fault be ignored either.
        libc::SIG_DFL | libc::SIG_IGN => die(signal, was_sent),
        function => {
            if let Some(action) = &program {
                if action.sa_flags & libc::SA_RESETHAND != 0 {
                    actions::forget_program(signal);
                }
                // SAFETY: the program installed this action for this signal; the arguments are the kernel's.
                unsafe { call(function, action, signal, info, raw) };
                actions::after_program(signal, super::handler::on_signal);
            }
        }
    }
    std::hint::black_box(&mut canary);
    canary = 0;
    std::hint::black_box(&mut canary);
    inside.into_iter().for_each(Inside::leave);
}

/// The default action. A fault comes again by itself, a signal that was sent does not.
pub(super) fn die(signal: Signal, was_sent: bool) {
    actions::set_default(signal);
    if was_sent {
        // SAFETY: plain system calls.
        unsafe {
            let thread = libc::syscall(libc::SYS_gettid);
            libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal.number());
        }
    }
}

/// Calls a handler as the kernel would: with its mask, and once only if it says so.
///
/// # Safety
/// `function` is the handler of `action`, which is the program's for this signal; the others are the kernel's.
unsafe fn call(
    function: usize,
    action: &libc::sigaction,
    signal: Signal,
    info: *mut libc::siginfo_t,
    raw: *mut libc::c_void,
) {
    // SAFETY: plain calls with valid sets (the context's is that of the interrupted code); the transmuted address is the
    // handler's, in the form that its flags tell.
    unsafe {
        let mut blocked = action.sa_mask;
        if action.sa_flags & libc::SA_NODEFER == 0 {
            libc::sigaddset(&raw mut blocked, signal.number());
        }
        let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        let interrupted = &raw const (*raw.cast::<libc::ucontext_t>()).uc_sigmask;
        libc::pthread_sigmask(libc::SIG_SETMASK, interrupted, before.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, std::ptr::null_mut());
        if action.sa_flags & libc::SA_SIGINFO != 0 {
            type WithInfo = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            std::mem::transmute::<usize, WithInfo>(function)(signal.number(), info, raw);
        } else {
            type Plain = extern "C" fn(i32);
            std::mem::transmute::<usize, Plain>(function)(signal.number());
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut());
    }
}
