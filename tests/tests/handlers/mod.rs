//! Signal handlers as programs have them, what they saw, and accesses that end in them.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use hmm_core::PAGE_SIZE;
use hmm_tests::Region;
use std::arch::global_asm;
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// What the handler saw last.
pub(crate) static CALLS: AtomicUsize = AtomicUsize::new(0);
pub(crate) static ADDRESS: AtomicU64 = AtomicU64::new(0);
pub(crate) static CODE: AtomicI32 = AtomicI32::new(0);
pub(crate) static SENDER: AtomicI32 = AtomicI32::new(0);
/// The signals that were blocked in it, one bit each.
pub(crate) static MASK: AtomicU64 = AtomicU64::new(0);

/// A `sigjmp_buf`, larger than that of any C library.
#[repr(C, align(16))]
struct JumpBuffer(UnsafeCell<[u64; 64]>);

// SAFETY: one thread at a time probes.
unsafe impl Sync for JumpBuffer {}

static BACK: JumpBuffer = JumpBuffer(UnsafeCell::new([0; 64]));

// `probe(back, address, write)` reads or writes a byte. 0: done; 1: a handler jumped back. A function that returns twice
// must not be called from Rust; here it returns twice into these few instructions.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".globl hmm_tests_probe",
    "hmm_tests_probe:",
    "push rbx",
    "push r12",
    "sub rsp, 8",
    "mov rbx, rsi",
    "mov r12, rdx",
    "mov esi, 1",
    "call __sigsetjmp@PLT",
    "test eax, eax",
    "jnz 22f",
    "test r12, r12",
    "jnz 20f",
    "mov al, byte ptr [rbx]",
    "jmp 21f",
    "20: mov byte ptr [rbx], 1",
    "21: xor eax, eax",
    "22: add rsp, 8",
    "pop r12",
    "pop rbx",
    "ret",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".globl hmm_tests_probe",
    "hmm_tests_probe:",
    "stp x29, x30, [sp, #-32]!",
    "stp x19, x20, [sp, #16]",
    "mov x19, x1",
    "mov x20, x2",
    "mov w1, #1",
    "bl __sigsetjmp",
    "cbnz w0, 22f",
    "mov w9, #1",
    "cbnz x20, 20f",
    "ldrb w9, [x19]",
    "b 21f",
    "20: strb w9, [x19]",
    "21: mov w0, #0",
    "22: ldp x19, x20, [sp, #16]",
    "ldp x29, x30, [sp], #32",
    "ret",
);

unsafe extern "C" {
    fn hmm_tests_probe(back: *mut [u64; 64], address: u64, write: u64) -> i32;
    fn siglongjmp(back: *mut [u64; 64], value: i32) -> !;
}

/// Tries an access; false when the handler of the signal that it raised jumped back here.
pub(crate) fn probe(address: u64, write: bool) -> bool {
    // SAFETY: whatever the access does is what the test asks for; only one thread of a test probes.
    unsafe { hmm_tests_probe(BACK.0.get(), address, u64::from(write)) == 0 }
}

/// A handler.
pub(crate) type WithInfo = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
pub(crate) type Plain = extern "C" fn(i32);

/// Notes what it sees, and jumps back to [`probe`].
pub(crate) extern "C" fn jump_back(number: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    note(number, info, ptr::null_mut());
    // SAFETY: the fault came from `probe`, whose frame is still there.
    unsafe { siglongjmp(BACK.0.get(), 1) }
}

/// As [`jump_back`], for a handler that is told nothing but the number.
pub(crate) extern "C" fn jump_back_plainly(_: i32) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    note_mask();
    // SAFETY: as above.
    unsafe { siglongjmp(BACK.0.get(), 1) }
}

