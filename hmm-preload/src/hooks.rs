//! What libhmm hands over, and who may use it now.

use crate::inside::Inside;
use libc::{c_int, c_void, size_t};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// libhmm's side (`struct hmm_preload_hooks`). It lives for ever: a call that began while it was attached ends with it.
///
/// No hook is called while the thread is in one of them already, and cancellation is off during each. A hook that takes
/// locks keeps signal handlers out by itself.
#[repr(C)]
pub(crate) struct Hooks {
    /// `sizeof`, so that it can grow: a longer one than ours is fine.
    size: size_t,
    hold: unsafe extern "C" fn(*const c_void, size_t, c_int) -> c_int,
    release: unsafe extern "C" fn(*const c_void, size_t),
    signal_action:
        Option<unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int>,
}

/// What came of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// All of it is there, and stays until released.
    Yes,
    /// Nothing of the process can be away for this thread now; there is nothing to release.
    NotNeeded,
    /// It cannot be had; there is nothing to release. The kernel shall say what is wrong with it.
    No,
}

static ATTACHED: AtomicPtr<Hooks> = AtomicPtr::new(ptr::null_mut());

/// Attaches libhmm's side, or detaches with NULL. Called by libhmm, which finds it by its name.
///
/// # Safety
/// `hooks` is NULL or lives for ever, and its functions may be called from any thread.
#[unsafe(no_mangle)]
unsafe extern "C" fn hmm_preload_attach(hooks: *const Hooks) {
    // SAFETY: by the caller's promise; an old libhmm with a shorter structure is not attached.
    let usable = unsafe { hooks.as_ref() }.is_some_and(|hooks| hooks.size >= size_of::<Hooks>());
    ATTACHED.store(if usable { hooks.cast_mut() } else { ptr::null_mut() }, Ordering::Release);
}

/// Whether libhmm is attached.
pub(crate) fn is_attached() -> bool {
    !ATTACHED.load(Ordering::Acquire).is_null()
}

/// The attached hooks, unless this thread is inside one of them.
pub(crate) fn usable() -> Option<&'static Hooks> {
    // SAFETY: what is attached lives for ever.
    let hooks = unsafe { ATTACHED.load(Ordering::Acquire).as_ref() }?;
    (!Inside::is_here()).then_some(hooks)
}

impl Hooks {
    pub(crate) fn hold(&self, address: *const c_void, length: size_t, write: bool) -> Held {
        let _inside = Inside::enter();
        // SAFETY: libhmm's promise (`hmm_preload_attach`); it checks the range itself.
        match unsafe { (self.hold)(address, length, c_int::from(write)) } {
            0 => Held::Yes,
            1 => Held::NotNeeded,
            _ => Held::No,
        }
    }

    /// Undoes one hold that said `Yes`.
    pub(crate) fn release(&self, address: *const c_void, length: size_t) {
        let _inside = Inside::enter();
        // SAFETY: as above.
        unsafe { (self.release)(address, length) };
    }

    /// Whether libhmm answers touches in signal handlers.
    pub(crate) fn uses_signals(&self) -> bool {
        self.signal_action.is_some()
    }

    /// Offers the program's handler to libhmm: 0 when it took it, 1 when not, or `-errno`.
    ///
    /// # Safety
    /// As `sigaction`.
    pub(crate) unsafe fn signal_action(
        &self,
        signal: c_int,
        action: *const libc::sigaction,
        old: *mut libc::sigaction,
    ) -> c_int {
        let Some(signal_action) = self.signal_action else { return 1 };
        let _inside = Inside::enter();
        // SAFETY: by the caller's promise.
        unsafe { signal_action(signal, action, old) }
    }
}
