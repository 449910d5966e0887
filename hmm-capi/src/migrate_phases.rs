//! Migration in three calls, as today's kernels have it: by address (`migrate_vma_*`), and by device page
//! (`migrate_device_*`).

use crate::arrays::Pinned;
use crate::error::record_outcome;
use crate::handle::{check_pointer, invalid};
use crate::hold;
use crate::interval::owner_from;
use crate::migrate::check_range;
use crate::mm;
use crate::pages::{self, page};
use crate::phase::{self, Core};
use crate::ret::IntoC;
use crate::tracking;
use crate::vma::{self, CVma, vm_area_struct};
use hmm_core::{AddrRange, Devmem, MigrateRequest, Pfn, Result, Select};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;

/// A migration by address. The driver sets vma, src, dst, start, end, pgmap_owner, flags and
/// fault_page, and keeps it where it is until migrate_vma_finalize(). src and dst must not overlap.
#[derive(Debug)]
#[repr(C)]
pub struct migrate_vma {
    /// The mapping that holds all of the range.
    pub vma: *mut vm_area_struct,
    /// One entry for each page: where the driver puts it.
    pub dst: *mut c_ulong,
    /// One entry for each page: what is there; filled in.
    pub src: *mut c_ulong,
    /// How many pages were collected: entries of src with MIGRATE_PFN_MIGRATE; filled in.
    pub cpages: c_ulong,
    /// How many pages the range has; filled in.
    pub npages: c_ulong,
    /// First address; rounded down to its page.
    pub start: c_ulong,
    /// First address behind the range; rounded down to its page.
    pub end: c_ulong,
    /// Whose device pages are collected, and who invalidate callbacks are told to migrate: the owner
    /// of the driver's struct dev_pagemap, or NULL.
    pub pgmap_owner: *mut c_void,
    /// A set of MIGRATE_VMA_SELECT_SYSTEM, _DEVICE_PRIVATE and _DEVICE_COHERENT.
    pub flags: c_ulong,
    /// In a migrate_to_ram callback vmf->page, otherwise NULL.
    pub fault_page: *mut page,
    /// The library's; room for later versions.
    pub reserved: [c_ulong; 4],
}

/// In `migrate_vma.reserved`: nothing was collected and nothing is held, so that the other calls have nothing to do.
const NOTHING_HELD: c_ulong = 0x6e6f_7468_696e_6700;
/// `MIGRATE_VMA_SELECT_*`.
const SELECT: [(c_ulong, Select); 3] =
    [(1 << 0, Select::SYSTEM), (1 << 1, Select::DEVICE), (1 << 2, Select::COHERENT)];

fn select_of(flags: c_ulong) -> Result<Select> {
    let known = SELECT.iter().fold(0, |all, (flag, _)| all | flag);
    if flags & !known != 0 {
        return Err(invalid(flags, "unknown MIGRATE_VMA_SELECT_ flag"));
    }
    let set = SELECT.iter().filter(|(flag, _)| flags & flag != 0);
    Ok(set.fold(Select::empty(), |all, (_, select)| all | *select))
}

/// The page for which a CPU fault asked: as the driver says, else as the callback's vma knows.
fn fault_page_of(vma: &CVma, fault_page: *const page) -> Result<Option<Pfn>> {
    if fault_page.is_null() {
        return Ok(vma.fault_page);
    }
    let is_private = |page: &Pfn| Devmem::find(*page).is_some_and(|devmem| !devmem.is_coherent());
    let page = pages::to_pfn(fault_page).filter(is_private);
    let what = "fault_page is no page of device memory that the CPU cannot address";
    page.map(Some).ok_or_else(|| invalid(fault_page.addr() as u64, what))
}

