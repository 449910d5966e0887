//! Device memory under the names of hmm.txt, section 5.

use crate::devices::device;
use crate::error::record_outcome;
use crate::handle::{Public, Table, check_pointer, invalid};
use crate::mm;
use crate::pages::{self, page};
use crate::ret::IntoC;
use crate::vma::{CallbackVma, vm_area_struct};
use hmm_core::{
    CpuFault, Devmem, DevmemOps, Error, FaultError, OwnerId, PAGE_SIZE, Pfn, Result, VirtAddr,
};
use std::ffi::{c_int, c_long, c_uint, c_ulong};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// An entry of a CPU page table at the level of 2 MiB: opaque, and always NULL here.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct pmd_t {
    _opaque: [u8; 0],
}

/// A range of physical addresses: opaque, for hmm_devmem_add_resource().
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct resource {
    _opaque: [u8; 0],
}

/// A driver's side of device memory. Copied by hmm_devmem_add(), so it may live on the stack.
///
/// Both are called with no lock of the library held, fault usually on a thread that answers CPU
/// faults (hmm_devmem_set_signal_safe() tells where else). They must not touch memory that may
/// migrate (hmm_pin_range() what they need), must not call malloc or free, and must not leave by
/// longjmp or an exception.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_devmem_ops {
    /// Mandatory. The last reference to a device page is gone: nobody uses it any more, and the
    /// driver may reuse it at once, even before it returns (promises 48, 56). Called exactly once
    /// for each page that was named as a destination of a migration, also when that migration
    /// failed. The driver's locks may be taken, but must not be held around calls that free pages
    /// (hmm_devmem_remove, migrate_vma, munmap).
    pub free: Option<unsafe extern "C" fn(devmem: *mut hmm_devmem, page: *mut page)>,
    /// Mandatory. The CPU touches addr, whose page is on the device. Bring it home with
    /// migrate_vma(), on a range inside vma that holds addr; neighbours may come along (promises
    /// 49, 50). The calling thread counts as holding the lock of the address space for reading, and
    /// vma lives until the return.
    ///
    /// page is the device page, as a hint: it may have come home meanwhile, and then there is
    /// nothing left to do. flags is a set of FAULT_FLAG_WRITE and FAULT_FLAG_REMOTE (a request of
    /// the library or another thread, not a touch). pmdp is NULL.
    ///
    /// Returns 0 or VM_FAULT_MAJOR when it was done, VM_FAULT_SIGBUS when the data is lost (the CPU
    /// access gets SIGBUS, never zeros), VM_FAULT_OOM when there is no memory now (the access is
    /// tried again).
    pub fault: Option<
        unsafe extern "C" fn(
            devmem: *mut hmm_devmem,
            vma: *mut vm_area_struct,
            addr: c_ulong,
            page: *mut page,
            flags: c_uint,
            pmdp: *mut pmd_t,
        ) -> c_int,
    >,
}

/// Device memory that the library made page descriptors for. Made by hmm_devmem_add(), read by the
/// driver, given back to hmm_devmem_remove().
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_devmem {
    /// First page.
    pub pfn_first: c_ulong,
    /// One behind the last page.
    pub pfn_last: c_ulong,
    /// As given to hmm_devmem_add().
    pub device: *mut device,
    /// As given to hmm_devmem_add(); not looked at any more.
    pub ops: *const hmm_devmem_ops,
    /// The library's; room for later versions.
    pub reserved: [c_ulong; 4],
}

impl Public for hmm_devmem {
    const EMPTY: Self = Self {
        pfn_first: 0,
        pfn_last: 0,
        device: ptr::null_mut(),
        ops: ptr::null(),
        reserved: [0; 4],
    };
}

/// What stands behind a handle: set once the core has made it.
type Made = OnceLock<Both>;

/// Device memory, and the way from it to the driver.
#[derive(Clone)]
pub(crate) struct Both {
    core: Arc<Devmem>,
    calls: Arc<Calls>,
}

