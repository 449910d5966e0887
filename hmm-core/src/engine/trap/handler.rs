//! The handler of SIGSEGV and SIGBUS, and the engines that it asks.

use super::actions::{self, Signal};
use super::context::Context;
use super::{Trap, chain, copy};
use crate::addr::VirtAddr;
use crate::engine::{lost, threads};
use crate::error::{Error, Result};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

/// Engines with traps that may be open at once.
const TRAPS: usize = 16;
/// `si_code` of an access to a page that a protection forbids, and of a missing page of a userfaultfd range.
const SEGV_ACCERR: i32 = 2;
const BUS_ADRERR: i32 = 2;

/// A place for a trap. Handlers that use it are counted, so that it can be taken away.
struct Slot {
    trap: AtomicPtr<Trap>,
    users: AtomicUsize,
}

static SLOTS: [Slot; TRAPS] =
    [const { Slot { trap: AtomicPtr::new(ptr::null_mut()), users: AtomicUsize::new(0) } }; TRAPS];

/// How many forks lie between the first process of the family and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// What a trap says to a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Answered, or it may be by now: try the access again.
    TryAgain,
    /// Ours, but the page is lost.
    Lost,
    /// Not ours.
    Stranger,
}

/// A synchronous signal.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Access {
    pub(in crate::engine) signal: Signal,
    pub(in crate::engine) addr: VirtAddr,
    pub(in crate::engine) write: bool,
}

/// Lets the handler ask a trap, and puts the handler first.
///
/// # Safety
/// The trap stays where it is until [`remove`] returned.
pub(super) unsafe fn insert(trap: NonNull<Trap>, signals: &[Signal]) -> Result<()> {
    for signal in signals {
        actions::install(*signal, on_signal)?;
    }
    for slot in &SLOTS {
        let empty = ptr::null_mut();
        let taken =
            slot.trap.compare_exchange(empty, trap.as_ptr(), Ordering::SeqCst, Ordering::Relaxed);
        if taken.is_ok() {
            return Ok(());
        }
    }
    Err(Error::NoMemory { what: "places for engines with signal handlers (16)" })
}

/// Waits until no handler uses the trap any more. The handler stays installed: the program may have put its own behind.
pub(super) fn remove(trap: NonNull<Trap>) {
    for slot in &SLOTS {
        let (mine, empty) = (trap.as_ptr(), ptr::null_mut());
        if slot.trap.compare_exchange(mine, empty, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
            while slot.users.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
        }
    }
}

/// Puts our handler first again, if need be.
pub(super) fn renew(signals: &[Signal]) -> Result<()> {
    signals.iter().try_for_each(|signal| actions::renew(*signal, on_signal))
}

/// In the child of a fork: the traps are the parent's, and so are the handlers that use them, but for the one perhaps
/// inside of which the fork was made.
pub(super) fn forget_after_fork() {
    FORKS.fetch_add(1, Ordering::SeqCst);
    for slot in &SLOTS {
        slot.trap.store(ptr::null_mut(), Ordering::SeqCst);
        slot.users.store(0, Ordering::SeqCst);
    }
}

fn ask_traps(access: &Access) -> Verdict {
    let forks = FORKS.load(Ordering::SeqCst);
    for slot in &SLOTS {
        slot.users.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the trap is in its place, and `remove` waits for this user of it.
        let trap = unsafe { slot.trap.load(Ordering::SeqCst).as_ref() };
        let verdict = trap.map_or(Verdict::Stranger, |trap| trap.on_access(access));
        if FORKS.load(Ordering::SeqCst) == forks {
            slot.users.fetch_sub(1, Ordering::SeqCst);
        }
        if verdict != Verdict::Stranger {
            return verdict;
        }
    }
    Verdict::Stranger
}

pub(super) unsafe extern "C" fn on_signal(
    number: i32,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the C library's variable of the calling thread.
    let errno = unsafe { *libc::__errno_location() };
    if let Some(signal) = Signal::of_number(number) {
        // SAFETY: the kernel's argument.
        if unsafe { (*info).si_code } <= 0 && chain::is_raised_inside() {
            return chain::die(signal, true);
        }
        // SAFETY: the kernel's arguments to a handler with SA_SIGINFO.
        unsafe { handle(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// # Safety
/// The kernel's arguments to a handler with `SA_SIGINFO`.
unsafe fn handle(signal: Signal, info: *mut libc::siginfo_t, raw: *mut libc::c_void) {
    // SAFETY: by the caller's promise.
    let (mut context, code, addr) =
        unsafe { (Context::new(raw), (*info).si_code, (*info).si_addr().addr() as u64) };
    let instruction = context.instruction();
    if let Some(end) = copy::end_of_present(instruction) {
        return context.go_to(end);
    }
    let is_page = match signal {
        Signal::Segv => code == SEGV_ACCERR,
        Signal::Bus => code == BUS_ADRERR,
    };
    let verdict = if is_page {
        ask_traps(&Access { signal, addr: VirtAddr::new(addr), write: context.is_write() })
    } else {
        Verdict::Stranger
    };
    match verdict {
        Verdict::TryAgain => {}
        // The access is tried again if the program's handler of SIGBUS returns.
        Verdict::Lost => {
            context.unblock(libc::SIGBUS);
            // It comes when this handler returned: a small alternate stack has no room for two. The system call itself:
            // libhmm_preload.so lets nobody block SIGBUS.
            let bus: u64 = 1 << (libc::SIGBUS - 1);
            let (block, mask, size) = (libc::SIG_BLOCK, &raw const bus, size_of::<u64>());
            let nothing = std::ptr::null_mut::<u64>();
            // SAFETY: the mask is the kernel's, of this frame; nothing is written.
            unsafe { libc::syscall(libc::SYS_rt_sigprocmask, block, mask, nothing, size) };
            lost::send(threads::id(), VirtAddr::new(addr));
        }
        Verdict::Stranger => match copy::end_of_faulting(instruction) {
            Some(end) if code > 0 => context.go_to(end),
            // SAFETY: by the caller's promise.
            _ => unsafe { chain::to_program(signal, info, raw) },
        },
    }
}
