//! `struct mm_struct`: the address space of this process, its counters and its plain services.

use crate::handle::{Opaque, Table, check_pointer, invalid, lock};
use crate::ret::IntoC;
use crate::{devmem, error, hold, mirror, tracking, vma};
use hmm_core::{AddrRange, Mm, Residency, Result, VirtAddr};
use std::ffi::{c_char, c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// The address space of this process, as the library sees it: opaque.
///
/// hmm_mm_current() opens it or takes one more reference, hmm_mm_put() drops one; the last put
/// closes it.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct mm_struct {
    _opaque: [u8; 0],
}

/// What stands behind a `struct mm_struct *`.
pub(crate) struct MmHandle {
    pub(crate) core: Arc<Mm>,
    /// Mirrors of C drivers that are registered now.
    pub(crate) mirrors: AtomicUsize,
    references: AtomicUsize,
    engine: [u8; 16],
}

static MMS: Table<Opaque, MmHandle, 64> =
    Table::new("not a live mm_struct of this library", "mm_struct handles (64)");
/// Held while the first reference is made or the last one goes.
static OPENING: Mutex<()> = Mutex::new(());
/// Held for the moment in which a handle is looked for and made.
static ADOPTING: Mutex<()> = Mutex::new(());

/// What stands behind a handle.
pub(crate) fn get(mm: *const mm_struct) -> Result<Arc<MmHandle>> {
    MMS.get(mm.cast())
}

/// The handle of an address space, made now if C code has none yet (a program may mix C and Rust).
pub(crate) fn adopt(mm: &Arc<Mm>) -> Result<Arc<MmHandle>> {
    let _guard = lock(&ADOPTING);
    if let Some((_, known)) = MMS.find(|known| Arc::ptr_eq(&known.core, mm)) {
        return Ok(known);
    }
    let mut engine = [0; 16];
    let name = mm.engine_name().as_bytes();
    let length = name.len().min(engine.len() - 1);
    engine[..length].copy_from_slice(&name[..length]);
    let handle = Arc::new(MmHandle {
        core: Arc::clone(mm),
        mirrors: AtomicUsize::new(0),
        references: AtomicUsize::new(0),
        engine,
    });
    MMS.insert(Arc::clone(&handle))?;
    Ok(handle)
}

/// The C pointer of a handle; NULL when it is closed.
pub(crate) fn pointer_to(mm: &Arc<MmHandle>) -> *mut mm_struct {
    MMS.find(|known| ptr::eq(known, Arc::as_ptr(mm)))
        .map_or(ptr::null_mut(), |found| found.0.cast())
}

/// What callbacks use on threads that answer faults must never migrate: the handle tables, and who is where.
fn pin_tables(mm: &Mm) -> Result<()> {
    let handles =
        [MMS.pages(), vma::VMAS.pages(), mirror::MIRRORS.pages(), tracking::RANGES.pages()];
    let threads = [devmem::DEVMEMS.pages(), hold::pages(), error::pages()];
    handles.into_iter().chain(threads).try_for_each(|pages| mm.pin_range(pages?))
}

fn open() -> Result<*mut mm_struct> {
    let _guard = lock(&OPENING);
    let core = Mm::current()?;
    let handle = adopt(&core)?;
    if handle.references.fetch_add(1, Ordering::Relaxed) == 0 {
        pin_tables(&core)?;
    }
    Ok(pointer_to(&handle))
}

fn put(mm: *mut mm_struct) -> Result<()> {
    let _guard = lock(&OPENING);
    let handle = get(mm)?;
    let count = handle.references.load(Ordering::Relaxed);
    match count {
        0 => return Err(invalid(mm.addr() as u64, "hmm_mm_put without hmm_mm_current")),
        1 => handle.core.close()?,
        _ => {}
    }
    // Only the holder of OPENING changes the count.
    handle.references.store(count - 1, Ordering::Relaxed);
    if count == 1 {
        tracking::forget(&handle);
        MMS.remove(mm.cast());
    }
    Ok(())
}

/// Opens the address space of this process, or takes one more reference to it.
///
/// The first call chooses the engine (environment variable HMM_ENGINE: auto, or uffd) and starts
/// its service threads.
///
/// @return The address space: the same pointer for every caller until the last hmm_mm_put(). On
/// failure ERR_PTR():
///  - -EOPNOTSUPP: no engine works on this kernel, and hmm_last_error() says why and what would
///    help;
///  - -ENOMEM;
///  - -EBUSY.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; stands for the kernel's current->mm with mmget().
#[unsafe(no_mangle)]
pub extern "C" fn hmm_mm_current() -> *mut mm_struct {
    open().into_c()
}

/// Drops one reference; the last one closes the address space.
///
/// Closing calls the release callback of each mirror once, brings every page home from its device,
/// and stops the service threads. Mirrors stay the driver's to unregister; device memory stays the
/// driver's to remove.
///
/// @param mm  What hmm_mm_current() returned.
/// @return 0, or:
///  - -EINVAL: mm is no live handle;
///  - -EDEADLK: called from inside a callback;
///  - -EBUSY, -EIO: a device did not give its pages back (the reference is kept, nothing is lost,
///    try again).
///
/// Context: any thread, but not inside a callback; may block; calls release, fault and free
/// callbacks.
/// Source: the kernel's mmput(); promise 43.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_put(mm: *mut mm_struct) -> c_int {
    put(mm).into_c()
}

