//! Ranges whose touches the toucher answers itself.

use crate::mm::{get, mm_struct};
use crate::ret::IntoC;
use hmm_core::{AddrRange, Error, Mm, Result};
use std::ffi::{c_int, c_void};

fn on_pages(
    mm: *const mm_struct,
    addr: *const c_void,
    length: usize,
    call: impl FnOnce(&Mm, AddrRange) -> Result<()>,
) -> Result<()> {
    let start = addr.addr() as u64;
    let what = "the range ends above the user address space";
    let end = start.checked_add(length as u64);
    let end = end.ok_or(Error::Invalid { address: hmm_core::VirtAddr::new(start), what })?;
    call(&get(mm)?.core, AddrRange::new(start, end)?)
}

/// Lets whoever touches an absent page of a range bring it home itself, in a handler of SIGBUS,
/// instead of waiting for a service thread: the fastest way there is.
///
/// For memory that the program never hands to the kernel while pages of it may be away, on an
/// engine that otherwise serves the kernel ("uffd"). System calls on absent pages of the range fail
/// with EFAULT from now on (on holes too, once pages of the range have migrated): keep what they
/// use present with hmm_guard(). Threads that touch it must not block SIGBUS, and the program must
/// not replace the handler. Exactly this range changes; the kernel cuts the mapping at its borders,
/// and mremap() moves what lies between two borders, not across one. What is unmapped is forgotten.
///
/// Pages on devices come home first. Calling it again changes nothing; where everything is answered
/// so anyway ("uffd-inline") only the arguments are checked.
///
/// @param mm      The address space.
/// @param addr    Start of the first page.
/// @param length  Bytes, a multiple of the page size, not 0.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, a bad range, or something else than mapped, private anonymous
///    memory of the program is in it;
///  - -EBUSY: a page did not come home, or another userfaultfd of the process has the range;
///  - -EIO: a device lost a page;
///  - -ENOMEM: more than 4096 separate ranges, or too many mappings;
///  - -EDEADLK: called from a callback;
///  - -EOPNOTSUPP: an engine without userfaultfd, or the program ignores SIGBUS or SIGSEGV;
///  - -ENODEV: closed.
///    Of a longer range, a part may have changed then.
///
/// Context: any thread, but not inside a callback; may block; calls invalidation, fault and free
/// callbacks.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_inline_range(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
) -> c_int {
    on_pages(mm, addr, length, |mm, range| mm.inline_range(range)).into_c()
}

/// Undoes hmm_mm_inline_range() on a range, or a part of one: touches are answered as the engine
/// answers by itself, and system calls wait for absent pages again where the engine has
/// HMM_CAPABILITY_KERNEL_FAULTS.
///
/// @param mm      The address space.
/// @param addr    Start of the first page.
/// @param length  Bytes, a multiple of the page size, not 0.
/// @return As hmm_mm_inline_range().
///
/// Context: as hmm_mm_inline_range().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_blocking_range(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
) -> c_int {
    on_pages(mm, addr, length, |mm, range| mm.blocking_range(range)).into_c()
}
