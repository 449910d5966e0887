//! The library's side of `libhmm_preload.so`, for engines on which the kernel cannot wait for absent pages.
//!
//! A program that was started with that library makes its system calls through it. It asks here before each: the memory
//! of the call comes home and stays until it is released. It does not link with us, nor we with it: we look for it by the
//! name of its one function.
//!
//! Once attached it stays so. After the mm is closed there is nothing to hold, but our handlers of SIGSEGV and SIGBUS are
//! still installed, and the program's must still be put behind them.

pub(crate) mod layout;

use crate::addr::{AddrRange, VirtAddr};
use crate::arena;
use crate::error::{Error, Result};
use crate::flags::Protection;
use crate::mm::Mm;
use crate::sync::this_thread;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// As `sigaction`: 0 when our handler stays first and the program's was put behind it, 1 when the C library shall do it,
/// or `-errno`.
pub(crate) type ProgramAction =
    unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;

/// `struct hmm_preload_hooks`, as hmm-preload has it.
#[repr(C)]
struct Hooks {
    size: usize,
    hold: unsafe extern "C" fn(*const c_void, usize, c_int) -> c_int,
    release: unsafe extern "C" fn(*const c_void, usize),
    signal_action: Option<ProgramAction>,
}

type Attach = unsafe extern "C" fn(*const Hooks);

/// The answer of `hold` when there is nothing to release.
const NOTHING_TO_DO: c_int = 1;
/// Nobody looks at [`HELD_FOR`] for longer than a moment.
const MOMENT: Duration = Duration::from_millis(100);

/// The mm that system calls hold memory of: one reference of it.
static HELD_FOR: AtomicPtr<Mm> = AtomicPtr::new(ptr::null_mut());
/// Threads that are about to take a reference of their own.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// Lets `libhmm_preload.so` hold memory of this mm, if the program was started with it. `program_action` is given when
/// the engine answers touches in handlers of SIGSEGV or SIGBUS.
pub(crate) fn attach(mm: &Arc<Mm>, program_action: Option<ProgramAction>) {
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"hmm_preload_attach".as_ptr()) };
    let hooks = Hooks { size: size_of::<Hooks>(), hold, release, signal_action: program_action };
    // Never freed: a call may be under way with older ones. An mm is opened rarely.
    if !found.is_null()
        && let Some(hooks) = arena::put(hooks)
    {
        hold_for(mm);
        // SAFETY: the function of this name has this form, and is never unloaded.
        unsafe { std::mem::transmute::<*mut c_void, Attach>(found)(hooks.as_ptr()) };
    }
}

/// Whose memory is held from now on.
fn hold_for(mm: &Arc<Mm>) {
    let new = Arc::into_raw(Arc::clone(mm)).cast_mut();
    let old = HELD_FOR.swap(new, Ordering::SeqCst);
    if old.is_null() {
        return;
    }
    // SAFETY: it came from `into_raw`, and its reference is ours now.
    let old = unsafe { Arc::from_raw(old) };
    let deadline = Instant::now() + MOMENT;
    while LOOKING.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    // In a forked child, who looked at that moment never ends; and nothing of a parent's mm may be taken down.
    if LOOKING.load(Ordering::SeqCst) > 0 || old.is_inherited() {
        let _ = Arc::into_raw(old);
    }
}

fn held_for() -> Option<Arc<Mm>> {
    LOOKING.fetch_add(1, Ordering::SeqCst);
    let mm = HELD_FOR.load(Ordering::SeqCst);
    let mm = (!mm.is_null()).then(|| {
        // SAFETY: the static's own reference is not dropped while somebody looks.
        unsafe {
            Arc::increment_strong_count(mm);
            Arc::from_raw(mm)
        }
    });
    LOOKING.fetch_sub(1, Ordering::SeqCst);
    mm
}

/// The program's signal handlers are kept off until this is dropped: one that touches memory which is away, while this
/// thread has a lock that the answer needs, would wait for itself. Our own stay on: a hold touches what it brings home.
struct HandlersOff(libc::sigset_t);

