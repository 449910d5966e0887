//! `migrate_vma` with its two callbacks, as hmm.txt, section 6, tells it.

use crate::arrays::{Pinned, entries, read_in, write_out};
use crate::error::record_outcome;
use crate::handle::{check_pointer, invalid};
use crate::pages::{self, page};
use crate::ret::IntoC;
use crate::vma::{self, CVma, CallbackVma, vm_area_struct};
use hmm_core::{
    AddrRange, Error, MigrateBatch, MigrateOps, MigrateRequest, PAGE_SIZE, Result, Select, VirtAddr,
};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;

/// A driver's side of a migration. Copied by migrate_vma().
///
/// Both are called on the thread that called migrate_vma(), with no lock of the library held. A
/// large range may be cut into several batches: then both are called once for each, with that
/// batch's start and end, and with src and dst pointing at that batch's first entries of the
/// caller's arrays.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct migrate_vma_ops {
    /// Mandatory. For each entry of src with MIGRATE_PFN_MIGRATE: choose a destination page, copy
    /// (or clear it, when src has no MIGRATE_PFN_VALID: nothing was there), and store
    /// migrate_pfn(pfn) | MIGRATE_PFN_LOCKED in dst, with MIGRATE_PFN_DEVICE for a device page.
    /// Leave dst 0 to let a page stay where it is. The pages are taken from the CPU: nobody can
    /// change them meanwhile (promise 61). src must not be changed.
    ///
    /// A source with MIGRATE_PFN_DEVICE is on a device, which need not be the driver's own: compare
    /// its pfn. Others are readable by the CPU at pfn_to_virt(). A destination in system memory
    /// comes from hmm_vma_alloc_locked_page(vma).
    pub alloc_and_copy: Option<
        unsafe extern "C" fn(
            vma: *mut vm_area_struct,
            src: *const c_ulong,
            dst: *mut c_ulong,
            start: c_ulong,
            end: c_ulong,
            private_data: *mut c_void,
        ),
    >,
    /// Mandatory. The outcome: entries of src that still have MIGRATE_PFN_MIGRATE moved, and only
    /// those (promise 62). The pages are still locked, so device page tables may be updated here
    /// (promise 63). src and dst must not be changed.
    pub finalize_and_map: Option<
        unsafe extern "C" fn(
            vma: *mut vm_area_struct,
            src: *const c_ulong,
            dst: *const c_ulong,
            start: c_ulong,
            end: c_ulong,
            private_data: *mut c_void,
        ),
    >,
}

/// The caller's arrays; entry 0 belongs to `start`.
struct Arrays {
    src: *mut c_ulong,
    dst: *mut c_ulong,
    start: VirtAddr,
}

/// Carries one migration's callbacks from the core to the driver.
struct Calls {
    ops: migrate_vma_ops,
    arrays: Arrays,
    vma: CallbackVma,
    private_data: *mut c_void,
}

impl Arrays {
    /// Where a batch's entries begin.
    fn at(&self, range: AddrRange) -> (*mut c_ulong, *mut c_ulong) {
        let first = ((range.start().get() - self.start.get()) as usize) / PAGE_SIZE;
        // SAFETY: a batch lies inside the range for which the caller promises that many entries.
        unsafe { (self.src.add(first), self.dst.add(first)) }
    }
}

impl MigrateOps for Calls {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let Some(call) = self.ops.alloc_and_copy else { return };
        let range = batch.range;
        let (src, dst) = self.arrays.at(range);
        write_out(batch.src, src);
        write_out(batch.dst, dst);
        let (start, end) = (range.start().get(), range.end().get());
        let (vma, private_data) = (self.vma.handle(), self.private_data);
        // SAFETY: by the driver's promise the function is callable; the arrays have an entry for each page.
        unsafe { call(vma, src, dst, start, end, private_data) };
        read_in(batch.dst, dst);
    }

    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        let Some(call) = self.ops.finalize_and_map else { return };
        let range = batch.range;
        let (src, dst) = self.arrays.at(range);
        write_out(batch.src, src);
        write_out(batch.dst, dst);
        let (start, end) = (range.start().get(), range.end().get());
        // SAFETY: by the driver's promise the function is callable; the arrays have an entry for each page.
        unsafe { call(self.vma.handle(), src, dst, start, end, self.private_data) };
    }
}

