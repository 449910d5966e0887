//! Device memory as today's kernels register it: `struct dev_pagemap`.

use crate::devmem::{self, owner_of};
use crate::error::record_outcome;
use crate::handle::{Opaque, Table, check_pointer, invalid, lock};
use crate::interval::owner_from;
use crate::mm::{self, MmHandle};
use crate::pages::{self, page};
use crate::ret::IntoC;
use crate::vma::vm_area_struct;
use hmm_core::{
    AddrRange, CpuFault, Devmem, DevmemOps, Error, FaultError, PAGE_SHIFT, PAGE_SIZE, Pfn, Result,
    VirtAddr,
};
use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ptr;
use std::sync::{Arc, Mutex, OnceLock};

/// Kinds of device memory: values of dev_pagemap.type. The values are the kernel's.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub enum memory_type {
    /// The CPU cannot address it: a touch of a page that is there brings it home.
    MEMORY_DEVICE_PRIVATE = 1,
    /// The CPU addresses it as its own memory, coherently. Its pages can be evicted.
    MEMORY_DEVICE_COHERENT = 2,
    /// The kernel's; not supported.
    MEMORY_DEVICE_FS_DAX = 3,
    /// The kernel's; not supported.
    MEMORY_DEVICE_GENERIC = 4,
    /// The kernel's; not supported.
    MEMORY_DEVICE_PCI_P2PDMA = 5,
}

/// What migrate_to_ram returns: 0 or VM_FAULT_ values.
pub type vm_fault_t = c_uint;

/// A touch of a page that is on a device, as migrate_to_ram receives it.
#[derive(Debug)]
#[repr(C)]
pub struct vm_fault {
    /// The mapping around the address; the thread counts as holding the lock of the address space.
    pub vma: *mut vm_area_struct,
    /// The touched page's address.
    pub address: c_ulong,
    /// The device page; it stays what it is until the callback returns.
    pub page: *mut page,
    /// A set of FAULT_FLAG_WRITE and FAULT_FLAG_REMOTE.
    pub flags: c_uint,
}

/// A driver's side of device memory. Copied by memremap_pages().
///
/// Both are called with no lock of the library held, migrate_to_ram usually on a thread that answers
/// CPU faults. They must not touch memory that may migrate (hmm_pin_range() what they need), must
/// not call malloc or free, and must not leave by longjmp or an exception.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct dev_pagemap_ops {
    /// Mandatory. The last reference to a device page is gone: the driver may reuse it at once.
    /// Called exactly once for each page that was named as a destination of a migration, also when
    /// that failed. The driver's locks may be taken, but must not be held around calls that free
    /// pages (memunmap_pages, migrate_vma_pages, migrate_vma_finalize, munmap).
    pub page_free: Option<unsafe extern "C" fn(page: *mut page)>,
    /// Mandatory for MEMORY_DEVICE_PRIVATE, not used for others. The CPU touches vmf->address, whose
    /// page is on the device: bring it home with migrate_vma_setup(), migrate_vma_pages() and
    /// migrate_vma_finalize() on a range inside vmf->vma that holds it, with vmf->page as fault_page;
    /// neighbours may come along.
    ///
    /// Returns 0 or VM_FAULT_MAJOR when it was done, VM_FAULT_SIGBUS when the data is lost (the CPU
    /// access gets SIGBUS, never zeros), VM_FAULT_OOM when there is no memory now (the access is
    /// tried again).
    pub migrate_to_ram: Option<unsafe extern "C" fn(vmf: *mut vm_fault) -> vm_fault_t>,
}

/// A range of addresses of device memory.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_pagemap_range {
    /// First address.
    pub start: u64,
    /// Last address, inclusive.
    pub end: u64,
}

