//! The process's actions for SIGSEGV and SIGBUS: ours first, the program's behind it.
//!
//! Nothing keeps a program from installing a handler of its own later. So the action is looked at again whenever pages
//! are about to leave, and now and then: a stranger's handler is put behind ours.

use crate::addr::VirtAddr;
use crate::arena;
use crate::engine::say;
use crate::error::{Error, Result};
use crate::sync::{Mutex, MutexGuard};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// So often may a program replace our handler before no more pages are sent away.
const REPLACEMENTS: u32 = 16;

/// One of the two signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Signal {
    /// SIGSEGV: an access that a protection forbids.
    Segv,
    /// SIGBUS: an access to a missing page of a userfaultfd range.
    Bus,
}

impl Signal {
    pub(super) fn number(self) -> i32 {
        match self {
            Self::Segv => libc::SIGSEGV,
            Self::Bus => libc::SIGBUS,
        }
    }

    pub(super) fn of_number(number: i32) -> Option<Self> {
        [Self::Segv, Self::Bus].into_iter().find(|one| one.number() == number)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Segv => "SIGSEGV",
            Self::Bus => "SIGBUS",
        }
    }

    fn state(self) -> &'static State {
        match self {
            Self::Segv => &SEGV,
            Self::Bus => &BUS,
        }
    }
}

/// An action of the program, and what it wanted before.
struct Wish {
    action: libc::sigaction,
    before: *mut Wish,
}

struct State {
    /// What the program wants for signals that are not ours; null as long as ours is not installed.
    program: AtomicPtr<Wish>,
    /// How often ours was installed: see [`mark`].
    generation: AtomicU32,
    replaced: AtomicU32,
    changing: Mutex<()>,
}

impl State {
    const fn new() -> Self {
        Self {
            program: AtomicPtr::new(ptr::null_mut()),
            generation: AtomicU32::new(0),
            replaced: AtomicU32::new(0),
            changing: Mutex::new(()),
        }
    }
}

static SEGV: State = State::new();
static BUS: State = State::new();

/// Held across a fork, so that the child can install its own handler.
pub(super) fn lock_for_fork() -> [MutexGuard<'static, ()>; 2] {
    [SEGV.changing.lock(), BUS.changing.lock()]
}

type Handler = unsafe extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// The program's action for signals that are not ours. Allocates nothing, takes no lock.
pub(super) fn of_program(signal: Signal) -> Option<libc::sigaction> {
    // SAFETY: what is stored was placed in the arena by `remember`, and is never freed.
    unsafe { signal.state().program.load(Ordering::Acquire).as_ref() }.map(|wish| wish.action)
}

fn remember(signal: Signal, action: libc::sigaction) -> Result<()> {
    // A handler may be reading the old one: it is not freed. Replacements are rare.
    let program = &signal.state().program;
    let wish = Wish { action, before: program.load(Ordering::Acquire) };
    let place = arena::put(wish).ok_or(Error::NoMemory { what: "the program's action" })?;
    program.store(place.as_ptr(), Ordering::Release);
    Ok(())
}

/// The real action now, and optionally a new one.
fn exchange(signal: Signal, new: Option<&libc::sigaction>) -> Result<libc::sigaction> {
    let mut old = MaybeUninit::<libc::sigaction>::uninit();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or a whole action, and `old` has room for one.
    if unsafe { c_library_sigaction()(signal.number(), new, old.as_mut_ptr()) } != 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        return Err(Error::Os { call: "sigaction", address: VirtAddr::new(0), errno });
    }
    // SAFETY: the call succeeded, and wrote it.
    Ok(unsafe { old.assume_init() })
}

type SigAction =
    unsafe extern "C" fn(i32, *const libc::sigaction, *mut libc::sigaction) -> libc::c_int;

/// The C library's own `sigaction`: that of libhmm_preload.so would ask us in turn.
fn c_library_sigaction() -> SigAction {
    static REAL: AtomicPtr<libc::c_void> = AtomicPtr::new(ptr::null_mut());
    let mut real = REAL.load(Ordering::Acquire);
    if real.is_null() {
        // SAFETY: both names are C strings; the library is in the process already, or nothing happens.
        real = unsafe {
            let library = libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD);
            if library.is_null() {
                return libc::sigaction;
            }
            libc::dlsym(library, c"sigaction".as_ptr())
        };
        if real.is_null() {
            return libc::sigaction;
        }
        REAL.store(real, Ordering::Release);
    }
    // SAFETY: the symbol of this name has this form.
    unsafe { std::mem::transmute::<*mut libc::c_void, SigAction>(real) }
}

/// Whether our handler can be installed.
///
/// # Errors
/// `Unsupported` when the program ignores the signal: somebody wants it so, and the kernel would kill at the first fault.
pub(super) fn check(signal: Signal) -> Result<()> {
    if exchange(signal, None)?.sa_sigaction == libc::SIG_IGN {
        return Err(Error::Unsupported {
            what: format!(
                "{name} is ignored by this process; this engine answers faults in a handler of {name}: set it to \
                 SIG_DFL before the library is opened",
                name = signal.name()
            ),
        });
    }
    Ok(())
}

