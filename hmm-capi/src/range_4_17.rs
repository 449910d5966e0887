//! Ranges as kernel v4.17 has them: the range carries all arguments, and the driver chooses how entries are encoded.

use crate::error::record;
use crate::handle::{check_pointer, invalid};
use crate::mirror::hmm_list;
use crate::range::after_busy;
use crate::ret::IntoC;
use crate::tracking::{self, Failure, Want};
use crate::vma::vm_area_struct;
use hmm_core::{Access, AddrRange, Error, PAGE_SHIFT, PfnEntry, PfnFlags, Result};
use std::ffi::{c_int, c_ulong};

/// A range in the form of kernel v4.17, which the header calls `struct hmm_range` when HMM_API_4_17
/// is defined.
///
/// The driver sets every member but list and valid before hmm_vma_get_pfns() or hmm_vma_fault().
#[derive(Debug)]
#[repr(C)]
pub struct hmm_range_4_17 {
    /// The mapping that holds all of the range.
    pub vma: *mut vm_area_struct,
    /// The library's.
    pub list: hmm_list,
    /// First address, page aligned.
    pub start: c_ulong,
    /// First address behind the range, page aligned.
    pub end: c_ulong,
    /// One entry for each page. For hmm_vma_fault() each says, in the driver's own flags, what is
    /// wanted of its page.
    pub pfns: *mut u64,
    /// The driver's bits for HMM_PFN_VALID, HMM_PFN_WRITE and HMM_PFN_DEVICE_PRIVATE, in this
    /// order.
    pub flags: *const u64,
    /// The driver's whole entries for HMM_PFN_ERROR, HMM_PFN_NONE and HMM_PFN_SPECIAL, in this
    /// order. Choose 0 for NONE: entries that are invalidated become 0.
    pub values: *const u64,
    /// How far a pfn is shifted in an entry; at most 12.
    pub pfn_shift: u8,
    /// What hmm_vma_range_done() returned, once it was called; true while the range is active.
    pub valid: bool,
}

/// The driver's encoding, copied.
struct Encoding {
    valid: u64,
    write: u64,
    device: u64,
    error: u64,
    none: u64,
    special: u64,
    shift: u8,
}

/// The members that the library reads, copied.
struct Request {
    vma: *mut vm_area_struct,
    list: *mut hmm_list,
    still_valid: *mut bool,
    start: u64,
    end: u64,
    pfns: *mut u64,
    encoding: Encoding,
}

impl Encoding {
    fn encode(&self, entry: PfnEntry) -> u64 {
        let flags = entry.flags();
        if flags.contains(PfnFlags::ERROR) {
            return self.error;
        }
        if flags.contains(PfnFlags::SPECIAL) {
            return self.special;
        }
        let Some(pfn) = entry.pfn() else { return self.none };
        let mut encoded = (pfn.get() << self.shift) | self.valid;
        if flags.contains(PfnFlags::WRITE) {
            encoded |= self.write;
        }
        if flags.contains(PfnFlags::DEVICE) {
            encoded |= self.device;
        }
        encoded
    }

    /// What the driver asks for in an entry.
    fn want(&self, entry: u64) -> Want {
        let asks = |flag: u64| flag != 0 && entry & flag == flag;
        if !asks(self.valid) {
            return Want { fault: None, home: false };
        }
        let access = if asks(self.write) { Access::Write } else { Access::Read };
        Want { fault: Some(access), home: asks(self.device) }
    }
}

