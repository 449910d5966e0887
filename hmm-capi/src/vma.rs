//! `struct vm_area_struct`: a look at one mapping, alive while the caller holds the address space's lock.

use crate::handle::{Opaque, Table};
use crate::hold;
use crate::mm::{self, MmHandle, mm_struct};
use crate::ret::IntoC;
use hmm_core::{Pfn, Protection, Result, VirtAddr, Vma, VmaKind};
use std::ffi::{c_int, c_ulong};
use std::ptr;
use std::sync::Arc;

/// One mapping of the process: opaque, read through hmm_vma_start() and its like.
///
/// A handle comes from find_vma() and lives until the thread that asked for it releases the lock of
/// the address space; a handle that a callback received lives until the callback returns. It is a
/// look at one moment: the process may change its mappings at any time, and every function that
/// takes a vma looks again.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct vm_area_struct {
    _opaque: [u8; 0],
}

/// What a vma handle stands for.
pub(crate) struct CVma {
    pub(crate) mm: Arc<MmHandle>,
    pub(crate) vma: Vma,
    /// The handle made before this one under the same hold (0: none).
    pub(crate) older: usize,
    /// Made for a callback, which runs on memory that does not migrate.
    pub(crate) in_callback: bool,
    /// The device page of the CPU fault that is being answered.
    pub(crate) fault_page: Option<Pfn>,
}

pub(crate) static VMAS: Table<Opaque, CVma, 4096> =
    Table::new("not a live vm_area_struct of this library", "vm_area_struct handles (4096)");

/// What stands behind a vma handle.
pub(crate) fn get(vma: *const vm_area_struct) -> Result<Arc<CVma>> {
    VMAS.get(vma.cast())
}

/// A handle that lives for one callback, or for the callbacks of one migration.
pub(crate) struct CallbackVma {
    handle: *mut vm_area_struct,
    _hold: hold::InCallback,
}

impl CallbackVma {
    /// Publishes a vma to the callbacks that run on this thread until the value is dropped.
    pub(crate) fn new(mm: Arc<MmHandle>, vma: Vma, fault_page: Option<Pfn>) -> Result<Self> {
        let in_callback = hold::InCallback::enter(Arc::clone(&mm))?;
        let object = CVma { mm, vma, older: 0, in_callback: true, fault_page };
        let handle = VMAS.insert(Arc::new(object))?;
        Ok(Self { handle: handle.cast(), _hold: in_callback })
    }

    /// What the callback gets.
    pub(crate) fn handle(&self) -> *mut vm_area_struct {
        self.handle
    }
}

impl Drop for CallbackVma {
    fn drop(&mut self) {
        VMAS.remove(self.handle.cast());
    }
}

/// Mapping is readable.
const VM_READ: u64 = 1;
/// Mapping is writable.
const VM_WRITE: u64 = 2;
/// Mapping is executable.
const VM_EXEC: u64 = 4;
/// Mapping is shared with other processes or with a file.
const VM_SHARED: u64 = 8;
/// Mapping is driver memory or the like: never mirrored.
const VM_PFNMAP: u64 = 0x400;
/// Mapping is hugetlbfs: never mirrored.
const VM_HUGETLB: u64 = 0x0040_0000;

/// `VM_*` flags of a vma.
fn flags_of(vma: &Vma) -> u64 {
    let protection =
        [(Protection::READ, VM_READ), (Protection::WRITE, VM_WRITE), (Protection::EXEC, VM_EXEC)];
    let set = protection.iter().filter(|(flag, _)| vma.protection.contains(*flag));
    let kind = match vma.kind {
        VmaKind::Shared | VmaKind::SharedFile => VM_SHARED,
        VmaKind::Huge => VM_HUGETLB,
        VmaKind::Special => VM_PFNMAP,
        VmaKind::Anonymous | VmaKind::PrivateFile => 0,
    };
    set.map(|(_, value)| value).sum::<u64>() | kind
}

fn find(mm: *mut mm_struct, addr: u64) -> Result<*mut vm_area_struct> {
    let mm = mm::get(mm)?;
    let newest = hold::newest_vma(&mm)?;
    let Some(vma) = mm.core.find_vma(VirtAddr::new(addr))? else { return Ok(ptr::null_mut()) };
    let known = VMAS.get(ptr::without_provenance(newest));
    if known.is_ok_and(|known| known.vma == vma) {
        return Ok(ptr::with_exposed_provenance_mut(newest));
    }
    let object =
        CVma { mm: Arc::clone(&mm), vma, older: newest, in_callback: false, fault_page: None };
    let handle = VMAS.insert(Arc::new(object))?;
    hold::set_newest_vma(&mm, handle.expose_provenance());
    Ok(handle.cast())
}