/// Device memory, described by the driver, which sets type, ops, owner, and range to 0 and the size
/// minus 1. It may embed this in a structure of its own, and gets back to that with container_of().
///
/// Its pages are pinned while it is registered. It must not move, and may be freed once
/// memunmap_pages() succeeded.
#[derive(Debug)]
#[repr(C)]
pub struct dev_pagemap {
    /// MEMORY_DEVICE_PRIVATE or MEMORY_DEVICE_COHERENT.
    pub r#type: c_uint,
    /// The kernel's; not looked at.
    pub flags: c_uint,
    /// The driver's callbacks; not looked at after memremap_pages().
    pub ops: *const dev_pagemap_ops,
    /// Whose the pages are: pgmap_owner of migrate_vma_setup(), dev_private_owner of
    /// hmm_range_fault(). Not NULL.
    pub owner: *mut c_void,
    /// How many ranges; there is one, and 0 means the same as 1.
    pub nr_range: c_int,
    /// In: how large it is, end - start + 1 bytes, rounded up to whole pages. Out: where it lies;
    /// the first page is pfn_to_page(range.start >> PAGE_SHIFT).
    pub range: hmm_pagemap_range,
    /// The library's; room for later versions.
    pub reserved: [c_ulong; 4],
}

/// One registered pagemap.
pub(crate) struct Registered {
    pagemap: usize,
    pinned: Mutex<Option<(Arc<MmHandle>, AddrRange)>>,
    /// Set once the core has made it.
    core: OnceLock<Arc<Devmem>>,
}

pub(crate) static PAGEMAPS: Table<Opaque, Registered, 64> =
    Table::new("not a registered dev_pagemap", "registered dev_pagemaps (64)");

/// Carries callbacks from the core to the driver.
struct Calls(dev_pagemap_ops);

impl DevmemOps for Calls {
    fn free(&self, _: &Devmem, page: Pfn) {
        if let Some(call) = self.0.page_free {
            // SAFETY: the device memory is not removed yet, so by the driver's promise the function is callable.
            unsafe { call(pages::from_pfn(page)) };
        }
    }

    fn fault(&self, _: &Devmem, fault: &CpuFault<'_>) -> std::result::Result<(), FaultError> {
        let Some(call) = self.0.migrate_to_ram else { return Err(FaultError::SigBus) };
        let (address, flags) = (fault.addr.get(), fault.flags.bits());
        let page = pages::from_pfn(fault.page);
        devmem::answer(fault, |vma| {
            let mut vmf = vm_fault { vma, address, page, flags };
            // SAFETY: the device memory is not removed yet, so by the driver's promise the function is callable.
            unsafe { call(&raw mut vmf) }.cast_signed()
        })
    }
}

/// The members that the library reads, checked and copied.
struct Description {
    is_coherent: bool,
    ops: dev_pagemap_ops,
    owner: *mut c_void,
    pages: usize,
}

fn describe(pagemap: *const dev_pagemap) -> Result<Description> {
    check_pointer(pagemap, "pgmap is NULL or misaligned")?;
    let address = pagemap.addr() as u64;
    // SAFETY: not NULL and aligned; the caller promises a struct dev_pagemap.
    let given = unsafe { ptr::read(pagemap) };
    check_pointer(given.ops, "pgmap->ops is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct dev_pagemap_ops.
    let ops = unsafe { ptr::read(given.ops) };
    let is_coherent = match given.r#type {
        1 => false,
        2 => true,
        3..=5 => {
            let what = "device memory other than MEMORY_DEVICE_PRIVATE and MEMORY_DEVICE_COHERENT";
            return Err(Error::Unsupported { what: what.into() });
        }
        _ => return Err(invalid(address, "pgmap->type is no enum memory_type")),
    };
    if ops.page_free.is_none() || (ops.migrate_to_ram.is_none() && !is_coherent) {
        return Err(invalid(address, "pgmap->ops lacks page_free or migrate_to_ram"));
    }
    if given.owner.is_null() || !matches!(given.nr_range, 0 | 1) {
        return Err(invalid(address, "pgmap->owner is NULL, or pgmap->nr_range is not 0 or 1"));
    }
    let size = given.range.end.checked_sub(given.range.start).and_then(|last| last.checked_add(1));
    let size = size.ok_or_else(|| invalid(address, "pgmap->range is reversed"))?;
    Ok(Description { is_coherent, ops, owner: given.owner, pages: devmem::pages_of(size)? })
}

