//! Changes of the program's layout: libhmm hears of each before it is made, and afterwards what came of it.
//!
//! What libc does by itself (`free`, `realloc`, the heap's trimming, stacks of threads) does not pass here: it calls
//! functions of its own that cannot be replaced. libhmm knows that, and goes on watching in its own way.

use crate::inside::Inside;
use crate::next::{Next, errno, replace, set_errno};
use libc::{c_int, c_void, off_t, size_t, syscall};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

const PAGE: usize = 4096;
const MADV_DONTNEED_LOCKED: c_int = 24;
const MREMAP_DONTUNMAP: c_int = 4;

/// What `Announcement::kind` says.
#[derive(Clone, Copy)]
#[repr(i32)]
enum Kind {
    /// Unmapped, or something else is mapped over it.
    Unmap = 1,
    /// The contents are dropped.
    Drop = 2,
    /// The access changes.
    Protect = 3,
    /// Moved.
    Move = 4,
    /// A segment of shared memory is detached; `length` says nothing.
    Detach = 5,
}

/// One change (`struct hmm_preload_change`): the same one goes to `begin` and to `end`.
#[repr(C)]
struct Announcement {
    kind: c_int,
    address: *const c_void,
    length: size_t,
    /// What is replaced at the new place of what moves; null: nothing.
    target: *const c_void,
    target_length: size_t,
    /// libhmm's, between the two.
    kept: [u64; 64],
}

impl Announcement {
    fn new(kind: Kind, address: *const c_void, length: size_t) -> Self {
        let (target, target_length) = (ptr::null(), 0);
        Self { kind: kind as c_int, address, length, target, target_length, kept: [0; 64] }
    }
}

/// libhmm's side (`struct hmm_preload_layout`). It lives for ever: a call that began while it was attached ends with it.
///
/// Neither is called while the thread is inside a hook already, or between the two calls. Cancellation is off from one to
/// the other; who keeps signal handlers out does so over both.
#[repr(C)]
struct Hooks {
    /// `sizeof`, so that it can grow: a longer one than ours is fine.
    size: size_t,
    /// 0: begun, `end` follows; 1: nothing to do; `-errno`: the call must not be made, and fails so.
    begin: unsafe extern "C" fn(*mut Announcement) -> c_int,
    /// Whether the call succeeded.
    end: unsafe extern "C" fn(*mut Announcement, c_int),
}

static ATTACHED: AtomicPtr<Hooks> = AtomicPtr::new(ptr::null_mut());

/// Attaches libhmm's side, or detaches with NULL. Called by libhmm, which finds it by its name.
///
/// # Safety
/// `hooks` is NULL or lives for ever, and its functions may be called from any thread.
#[unsafe(no_mangle)]
unsafe extern "C" fn hmm_preload_attach_layout(hooks: *const Hooks) {
    // SAFETY: by the caller's promise.
    let usable = unsafe { hooks.as_ref() }.is_some_and(|hooks| hooks.size >= size_of::<Hooks>());
    ATTACHED.store(if usable { hooks.cast_mut() } else { ptr::null_mut() }, Ordering::Release);
}

/// The attached hooks, unless this thread is inside one.
fn usable() -> Option<&'static Hooks> {
    // SAFETY: what is attached lives for ever.
    let hooks = unsafe { ATTACHED.load(Ordering::Acquire).as_ref() }?;
    (!Inside::is_here()).then_some(hooks)
}

/// Makes a call that changes the layout; it failed when it returns `failed`.
#[inline]
fn announced<R: Copy + PartialEq>(
    what: impl FnOnce() -> Option<Announcement>,
    failed: R,
    call: impl FnOnce() -> R,
) -> R {
    match usable() {
        None => call(),
        Some(hooks) => announced_to(hooks, what, failed, call),
    }
}

#[inline(never)]
fn announced_to<R: Copy + PartialEq>(
    hooks: &Hooks,
    what: impl FnOnce() -> Option<Announcement>,
    failed: R,
    call: impl FnOnce() -> R,
) -> R {
    let before = errno();
    let Some(mut change) = what() else { return call() };
    let inside = Inside::enter();
    // SAFETY: libhmm's promise (`hmm_preload_attach_layout`); the change is this frame's.
    let begun = unsafe { (hooks.begin)(&raw mut change) };
    set_errno(if begun < 0 { begun.wrapping_neg() } else { before });
    if begun < 0 {
        return failed;
    }
    if begun > 0 {
        drop(inside);
        return call();
    }
    // Still inside: what libhmm holds until the end must not be left behind.
    let result = call();
    let after = errno();
    // SAFETY: as above; it has begun.
    unsafe { (hooks.end)(&raw mut change, c_int::from(result != failed)) };
    set_errno(after);
    drop(inside);
    result
}

/// The kernel counts in whole pages; what is too long is its business.
fn pages(length: size_t) -> Option<size_t> {
    length.checked_next_multiple_of(PAGE)
}

fn drops(advice: c_int) -> bool {
    [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_REMOVE, MADV_DONTNEED_LOCKED]
        .contains(&advice)
}

/// What `mremap` is about to do.
fn moving(
    old: *mut c_void,
    old_length: size_t,
    new_length: size_t,
    flags: c_int,
    new: *mut c_void,
) -> Option<Announcement> {
    let (old_length, new_length) = (pages(old_length)?, pages(new_length)?);
    let is_fixed = flags & libc::MREMAP_FIXED != 0;
    if new_length < old_length && !is_fixed && flags & MREMAP_DONTUNMAP == 0 {
        // Shrinks in its place.
        let tail = old.wrapping_byte_add(new_length);
        return Some(Announcement::new(Kind::Unmap, tail, old_length.wrapping_sub(new_length)));
    }
    if old_length == 0 {
        // A second mapping of shared memory.
        return is_fixed.then(|| Announcement::new(Kind::Unmap, new, new_length));
    }
    let mut change = Announcement::new(Kind::Move, old, old_length);
    if is_fixed {
        (change.target, change.target_length) = (new, new_length);
    }
    Some(change)
}