/// The name of the engine that changes CPU mappings, for people ("uffd").
///
/// @param mm  The address space.
/// @return A string that lives as long as the address space is open; NULL when mm is no live
/// handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_engine(mm: *const mm_struct) -> *const c_char {
    // The string lies in the handle's own allocation, which the table keeps until the address space is closed.
    get(mm).map_or(ptr::null(), |mm| mm.engine.as_ptr().cast())
}

/// Waits until layout changes that were made before this call are applied and their callbacks are
/// done.
///
/// munmap(), mremap() and madvise() of the process are reported to the library while they happen. A
/// thread that made one and then starts device work calls this in between, so that the device
/// cannot use a translation from before.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; stands for the synchronous invalidation of hmm.txt, section 4 (promise 23).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_sync(mm: *mut mm_struct) -> c_int {
    get(mm).map(|mm| mm.core.sync()).into_c()
}

fn check_buffer(buffer: *const c_void, length: usize) -> Result<()> {
    check_pointer(buffer.cast::<u8>(), "buffer is NULL")?;
    let fits = isize::try_from(length).is_ok();
    fits.then_some(()).ok_or_else(|| invalid(buffer.addr() as u64, "length is above SSIZE_MAX"))
}

/// Reads memory of the process without ever raising a signal.
///
/// Pages that are on a device come home first, as for any CPU access.
///
/// @param mm      The address space.
/// @param addr    First byte to read; need not be mapped.
/// @param buffer  Where the bytes go; plain memory of the caller.
/// @param length  Bytes to read.
/// @return The bytes read, fewer than length when the mapping ends before, or:
///  - -EFAULT: nothing is readable at addr;
///  - -EINVAL: mm is no live handle, buffer is NULL, or length above SSIZE_MAX;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; compare process_vm_readv(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_read(
    mm: *mut mm_struct,
    addr: *const c_void,
    buffer: *mut c_void,
    length: usize,
) -> c_long {
    let read = |mm: Arc<MmHandle>| {
        check_buffer(buffer, length)?;
        // SAFETY: the caller promises `length` writable bytes at `buffer`.
        let out = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        mm.core.read(VirtAddr::from_ptr(addr), out)
    };
    get(mm).and_then(read).into_c()
}

/// Writes memory of the process without ever raising a signal.
///
/// Pages that are on a device come home first, as for any CPU access.
///
/// @param mm      The address space.
/// @param addr    First byte to write; need not be mapped.
/// @param buffer  The bytes; plain memory of the caller.
/// @param length  Bytes to write.
/// @return The bytes written, fewer than length when the writable mapping ends before, or:
///  - -EFAULT: nothing is writable at addr;
///  - -EINVAL: mm is no live handle, buffer is NULL, or length above SSIZE_MAX;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; compare process_vm_writev(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_write(
    mm: *mut mm_struct,
    addr: *mut c_void,
    buffer: *const c_void,
    length: usize,
) -> c_long {
    let write = |mm: Arc<MmHandle>| {
        check_buffer(buffer, length)?;
        // SAFETY: the caller promises `length` readable bytes at `buffer`.
        let data = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
        mm.core.write(VirtAddr::from_ptr(addr), data)
    };
    get(mm).and_then(write).into_c()
}

/// Reads memory of the process only if that needs no waiting: for a device engine that works under
/// the driver's update lock, where a fault would wait for itself.
///
/// @param mm      The address space.
/// @param addr    First byte to read; need not be mapped.
/// @param buffer  Where the bytes go; memory of the caller that does not migrate.
/// @param length  Bytes to read.
/// @return True when all bytes were read. False when some page of them is not present (it is on a
/// device, on its way, never touched, not mapped); then buffer may be partly written. Let go of the
/// lock, use hmm_vma_fault(), and try again. Also false for bad arguments.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; stands for an access through the device's page table.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_peek(
    mm: *mut mm_struct,
    addr: *const c_void,
    buffer: *mut c_void,
    length: usize,
) -> bool {
    let Ok(mm) = get(mm) else { return false };
    if check_buffer(buffer, length).is_err() {
        return false;
    }
    // SAFETY: the caller promises `length` writable bytes at `buffer`.
    let out = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    mm.core.peek(VirtAddr::from_ptr(addr), out)
}

/// Writes memory of the process only if that needs no waiting; see hmm_mm_peek().
///
/// @param mm      The address space.
/// @param addr    First byte to write; need not be mapped.
/// @param buffer  The bytes; memory of the caller that does not migrate.
/// @param length  Bytes to write.
/// @return True when all bytes were written. False when some page of them is not present or not
/// writable; then the bytes of earlier pages may be written. Also false for bad arguments.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; stands for an access through the device's page table.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_poke(
    mm: *mut mm_struct,
    addr: *mut c_void,
    buffer: *const c_void,
    length: usize,
) -> bool {
    let Ok(mm) = get(mm) else { return false };
    if check_buffer(buffer, length).is_err() {
        return false;
    }
    // SAFETY: the caller promises `length` readable bytes at `buffer`.
    let data = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), length) };
    mm.core.poke(VirtAddr::from_ptr(addr), data)
}

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
/// @param mm      The address space.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes; every page that they touch is made present.
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
