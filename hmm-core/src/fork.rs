//! fork: no byte is lost to it.
//!
//! A child gets copies of the vmas without the service threads, and would read zeros where pages are away. So before a
//! fork every page comes home, and nothing leaves until it is over; the kernel's own copy-on-write does the rest. The
//! parent goes on as before. In the child the inherited mm says `Gone`; the child may open one of its own. `vfork` and
//! `posix_spawn` run no such handlers and need none: they share the parent's memory.

use crate::arena;
use crate::mm::{Mm, next_generation};
use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

static INSTALLED: AtomicBool = AtomicBool::new(false);
/// The mms whose gates the running fork has closed.
static HELD: Mutex<Vec<std::sync::Arc<Mm>>> = Mutex::new(Vec::new());

/// Installs the handlers, once.
pub(crate) fn install() {
    if !INSTALLED.swap(true, Ordering::AcqRel) {
        // SAFETY: the handlers are functions of this library, which is never unloaded (the artefacts say nodelete).
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    }
}

extern "C" fn prepare() {
    let all = Mm::all_open();
    for mm in &all {
        mm.close_gate_for_fork();
    }
    *HELD.lock() = all;
    arena::lock_for_fork();
}

extern "C" fn parent() {
    arena::unlock_after_fork();
    for mm in std::mem::take(&mut *HELD.lock()) {
        mm.open_gate_after_fork();
    }
}

extern "C" fn child() {
    next_generation();
    arena::unlock_after_fork();
    // The inherited objects stay as they are: their threads do not exist here, so nothing may wait for them.
    std::mem::take(&mut *HELD.lock()).into_iter().for_each(|mm| {
        mm.open_gate_after_fork();
        let _ = std::sync::Arc::into_raw(mm);
    });
}