fn request_of(args: &migrate_vma, vma: &CVma) -> Result<MigrateRequest> {
    check_pointer(args.src, "src is NULL or misaligned")?;
    check_pointer(args.dst, "dst is NULL or misaligned")?;
    let range = check_range(vma, args.start, args.end)?;
    if tracking::is_special(vma) {
        return Err(invalid(args.start, "memory of this kind never migrates"));
    }
    let mut select = select_of(args.flags)?;
    if vma.fault_page.is_some() {
        // What is home stays there: the mm may be closing, or the process forking.
        select.remove(Select::SYSTEM);
    }
    let fault_page = fault_page_of(vma, args.fault_page)?;
    Ok(MigrateRequest { range, select, owner: Some(owner_from(args.pgmap_owner)), fault_page })
}

fn setup(args: *mut migrate_vma) -> Result<()> {
    check_pointer(args, "args is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct migrate_vma. Raw pointers and integers may be anything.
    let given = unsafe { ptr::read(args) };
    let vma = vma::get(given.vma)?;
    let request = request_of(&given, &vma)?;
    let (src, pages) = (given.src, request.range.pages());
    let bytes = pages * size_of::<c_ulong>();
    let pieces =
        [(src.addr(), bytes), (given.dst.addr(), bytes), (args.addr(), size_of::<migrate_vma>())];
    let pinned = if vma.in_callback { Pinned::default() } else { Pinned::new(&vma.mm, &pieces)? };
    let collect = |src: &mut [_]| vma.mm.core.migrate_setup(&request, src).map(Core::ByAddress);
    let collected = phase::begin(Some(&vma.mm), src, pages, pinned, collect)?;
    if collected == 0 {
        // Drivers are free to stop here.
        phase::finalize(src)?;
    }
    let mark = if collected == 0 { NOTHING_HELD } else { 0 };
    fill_in(args, request.range, collected as c_ulong, mark);
    Ok(())
}

fn fill_in(args: *mut migrate_vma, range: AddrRange, collected: c_ulong, mark: c_ulong) {
    // SAFETY: `setup` found the pointer good, and the caller promises a struct migrate_vma.
    unsafe {
        (&raw mut (*args).cpages).write(collected);
        (&raw mut (*args).npages).write(range.pages() as c_ulong);
        (&raw mut (*args).start).write(range.start().get());
        (&raw mut (*args).end).write(range.end().get());
        (&raw mut (*args).reserved).write([mark, 0, 0, 0]);
    }
}

/// A struct that was set up, and whether the library holds pages for it.
fn read_migration(migrate: *const migrate_vma) -> Result<(migrate_vma, bool)> {
    check_pointer(migrate, "migrate is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct migrate_vma.
    let given = unsafe { ptr::read(migrate) };
    let holds = given.reserved[0] != NOTHING_HELD;
    Ok((given, holds))
}

fn pages(migrate: *const migrate_vma) -> Result<()> {
    let (given, holds) = read_migration(migrate)?;
    if !holds {
        return Ok(());
    }
    check_pointer(given.dst, "dst is NULL or misaligned")?;
    phase::pages(given.src, given.dst, given.npages as usize)
}

fn finalize(migrate: *mut migrate_vma) -> Result<()> {
    let (given, holds) = read_migration(migrate)?;
    if holds {
        return phase::finalize(given.src);
    }
    // SAFETY: as for reading it.
    unsafe { (&raw mut (*migrate).reserved).write([0; 4]) };
    Ok(())
}

fn device_range(src: *mut c_ulong, start: u64, npages: u64) -> Result<()> {
    check_pointer(src, "src_pfns is NULL or misaligned")?;
    let first = Pfn::new(start);
    let devmem = Devmem::find(first)
        .filter(|devmem| npages > 0 && npages <= devmem.pfn_last().get() - first.get());
    let devmem = devmem.ok_or_else(|| invalid(start, "these are not pages of device memory"))?;
    let (pages, mm) = (npages as usize, mm::any());
    let pieces = [(src.addr(), pages * size_of::<c_ulong>())];
    let pinned = match &mm {
        Some(mm) if !hold::in_callback() => Pinned::new(mm, &pieces)?,
        _ => Pinned::default(),
    };
    let collect = |src: &mut [_]| devmem.migrate_setup(first, src).map(Core::ByPage);
    phase::begin(mm.as_ref(), src, pages, pinned, collect).map(|_| ())
}

fn device_pages(src: *const c_ulong, dst: *const c_ulong, npages: u64) -> Result<()> {
    check_pointer(dst, "dst_pfns is NULL or misaligned")?;
    phase::pages(src, dst, npages as usize)
}

/// First of three calls: takes the pages of a range that can migrate from the CPU, after all
/// subscriptions to it were called with MMU_NOTIFY_MIGRATE and pgmap_owner.
///
/// Entries of src with MIGRATE_PFN_MIGRATE were collected: with MIGRATE_PFN_VALID the page is
/// migrate_pfn_to_page(), and MIGRATE_PFN_WRITE says that it was writable; without, nothing was
/// there, and the destination is to be cleared. For other entries hmm_migrate_reason() tells why the
/// page stays. Then the driver
///
///  - chooses a destination for each, copies, and stores migrate_pfn(page_to_pfn(page)) in dst, or 0
///    to leave the page where it is. A system page comes from hmm_migrate_alloc_page(). No copy is
///    needed to or from coherent device memory: contents stay where they are mapped, and only a hole
///    is cleared, by the library;
///  - calls migrate_vma_pages(), which moves them;
///  - updates its page table for entries of src that still have MIGRATE_PFN_MIGRATE;
///  - calls migrate_vma_finalize().
///
/// All of it on one thread, and soon: CPU accesses to the pages sleep until the end. Contents of
/// private memory are readable at hmm_page_to_virt() of their source page, not at their address. The
/// thread must not touch the range meanwhile, nor call what may wait for it. src, dst and args itself
/// are kept from migrating until the end. When nothing was collected (cpages is 0), nothing is held,
/// and the other calls may be left out.
///
/// In a migrate_to_ram callback only pages on devices are collected, whatever flags says.
///
/// @param args  The migration; cpages, npages, start and end are filled in, and src.
/// @return 0, also when nothing was collected, or:
///  - -EINVAL: args, src or dst is NULL or misaligned, vma is no live handle, the range is empty, or
///    larger than 1 GiB, or leaves the vma, the mapping is of a kind that never migrates, flags is
///    unknown, or fault_page is not a device page that the CPU cannot address;
///  - -EBUSY: src belongs to a migration that is not finalized, or too many migrations for 10
///    seconds;
///  - -ENOMEM;
///  - -EFAULT: the mapping is gone;
///  - -EDEADLK: inside a callback that must not migrate;
///  - -ENODEV: closed.
///
/// On errors nothing is written.
///
/// Context: a thread that holds the lock of the address space (either way), or a migrate_to_ram
/// callback; without locks that invalidate callbacks take; may block.
/// Source: migrate_vma_setup() of kernels v5.4 to v7.3; flags and owners as since v5.9.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_vma_setup(args: *mut migrate_vma) -> c_int {
    setup(args).into_c()
}

/// Second of three calls: moves pages to where dst says.
///
/// Afterwards entries of src that still have MIGRATE_PFN_MIGRATE moved, and only those; for others
/// hmm_migrate_reason() tells why not. Destination pages of device memory that were not used go
/// back through page_free.
///
/// @param migrate  What was set up; dst is filled in by the driver.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL migrate or dst is NULL or
/// misaligned, it is not set up, or its pages were moved already; -ENOMEM. After an error nothing
/// has moved.
///
/// Context: the thread that set it up, callbacks of device memory included; calls page_free.
/// Source: migrate_vma_pages() of kernels v5.4 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_vma_pages(migrate: *mut migrate_vma) {
    record_outcome(pages(migrate));
}

