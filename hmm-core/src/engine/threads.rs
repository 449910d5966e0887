//! What the engines' own threads have in common.

use crate::addr::{AddrRange, VirtAddr};
use crate::engine::FaultSink;
use crate::error::Error;

/// Their stacks.
pub(super) const STACK: usize = 512 << 10;

/// First thing on a thread of the library: signals are kept off, and its stack never migrates. Returns its kernel id.
pub(super) fn prepare(sink: Option<&dyn FaultSink>) -> u32 {
    block_signals();
    if let (Some(stack), Some(sink)) = (own_stack(), sink) {
        sink.on_own_memory(stack);
        populate(stack);
    }
    id()
}

/// The calling thread's kernel id.
pub(super) fn id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

pub(super) fn cannot_start(error: std::io::Error) -> Error {
    Error::Os {
        call: "pthread_create",
        address: VirtAddr::new(0),
        errno: error.raw_os_error().unwrap_or(libc::EAGAIN),
    }
}

/// Cores that this process may run on.
pub(super) fn usable_cpus() -> Vec<usize> {
    let allowed = rustix::thread::sched_getaffinity(None);
    let count = rustix::thread::CpuSet::MAX_CPU;
    let cpus: Vec<_> =
        allowed.map(|set| (0..count).filter(|cpu| set.is_set(*cpu)).collect()).unwrap_or_default();
    if cpus.is_empty() { vec![0] } else { cpus }
}

/// The application's signal handlers have no business on these threads. Faults of their own are answered all the same.
fn block_signals() {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigfillset initialises the set; a null old set is allowed.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::sigdelset(all.as_mut_ptr(), libc::SIGSEGV);
        libc::sigdelset(all.as_mut_ptr(), libc::SIGBUS);
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
}

/// The kernel may join a stack to a neighbouring mapping of the process, and watch both: no page of it may be absent.
fn populate(stack: AddrRange) {
    let (start, len) = (stack.start().as_ptr().cast(), stack.len() as usize);
    // SAFETY: populating changes no contents. A part that cannot be populated is above the stack.
    let _ = unsafe { rustix::mm::madvise(start, len, rustix::mm::Advice::LinuxPopulateWrite) };
}

/// The calling thread's stack, with its control block.
fn own_stack() -> Option<AddrRange> {
    let mut attributes = std::mem::MaybeUninit::<libc::pthread_attr_t>::uninit();
    // SAFETY: on success it initialises the attributes of the calling thread.
    if unsafe { libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) } != 0 {
        return None;
    }
    let (mut start, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the attributes are initialised; both results are written.
    unsafe { libc::pthread_attr_getstack(attributes.as_ptr(), &mut start, &mut size) };
    // SAFETY: initialised above, used no more.
    unsafe { libc::pthread_attr_destroy(attributes.as_mut_ptr()) };
    let start = start.addr() as u64;
    // The control block and static thread-local storage are inside, at the top.
    AddrRange::covering(start, size as u64).ok()
}
