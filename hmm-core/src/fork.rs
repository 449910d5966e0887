//! fork: no byte is lost to it.
//!
//! A child gets copies of the vmas without the service threads, and would read zeros where pages are away. So before a
//! fork every page comes home, and nothing leaves until it is over; the kernel's own copy-on-write does the rest. What
//! does not come home, or shall not ([`crate::ForkMode`]), is left out of the child. The parent goes on as before. In
//! the child the inherited mm says `Gone`, as does device memory; the child may open an mm, and add devices, of its own.
//!
//! `vfork` and `posix_spawn` run no such handlers and need none: they share the parent's memory. A child made by the bare
//! system call (`SYS_clone` without `CLONE_VM`) runs none either, and must not touch what may be away.
//!
//! Forks of several threads take turns, and the library's process-wide locks are held across each of them, so that no
//! child inherits one of them taken by a thread that it lacks.

use crate::arena;
use crate::devmem::WindowsHeld;
use crate::mm::{Mm, next_generation};
use crate::sync::{Mutex, MutexGuard};
use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

static INSTALLED: AtomicBool = AtomicBool::new(false);
/// One fork at a time.
static TURN: Mutex<()> = Mutex::new(());
static UNDER_WAY: UnderWay = UnderWay(UnsafeCell::new(None));

/// What a fork holds, in the order in which it lets go.
struct Held {
    _open: MutexGuard<'static, Vec<std::sync::Weak<Mm>>>,
    _current: MutexGuard<'static, Option<Arc<Mm>>>,
    gates: Vec<Arc<Mm>>,
    windows: WindowsHeld,
    _turn: MutexGuard<'static, ()>,
}

/// The fork under way; only the thread whose turn it is looks at it.
struct UnderWay(UnsafeCell<Option<Held>>);

// SAFETY: `prepare` fills it and `parent` or `child` empties it, all in the thread that holds `TURN`.
unsafe impl Sync for UnderWay {}

impl UnderWay {
    fn replace(&self, held: Option<Held>) -> Option<Held> {
        // SAFETY: only called by the thread that holds `TURN`; the reference does not outlive the call.
        std::mem::replace(unsafe { &mut *self.0.get() }, held)
    }
}

/// Installs the handlers, once.
pub(crate) fn install() {
    if !INSTALLED.swap(true, Ordering::AcqRel) {
        // SAFETY: the handlers are functions of this library, which is never unloaded (the artefacts say nodelete).
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    }
}

extern "C" fn prepare() {
    let turn = TURN.lock();
    // An mm that another thread is opening is either in the list by now, or has nothing on a device yet.
    let current = Mm::lock_current();
    let gates = Mm::all_open();
    gates.iter().for_each(|mm| mm.close_gate_for_fork());
    let open = Mm::lock_list();
    let windows = WindowsHeld::take();
    UNDER_WAY.replace(Some(Held { _open: open, _current: current, gates, windows, _turn: turn }));
    arena::lock_for_fork();
}

extern "C" fn parent() {
    arena::unlock_after_fork();
    if let Some(held) = UNDER_WAY.replace(None) {
        held.gates.iter().for_each(|mm| mm.open_gate_after_fork());
    }
}

extern "C" fn child() {
    next_generation();
    arena::unlock_after_fork();
    if let Some(mut held) = UNDER_WAY.replace(None) {
        // The inherited objects stay as they are: their threads do not exist here, so nothing may wait for them.
        let inherited = std::mem::take(&mut held.gates);
        if inherited.iter().any(|mm| mm.child_has_holes()) {
            end_child();
        }
        inherited.into_iter().for_each(|mm| _ = Arc::into_raw(mm));
        held.windows.disown();
    }
}

/// Better no child than one that reads zeros for data.
fn end_child() -> ! {
    let text = b"libhmm: the child of this fork is ended: pages that are on a device could neither be brought home nor \
                 left out of it\n";
    let _ = rustix::io::write(rustix::stdio::stderr(), text);
    std::process::abort()
}
