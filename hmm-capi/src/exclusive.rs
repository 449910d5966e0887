//! Exclusive access: a page that the CPU cannot reach while the device works on it alone.

use crate::error::record_outcome;
use crate::handle::{check_pointer, invalid};
use crate::hold;
use crate::interval::owner_from;
use crate::mm::{self, MmHandle, mm_struct};
use crate::pages::{self, page};
use crate::ret::IntoC;
use hmm_core::{AddrRange, Error, OwnerId, Result, VirtAddr, unlock_exclusive};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;

/// Pages that belong together: opaque. Here every page is alone, and a folio is its page.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct folio {
    _opaque: [u8; 0],
}

/// The address space of a call, whose lock the caller holds.
fn locked(mm: *mut mm_struct) -> Result<Arc<MmHandle>> {
    let handle = mm::get(mm)?;
    if !hold::holds(&handle) {
        return Err(invalid(mm.addr() as u64, "take hmm_mm_read_lock before"));
    }
    Ok(handle)
}

fn make(mm: &MmHandle, addr: VirtAddr, owner: OwnerId, holds_others: bool) -> Result<*mut page> {
    mm.core.make_exclusive(addr.page(), owner, holds_others).map(pages::from_pfn)
}

fn make_one(
    mm: *mut mm_struct,
    addr: u64,
    owner: *mut c_void,
    folio: *mut *mut folio,
) -> Result<*mut page> {
    check_pointer(folio, "foliop is NULL or misaligned")?;
    let page = make(&*locked(mm)?, VirtAddr::new(addr), owner_from(owner), false)?;
    // SAFETY: not NULL and aligned; the caller promises a place for one pointer.
    unsafe { folio.write(page.cast()) };
    Ok(page)
}

/// Whether an error is about the page alone, so that the next one is worth a try.
fn is_of_page(error: &Error) -> bool {
    matches!(error, Error::Unsupported { .. } | Error::Busy { .. })
}

fn make_range(
    mm: *mut mm_struct,
    bounds: (u64, u64),
    pages: *mut *mut page,
    owner: *mut c_void,
) -> Result<usize> {
    check_pointer(pages, "pages is NULL or misaligned")?;
    let (mm, range) = (locked(mm)?, AddrRange::new(bounds.0, bounds.1)?);
    for index in 0..range.pages() {
        let addr = VirtAddr::new(bounds.0 + ((index as u64) << hmm_core::PAGE_SHIFT));
        let page = match make(&mm, addr, owner_from(owner), index > 0) {
            Ok(page) => page,
            Err(error) if is_of_page(&error) => ptr::null_mut(),
            Err(error) if index == 0 => return Err(error),
            Err(_) => return Ok(index),
        };
        // SAFETY: the caller promises a place for each page of the range.
        unsafe { pages.add(index).write(page) };
    }
    Ok(range.pages())
}

/// Takes one page from the CPU, for the device alone: for atomic operations that the device cannot
/// make on memory which the CPU uses at the same time.
///
/// The page is made present and writable first. Subscriptions are called with MMU_NOTIFY_EXCLUSIVE
/// and owner: a driver ignores its own. The contents are at hmm_page_to_virt(page), where the device
/// works on them. A touch by the CPU sleeps until the driver unlocks the page (folio_unlock(),
/// unlock_page(), hmm_page_unlock()); the first touch after that gives the page back to the CPU, and
/// subscriptions are called with MMU_NOTIFY_CLEAR before, so that the device ends its use of it.
///
/// @param mm      The address space; the caller holds its lock.
/// @param addr    Any address in the page.
/// @param owner   For MMU_NOTIFY_EXCLUSIVE; may be NULL.
/// @param foliop  Receives the folio of the page, for folio_unlock() and folio_put().
/// @return The page, locked. On failure ERR_PTR():
///  - -EINVAL: mm is no live handle, its lock is not held, or foliop is NULL or misaligned;
///  - -EFAULT: nothing is mapped there, or the mapping is not readable and writable, or the page
///    cannot be had;
///  - -EOPNOTSUPP: not private anonymous memory;
///  - -EBUSY: the page is pinned, shared, or in use by a migration for a second;
///  - -ENOMEM: 65,536 pages are exclusive already, or no memory;
///  - -EDEADLK: inside a callback;
///  - -ENODEV: closed.
///
/// Context: a thread that holds the lock of the address space, without locks that invalidate callbacks
/// take; not inside a callback; may block.
/// Source: make_device_exclusive() of kernels v6.15 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn make_device_exclusive(
    mm: *mut mm_struct,
    addr: c_ulong,
    owner: *mut c_void,
    foliop: *mut *mut folio,
) -> *mut page {
    make_one(mm, addr, owner, foliop).into_c()
}

/// make_device_exclusive() for the pages of a range, one after another.
///
/// @param mm     As for make_device_exclusive().
/// @param start  First address, page aligned.
/// @param end    First address behind the range, page aligned.
/// @param pages  One place for each page: the page, locked, or NULL where it could not be made
///               exclusive.
/// @param owner  As for make_device_exclusive().
/// @return How many places were filled in: fewer than the range has when a page cannot be had at all.
/// Or, when that is the first one, an error of make_device_exclusive(), or:
///  - -EINVAL: also when pages is NULL or misaligned, or the bounds are not page aligned, empty or
///    reversed.
///
/// Context: as make_device_exclusive().
/// Source: make_device_exclusive_range() of kernels v5.14 to v6.14.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn make_device_exclusive_range(
    mm: *mut mm_struct,
    start: c_ulong,
    end: c_ulong,
    pages: *mut *mut page,
    owner: *mut c_void,
) -> c_int {
    let made = make_range(mm, (start, end), pages, owner).into_c();
    // A range has fewer than 2^31 pages that can be made present.
    c_int::try_from(made).unwrap_or(c_int::MAX)
}

/// Unlocks a page that make_device_exclusive() returned: from now on a touch by the CPU takes it back.
/// Pages of migrations need no unlocking; for them this does nothing. The header offers the kernel's
/// names unlock_page() and folio_unlock() for it.
///
/// @param page  The page.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page.
///
/// Context: any thread, callbacks included; does not block.
/// Source: unlock_page() of kernels v4.14 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_page_unlock(page: *mut page) {
    let what = "not a struct page";
    let pfn = pages::to_pfn(page).ok_or_else(|| invalid(page.addr() as u64, what));
    record_outcome(pfn.map(|pfn| _ = unlock_exclusive(pfn)));
}