/// Last of three calls: what moved is visible to the CPU, what did not is put back as it was, and
/// accesses that waited go on. Without migrate_vma_pages() before it, every page is put back.
///
/// hmm_mm_put() does that for migrations that nobody finalized.
///
/// @param migrate  What was set up.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL migrate is NULL or misaligned, or
/// it is not set up, or finalized already.
///
/// Context: the thread that set it up, callbacks of device memory included; calls page_free.
/// Source: migrate_vma_finalize() of kernels v5.4 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_vma_finalize(migrate: *mut migrate_vma) {
    record_outcome(finalize(migrate));
}

/// First of three calls to empty a part of a device without knowing addresses: takes what the pages
/// hold, wherever they are mapped. Subscriptions are called with MMU_NOTIFY_CLEAR.
///
/// `src_pfns[i]` belongs to page start + i, as entries of migrate_vma_setup() do. It is 0 where the
/// page is free, held by somebody else, or beyond what one call can hold: call again for those. As
/// there, system pages come from hmm_migrate_alloc_page(`&src_pfns[i]`).
///
/// @param src_pfns  One entry for each page; filled in.
/// @param start     Pfn of the first page.
/// @param npages    How many pages.
/// @return 0, also when nothing was collected, or:
///  - -EINVAL: src_pfns is NULL or misaligned, or these are not pages of one live device memory;
///  - -EBUSY: src_pfns belongs to a migration that is not finalized;
///  - -ENOMEM;
///  - -EDEADLK: inside a callback.
///
/// Context: any thread, but not inside a callback; without locks that invalidate callbacks take; may
/// block.
/// Source: migrate_device_range() of kernels v6.1 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_device_range(
    src_pfns: *mut c_ulong,
    start: c_ulong,
    npages: c_ulong,
) -> c_int {
    device_range(src_pfns, start, npages).into_c()
}