/// Finds the first mapping that ends above an address.
///
/// As in the kernel the mapping may begin above the address: compare with hmm_vma_start(). The
/// header offers the kernel's name find_vma() for it.
///
/// @param mm    The address space; the caller holds its lock (either way), or is inside a callback.
/// @param addr  Any address.
/// @return A handle that lives until the lock is released (or the callback returns). NULL when
/// there is no such mapping, and also on errors, which hmm_last_errno() tells apart: 0 no mapping,
/// -EINVAL mm is no live handle or the lock is not held, -ENODEV the address space is closed,
/// -ENOMEM more than 4096 handles are alive.
///
/// Context: any thread that holds the lock, callbacks included; does not block.
/// Source: the kernel's find_vma().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_find_vma(mm: *mut mm_struct, addr: c_ulong) -> *mut vm_area_struct {
    let found = find(mm, addr);
    crate::error::record_outcome(found.as_ref().map(|_| ()).map_err(Clone::clone));
    found.unwrap_or(ptr::null_mut())
}

/// First address of a vma.
///
/// @param vma  A live handle.
/// @return The address, or 0 when vma is not a live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: the kernel's vm_area_struct.vm_start.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_start(vma: *const vm_area_struct) -> c_ulong {
    get(vma).map_or(0, |vma| vma.vma.range.start().get())
}

/// First address behind a vma.
///
/// @param vma  A live handle.
/// @return The address, or 0 when vma is not a live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: the kernel's vm_area_struct.vm_end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_end(vma: *const vm_area_struct) -> c_ulong {
    get(vma).map_or(0, |vma| vma.vma.range.end().get())
}

/// Protection and kind of a vma.
///
/// @param vma  A live handle.
/// @return A set of VM_READ, VM_WRITE, VM_EXEC, VM_SHARED, VM_HUGETLB and VM_PFNMAP; 0 also when
/// vma is not a live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: the kernel's vm_area_struct.vm_flags.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_flags(vma: *const vm_area_struct) -> c_ulong {
    get(vma).map_or(0, |vma| flags_of(&vma.vma))
}

/// The address space of a vma.
///
/// @param vma  A live handle.
/// @return The mm, without a new reference: it is valid as long as the vma is. NULL when vma is not
/// a live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: the kernel's vm_area_struct.vm_mm.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_mm(vma: *const vm_area_struct) -> *mut mm_struct {
    get(vma).map_or(ptr::null_mut(), |vma| mm::pointer_to(&vma.mm))
}

/// Takes the lock of an address space shared (the kernel's mmap_lock, once mmap_sem).
///
/// The lock orders drivers among themselves, and a vma handle lives as long as it is held. It does
/// not stop the process from changing its mappings (no user-space lock could): ranges are validated
/// by hmm_vma_range_done() for that. Nests on one thread. Inside fault, alloc_and_copy and
/// finalize_and_map callbacks the thread counts as holding it.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle;
///  - -EDEADLK: this thread holds it for writing;
///  - -EBUSY: it was not free for 10 seconds;
///  - -ENOMEM: more than 1024 threads hold locks.
///
/// Context: any thread; blocks while another thread holds it for writing.
/// Source: the kernel's mmap_read_lock().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_read_lock(mm: *mut mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| hold::read_lock(&mm)).into_c()
}

/// Releases what hmm_mm_read_lock() took; the vma handles that this thread got meanwhile end.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, or this thread does not hold the lock for reading.
///
/// Context: the thread that took it; does not block.
/// Source: the kernel's mmap_read_unlock().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_read_unlock(mm: *mut mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| hold::read_unlock(&mm)).into_c()
}

/// Takes the lock of an address space alone; does not nest.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle;
///  - -EDEADLK: this thread holds it already, or is inside a callback;
///  - -EBUSY: it was not free for 10 seconds;
///  - -ENOMEM: more than 1024 threads hold locks.
///
/// Context: any thread, but not inside a callback; blocks while others hold it.
/// Source: the kernel's mmap_write_lock().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_write_lock(mm: *mut mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| hold::write_lock(&mm)).into_c()
}

/// Releases what hmm_mm_write_lock() took; the vma handles that this thread got meanwhile end.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, or this thread does not hold the lock for writing.
///
/// Context: the thread that took it; does not block.
/// Source: the kernel's mmap_write_unlock().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_write_unlock(mm: *mut mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| hold::write_unlock(&mm)).into_c()
}