fn read_request(range: *mut hmm_range_4_17) -> Result<Request> {
    check_pointer(range, "range is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a range whose arguments are set. `valid` and `list` may hold
    // anything, so they are not read.
    let (flags, values, shift, pfns) = unsafe {
        (
            (&raw const (*range).flags).read(),
            (&raw const (*range).values).read(),
            (&raw const (*range).pfn_shift).read(),
            (&raw const (*range).pfns).read(),
        )
    };
    check_pointer(pfns, "range->pfns is NULL or misaligned")?;
    check_pointer(flags, "range->flags is NULL or misaligned")?;
    check_pointer(values, "range->values is NULL or misaligned")?;
    if u32::from(shift) > PAGE_SHIFT {
        return Err(invalid(range.addr() as u64, "range->pfn_shift is above 12"));
    }
    // SAFETY: not NULL and aligned; the caller promises three words each.
    let words = unsafe { (flags.cast::<[u64; 3]>().read(), values.cast::<[u64; 3]>().read()) };
    let ([valid, write, device], [error, none, special]) = words;
    // SAFETY: as for the first members.
    unsafe {
        Ok(Request {
            vma: (&raw const (*range).vma).read(),
            list: &raw mut (*range).list,
            still_valid: &raw mut (*range).valid,
            start: (&raw const (*range).start).read(),
            end: (&raw const (*range).end).read(),
            pfns,
            encoding: Encoding { valid, write, device, error, none, special, shift },
        })
    }
}

impl Request {
    fn write_entry(&self, index: usize, value: u64) {
        // SAFETY: the index is that of a page of the checked range, and the driver promises an entry for each.
        unsafe { self.pfns.add(index).write(value) };
    }

    fn write_out(&self, entries: &[PfnEntry]) {
        for (index, entry) in entries.iter().enumerate() {
            self.write_entry(index, self.encoding.encode(*entry));
        }
    }

    /// Runs of pages of which the driver wants the same.
    fn parts(&self, range: AddrRange, faults: bool) -> Vec<(AddrRange, Want)> {
        let want = |index: usize| {
            // SAFETY: the index is that of a page of the checked range, and the driver promises an entry for each.
            let entry = unsafe { self.pfns.add(index).read() };
            if faults { self.encoding.want(entry) } else { Want { fault: None, home: false } }
        };
        let mut parts = Vec::new();
        let (mut first, mut current) = (0, want(0));
        for index in 1..range.pages() {
            let next = want(index);
            if next != current {
                parts.push((range.sub(first, index - first), current));
                (first, current) = (index, next);
            }
        }
        parts.push((range.sub(first, range.pages() - first), current));
        parts
    }

    fn look(&self, faults: bool) -> Result<()> {
        let (vma, range) = tracking::check(self.vma, self.start, self.end)?;
        if tracking::is_special(&vma) {
            (0..range.pages()).for_each(|index| self.write_entry(index, self.encoding.special));
            let address = range.start();
            return Err(Error::Invalid { address, what: "memory of this kind is never mirrored" });
        }
        match tracking::look(&vma, range, self.parts(range, faults)) {
            Ok(look) => {
                self.write_out(&look.entries);
                tracking::start(self.list, &vma.mm, range, look, self.pfns)?;
                // SAFETY: the member of the range that the caller promises.
                unsafe { self.still_valid.write(true) };
                Ok(())
            }
            Err(Failure { error, entries }) => {
                self.write_out(&entries);
                Err(error)
            }
        }
    }
}

/// hmm_vma_get_pfns() in the form of kernel v4.17; see HMM_API_4_17.
///
/// @param range  All arguments.
/// @return As hmm_vma_get_pfns(), or:
///  - -EINVAL: also when flags or values is NULL or pfn_shift is above 12.
///
/// Context: as hmm_vma_get_pfns().
/// Source: hmm_vma_get_pfns() of kernel v4.17; promises 26, 30 to 38.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_get_pfns_4_17(range: *mut hmm_range_4_17) -> c_int {
    read_request(range).and_then(|request| request.look(false)).into_c()
}

/// hmm_vma_fault() in the form of kernel v4.17; see HMM_API_4_17.
///
/// Each entry says before the call what is wanted: the driver's bit for VALID, to have the page
/// present; with WRITE, writable; with DEVICE_PRIVATE, brought home if it is on a device. An entry
/// without VALID is only looked at.
///
/// @param range  All arguments.
/// @param block  As for hmm_vma_fault().
/// @return As hmm_vma_fault(), or:
///  - -EINVAL: also when flags or values is NULL or pfn_shift is above 12.
///
/// Context: as hmm_vma_fault().
/// Source: hmm_vma_fault() of kernel v4.17; promises 27 to 31, 34 to 38, 44 to 46.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_fault_4_17(range: *mut hmm_range_4_17, block: bool) -> c_int {
    let looked = read_request(range).and_then(|request| {
        let vma = request.vma;
        request.look(true).map_err(|error| after_busy(error, block, vma))
    });
    looked.into_c()
}

/// hmm_vma_range_done() in the form of kernel v4.17; see HMM_API_4_17.
///
/// @param range  The range.
/// @return As hmm_vma_range_done().
///
/// Context: as hmm_vma_range_done().
/// Source: hmm_vma_range_done() of kernel v4.17; promises 36 to 40.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_vma_range_done_4_17(range: *mut hmm_range_4_17) -> bool {
    let finished = check_pointer(range, "range is NULL or misaligned").and_then(|()| {
        // SAFETY: not NULL and aligned; the caller promises a range in the form of v4.17.
        let (list, valid) = unsafe { (&raw mut (*range).list, &raw mut (*range).valid) };
        // SAFETY: as above; it was active, so the library owns `valid`.
        tracking::finish(list).inspect(|still| unsafe { valid.write(*still) })
    });
    finished.inspect_err(record).unwrap_or(false)
}