unsafe extern "C" {
    // libc's own, under the name that nobody replaces.
    fn __sbrk(increment: isize) -> *mut c_void;
}

const NO_BREAK: *mut c_void = ptr::without_provenance_mut(usize::MAX);

/// What becomes unmapped when the program's break moves down from `now` to `then`.
fn below_break(now: usize, then: usize) -> Option<Announcement> {
    let (now, then) = (pages(now)?, pages(then)?);
    (then < now).then(|| {
        let start = ptr::without_provenance::<c_void>(then);
        Announcement::new(Kind::Unmap, start, now.wrapping_sub(then))
    })
}

fn break_now() -> usize {
    // SAFETY: asks only.
    unsafe { __sbrk(0) }.addr()
}

/// `mmap` of both names: the system call takes the same arguments.
///
/// # Safety
/// As `mmap`.
unsafe fn map(
    next: &Next<Map>,
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: off_t,
) -> *mut c_void {
    let replaces = flags & libc::MAP_FIXED != 0 && flags & libc::MAP_FIXED_NOREPLACE == 0;
    // SAFETY: by the caller's promise.
    let call = || unsafe {
        match next.get() {
            Some(next) => next(address, length, protection, flags, file, offset),
            None => {
                let (protection, flags, file) =
                    (i64::from(protection), i64::from(flags), i64::from(file));
                syscall(libc::SYS_mmap, address, length, protection, flags, file, offset)
                    as *mut c_void
            }
        }
    };
    if !replaces {
        return call();
    }
    announced(|| Some(Announcement::new(Kind::Unmap, address, length)), libc::MAP_FAILED, call)
}

type Map =
    unsafe extern "C-unwind" fn(*mut c_void, size_t, c_int, c_int, c_int, off_t) -> *mut c_void;

replace! {
    // `mmap(2)`: `off_t` has 64 bits, so both names are one function.
    fn [mmap mmap64] (
        address: *mut c_void, length: size_t, protection: c_int, flags: c_int, file: c_int, offset: off_t
    ) -> *mut c_void = |next| {
        // SAFETY: as the caller.
        unsafe { map(next, address, length, protection, flags, file, offset) }
    }

    // `munmap(2)`.
    fn [munmap] (address: *mut c_void, length: size_t) -> c_int = |next| {
        announced(
            || Some(Announcement::new(Kind::Unmap, address, length)),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address, length),
                None => syscall(libc::SYS_munmap, address, length) as c_int,
            } },
        )
    }

    // `mremap(2)`. The fifth argument is there if the flags say so; in any case it is a register.
    fn [mremap] (
        old: *mut c_void, old_length: size_t, new_length: size_t, flags: c_int, new: *mut c_void
    ) -> *mut c_void = |next| {
        announced(
            || moving(old, old_length, new_length, flags, new),
            libc::MAP_FAILED,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(old, old_length, new_length, flags, new),
                None => {
                    let flags = i64::from(flags);
                    syscall(libc::SYS_mremap, old, old_length, new_length, flags, new) as *mut c_void
                }
            } },
        )
    }

    // `mprotect(2)`.
    fn [mprotect] (address: *mut c_void, length: size_t, protection: c_int) -> c_int = |next| {
        announced(
            || Some(Announcement::new(Kind::Protect, address, length)),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address, length, protection),
                None => syscall(libc::SYS_mprotect, address, length, i64::from(protection)) as c_int,
            } },
        )
    }

    // `pkey_mprotect(2)`.
    fn [pkey_mprotect] (
        address: *mut c_void, length: size_t, protection: c_int, key: c_int
    ) -> c_int = |next| {
        announced(
            || Some(Announcement::new(Kind::Protect, address, length)),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address, length, protection, key),
                None => {
                    let (protection, key) = (i64::from(protection), i64::from(key));
                    syscall(libc::SYS_pkey_mprotect, address, length, protection, key) as c_int
                }
            } },
        )
    }

    // `madvise(2)`.
    fn [madvise] (address: *mut c_void, length: size_t, advice: c_int) -> c_int = |next| {
        announced(
            || drops(advice).then(|| Announcement::new(Kind::Drop, address, length)),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address, length, advice),
                None => syscall(libc::SYS_madvise, address, length, i64::from(advice)) as c_int,
            } },
        )
    }

    // `brk(2)`.
    fn [brk] (address: *mut c_void) -> c_int = |next| {
        announced(
            || below_break(break_now(), address.addr()),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address),
                None => {
                    let step = address.addr().wrapping_sub(break_now()).cast_signed();
                    if __sbrk(step) == NO_BREAK { -1 } else { 0 }
                }
            } },
        )
    }

    // `sbrk(3)`.
    fn [sbrk] (increment: isize) -> *mut c_void = |next| {
        let now = || if increment < 0 { Some(break_now()) } else { None };
        announced(
            || now().and_then(|now| below_break(now, now.wrapping_add_signed(increment))),
            NO_BREAK,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(increment),
                None => __sbrk(increment),
            } },
        )
    }

    // `shmdt(2)`: libhmm finds out how long the segment is.
    fn [shmdt] (address: *const c_void) -> c_int = |next| {
        announced(
            || Some(Announcement::new(Kind::Detach, address, PAGE)),
            -1,
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(address),
                None => syscall(libc::SYS_shmdt, address) as c_int,
            } },
        )
    }
}
