//! Handlers and masks of SIGSEGV and SIGBUS, by which some engines of libhmm learn of touches.
//!
//! libhmm's handler has to stay the first, so the program's own is handed to libhmm, which calls it for everything that
//! is not its own. And a thread must not block these signals: the kernel does not hold back the signal of an access that
//! faults, it kills the process. So a touch of a page that is away, otherwise answered unnoticed, would be the end of a
//! thread that has "everything" blocked. They are left out of every mask that is set while libhmm is attached. The
//! price is that `kill -SEGV` cannot be blocked, nor awaited with `sigwait`. What is read back is the truth.
//!
//! `ppoll`, `pselect` and `epoll_pwait` are left alone: a handler that runs during one of them has the mask that the
//! program gave it.

use crate::hooks::{self, Hooks};
use crate::next::{Next, replace, set_errno};
use libc::{c_int, sighandler_t, sigset_t};
use std::mem::MaybeUninit;
use std::ptr;

/// The kernel's mask: one word. libc's `sigset_t` has room for more, which nobody uses.
type Mask = u64;
const FAULTS: Mask = 1 << (libc::SIGSEGV - 1) | 1 << (libc::SIGBUS - 1);

fn is_fault(signal: c_int) -> bool {
    signal == libc::SIGSEGV || signal == libc::SIGBUS
}

/// libhmm's hooks, if its engine uses signals.
fn engine() -> Option<&'static Hooks> {
    hooks::usable().filter(|hooks| hooks.uses_signals())
}

fn fail(errno: c_int) -> c_int {
    set_errno(errno);
    -1
}

type SigAction =
    unsafe extern "C-unwind" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;

/// # Safety
/// As `sigaction`.
unsafe fn set_action(
    next: &Next<SigAction>,
    signal: c_int,
    action: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let Some(next) = next.get_or_look_up() else { return fail(libc::ENOSYS) };
    let Some(hooks) = engine() else {
        // SAFETY: by the caller's promise.
        return unsafe { next(signal, action, old) };
    };
    if is_fault(signal) {
        // SAFETY: by the caller's promise.
        match unsafe { hooks.signal_action(signal, action, old) } {
            0 => return 0,
            error if error < 0 => return fail(error.wrapping_neg()),
            _ => {}
        }
    } else if !action.is_null() {
        // SAFETY: by the caller's promise, as libc reads it.
        let mut changed = unsafe { action.read() };
        // A handler is interrupted by its own touches too.
        // SAFETY: the mask's first word is the kernel's mask.
        unsafe { *(&raw mut changed.sa_mask).cast::<Mask>() &= !FAULTS };
        // SAFETY: by the caller's promise.
        return unsafe { next(signal, &raw const changed, old) };
    }
    // SAFETY: by the caller's promise.
    unsafe { next(signal, action, old) }
}

type Signal = unsafe extern "C-unwind" fn(c_int, sighandler_t) -> sighandler_t;

/// `signal` in its two tastes, told apart by flags. libc's own calls its `sigaction` in a way that cannot be replaced.
///
/// # Safety
/// As `signal`.
unsafe fn set_handler(
    next: &Next<Signal>,
    signal: c_int,
    handler: sighandler_t,
    flags: c_int,
) -> sighandler_t {
    if is_fault(signal)
        && handler != libc::SIG_ERR
        && let Some(hooks) = engine()
    {
        // SAFETY: all zeros is a valid sigaction.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        // SAFETY: all zeros is a valid sigaction.
        let mut old: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        // SAFETY: both are this frame's.
        match unsafe { hooks.signal_action(signal, &raw const action, &raw mut old) } {
            0 => return old.sa_sigaction,
            error if error < 0 => {
                set_errno(error.wrapping_neg());
                return libc::SIG_ERR;
            }
            _ => {}
        }
    }
    match next.get_or_look_up() {
        // SAFETY: by the caller's promise.
        Some(next) => unsafe { next(signal, handler) },
        None => {
            set_errno(libc::ENOSYS);
            libc::SIG_ERR
        }
    }
}

