//! Ranges as hmm.txt, section 4, has them: look at the CPU page table, then validate under the driver's lock.

use crate::error::record;
use crate::handle::check_pointer;
use crate::hold;
use crate::mirror::hmm_list;
use crate::ret::IntoC;
use crate::tracking::{self, Want};
use crate::vma::vm_area_struct;
use hmm_core::{Access, AddrRange, Error, PfnEntry, PfnFlags, Result, VirtAddr};
use std::ffi::{c_int, c_ulong};
use std::ptr;

/// One entry of a range: HMM_PFN_* flags in the low 7 bits, the pfn above.
pub type hmm_pfn_t = c_ulong;

/// A range of addresses between a look at the CPU page table and hmm_vma_range_done(). The caller
/// provides the memory, usually on its stack, and need not set anything: the look fills it in. It
/// must not move while it is active.
#[derive(Debug)]
#[repr(C)]
pub struct hmm_range {
    /// The library's.
    pub list: hmm_list,
    /// First address.
    pub start: c_ulong,
    /// First address behind the range.
    pub end: c_ulong,
    /// One entry for each page, as given by the caller.
    pub pfns: *mut hmm_pfn_t,
    /// What hmm_vma_range_done() returned, once it was called; true while the range is active.
    pub valid: bool,
}

/// The arguments that both kinds of look share.
struct Arguments {
    vma: *mut vm_area_struct,
    range: *mut hmm_range,
    start: u64,
    end: u64,
    pfns: *mut hmm_pfn_t,
}

/// Writes entries out; plain stores of the caller's own thread, which may fault like its own.
fn write_out(pfns: *mut hmm_pfn_t, entries: &[PfnEntry]) {
    // SAFETY: the caller promises one entry for each page; PfnEntry is a transparent u64, as hmm_pfn_t is.
    unsafe { ptr::copy_nonoverlapping(entries.as_ptr().cast(), pfns, entries.len()) };
}

fn look(arguments: &Arguments, want: Want) -> Result<()> {
    let Arguments { range, start, end, pfns, .. } = *arguments;
    check_pointer(range, "range is NULL or misaligned")?;
    check_pointer(pfns, "pfns is NULL or misaligned")?;
    let (vma, addresses) = tracking::check(arguments.vma, start, end)?;
    if tracking::is_special(&vma) {
        let special = PfnEntry::bare(PfnFlags::SPECIAL).0;
        // SAFETY: the caller promises one entry for each page.
        (0..addresses.pages()).for_each(|index| unsafe { pfns.add(index).write(special) });
        let address = addresses.start();
        return Err(Error::Invalid { address, what: "memory of this kind is never mirrored" });
    }
    match tracking::look(&vma, addresses, [(addresses, want)]) {
        Ok(look) => {
            write_out(pfns, &look.entries);
            // SAFETY: checked above; the caller promises a struct hmm_range.
            let list = unsafe { &raw mut (*range).list };
            tracking::start(list, &vma.mm, addresses, look, pfns)?;
            fill_in(range, addresses, pfns);
            Ok(())
        }
        Err(failure) => {
            write_out(pfns, &failure.entries);
            Err(failure.error)
        }
    }
}

fn fill_in(range: *mut hmm_range, addresses: AddrRange, pfns: *mut hmm_pfn_t) {
    // SAFETY: the caller promises a struct hmm_range; checked for NULL and alignment by `look`.
    unsafe {
        (&raw mut (*range).start).write(addresses.start().get());
        (&raw mut (*range).end).write(addresses.end().get());
        (&raw mut (*range).pfns).write(pfns);
        (&raw mut (*range).valid).write(true);
    }
}

/// The error of a look whose fault could not be finished in time: with `block` false the lock is
/// dropped and the error becomes EAGAIN, as hmm.txt's age has it.
pub(crate) fn after_busy(error: Error, block: bool, vma: *const vm_area_struct) -> Error {
    if block || !matches!(error, Error::Busy { .. }) {
        return error;
    }
    match crate::vma::get(vma) {
        Ok(vma) if hold::drop_read_lock(&vma.mm) => Error::Os {
            call: "hmm_vma_fault (the lock was released, start over)",
            address: VirtAddr::new(vma.vma.range.start().get()),
            errno: libc::EAGAIN,
        },
        _ => error,
    }
}

