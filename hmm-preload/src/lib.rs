//! `libhmm_preload.so`: system calls of unmodified programs on migrated buffers.
//!
//! Not every engine of libhmm can serve the kernel's own accesses to a page that is away (`KERNEL_FAULTS`): where it
//! cannot, `read` into such a page says `EFAULT`. Loaded with `LD_PRELOAD`, this library stands between the program
//! and libc. Before a system call it has libhmm bring the call's memory home and keep it there, and lets go afterwards.
//!
//! And it tells libhmm of changes of the layout (`munmap`, `mremap`, `mprotect`, …) before they are made.
//!
//! It does not depend on libhmm: libhmm looks for `hmm_preload_attach` and hands over its side. Until then, and
//! in every program that does not use libhmm, a wrapper costs one load and passes on to libc.
//!
//! What runs here may run anywhere: in a signal handler, before `main`, in a thread that is cancelled, in a child
//! between `vfork` and `exec`. So nothing here allocates, takes a lock or panics.

// A thread that is cancelled in a system call is unwound through these frames. In a library that aborts on panics the
// compiler puts an abort in the way of that too.
#[cfg(panic = "abort")]
compile_error!("build hmm-preload with a profile that unwinds, as release does");

mod calls;
mod cleanup;
mod holds;
mod hooks;
mod inside;
mod layout;
mod messages;
mod next;
mod signals;

/// Runs when the library is loaded: looks up everything that it replaces, so that nothing needs the loader later.
extern "C" fn look_up() {
    calls::look_up();
    layout::look_up();
    messages::look_up();
    signals::look_up();
    cleanup::look_up();
}

#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_UP: extern "C" fn() = look_up;