type SetMask = unsafe extern "C-unwind" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int;

/// Without the faults in what is blocked. The kernel fills `old` itself, so it fills a copy: `old` may be away.
///
/// # Safety
/// As `sigprocmask`.
unsafe fn set_mask(next: SetMask, how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int {
    if engine().is_none() {
        // SAFETY: by the caller's promise.
        return unsafe { next(how, set, old) };
    }
    let mut wanted = MaybeUninit::<sigset_t>::zeroed();
    if !set.is_null() {
        // SAFETY: by the caller's promise, as libc reads it.
        let mask = unsafe { set.cast::<Mask>().read() };
        let mask = if how == libc::SIG_UNBLOCK { mask } else { mask & !FAULTS };
        // SAFETY: the set's first word is the kernel's mask.
        unsafe { wanted.as_mut_ptr().cast::<Mask>().write(mask) };
    }
    let wanted = if set.is_null() { ptr::null() } else { wanted.as_ptr() };
    let mut was = MaybeUninit::<sigset_t>::zeroed();
    // SAFETY: both are this frame's.
    let result = unsafe { next(how, wanted, was.as_mut_ptr()) };
    if result == 0 && !old.is_null() {
        // SAFETY: by the caller's promise; only the kernel's word is written, as without us.
        unsafe { old.cast::<Mask>().write(was.as_ptr().cast::<Mask>().read()) };
    }
    result
}

replace! {
    // `sigsuspend(2)`: handlers run during it, with this mask.
    fn [sigsuspend] (set: *const sigset_t) -> c_int = |next| {
        let Some(next) = next.get_or_look_up() else { return fail(libc::ENOSYS) };
        if engine().is_none() || set.is_null() {
            // SAFETY: as the caller.
            return unsafe { next(set) };
        }
        // SAFETY: as the caller; libc reads the whole set too.
        let mut wanted = unsafe { set.read() };
        // SAFETY: the set's first word is the kernel's mask.
        unsafe { *(&raw mut wanted).cast::<Mask>() &= !FAULTS };
        // SAFETY: the set is this frame's.
        unsafe { next(&raw const wanted) }
    }

    // `sigaction(2)`; libc exports it under both names.
    fn [sigaction __sigaction] (
        signal: c_int, action: *const libc::sigaction, old: *mut libc::sigaction
    ) -> c_int = |next| {
        // SAFETY: as the caller.
        unsafe { set_action(next, signal, action, old) }
    }

    // `signal(3)` of BSD: the handler stays, system calls go on.
    fn [signal bsd_signal ssignal] (signal: c_int, handler: sighandler_t) -> sighandler_t = |next| {
        // SAFETY: as the caller.
        unsafe { set_handler(next, signal, handler, libc::SA_RESTART) }
    }

    // `signal(3)` of System V: the handler is used once, and not kept from itself.
    fn [sysv_signal __sysv_signal] (signal: c_int, handler: sighandler_t) -> sighandler_t = |next| {
        // SAFETY: as the caller.
        unsafe { set_handler(next, signal, handler, libc::SA_RESETHAND | libc::SA_NODEFER) }
    }

    // `pthread_sigmask(3)`: returns its error.
    fn [pthread_sigmask] (how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int = |next| {
        match next.get_or_look_up() {
            // SAFETY: as the caller.
            Some(next) => unsafe { set_mask(next, how, set, old) },
            None => libc::ENOSYS,
        }
    }

    // `sigprocmask(2)`: puts its error into errno.
    fn [sigprocmask] (how: c_int, set: *const sigset_t, old: *mut sigset_t) -> c_int = |next| {
        match next.get_or_look_up() {
            // SAFETY: as the caller.
            Some(next) => unsafe { set_mask(next, how, set, old) },
            None => fail(libc::ENOSYS),
        }
    }
}
