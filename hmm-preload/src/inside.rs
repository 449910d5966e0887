//! Whether the calling thread is inside one of libhmm's hooks. Calls that libhmm makes there pass through.

use libc::c_int;
use std::ptr;

unsafe extern "C" {
    // Not in the libc crate. Unlike most of libc it may be called from signal handlers: it changes a word of the thread.
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}

const PTHREAD_CANCEL_DISABLE: c_int = 1;

/// The thread is inside a hook until this is dropped, and cannot be cancelled: libhmm's locks would stay taken.
pub(crate) struct Inside {
    cancel_state: c_int,
}

impl Inside {
    pub(crate) fn is_here() -> bool {
        // SAFETY: the flag is the calling thread's own.
        unsafe { flag().read_volatile() != 0 }
    }

    pub(crate) fn enter() -> Self {
        let mut cancel_state = 0;
        // SAFETY: the old state goes to a variable of ours.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut cancel_state) };
        // SAFETY: the flag is the calling thread's own. Volatile: a signal handler of this thread looks at it.
        unsafe { flag().write_volatile(1) };
        Self { cancel_state }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // SAFETY: as in `enter`.
        unsafe { flag().write_volatile(0) };
        // SAFETY: the state is one that the function returned.
        unsafe { pthread_setcancelstate(self.cancel_state, ptr::null_mut()) };
    }
}

// `thread_local!` asks the loader for the address of a variable in a shared library, and after a dlopen that may allocate:
// in a signal handler, or in the `read` of an allocator. A variable with a fixed distance from the thread pointer (the
// initial-exec model) has no such call. Stable Rust has no word for it, so here it is in assembly.
#[cfg(target_arch = "x86_64")]
mod variable {
    use std::arch::{asm, global_asm};

    global_asm!(
        ".pushsection .tbss.hmm_preload_inside, \"awT\", @nobits",
        ".hidden hmm_preload_inside",
        ".globl hmm_preload_inside",
        ".type hmm_preload_inside, @object",
        ".size hmm_preload_inside, 4",
        ".balign 4",
        "hmm_preload_inside:",
        ".zero 4",
        ".popsection",
    );

    /// The calling thread's flag.
    pub(super) fn flag() -> *mut u32 {
        let address;
        // SAFETY: reads the thread pointer, which the first word of a thread's block repeats, and a constant of the
        // loader's.
        unsafe {
            asm!(
                "mov {address}, qword ptr fs:[0]",
                "add {address}, qword ptr [rip + hmm_preload_inside@GOTTPOFF]",
                address = out(reg) address,
                options(readonly, nostack),
            );
        }
        address
    }
}

// Elsewhere (aarch64) the loader answers for libraries that were there at the start without allocating.
#[cfg(not(target_arch = "x86_64"))]
mod variable {
    use std::cell::Cell;

    thread_local! {
        static INSIDE: Cell<u32> = const { Cell::new(0) };
    }

    /// The calling thread's flag.
    pub(super) fn flag() -> *mut u32 {
        INSIDE.with(Cell::as_ptr)
    }
}

use variable::flag;