/// Looks at the CPU page table of a range, without faulting anything in, and begins to track it.
///
/// Entries describe what is present: flags and pfn where a page is (HMM_PFN_VALID), HMM_PFN_EMPTY
/// where none is, HMM_PFN_DEVICE_UNADDRESSABLE with the pfn of a device page, HMM_PFN_ERROR where
/// memory is poisoned. The CPU page table is not changed.
///
/// On success the range is active: any change of the CPU page table inside it is noticed until
/// hmm_vma_range_done(), which must be called once. After an error the range is not active, and
/// hmm_vma_range_done() must not be called. The driver reads pfns under its update lock, where it
/// must not fault: pin them (hmm_pin_range) unless they are on memory that nobody migrates.
///
/// @param vma    The mapping that holds all of the range; so the address space is locked by the
///               caller.
/// @param range  Memory for the range; its contents before the call do not matter.
/// @param start  First address, page aligned.
/// @param end    First address behind the range, page aligned.
/// @param pfns   One entry for each page.
/// @return 0, whatever the entries say, or:
///  - -EINVAL: a pointer is NULL or misaligned, vma is no live handle, the bounds are not page
///    aligned, empty, reversed or outside the vma, no mirror is registered, or the mapping is of a
///    kind that is never mirrored (then all entries are HMM_PFN_SPECIAL);
///  - -EPERM: the mapping is not readable;
///  - -EFAULT: it is gone;
///  - -EBUSY: it changed all the time;
///  - -ENOMEM: no memory for the entries, or more than 4096 ranges are active;
///  - -ENODEV: closed.
///
/// Context: a thread that holds the lock of the address space; not inside
/// sync_cpu_device_pagetables; may block.
/// Source: hmm.txt section 4; promises 26, 31 to 38; kernels v4.14 to v4.16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_get_pfns(
    vma: *mut vm_area_struct,
    range: *mut hmm_range,
    start: c_ulong,
    end: c_ulong,
    pfns: *mut hmm_pfn_t,
) -> c_int {
    let arguments = Arguments { vma, range, start, end, pfns };
    look(&arguments, Want { fault: None, home: false }).into_c()
}

/// Like hmm_vma_get_pfns(), but faults in what is missing first, as if the CPU had touched it.
///
/// Missing pages are filled with zeros, read from their file, swapped in. With write, read-only
/// pages of writable mappings become writable (copy-on-write is broken). Pages on a device are
/// reported as they are, not brought home: look at HMM_PFN_DEVICE_UNADDRESSABLE.
///
/// The library never has to drop the lock to wait for a fault. Only when a range keeps changing for
/// longer than a second does it give up; then block decides: if true, the result is -EBUSY and the
/// lock is still held; if false, the lock is released (if the caller holds it once and for reading)
/// and the result is -EAGAIN: the driver takes the lock, finds the vma, and starts over.
///
/// @param vma    The mapping that holds all of the range; so the address space is locked by the
///               caller.
/// @param range  Memory for the range; its contents before the call do not matter.
/// @param start  First address, page aligned.
/// @param end    First address behind the range, page aligned.
/// @param pfns   One entry for each page.
/// @param write  Pages are wanted writable.
/// @param block  What -EBUSY means, see above.
/// @return 0 (look at each entry: not every page can be made valid), or one of hmm_vma_get_pfns()'s
/// errors, or:
///  - -EFAULT: a fault failed (the entries from there on are zero or HMM_PFN_ERROR);
///  - -EPERM: write, and the mapping is not writable;
///  - -EAGAIN: the lock was released.
///
/// Context: a thread that holds the lock of the address space; not inside a callback; may block;
/// may call fault.
/// Source: hmm.txt section 4; promises 27 to 31, 34 to 38, 44 to 46; kernels v4.14 to v4.16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_fault(
    vma: *mut vm_area_struct,
    range: *mut hmm_range,
    start: c_ulong,
    end: c_ulong,
    pfns: *mut hmm_pfn_t,
    write: bool,
    block: bool,
) -> c_int {
    let arguments = Arguments { vma, range, start, end, pfns };
    let access = if write { Access::Write } else { Access::Read };
    look(&arguments, Want { fault: Some(access), home: false })
        .map_err(|error| after_busy(error, block, vma))
        .into_c()
}

/// Ends the tracking of a range and tells whether what was found is still true.
///
/// Called once after each success of hmm_vma_get_pfns() or hmm_vma_fault(), under the driver's
/// update lock, the one that sync_cpu_device_pagetables takes. Then either the change already came
/// (the result is false), or its callback waits for the lock and removes afterwards what the driver
/// writes now.
///
/// When the result is false, the entries of what changed are zero. A driver may start over, or use
/// the entries that are left.
///
/// @param vma    Not looked at: the range knows its address space. (It may be stale by now, so it
///               may be NULL.)
/// @param range  The range.
/// @return True when nothing in the range was invalidated since the look began. False when
/// something was; also when the range is not active (nothing is changed then, and hmm_last_errno()
/// is -EINVAL).
///
/// Context: any thread, with the driver's update lock; does not block.
/// Source: hmm.txt section 4; promises 36 to 40; kernels v4.14 to v4.16.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_range_done(
    vma: *mut vm_area_struct,
    range: *mut hmm_range,
) -> bool {
    let _ = vma;
    let finished = check_pointer(range, "range is NULL or misaligned").and_then(|()| {
        // SAFETY: not NULL and aligned; the caller promises a struct hmm_range.
        let (list, valid) = unsafe { (&raw mut (*range).list, &raw mut (*range).valid) };
        // SAFETY: as above; it was active, so the library owns `valid`.
        tracking::finish(list).inspect(|still| unsafe { valid.write(*still) })
    });
    finished.inspect_err(record).unwrap_or(false)
}