pub(crate) static DEVMEMS: Table<hmm_devmem, Made, 64> =
    Table::new("not a live hmm_devmem of this library", "hmm_devmem handles (64)");

/// Carries callbacks from the core to the driver.
struct Calls {
    ops: hmm_devmem_ops,
    handle: usize,
    is_signal_safe: AtomicBool,
}

impl Calls {
    fn handle(&self) -> *mut hmm_devmem {
        ptr::with_exposed_provenance_mut(self.handle)
    }
}

/// `VM_FAULT_*`: no memory now.
const VM_FAULT_OOM: c_int = 1;
/// `VM_FAULT_*`: done, and it took I/O.
const VM_FAULT_MAJOR: c_int = 4;

/// What the driver answered a CPU fault with.
fn fault_result(answer: c_int) -> std::result::Result<(), FaultError> {
    match answer & !VM_FAULT_MAJOR {
        0 => Ok(()),
        VM_FAULT_OOM => Err(FaultError::OutOfMemory),
        _ => Err(FaultError::SigBus),
    }
}

/// Has the driver answer a CPU fault: `call` gets a vma that lives meanwhile.
pub(crate) fn answer(
    fault: &CpuFault<'_>,
    call: impl FnOnce(*mut vm_area_struct) -> c_int,
) -> std::result::Result<(), FaultError> {
    let vma = mm::adopt(fault.mm)
        .and_then(|mm| CallbackVma::new(mm, fault.vma, Some(fault.page)))
        .map_err(|_| FaultError::OutOfMemory)?;
    fault_result(call(vma.handle()))
}

impl DevmemOps for Calls {
    fn free(&self, _: &Devmem, page: Pfn) {
        if let Some(call) = self.ops.free {
            // SAFETY: the device memory is not removed yet, so by the driver's promise the function is callable.
            unsafe { call(self.handle(), pages::from_pfn(page)) };
        }
    }

    fn fault(&self, _: &Devmem, fault: &CpuFault<'_>) -> std::result::Result<(), FaultError> {
        let Some(call) = self.ops.fault else { return Err(FaultError::SigBus) };
        let (addr, page) = (fault.addr.get(), pages::from_pfn(fault.page));
        let (handle, flags) = (self.handle(), fault.flags.bits());
        // SAFETY: the device memory is not removed yet, so by the driver's promise the function is callable.
        answer(fault, |vma| unsafe { call(handle, vma, addr, page, flags, ptr::null_mut()) })
    }

    fn is_signal_safe(&self) -> bool {
        self.is_signal_safe.load(Ordering::Relaxed)
    }
}

