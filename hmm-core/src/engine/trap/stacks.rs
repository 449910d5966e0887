//! Stacks on which faults are answered. A program's alternate signal stack is often a few kilobytes, with nothing below
//! it that would stop an overflow; drivers need more.

use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::error::{Error, Result};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

const STACKS: usize = 64;
const SIZE: usize = 256 << 10;
/// A page without access below each stack, and one above the last.
const STRIDE: usize = SIZE + PAGE_SIZE;

/// A pool of stacks in one mapping.
#[derive(Debug)]
pub(super) struct Stacks {
    area: AddrRange,
    /// A bit for each stack in use.
    used: AtomicU64,
}

/// One stack, in use until dropped.
struct Claim<'a>(&'a Stacks, usize);

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.used.fetch_and(!(1 << self.1), Ordering::Release);
    }
}

impl Stacks {
    pub(super) fn new() -> Result<Self> {
        let bytes = STACKS * STRIDE + PAGE_SIZE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), flags)
        };
        let no_memory = |_| Error::NoMemory { what: "stacks for the signal handler" };
        let start = mapped.map_err(no_memory)?.expose_provenance() as u64;
        let stacks =
            Self { area: AddrRange::new(start, start + bytes as u64)?, used: AtomicU64::new(0) };
        for number in 0..STACKS {
            let stack = stacks.stack(number);
            let access = MprotectFlags::READ | MprotectFlags::WRITE;
            let start = stack.start().as_ptr().cast();
            // SAFETY: the stack lies in the mapping made above.
            unsafe { rustix::mm::mprotect(start, SIZE, access) }.map_err(no_memory)?;
        }
        Ok(stacks)
    }

    fn stack(&self, number: usize) -> AddrRange {
        let start = self.area.start().get() + (number * STRIDE + PAGE_SIZE) as u64;
        AddrRange::from_bounds(start, start + SIZE as u64)
    }

    /// All of them.
    pub(super) fn area(&self) -> AddrRange {
        self.area
    }

    fn claim(&self) -> Option<Claim<'_>> {
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            let free = used.trailing_ones() as usize;
            if free >= STACKS {
                return None;
            }
            let wanted = used | 1 << free;
            match self.used.compare_exchange_weak(
                used,
                wanted,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(Claim(self, free)),
                Err(other) => used = other,
            }
        }
    }

    /// Runs `work` on a stack of the pool; on the current one when it is of the pool already. Waits for a free one:
    /// nobody sleeps on them for long. `None` only if `work` did not return.
    pub(super) fn run<R>(&self, work: &mut dyn FnMut() -> R) -> Option<R> {
        let marker = 0_u8;
        if self.area.contains(VirtAddr::from_ptr(&raw const marker)) {
            return Some(work());
        }
        let claim = loop {
            match self.claim() {
                Some(claim) => break claim,
                None => std::thread::yield_now(),
            }
        };
        let mut result = None;
        let mut job = || {
            let _off = AlternateOff::begin();
            result = Some(work());
        };
        let mut job: &mut dyn FnMut() = &mut job;
        let top: *mut u8 = self.stack(claim.1).end().as_ptr();
        // SAFETY: the stack is a whole one of ours, claimed by this thread until `claim` is dropped.
        unsafe { call_on(top, &raw mut job) };
        result
    }
}

impl Drop for Stacks {
    fn drop(&mut self) {
        let start = self.area.start().as_ptr().cast();
        // SAFETY: the mapping is this pool's, and no handler runs any more when an engine is dropped.
        let _ = unsafe { rustix::mm::munmap(start, self.area.len() as usize) };
    }
}

impl Stacks {
    /// Frees what deep calls left behind.
    pub(super) fn trim(&self) {
        // Claims every free stack for the moment, so that no handler runs on what is dropped.
        let claimed = !self.used.swap(u64::MAX, Ordering::Acquire);
        for number in (0..STACKS).filter(|number| claimed & (1 << number) != 0) {
            let (start, len) = (self.stack(number).start().as_ptr().cast(), SIZE - 4 * PAGE_SIZE);
            // SAFETY: nobody runs on a stack that was free and is claimed here.
            let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxDontNeed) };
        }
        self.used.fetch_and(!claimed, Ordering::Release);
    }
}

/// No alternate signal stack for the calling thread until dropped. A nested fault would be put at its top, where the
/// frame of the outer one lies: the kernel only sees that the thread is not on it now.
struct AlternateOff(Option<libc::stack_t>);

impl AlternateOff {
    fn begin() -> Self {
        let off =
            libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        let mut before = off;
        // SAFETY: both structures live during the call; the thread is not on its alternate stack now.
        let done = unsafe { libc::sigaltstack(&raw const off, &raw mut before) } == 0;
        Self((done && before.ss_flags & libc::SS_DISABLE == 0).then_some(before))
    }
}

impl Drop for AlternateOff {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // SAFETY: it was the thread's own before.
            unsafe { libc::sigaltstack(before, std::ptr::null_mut()) };
        }
    }
}

extern "C" fn run_job(job: *mut &mut dyn FnMut()) {
    // A panic cannot cross the change of stacks; on a fault path it would end the process anyway.
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // SAFETY: `call_on` passes the pointer that it was given, which lives during the call.
        unsafe { (*job)() }
    }));
    if ended.is_err() {
        std::process::abort();
    }
}

/// Calls `run_job(job)` with the stack pointer at `top`.
///
/// # Safety
/// `top` is the 16-byte aligned end of a writable stack that nobody else uses; `job` is valid.
#[cfg(target_arch = "x86_64")]
unsafe fn call_on(top: *mut u8, job: *mut &mut dyn FnMut()) {
    // SAFETY: by the caller's promise. r12 is preserved by the callee, and the old stack pointer waits in it.
    unsafe {
        asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {run}",
            "mov rsp, r12",
            top = in(reg) top,
            run = sym run_job,
            in("rdi") job,
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

/// As above.
///
/// # Safety
/// As above.
#[cfg(target_arch = "aarch64")]
unsafe fn call_on(top: *mut u8, job: *mut &mut dyn FnMut()) {
    // SAFETY: by the caller's promise. x20 is preserved by the callee, and the old stack pointer waits in it.
    unsafe {
        asm!(
            "mov x20, sp",
            "mov sp, {top}",
            "bl {run}",
            "mov sp, x20",
            top = in(reg) top,
            run = sym run_job,
            in("x0") job,
            out("x20") _,
            clobber_abi("C"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_runs_on_a_stack_of_the_pool_and_nests_on_it() {
        let stacks = Stacks::new().unwrap();
        let inside = |stacks: &Stacks| {
            let here = 0_u8;
            stacks.area().contains(VirtAddr::from_ptr(&raw const here))
        };
        assert!(!inside(&stacks));
        let nested = stacks.run(&mut || stacks.run(&mut || inside(&stacks)));
        assert_eq!(nested, Some(Some(true)));
        stacks.trim();
        assert_eq!(stacks.run(&mut || [7_u8; 100 << 10][5]), Some(7));
        assert_eq!(stacks.used.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_pool_is_waited_for() {
        let stacks = Stacks::new().unwrap();
        let claims: Vec<_> = (0..STACKS).map(|_| stacks.claim().unwrap()).collect();
        assert!(stacks.claim().is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| stacks.run(&mut || 1));
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drop(claims);
            assert_eq!(waiting.join().unwrap(), Some(1));
        });
    }
}