fn copy_ops(ops: *const migrate_vma_ops) -> Result<migrate_vma_ops> {
    check_pointer(ops, "ops is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct migrate_vma_ops.
    let copy = unsafe { ptr::read(ops) };
    if copy.alloc_and_copy.is_none() || copy.finalize_and_map.is_none() {
        let what = "ops->alloc_and_copy and ops->finalize_and_map are both needed";
        return Err(invalid(ops.addr() as u64, what));
    }
    Ok(copy)
}

/// The range of a call: bounds are rounded down to pages, as the kernel does.
pub(crate) fn check_range(vma: &CVma, start: u64, end: u64) -> Result<AddrRange> {
    let page = |address: u64| VirtAddr::new(address).page().get();
    let range = AddrRange::new(page(start), page(end))?;
    if !vma.vma.range.covers(range) {
        return Err(invalid(start, "the range leaves the vma"));
    }
    Ok(range)
}

fn migrate(
    ops: migrate_vma_ops,
    vma: &Arc<CVma>,
    range: AddrRange,
    arrays: Arrays,
    private_data: *mut c_void,
) -> Result<()> {
    let (mut src, mut dst) = (entries(range.pages())?, entries(range.pages())?);
    let bytes = size_of_val(&*src);
    let pieces = [(arrays.src.addr(), bytes), (arrays.dst.addr(), bytes)];
    let _pinned = if vma.in_callback { Pinned::default() } else { Pinned::new(&vma.mm, &pieces)? };
    let callback_vma = CallbackVma::new(Arc::clone(&vma.mm), vma.vma, vma.fault_page)?;
    let mut calls = Calls { ops, arrays, vma: callback_vma, private_data };
    let mut run = |select| {
        let request = MigrateRequest { range, select, owner: None, fault_page: vma.fault_page };
        vma.mm.core.migrate(&request, &mut calls, &mut src, &mut dst)
    };
    if vma.fault_page.is_some() {
        // A CPU fault brings pages home. What is home stays there: the mm may be closing, or the process forking.
        run(Select::DEVICE)?;
    } else {
        match run(Select::SYSTEM | Select::DEVICE) {
            // While the mm closes nothing may leave, but pages may still come home.
            Err(Error::Gone { .. }) => run(Select::DEVICE)?,
            other => other?,
        }
    }
    write_out(&src, calls.arrays.src);
    write_out(&dst, calls.arrays.dst);
    Ok(())
}

/// Both forms; `mentries` is how many entries the arrays have, if the caller says so.
#[expect(clippy::too_many_arguments, reason = "the argument list is hmm.txt's")]
fn migrate_checked(
    ops: *const migrate_vma_ops,
    vma: *mut vm_area_struct,
    mentries: Option<u64>,
    start: u64,
    end: u64,
    src: *mut c_ulong,
    dst: *mut c_ulong,
    private_data: *mut c_void,
) -> Result<()> {
    let ops = copy_ops(ops)?;
    let vma = vma::get(vma)?;
    check_pointer(src, "src is NULL or misaligned")?;
    check_pointer(dst, "dst is NULL or misaligned")?;
    let range = check_range(&vma, start, end)?;
    if mentries.is_some_and(|entries| entries < range.pages() as u64) {
        return Err(invalid(start, "mentries is below the number of pages"));
    }
    if crate::tracking::is_special(&vma) {
        return Err(invalid(start, "memory of this kind never migrates"));
    }
    let arrays = Arrays { src, dst, start: range.start() };
    migrate(ops, &vma, range, arrays, private_data)
}

/// Moves the pages of a range to where the driver's callbacks decide: to device memory, back, or
/// from device to device.
///
/// The range is invalidated in all mirrors, the driver's own included; then pages that can be had
/// are taken from the CPU, and alloc_and_copy chooses and fills their destinations. Pages that
/// cannot be taken (pinned, shared, locked, in use by another migration) are left out and stay
/// as they are; so do pages for which the driver stores no destination. Then the new places become
/// visible, and finalize_and_map is told which pages moved. CPU accesses to pages under migration
/// sleep until it is over.
///
/// With the vma that a fault callback received, only pages on devices are collected: what is home
/// stays there. The same holds for every migration while the address space is being closed.
///
/// Afterwards src and dst of the whole range hold the final entries. They must not overlap. What did
/// not migrate says why: hmm_migrate_reason() of its entry of src, in words by hmm_stay_text().
/// Destination pages of device memory that were not used in the end are given back through free.
///
/// @param ops           The driver's callbacks; copied.
/// @param vma           The mapping that holds all of the range; the address space is locked, or it
///                      is a callback's vma.
/// @param mentries      Entries of src and of dst; at least one for each page.
/// @param start         First address; rounded down to its page.
/// @param end           First address behind the range; rounded down to its page.
/// @param src           One entry for each page, filled in: what is there now.
/// @param dst           One entry for each page, cleared before alloc_and_copy: where it goes.
/// @param private_data  For the callbacks.
/// @return 0, also when nothing moved, or:
///  - -EINVAL: ops, a callback, src or dst is NULL or misaligned, vma is no live handle, start >=
///    end, the range leaves the vma, mentries is too small, or the mapping is of a kind that never
///    migrates (driver memory, hugetlbfs);
///  - -EBUSY: too many migrations for 10 seconds;
///  - -ENOMEM;
///  - -EFAULT: the mapping is gone;
///  - -EDEADLK: inside a callback that must not migrate;
///  - -ENODEV: closed.
///
/// On errors src and dst are not written.
///
/// Context: a thread that holds the lock of the address space (either way), or a fault callback;
/// may block.
/// Source: hmm.txt section 6; promises 57 to 74. Without mentries: HMM_API_4_17.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_vma(
    ops: *const migrate_vma_ops,
    vma: *mut vm_area_struct,
    mentries: c_ulong,
    start: c_ulong,
    end: c_ulong,
    src: *mut c_ulong,
    dst: *mut c_ulong,
    private_data: *mut c_void,
) -> c_int {
    migrate_checked(ops, vma, Some(mentries), start, end, src, dst, private_data).into_c()
}