impl Registered {
    /// False in a child for what its parent registered.
    fn is_ours(&self) -> bool {
        let is_known = |core: &Arc<Devmem>| {
            Devmem::find(core.pfn_first()).is_some_and(|found| Arc::ptr_eq(&found, core))
        };
        self.core.get().is_none_or(is_known)
    }
}

fn find(pagemap: *const dev_pagemap) -> Option<(*mut Opaque, Arc<Registered>)> {
    PAGEMAPS.find(|one| one.pagemap == pagemap.addr() && one.is_ours())
}

/// A place in the table, unless the pagemap has one already.
fn reserve(pagemap: *mut dev_pagemap) -> Result<(*mut Opaque, Arc<Registered>)> {
    static RESERVING: Mutex<()> = Mutex::new(());
    let _guard = lock(&RESERVING);
    if find(pagemap).is_some() {
        let address = VirtAddr::from_ptr(pagemap);
        return Err(Error::Busy { address, what: "this dev_pagemap is registered already" });
    }
    let (pinned, core) = (Mutex::new(None), OnceLock::new());
    let registered = Arc::new(Registered { pagemap: pagemap.expose_provenance(), pinned, core });
    Ok((PAGEMAPS.insert(Arc::clone(&registered))?, registered))
}

impl Registered {
    /// Callbacks read the driver's structure: it stays where it is, as long as an address space is open.
    fn pin(&self) -> Result<()> {
        let Some(mm) = mm::any() else { return Ok(()) };
        let range = AddrRange::covering(self.pagemap as u64, size_of::<dev_pagemap>() as u64)?;
        mm.core.pin_range(range)?;
        *lock(&self.pinned) = Some((mm, range));
        Ok(())
    }

    fn unpin(&self) {
        if let Some((mm, range)) = lock(&self.pinned).take() {
            // Fails only when the mm was closed meanwhile, and then there is nothing to unpin.
            let _ = mm.core.unpin_range(range);
        }
    }

    fn make(&self, what: &Description) -> Result<Arc<Devmem>> {
        self.pin()?;
        let (ops, owner) = (Arc::new(Calls(what.ops)), owner_from(what.owner));
        let made = match what.is_coherent {
            true => Devmem::add_coherent(ops, owner, what.pages),
            false => Devmem::add(ops, owner, what.pages),
        };
        made.inspect_err(|_| self.unpin())
    }
}

fn remap(pagemap: *mut dev_pagemap) -> Result<*mut c_void> {
    let what = describe(pagemap)?;
    let (handle, registered) = reserve(pagemap)?;
    let made = registered.make(&what).inspect_err(|_| {
        PAGEMAPS.remove(handle);
    })?;
    let start = made.pfn_first().get() << PAGE_SHIFT;
    let end = start + (what.pages * PAGE_SIZE) as u64 - 1;
    // SAFETY: `describe` found the pointer good, and the caller promises a struct dev_pagemap.
    unsafe { (&raw mut (*pagemap).range).write(hmm_pagemap_range { start, end }) };
    registered.core.get_or_init(|| made);
    Ok(ptr::without_provenance_mut(start as usize))
}

fn unmap(pagemap: *mut dev_pagemap) -> Result<()> {
    if pagemap.is_null() {
        return Ok(());
    }
    let not_registered = || invalid(pagemap.addr() as u64, "not a registered dev_pagemap");
    let (handle, registered) = find(pagemap).ok_or_else(not_registered)?;
    registered.core.get().ok_or_else(not_registered)?.remove()?;
    PAGEMAPS.remove(handle);
    registered.unpin();
    Ok(())
}