fn copy_ops(ops: *const hmm_devmem_ops) -> Result<hmm_devmem_ops> {
    check_pointer(ops, "ops is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct hmm_devmem_ops.
    let copy = unsafe { ptr::read(ops) };
    if copy.free.is_none() || copy.fault.is_none() {
        return Err(invalid(ops.addr() as u64, "ops->free and ops->fault are both needed"));
    }
    Ok(copy)
}

/// Pages of device memory of so many bytes.
pub(crate) fn pages_of(size: u64) -> Result<usize> {
    let pages = size.div_ceil(PAGE_SIZE as u64);
    usize::try_from(pages).map_err(|_| invalid(size, "size is too large"))
}

fn add(ops: *const hmm_devmem_ops, device: *mut device, size: u64) -> Result<*mut hmm_devmem> {
    let copy = copy_ops(ops)?;
    let pages = pages_of(size)?;
    let object = Arc::new(Made::new());
    let handle = DEVMEMS.insert(Arc::clone(&object))?;
    let calls = Calls {
        ops: copy,
        handle: handle.expose_provenance(),
        is_signal_safe: AtomicBool::new(false),
    };
    let calls = Arc::new(calls);
    let core =
        Devmem::add(Arc::clone(&calls) as _, OwnerId::unique(), pages).inspect_err(|_| {
            DEVMEMS.remove(handle);
        })?;
    let (pfn_first, pfn_last) = (core.pfn_first().get(), core.pfn_last().get());
    DEVMEMS.edit(handle, hmm_devmem { pfn_first, pfn_last, device, ops, reserved: [0; 4] });
    object.get_or_init(|| Both { core, calls });
    Ok(handle)
}

fn get(devmem: *const hmm_devmem) -> Result<Both> {
    let object = DEVMEMS.get(devmem)?;
    object.get().cloned().ok_or_else(|| invalid(devmem.addr() as u64, "not added yet"))
}

fn remove(devmem: *mut hmm_devmem) -> Result<()> {
    if devmem.is_null() {
        return Ok(());
    }
    get(devmem)?.core.remove()?;
    DEVMEMS.remove(devmem);
    Ok(())
}

/// Registers device memory and makes a descriptor for each of its pages.
///
/// The library never sees the memory itself: nothing of it is mapped, and a driver that hands out
/// page n of pfn_first + n decides what that means on its device. All pages are free at first and
/// the driver's to hand out, as destinations of migrate_vma(); the library has no allocator for
/// them.
///
/// @param ops     The driver's callbacks; copied.
/// @param device  The device, kept for the driver in devmem->device; may be NULL.
/// @param size    Bytes, rounded up to whole pages; at most 256 GiB.
/// @return The device memory. On failure ERR_PTR():
///  - -EINVAL: ops or a callback is NULL, ops is misaligned, size is 0 or too large;
///  - -ENOMEM: no descriptors, or 64 devices exist already.
///
/// Context: any thread; may block.
/// Source: hmm.txt section 5; promise 47.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_add(
    ops: *const hmm_devmem_ops,
    device: *mut device,
    size: c_ulong,
) -> *mut hmm_devmem {
    add(ops, device, size).into_c()
}

/// Registers device memory that the CPU can address coherently. Not supported yet.
///
/// @param ops     The driver's callbacks.
/// @param device  The device; may be NULL.
/// @param res     Where the memory is.
/// @return Always ERR_PTR():
///  - -EINVAL: ops, a callback or res is NULL, or ops is misaligned;
///  - -EOPNOTSUPP: the arguments are good.
///
/// Context: any thread; does not block.
/// Source: hmm_devmem_add_resource() of kernels v4.14 to v5.2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_add_resource(
    ops: *const hmm_devmem_ops,
    device: *mut device,
    res: *mut resource,
) -> *mut hmm_devmem {
    let _ = device;
    let checked = copy_ops(ops).and_then(|_| check_pointer(res.cast::<u8>(), "res is NULL"));
    let outcome: Result<*mut hmm_devmem> = checked.and(Err(Error::Unsupported {
        what: "device memory that the CPU can address; use hmm_devmem_add".into(),
    }));
    outcome.into_c()
}

/// Removes device memory: brings its pages home through fault, waits until every page is free, and
/// forgets it.
///
/// If that takes longer than the library waits (about 10 seconds), or a page cannot come home, the
/// device memory stays as it is: hmm_last_errno() says why, and the call can be made again. The
/// driver's update lock must not be held.
///
/// @param devmem  What hmm_devmem_add() returned; NULL does nothing.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not live device memory (nothing
/// is changed); -EBUSY; -EIO; -EDEADLK called from inside a callback.
///
/// Context: any thread, but not inside a callback; may block; calls fault and free.
/// Source: hmm.txt section 5; promises 54, 81.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_remove(devmem: *mut hmm_devmem) {
    record_outcome(remove(devmem));
}