/// Notes what it sees, and returns.
pub(crate) extern "C" fn note(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel's argument; the fields are plain numbers, of which the signal's kind gives one a meaning.
    let (address, code, sender) =
        unsafe { ((*info).si_addr().addr(), (*info).si_code, (*info).si_pid()) };
    ADDRESS.store(address as u64, Ordering::SeqCst);
    CODE.store(code, Ordering::SeqCst);
    SENDER.store(sender, Ordering::SeqCst);
    note_mask();
    CALLS.fetch_add(1, Ordering::SeqCst);
}

fn note_mask() {
    let mask = blocked();
    let bits = (1..64).filter(|number| is_in(&mask, *number)).fold(0, |bits, one| bits | 1 << one);
    MASK.store(bits, Ordering::SeqCst);
}

/// The signals that the calling thread blocks.
pub(crate) fn blocked() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: without a new set, the present one is written.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), set.as_mut_ptr());
        set.assume_init()
    }
}

pub(crate) fn is_in(set: &libc::sigset_t, number: i32) -> bool {
    // SAFETY: a whole set.
    unsafe { libc::sigismember(set, number) == 1 }
}

/// Whether a signal was blocked when the handler ran.
pub(crate) fn was_blocked(number: i32) -> bool {
    MASK.load(Ordering::SeqCst) & 1 << number != 0
}

/// The calling thread blocks a signal from now on, or not any more.
pub(crate) fn block(number: i32, how: i32) {
    let set = set_of(&[number]);
    // SAFETY: the set is initialised.
    assert_eq!(unsafe { libc::pthread_sigmask(how, &set, ptr::null_mut()) }, 0);
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        signals.iter().for_each(|one| _ = libc::sigaddset(&mut set, *one));
        set
    }
}

/// Installs an action; returns the one before.
pub(crate) fn install(signal: i32, handler: usize, flags: i32, mask: &[i32]) -> libc::sigaction {
    // SAFETY: all fields of an action may be zero.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    (new.sa_sigaction, new.sa_flags, new.sa_mask) = (handler, flags, set_of(mask));
    exchange(signal, &new)
}

/// Installs an action that was there before; returns the present one.
pub(crate) fn exchange(signal: i32, new: &libc::sigaction) -> libc::sigaction {
    let mut old = MaybeUninit::uninit();
    // SAFETY: `new` is a whole action, `old` has room for one.
    unsafe {
        assert_eq!(libc::sigaction(signal, new, old.as_mut_ptr()), 0);
        old.assume_init()
    }
}

/// As [`install`], for a handler with `SA_SIGINFO` on the alternate stack.
pub(crate) fn install_with_info(signal: i32, handler: WithInfo) -> libc::sigaction {
    install(signal, handler as usize, libc::SA_SIGINFO | libc::SA_ONSTACK, &[])
}

/// The default action.
pub(crate) fn reset(signal: i32) {
    install(signal, libc::SIG_DFL, 0, &[]);
}

/// A page of the program's own that nobody may touch.
pub(crate) fn forbidden_page() -> Region {
    let region = Region::new(1);
    region.fill(9);
    // SAFETY: the region is mapped; only probes touch it.
    let done = unsafe { libc::mprotect(region.as_ptr().cast(), PAGE_SIZE, libc::PROT_NONE) };
    assert_eq!(done, 0);
    region
}

/// A mapped page behind the end of its file: a touch gets SIGBUS.
pub(crate) fn page_without_file() -> u64 {
    // SAFETY: the name is a terminated string; a new mapping replaces nothing.
    let page = unsafe {
        let file = libc::memfd_create(c"empty".as_ptr(), 0);
        libc::mmap(ptr::null_mut(), PAGE_SIZE, libc::PROT_READ, libc::MAP_SHARED, file, 0)
    };
    assert_ne!(page, libc::MAP_FAILED);
    page.expose_provenance() as u64
}

/// Sends a signal to this process, as another would.
pub(crate) fn send(signal: i32) {
    // SAFETY: no pointers.
    assert_eq!(unsafe { libc::kill(libc::getpid(), signal) }, 0);
}
