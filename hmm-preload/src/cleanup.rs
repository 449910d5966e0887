//! Letting go when the system call does not return: the thread is cancelled in it, or a signal handler jumps out of it.
//!
//! libc has a list of what to run then, by thread; entries lie in the frames that they belong to. The list serves both
//! cases, and needs nothing of Rust's unwinding.

use crate::next::Next;
use libc::{c_int, c_void};
use std::mem::MaybeUninit;

/// libc's list entry (`struct _pthread_cleanup_buffer`); only libc looks inside.
#[repr(C)]
struct Entry {
    routine: Routine,
    argument: *mut c_void,
    cancel_type: c_int,
    previous: *mut Entry,
}

type Routine = extern "C" fn(*mut c_void);
type Push = unsafe extern "C-unwind" fn(*mut Entry, Routine, *mut c_void);
type Pop = unsafe extern "C-unwind" fn(*mut Entry, c_int);

static PUSH: Next<Push> = Next::new("_pthread_cleanup_push\0");
static POP: Next<Pop> = Next::new("_pthread_cleanup_pop\0");

pub(crate) fn look_up() {
    PUSH.look_up();
    POP.look_up();
}

/// Does `work`; if it never returns, `routine(argument)` is run. Without libc's list (an old glibc in a program without
/// threads) it is not.
///
/// # Safety
/// `routine` may be called with `argument` at any time during `work`, in this thread.
pub(crate) unsafe fn covered<R>(
    routine: Routine,
    argument: *mut c_void,
    work: impl FnOnce() -> R,
) -> R {
    let (Some(push), Some(pop)) = (PUSH.get(), POP.get()) else { return work() };
    let mut entry = MaybeUninit::<Entry>::uninit();
    // SAFETY: libc fills the entry, which lies in this frame until it is taken off the list.
    unsafe { push(entry.as_mut_ptr(), routine, argument) };
    let result = work();
    // SAFETY: the entry is the newest of this thread: what `work` pushed it has popped.
    unsafe { pop(entry.as_mut_ptr(), 0) };
    result
}