/// Says that fault may run in a signal handler of the thread that touched a page.
///
/// Some engines ("uffd-inline", "signal") learn of a touch by a signal in the thread that touched.
/// That thread then waits while a service thread calls fault; with safe it calls fault itself, and
/// saves two changes of threads for each touch. What fault leads to runs there too:
/// alloc_and_copy, finalize_and_map, free, and sync_cpu_device_pagetables of every mirror of the
/// range. So all of these must
///
///  - call only what may be called in a signal handler (signal-safety(7)): no malloc, no printf;
///  - take no lock that is ever held over a touch of memory that may migrate: the thread that
///    touches would wait for itself. (pthread_mutex_lock() is good for all other locks here,
///    since the touch is synchronous.)
///
/// Other engines call fault on service threads, whatever is said here; so does every engine when
/// the touch comes from inside a callback.
///
/// @param devmem  The device memory.
/// @param safe    Whether fault may; false at first. Touches that are being answered are not
///                changed.
/// @return 0, or:
///  - -EINVAL: not live device memory.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_set_signal_safe(devmem: *mut hmm_devmem, safe: bool) -> c_int {
    let set = |both: Both| both.calls.is_signal_safe.store(safe, Ordering::Relaxed);
    get(devmem).map(set).into_c()
}

/// How many pages of device memory hold data of the process.
///
/// @param devmem  The device memory.
/// @return Pages, or -EINVAL when it is not live.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_in_use(devmem: *const hmm_devmem) -> c_long {
    get(devmem).map(|both| both.core.in_use()).into_c()
}

/// Brings home what some pages of device memory hold, wherever they are mapped, through the driver's
/// fault: how a driver makes room when its memory is full.
///
/// The driver's policy chooses the pages. To be called before migrate_vma(), never in
/// alloc_and_copy, which holds pages and must not wait for others. Evict many pages at once: it
/// looks at all page tables.
///
/// @param devmem  The device memory.
/// @param first   Number of the first page, from devmem->pfn_first on.
/// @param npages  How many pages.
/// @return How many of them held something; they are free now, unless something else took them. Or:
///  - -EINVAL: devmem is not live, or these are not its pages;
///  - -EDEADLK: called from inside a callback;
///  - -EIO: the device cannot return one (the others came home);
///  - -EBUSY: one did not come home in time.
///
/// Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
/// Source: the kernel's migrate_device_range(), from v6.1 on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_evict(
    devmem: *mut hmm_devmem,
    first: c_ulong,
    npages: c_ulong,
) -> c_long {
    let evict = |both: Both| both.core.evict(Pfn::new(first), npages as usize);
    get(devmem).and_then(evict).into_c()
}

/// The device memory that holds a device page.
pub(crate) fn owner_of(page: *const page) -> Result<(Arc<Devmem>, Pfn)> {
    let address = VirtAddr::from_ptr(page);
    let pfn = pages::to_pfn(page).ok_or(Error::Invalid { address, what: "not a struct page" })?;
    let devmem = Devmem::find(pfn);
    Ok((devmem.ok_or(Error::Invalid { address, what: "not a page of device memory" })?, pfn))
}

/// Stores one word of the driver's with a device page; it stays until the page is freed.
///
/// @param page  A page of device memory.
/// @param data  The word.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page of live device
/// memory.
///
/// Context: any thread, callbacks included; does not block.
/// Source: hmm_devmem_page_set_drvdata() of kernels v4.14 to v5.2; promise 53.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_page_set_drvdata(page: *mut page, data: c_ulong) {
    record_outcome(owner_of(page).map(|(devmem, pfn)| devmem.set_drvdata(pfn, data)));
}

/// Reads the word that the driver stored with a device page.
///
/// @param page  A page of device memory.
/// @return The word; 0 when none was stored or it is not a page of live device memory.
///
/// Context: any thread, callbacks included; does not block.
/// Source: hmm_devmem_page_get_drvdata() of kernels v4.14 to v5.2; promise 53.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_devmem_page_get_drvdata(page: *const page) -> c_ulong {
    owner_of(page).map_or(0, |(devmem, pfn)| devmem.drvdata(pfn))
}
