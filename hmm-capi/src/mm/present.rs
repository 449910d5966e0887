//! Pages at home: pins, guards, making present; and where each page is.

use crate::error::record;
use crate::handle::{Opaque, Table, check_pointer, invalid};
use crate::mm::{get, mm_struct};
use crate::ret::IntoC;
use hmm_core::{AddrRange, Mm, PresentGuard, Residency, Result};
use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;

/// Runs `call` on the pages touched by `length` bytes at `addr`.
fn on_range<R>(
    mm: *const mm_struct,
    addr: *const c_void,
    length: usize,
    call: impl FnOnce(&Mm, AddrRange) -> Result<R>,
) -> Result<R> {
    let range = AddrRange::covering(addr.addr() as u64, length as u64)?;
    call(&get(mm)?.core, range)
}

/// Brings a range home and keeps it in system memory until it is unpinned.
///
/// For memory that a driver's callbacks touch, or that they hold a lock over: the driver's
/// structure, its page table, its lists. A callback that touched a page that is on a device would
/// wait for itself. Pins count: what is pinned twice is unpinned twice, with the same addr and
/// length.
///
/// @param mm      The address space.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes; every page that they touch is pinned.
/// @return 0 (what is not mapped counts as home), or:
///  - -EINVAL: mm is no live handle, addr is NULL, length is 0 or overflows;
///  - -EBUSY, -EIO: a page did not come home;
///  - -ENOMEM: more than 4096 pins;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; compare the kernel's pin_user_pages().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_pin_range(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
) -> c_int {
    on_range(mm, addr, length, |mm, range| mm.pin_range(range)).into_c()
}

/// Takes back one hmm_pin_range() of the same pages.
///
/// @param mm      The address space.
/// @param addr    As given to hmm_pin_range().
/// @param length  As given to hmm_pin_range().
/// @return 0, or:
///  - -EINVAL: mm is no live handle, a bad range, or these pages were not pinned by one call;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; does not block for long.
/// Source: ours; compare the kernel's unpin_user_pages().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_unpin_range(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
) -> c_int {
    on_range(mm, addr, length, |mm, range| mm.unpin_range(range)).into_c()
}

/// Brings a range home and makes it present, as if the CPU had touched every page of it.
///
/// It may leave again at once: what shall stay for a system call is kept by hmm_guard().
///
/// @param mm      The address space.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes, not 0; every page that they touch is made present.
/// @param write   As if for writing: copy-on-write is broken.
/// @return Pages that came home from devices, or:
///  - -EINVAL: mm is no live handle, or a bad range;
///  - -EFAULT: something is not mapped;
///  - -EPERM: the protection forbids it;
///  - -EIO: a device lost a page;
///  - -EBUSY;
///  - -ENOMEM;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
/// Source: ours; compare madvise(MADV_POPULATE_WRITE).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_make_present(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
    write: bool,
) -> c_long {
    on_range(mm, addr, length, |mm, range| mm.make_present(range, write)).into_c()
}

/// A range of bytes that system calls can use; see hmm_guard(). The caller provides the memory,
/// usually on its stack, and it may move. All zeros (HMM_GUARD_NONE) holds nothing.
#[derive(Debug)]
#[repr(C)]
pub struct hmm_guard {
    /// The library's; NULL when it holds nothing.
    pub held: *const c_void,
    /// First address of the pages that are held.
    pub start: c_ulong,
    /// First address behind them.
    pub end: c_ulong,
    /// Zero; room for later versions.
    pub reserved: c_ulong,
}

impl hmm_guard {
    const NONE: Self = Self { held: ptr::null(), start: 0, end: 0, reserved: 0 };
}

static GUARDS: Table<Opaque, PresentGuard, 1024> =
    Table::new("not a guard that holds something", "guards that hold something (1024)");

fn keep(
    mm: *const mm_struct,
    addr: *const c_void,
    length: usize,
    write: bool,
) -> Result<hmm_guard> {
    let range = AddrRange::covering(addr.addr() as u64, length as u64)?;
    let held = Arc::new(get(mm)?.core.guard(range, write)?);
    let held = GUARDS.insert(held)?.cast_const().cast();
    let (start, end) = (range.start().get(), range.end().get());
    Ok(hmm_guard { held, start, end, reserved: 0 })
}