/// Registers device memory and makes a descriptor for each of its pages.
///
/// As with hmm_devmem_add(), the library never sees the memory itself, and all pages are free at
/// first and the driver's to hand out, as destinations of migrations. Coherent memory is the
/// exception in one respect: contents of a coherent page stay where they are mapped in the process,
/// so the device reads and writes them there, as it does with system memory. What changes is whose
/// page it is: it has a pfn of the device's, counts as device memory, and can be evicted.
///
/// @param pgmap  What the driver describes; range is filled in.
/// @param nid    Not looked at.
/// @return A cookie that is range.start and no address; the driver may ignore it. On failure
/// ERR_PTR():
///  - -EINVAL: pgmap or its ops is NULL or misaligned, page_free is NULL, or migrate_to_ram for
///    private memory, owner is NULL, range is reversed or above 256 GiB, nr_range is above 1, or
///    type is unknown;
///  - -EOPNOTSUPP: another type of the kernel's;
///  - -EBUSY: it is registered already;
///  - -ENOMEM: no descriptors, or 64 devices exist already.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: memremap_pages() of kernels v5.3 to v7.3; page_free as up to v6.18.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memremap_pages(pgmap: *mut dev_pagemap, nid: c_int) -> *mut c_void {
    let _ = nid;
    remap(pgmap).into_c()
}

/// Removes device memory: brings its pages home (private ones through migrate_to_ram), waits until
/// every page is free, and forgets it.
///
/// If that takes longer than the library waits (about 10 seconds), or a page cannot come home, the
/// device memory stays as it is: hmm_last_errno() says why, and the call can be made again. The
/// driver's update lock must not be held.
///
/// @param pgmap  What was given to memremap_pages(); NULL does nothing.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not registered; -EBUSY; -EIO;
/// -EDEADLK called from inside a callback.
///
/// Context: any thread, but not inside a callback; may block; calls migrate_to_ram and page_free.
/// Source: memunmap_pages() of kernels v5.3 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memunmap_pages(pgmap: *mut dev_pagemap) {
    record_outcome(unmap(pgmap));
}

/// The device memory that a page is of.
///
/// @param page  Any page, or any pointer.
/// @return What was given to memremap_pages(); NULL for pages of system memory or of
/// hmm_devmem_add(), and for what is no page of live device memory.
///
/// Context: any thread, callbacks included; does not block.
/// Source: page_pgmap() of kernels v6.15 to v7.3; page->pgmap before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn page_pgmap(page: *const page) -> *mut dev_pagemap {
    let found = owner_of(page).ok().and_then(|(devmem, _)| {
        let is_it =
            |one: &Registered| one.core.get().is_some_and(|core| Arc::ptr_eq(core, &devmem));
        PAGEMAPS.find(is_it)
    });
    found.map_or(ptr::null_mut(), |(_, one)| ptr::with_exposed_provenance_mut(one.pagemap))
}

/// Whether a page is device memory that the CPU cannot address, of memremap_pages() or
/// hmm_devmem_add(). The header offers the kernel's name is_device_private_page() for it.
///
/// @param page  Any page, or any pointer.
/// @return False also for pages of device memory that was removed.
///
/// Context: any thread, callbacks included; does not block.
/// Source: is_device_private_page() of kernels v4.14 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_page_is_device_private(page: *const page) -> bool {
    owner_of(page).is_ok_and(|(devmem, _)| !devmem.is_coherent())
}

/// Whether a page is device memory that the CPU can address. The header offers the kernel's name
/// is_device_coherent_page() for it.
///
/// @param page  Any page, or any pointer.
/// @return False also for pages of device memory that was removed.
///
/// Context: any thread, callbacks included; does not block.
/// Source: is_device_coherent_page() of kernels v6.0 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_page_is_device_coherent(page: *const page) -> bool {
    owner_of(page).is_ok_and(|(devmem, _)| devmem.is_coherent())
}

/// What a driver calls for a free page before it names it as a destination. The library does that
/// by itself when the migration commits, so this only looks whether it is a page that can be named.
///
/// @param page  A page of device memory.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page of live device memory.
///
/// Context: any thread, callbacks included; does not block.
/// Source: zone_device_page_init() of kernels v6.1 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn zone_device_page_init(page: *mut page) {
    record_outcome(owner_of(page).map(|_| ()));
}