impl HandlersOff {
    fn begin() -> Self {
        let mut off = MaybeUninit::<libc::sigset_t>::uninit();
        let mut before = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigfillset initialises the first set, pthread_sigmask the other.
        unsafe {
            libc::sigfillset(off.as_mut_ptr());
            for signal in [libc::SIGSEGV, libc::SIGBUS] {
                libc::sigdelset(off.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, off.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for HandlersOff {
    fn drop(&mut self) {
        // SAFETY: the set is the one that was in force before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

unsafe extern "C" fn hold(address: *const c_void, length: usize, write: c_int) -> c_int {
    let _off = HandlersOff::begin();
    let Some(mm) = held_for() else { return NOTHING_TO_DO };
    match hold_bytes(&mm, VirtAddr::from_ptr(address), length, write != 0) {
        Ok(true) => 0,
        Ok(false) => NOTHING_TO_DO,
        Err(error) => -error.errno(),
    }
}

unsafe extern "C" fn release(address: *const c_void, length: usize) {
    let _off = HandlersOff::begin();
    let range = AddrRange::covering(VirtAddr::from_ptr(address).get(), length as u64);
    if let (Some(mm), Ok(range)) = (held_for(), range) {
        // If another mm was opened meanwhile, this one knows nothing of the hold.
        let _ = mm.unpin_range(range);
    }
}

/// Brings bytes home, makes them present for reading or writing, and keeps them. False when there is nothing to hold for
/// this thread now.
fn hold_bytes(mm: &Mm, address: VirtAddr, length: usize, write: bool) -> Result<bool> {
    if is_ours_to_serve(mm) {
        return Ok(false);
    }
    let range = AddrRange::covering(address.get(), length as u64)?;
    // Pinned first: what comes home does not leave again. (`Mm::pin_range` would write to what is only to be read.)
    mm.pins.insert(range)?;
    match mm.make_present(range, write) {
        Err(Error::Permission { .. }) if is_allowed(mm, range, write) => Ok(true),
        done => done.inspect_err(|_| _ = mm.unpin_range(range)).map(|_| true),
    }
}

/// Whether the call is made where memory must not be waited for: by a thread of the library or in a driver's callback,
/// whose buffers the driver keeps at home. Also when everything is at home for good.
fn is_ours_to_serve(mm: &Mm) -> bool {
    mm.check_open().is_err()
        || mm.engine.is_service_thread()
        || mm.notifiers.in_callback()
        || mm.inflight.count_of_thread(this_thread()) > 0
}

/// Whether every mapping of a range allows an access. Where it does, but pages cannot be made present ahead of it (device
/// memory; kernels before 5.14; gVisor), they are at home all the same.
fn is_allowed(mm: &Mm, range: AddrRange, write: bool) -> bool {
    let wanted = if write { Protection::WRITE } else { Protection::READ };
    let mut next = range.start();
    while next < range.end() {
        match mm.engine.mapping_at(next) {
            Ok(Some(one)) if one.range.contains(next) && one.protection.contains(wanted) => {
                next = one.range.end();
            }
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::{ModelConfig, ModelEngine};
    use crate::engine::{Engine, Present, VmaKind};

    fn stage(protection: Protection) -> (Arc<ModelEngine>, Arc<Mm>, AddrRange) {
        let model = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(model.clone()).unwrap();
        let range = model.mmap(4, protection, VmaKind::Anonymous).unwrap();
        (model, mm, range)
    }

    fn pinned(mm: &Mm, range: AddrRange) -> usize {
        let mut pages = 0;
        mm.pins.within(range, |pin| pages += pin.pages());
        pages
    }

    fn present(model: &ModelEngine, range: AddrRange) -> Vec<Present> {
        let mut pages = Vec::new();
        model.scan(range, &mut |run, how| pages.extend(vec![how; run.pages()])).unwrap();
        pages
    }

    #[test]
    fn bytes_are_held_by_whole_pages_and_released_once() {
        let (model, mm, range) = stage(Protection::READ | Protection::WRITE);
        let inside = VirtAddr::new(range.start().get() + 4000);
        assert!(hold_bytes(&mm, inside, 200, true).unwrap());
        assert_eq!(pinned(&mm, range), 2);
        assert_eq!(present(&model, range.sub(0, 2)), [Present::Page; 2]);
        hold_for(&mm);
        // SAFETY: addresses of the model's memory are only compared.
        unsafe { release(inside.as_ptr().cast(), 200) };
        assert_eq!(pinned(&mm, range), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { hold(inside.as_ptr().cast(), 200, 0) }, 0);
        assert_eq!(pinned(&mm, range), 2);
        mm.close().unwrap();
        // SAFETY: as above.
        unsafe { release(inside.as_ptr().cast(), 200) };
        assert_eq!(pinned(&mm, range), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { hold(inside.as_ptr().cast(), 200, 0) }, NOTHING_TO_DO);
    }

    #[test]
    fn what_is_only_read_is_not_written_to() {
        let (model, mm, range) = stage(Protection::READ | Protection::WRITE);
        assert!(hold_bytes(&mm, range.start(), 1, false).unwrap());
        assert_eq!(present(&model, range.sub(0, 1)), [Present::Zero]);
    }

    #[test]
    fn what_cannot_be_had_is_not_held() {
        let (model, mm, range) = stage(Protection::READ);
        let is_refused = |address, length, write, errno| {
            let error = hold_bytes(&mm, address, length, write).unwrap_err();
            assert_eq!((error.errno(), pinned(&mm, range)), (errno, 0));
        };
        is_refused(range.start(), 100, true, libc::EPERM);
        is_refused(range.end(), 100, false, libc::EFAULT);
        is_refused(VirtAddr::new(u64::MAX - 10), 100, false, libc::EINVAL);
        is_refused(range.start(), usize::MAX, false, libc::EINVAL);
        assert!(is_allowed(&mm, range, false) && !is_allowed(&mm, range, true));
        model.munmap(range.sub(1, 1));
        assert!(!is_allowed(&mm, range, false) && is_allowed(&mm, range.sub(2, 2), false));
    }
}