/// Puts our handler first.
///
/// # Errors
/// As [`check`].
pub(super) fn install(signal: Signal, handler: Handler) -> Result<()> {
    check(signal)?;
    let _one = signal.state().changing.lock();
    let now = exchange(signal, None)?;
    if now.sa_sigaction == handler as usize {
        return Ok(());
    }
    put_first(signal, handler, now)
}

fn put_first(signal: Signal, handler: Handler, program: libc::sigaction) -> Result<()> {
    remember(signal, program)?;
    // SAFETY: all fields of an action may be zero.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // Other handlers of the program wait: they may touch what is being brought home. Faults nest, though: a driver's
    // callback may touch memory that is away.
    // SAFETY: the set is a field of `action`.
    unsafe {
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigdelset(&raw mut action.sa_mask, libc::SIGSEGV);
        libc::sigdelset(&raw mut action.sa_mask, libc::SIGBUS);
    }
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    let generation = signal.state().generation.fetch_add(1, Ordering::Relaxed) + 1;
    mark(&mut action.sa_mask, generation);
    exchange(signal, Some(&action)).map(drop)
}

/// Two signals that are ignored by default tell by being blocked or not how often our handler was installed. So a
/// program that puts back the handler that it found, which may be ours of an earlier time, is seen to do that.
const MARKS: [i32; 2] = [libc::SIGURG, libc::SIGWINCH];

fn mark(mask: &mut libc::sigset_t, generation: u32) {
    for (bit, signal) in MARKS.into_iter().enumerate().filter(|(bit, _)| generation >> bit & 1 == 0)
    {
        let _ = bit;
        // SAFETY: the set is valid.
        unsafe { libc::sigdelset(mask, signal) };
    }
}

fn generation_of(mask: &libc::sigset_t) -> u32 {
    // SAFETY: the set is valid.
    let has = |signal| u32::from(unsafe { libc::sigismember(mask, signal) } == 1);
    has(MARKS[0]) | has(MARKS[1]) << 1
}

/// After the program's handler returned. If it put back our own handler of an earlier time, it wants no more signals:
/// what the program wanted before counts again, and ours is as it was.
pub(super) fn after_program(signal: Signal, handler: Handler) {
    let state = signal.state();
    let Ok(now) = exchange(signal, None) else { return };
    let generation = state.generation.load(Ordering::Relaxed) & 3;
    if now.sa_sigaction != handler as usize || generation_of(&now.sa_mask) == generation {
        return;
    }
    let wish = state.program.load(Ordering::Acquire);
    // SAFETY: wishes lie in the arena and are never freed.
    if let Some(wish) = unsafe { wish.as_ref() } {
        state.program.store(wish.before, Ordering::Release);
    }
    let mut again = now;
    // SAFETY: the set is valid.
    unsafe { libc::sigfillset(&raw mut again.sa_mask) };
    for kept in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: as above.
        unsafe { libc::sigdelset(&raw mut again.sa_mask, kept) };
    }
    mark(&mut again.sa_mask, generation);
    let _ = exchange(signal, Some(&again));
}

/// The program's handler wants one signal only (`SA_RESETHAND`), and is about to get it.
pub(super) fn forget_program(signal: Signal) {
    // SAFETY: all fields of an action may be zero, and SIG_DFL is.
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // Without memory it gets one more.
    let _ = remember(signal, default);
}

/// Puts our handler first again when somebody replaced it, and says so.
///
/// # Errors
/// `Unsupported` when that happened too often: a page that leaves now could be touched under the wrong handler.
pub(super) fn renew(signal: Signal, handler: Handler) -> Result<()> {
    let state = signal.state();
    let _one = state.changing.lock();
    let now = exchange(signal, None)?;
    if now.sa_sigaction == handler as usize {
        return Ok(());
    }
    let count = state.replaced.fetch_add(1, Ordering::Relaxed) + 1;
    if count > REPLACEMENTS {
        return Err(Error::Unsupported {
            what: format!(
                "the program replaced the library's handler of {} {count} times; install the program's handler before \
                 the library is opened, or run under libhmm_preload.so",
                signal.name()
            ),
        });
    }
    put_first(signal, handler, now)?;
    say::line(format_args!(
        "libhmm: the program replaced the handler of {}; the library's is first again, the program's behind it\n",
        signal.name()
    ));
    Ok(())
}

/// What the program asks for with `sigaction`, when libhmm_preload.so passes it on: ours stays first.
///
/// # Safety
/// As for `sigaction`: each pointer is null or valid.
pub(super) unsafe fn program_asks(
    signal: Signal,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> bool {
    let _one = signal.state().changing.lock();
    let Some(program) = of_program(signal) else { return false };
    // SAFETY: by the caller's promise.
    if let Some(new) = unsafe { new.as_ref() }
        && remember(signal, *new).is_err()
    {
        return false;
    }
    if !old.is_null() {
        // SAFETY: by the caller's promise.
        unsafe { old.write(program) };
    }
    true
}

/// Takes our handler away for a fault that nobody can answer: the default action ends the process at the access.
pub(super) fn set_default(signal: Signal) {
    // SAFETY: all fields of an action may be zero, and SIG_DFL is. (`signal` of libhmm_preload.so would ask us in turn.)
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    let _ = exchange(signal, Some(&default));
}