/// migrate_vma() as the kernels merged it, without mentries; see HMM_API_4_17.
///
/// @param ops           As for migrate_vma().
/// @param vma           As for migrate_vma().
/// @param start         As for migrate_vma().
/// @param end           As for migrate_vma().
/// @param src           As for migrate_vma().
/// @param dst           As for migrate_vma().
/// @param private_data  As for migrate_vma().
/// @return As migrate_vma().
///
/// Context: as migrate_vma().
/// Source: migrate_vma() of kernels v4.14 to v5.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_vma_4_17(
    ops: *const migrate_vma_ops,
    vma: *mut vm_area_struct,
    start: c_ulong,
    end: c_ulong,
    src: *mut c_ulong,
    dst: *mut c_ulong,
    private_data: *mut c_void,
) -> c_int {
    migrate_checked(ops, vma, None, start, end, src, dst, private_data).into_c()
}

fn alloc_locked_page(vma: *mut vm_area_struct, addr: u64) -> Result<*mut page> {
    let found = vma::get(vma)?.mm.core.alloc_system_page(VirtAddr::new(addr).page());
    let what = "only inside alloc_and_copy, for a page of its batch that is on a device";
    found.map(pages::from_pfn).ok_or_else(|| invalid(addr, what))
}

/// Gets a page of system memory for a page that comes home, locked and writable at
/// hmm_page_to_virt().
///
/// Each page that comes home has its system page reserved before alloc_and_copy is called, so this
/// cannot run out of memory half-way.
///
/// @param vma   The vma that alloc_and_copy received.
/// @param addr  The address whose page it will be: one of the batch, with MIGRATE_PFN_DEVICE in its
///              src.
/// @return The page, to be stored in dst as migrate_pfn(page_to_pfn(page)) | MIGRATE_PFN_LOCKED; a
/// page that is not stored goes back by itself. NULL with hmm_last_errno() -EINVAL: not inside
/// alloc_and_copy, not on its thread, no live vma, or not the address of a page that this batch
/// brings home.
///
/// Context: inside alloc_and_copy, on the thread that it was called on; does not block for long.
/// Source: hmm_vma_alloc_locked_page() of kernels v4.14 to v5.2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_alloc_locked_page(
    vma: *mut vm_area_struct,
    addr: c_ulong,
) -> *mut page {
    let page = alloc_locked_page(vma, addr);
    record_outcome(page.as_ref().map(|_| ()).map_err(Clone::clone));
    page.unwrap_or(ptr::null_mut())
}