/// Refuses what is no guard, and one that holds something: that would never be let go.
fn check_empty(guard: *const hmm_guard) -> Result<()> {
    check_pointer(guard, "guard is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct hmm_guard, which any bits are.
    if unsafe { (*guard).held.is_null() } {
        return Ok(());
    }
    let what = "the guard holds something already, or was not all zeros at first";
    Err(invalid(guard.addr() as u64, what))
}

/// Keeps bytes present for system calls until hmm_unguard(): brings their pages home, makes them
/// present as an access would, and keeps them from migrating.
///
/// Where the engine lacks HMM_CAPABILITY_KERNEL_FAULTS, a system call fails with EFAULT (or stops
/// short) at a page that is on a device. Guard the buffers of the call, and it works on every
/// engine:
///
/// ```c
/// HMM_GUARD_SCOPE(guard);
/// if (hmm_guard(mm, &guard, buffer, length, true))
///   return -1;
/// got = read(file, buffer, length);
/// ```
///
/// Guards of the same pages count: the pages stay until the last one lets go. Migration leaves
/// guarded pages where they are; nothing else of the process changes.
///
/// @param mm      The address space.
/// @param guard   Holds nothing yet: all zeros, or as hmm_unguard() left it.
/// @param addr    First byte; need not be aligned.
/// @param length  Bytes, not 0; every page that they touch is held.
/// @param write   The system call writes to them, as read(2) does: copy-on-write is broken.
/// @return 0, or (and then it holds nothing):
///  - -EINVAL: mm is no live handle; guard is NULL, misaligned, or holds something; addr is NULL,
///    length is 0 or overflows;
///  - -EFAULT: something is not mapped;
///  - -EPERM: the protection forbids the access;
///  - -EIO: a device lost a page;
///  - -EBUSY: a page did not come home in time;
///  - -ENOMEM: more than 1024 guards, or more than 4096 guards and pins together;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
/// Source: ours; compare the kernel's pin_user_pages() around direct I/O.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_guard(
    mm: *mut mm_struct,
    guard: *mut hmm_guard,
    addr: *const c_void,
    length: usize,
    write: bool,
) -> c_int {
    let outcome = check_empty(guard).and_then(|()| keep(mm, addr, length, write));
    // SAFETY: `check_empty` found it good; the caller promises a writable struct hmm_guard.
    outcome.map(|held| unsafe { ptr::write(guard, held) }).into_c()
}

/// Lets go of what a guard holds; its pages may migrate again. A guard that holds nothing is left
/// as it is, so a second call does no harm.
///
/// HMM_GUARD_SCOPE() calls it at the end of a scope.
///
/// @param guard  As hmm_guard() filled it in, or all zeros; NULL does nothing.
///
/// Returns nothing. hmm_last_errno() stays as it is, except -EINVAL when the guard was never
/// filled in by hmm_guard(), or a copy of it let go before; it holds nothing afterwards.
///
/// Context: any thread, also another than that of hmm_guard(), but not inside a callback; does not
/// block for long.
/// Source: ours; compare the kernel's unpin_user_pages().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_unguard(guard: *mut hmm_guard) {
    if guard.is_null() || !guard.is_aligned() {
        return;
    }
    // SAFETY: not NULL and aligned; the caller promises a struct hmm_guard, which any bits are.
    let before = unsafe { ptr::replace(guard, hmm_guard::NONE) };
    if !before.held.is_null() && GUARDS.remove(before.held.cast()).is_none() {
        record(&invalid(before.held.addr() as u64, "not a guard that holds something"));
    }
}

/// The byte that stands for a page's place in `hmm_residency`.
fn residency_byte(place: Residency) -> u8 {
    match place {
        Residency::None => 0,
        Residency::System => 1,
        Residency::Device(_) => 2,
        Residency::Migrating => 3,
        Residency::Poisoned => 4,
        Residency::Unmapped => 5,
    }
}

fn residency(mm: &Mm, range: AddrRange, places: *mut u8, count: usize) -> Result<()> {
    const CHUNK: usize = 256;
    check_pointer(places, "places is NULL")?;
    if count < range.pages() {
        return Err(invalid(
            range.start().get(),
            "places has fewer bytes than the range has pages",
        ));
    }
    for first in (0..range.pages()).step_by(CHUNK) {
        let pages = CHUNK.min(range.pages() - first);
        let mut found = [Residency::None; CHUNK];
        mm.residency(range.sub(first, pages), &mut found[..pages])?;
        for (index, place) in found[..pages].iter().enumerate() {
            // SAFETY: the caller promises `count` writable bytes, and the index is below range.pages() <= count.
            unsafe { places.add(first + index).write(residency_byte(*place)) };
        }
    }
    Ok(())
}

/// Tells where each page of a range is, without touching it.
///
/// @param mm      The address space.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes; every page that they touch is reported.
/// @param places  One byte for each page: HMM_RESIDENCY_NONE, _SYSTEM, _DEVICE, _MIGRATING,
///                _POISONED or _UNMAPPED.
/// @param count   Bytes at places; at least one for each page.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, a bad range, places is NULL or too small;
///  - -ENODEV: closed (places may then be partly written).
///
/// Context: any thread, but not inside a callback; does not block for long.
/// Source: ours; compare mincore(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_residency(
    mm: *mut mm_struct,
    addr: *const c_void,
    length: usize,
    places: *mut u8,
    count: usize,
) -> c_int {
    on_range(mm, addr, length, |mm, range| residency(mm, range, places, count)).into_c()
}
