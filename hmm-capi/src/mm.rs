//! `struct mm_struct`: the address space of this process, its engine and plain accesses.

// The paths are where the modules would be anyway; the header's generator needs it to find the file.
#[path = "mm/fork.rs"]
mod fork;
#[path = "mm/inline.rs"]
mod inline;
#[path = "mm/present.rs"]
mod present;

pub use fork::*;
pub use inline::*;
pub use present::*;

use crate::handle::{Opaque, Table, check_pointer, invalid, lock};
use crate::ret::IntoC;
use crate::{devmem, error, hold, interval, mirror, pagemap, phase, tracking, vma};
use hmm_core::limits::DEADLINE;
use hmm_core::{Error, Mm, Result, VirtAddr};
use std::ffi::{c_char, c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

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
/// Held while the first reference is made or the last one goes, which calls callbacks.
static OPENING: Mutex<()> = Mutex::new(());
/// The thread that holds it.
static OPENER: AtomicUsize = AtomicUsize::new(0);
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

/// The handle of the address space that C code has open.
pub(crate) fn any() -> Option<Arc<MmHandle>> {
    let is_open = |known: &MmHandle| {
        known.references.load(Ordering::Relaxed) > 0 && !known.core.is_inherited()
    };
    MMS.find(is_open).map(|found| found.1)
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
    let newer = [interval::INTERVALS.pages(), pagemap::PAGEMAPS.pages(), phase::PHASES.pages()];
    let threads = [devmem::DEVMEMS.pages(), hold::pages(), error::pages()];
    handles.into_iter().chain(newer).chain(threads).try_for_each(|pages| mm.pin_range(pages?))
}

/// `OPENING`, taken.
struct Turn {
    _taken: MutexGuard<'static, ()>,
}

impl Turn {
    /// Waits for it, but not for itself, and not for ever: whoever has it may wait for a callback that wants it.
    fn take() -> Result<Self> {
        if OPENER.load(Ordering::Relaxed) == error::this_thread() {
            let what =
                "the address space is opened or closed from inside a callback of its closing";
            return Err(Error::Deadlock { what });
        }
        let deadline = Instant::now() + DEADLINE;
        loop {
            let taken = match OPENING.try_lock() {
                Ok(taken) => taken,
                Err(TryLockError::Poisoned(taken)) => taken.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    let what = "another thread opens or closes the address space";
                    return Err(Error::Busy { address: VirtAddr::new(0), what });
                }
            };
            OPENER.store(error::this_thread(), Ordering::Relaxed);
            return Ok(Self { _taken: taken });
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        OPENER.store(0, Ordering::Relaxed);
    }
}

fn open() -> Result<*mut mm_struct> {
    let _turn = Turn::take()?;
    let core = Mm::current()?;
    let handle = adopt(&core)?;
    if handle.references.fetch_add(1, Ordering::Relaxed) == 0 {
        pin_tables(&core)?;
    }
    Ok(pointer_to(&handle))
}

fn put(mm: *mut mm_struct) -> Result<()> {
    if hold::in_callback() {
        let what = "an address space cannot be closed from one of its callbacks";
        return Err(Error::Deadlock { what });
    }
    let _turn = Turn::take()?;
    let handle = get(mm)?;
    let count = handle.references.load(Ordering::Relaxed);
    match count {
        0 => return Err(invalid(mm.addr() as u64, "hmm_mm_put without hmm_mm_current")),
        1 => {
            phase::forget(&handle);
            handle.core.close()?;
        }
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
/// The first call chooses the engine and starts its service threads. The environment variable
/// HMM_ENGINE names one: uffd, uffd-inline or signal; auto, or nothing, takes the best that works
/// here. HMM_LAYOUT=ordered has changes of the layout announced (HMM_CAPABILITY_ORDERED), and is
/// refused without libhmm_preload.so; HMM_LAYOUT=observed has not. hmm_mm_capabilities() tells what
/// it can do.
///
/// @return The address space: the same pointer for every caller until the last hmm_mm_put(). On
/// failure ERR_PTR():
///  - -EOPNOTSUPP: no engine works on this kernel, or HMM_ENGINE or HMM_LAYOUT asks for what
///    cannot be had, and hmm_last_error() says why and what would help;
///  - -ENOMEM;
///  - -EBUSY: another thread opens or closes it for more than 10 seconds;
///  - -EDEADLK: called from inside a callback of its closing.
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
///  - -EBUSY, -EIO: a device did not give its pages back, or another thread opens or closes (the
///    reference is kept, nothing is lost, try again).
///
/// Context: any thread, but not inside a callback; may block; calls release, fault and free
/// callbacks.
/// Source: the kernel's mmput(); promise 43.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_put(mm: *mut mm_struct) -> c_int {
    put(mm).into_c()
}

/// The name of the engine that changes CPU mappings, for people: "uffd", "uffd-inline" or "signal".
///
/// Programs that behave differently from one engine to another ask hmm_mm_capabilities() instead.
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

/// What the engine of an address space can do.
///
/// @param mm  The address space.
/// @return A set of HMM_CAPABILITY_ bits, whose descriptions say what to do where one is missing;
/// or:
///  - -EINVAL: mm is no live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_capabilities(mm: *const mm_struct) -> c_int {
    // There are few of them: the sign bit is free.
    let bits = get(mm).map(|mm| mm.core.capabilities().bits() as usize);
    bits.into_c() as c_int
}

/// Waits until layout changes that were made before this call are applied and their callbacks are
/// done.
///
/// munmap(), mremap() and madvise() of the process are reported to the library while they happen,
/// where the engine has HMM_CAPABILITY_EVENTS. A thread that made one and then starts device work
/// calls this in between, so that the device cannot use a translation from before.
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