/// Second of three calls, as migrate_vma_pages().
///
/// @param src_pfns  What migrate_device_range() filled in.
/// @param dst_pfns  Where the driver puts each page; 0 leaves it where it is. Must not lie in memory
///                  that is on the device.
/// @param npages    As for migrate_device_range().
///
/// Returns nothing, as in the kernel. hmm_last_errno(): as migrate_vma_pages(), and -EINVAL for
/// another npages.
///
/// Context: the thread that called migrate_device_range(); calls page_free.
/// Source: migrate_device_pages() of kernels v6.1 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_device_pages(
    src_pfns: *mut c_ulong,
    dst_pfns: *mut c_ulong,
    npages: c_ulong,
) {
    record_outcome(device_pages(src_pfns, dst_pfns, npages));
}

/// Last of three calls, as migrate_vma_finalize().
///
/// @param src_pfns  What migrate_device_range() filled in.
/// @param dst_pfns  Not looked at any more.
/// @param npages    Not looked at any more.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): as migrate_vma_finalize().
///
/// Context: the thread that called migrate_device_range(); calls page_free.
/// Source: migrate_device_finalize() of kernels v6.1 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn migrate_device_finalize(
    src_pfns: *mut c_ulong,
    dst_pfns: *mut c_ulong,
    npages: c_ulong,
) {
    let _ = (dst_pfns, npages);
    record_outcome(phase::finalize(src_pfns));
}

/// The system page that is reserved for a page which comes home, where a kernel driver says
/// alloc_page(): reserved by setup, so that this cannot run out of memory half-way.
///
/// The driver writes the contents to hmm_page_to_virt(page), except when the source is a coherent
/// page: its contents are there already. A page that is not stored in dst goes back by itself.
///
/// @param entry  The page's entry, inside the array src of a migration: `&src[i]`.
/// @return The page, to be stored in `dst[i]` as migrate_pfn(page_to_pfn(page)). NULL with
/// hmm_last_errno() -EINVAL: entry is not inside the src of a migration between its first and second
/// call, or its page is not on a device.
///
/// Context: between the first and the second call, callbacks of device memory included; does not
/// block for long.
/// Source: ours; alloc_page() in the drivers of kernels v5.4 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_migrate_alloc_page(entry: *const c_ulong) -> *mut page {
    let found = phase::system_page(entry);
    record_outcome(found.as_ref().map(|_| ()).map_err(Clone::clone));
    found.map_or(ptr::null_mut(), pages::from_pfn)
}
