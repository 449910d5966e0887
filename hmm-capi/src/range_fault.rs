//! `hmm_range_fault` of today's kernels: a look at a range under an interval notifier, with a wish for each page.

use crate::handle::{check_pointer, invalid};
use crate::hold;
use crate::interval::{self, mmu_interval_notifier, owner_from};
use crate::mm::MmHandle;
use crate::ret::IntoC;
use hmm_core::{AddrRange, Error, HmmPfn, Notifier, OwnerId, RangeFault, Result};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A range in the form of today's kernels, which the header calls `struct hmm_range` when
/// HMM_API_7_3 is defined. The driver sets every member; all of them stay its own.
#[derive(Debug)]
#[repr(C)]
pub struct hmm_range_7_3 {
    /// A subscription that covers the range.
    pub notifier: *mut mmu_interval_notifier,
    /// What mmu_interval_read_begin() returned for it.
    pub notifier_seq: c_ulong,
    /// First address, page aligned.
    pub start: c_ulong,
    /// First address behind the range, page aligned.
    pub end: c_ulong,
    /// One entry for each page: in, what is wanted of it; out, what is there.
    pub hmm_pfns: *mut c_ulong,
    /// Wanted of every page, beside what its entry says: HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, both
    /// or none.
    pub default_flags: c_ulong,
    /// Which of these flags of the entries count; 0: only default_flags do.
    pub pfn_flags_mask: c_ulong,
    /// Whose device pages are reported as they are: the owner of the driver's own struct
    /// dev_pagemap, or NULL. Pages on other devices that the CPU cannot address count as absent, and
    /// come home when they are faulted.
    pub dev_private_owner: *mut c_void,
}

/// A range, copied, with what stands behind its members.
struct Request {
    mm: Arc<MmHandle>,
    notifier: Arc<Notifier>,
    sequence: u64,
    addresses: AddrRange,
    hmm_pfns: *mut c_ulong,
    default_flags: u64,
    pfn_flags_mask: u64,
    owner: OwnerId,
}

fn read_request(range: *mut hmm_range_7_3) -> Result<Request> {
    check_pointer(range, "range is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a range whose members are set.
    let range = unsafe { ptr::read(range) };
    check_pointer(range.hmm_pfns, "range->hmm_pfns is NULL or misaligned")?;
    let subscription = interval::get(range.notifier)?;
    Ok(Request {
        mm: Arc::clone(&subscription.mm),
        notifier: subscription.notifier()?,
        sequence: range.notifier_seq,
        addresses: AddrRange::new(range.start, range.end)?,
        hmm_pfns: range.hmm_pfns,
        default_flags: range.default_flags,
        pfn_flags_mask: range.pfn_flags_mask,
        owner: owner_from(range.dev_private_owner),
    })
}

impl Request {
    /// A copy of the caller's entries: their memory may fault.
    fn entries(&self) -> Result<Vec<HmmPfn>> {
        let (mut entries, count) = (Vec::new(), self.addresses.pages());
        let what = "the entries of a range";
        entries.try_reserve_exact(count).map_err(|_| Error::NoMemory { what })?;
        // SAFETY: the driver promises an entry for each page of the checked range.
        entries.extend((0..count).map(|index| HmmPfn(unsafe { self.hmm_pfns.add(index).read() })));
        Ok(entries)
    }

    fn look(&self) -> Result<()> {
        let mut entries = self.entries()?;
        let mut fault = RangeFault {
            range: self.addresses,
            owner: self.owner,
            default_flags: self.default_flags,
            pfn_flags_mask: self.pfn_flags_mask,
            hmm_pfns: &mut entries,
        };
        let still = || !self.notifier.read_retry(self.sequence);
        let looked = self.mm.core.hmm_range_fault(&mut fault, &still);
        for (index, entry) in entries.iter().enumerate() {
            // SAFETY: as for reading them.
            unsafe { self.hmm_pfns.add(index).write(entry.0) };
        }
        looked
    }
}

fn look_locked(range: *mut hmm_range_7_3) -> Result<()> {
    let request = read_request(range)?;
    if !hold::holds(&request.mm) {
        let start = request.addresses.start().get();
        return Err(invalid(start, "take hmm_mm_read_lock before hmm_range_fault"));
    }
    request.look()
}

/// A round without the lock: number, lock, look.
fn look_once(range: *mut hmm_range_7_3, request: &mut Request) -> Result<()> {
    request.sequence = request.notifier.read_begin()?;
    // SAFETY: read_request found the pointer good, and the caller promises a range.
    unsafe { (&raw mut (*range).notifier_seq).write(request.sequence) };
    hold::read_lock(&request.mm)?;
    let looked = request.look();
    hold::read_unlock(&request.mm)?;
    looked
}

fn look_unlocked(range: *mut hmm_range_7_3, timeout_ms: u64) -> Result<()> {
    let mut request = read_request(range)?;
    let limit = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms));
    let end = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let looked = look_once(range, &mut request);
        // What is busy for another reason was waited for already.
        let is_over = request.notifier.read_retry(request.sequence);
        match looked {
            Err(Error::Busy { .. }) if is_over && end.is_none_or(|end| Instant::now() < end) => {}
            outcome => return outcome,
        }
    }
}

/// Looks at the CPU page table of a range, and makes present and writable what the driver wants so.
///
/// What is wanted of page i is `(hmm_pfns[i] & pfn_flags_mask) | default_flags`: HMM_PFN_REQ_FAULT,
/// the page is made present as if the CPU had touched it; with HMM_PFN_REQ_WRITE, writable, too
/// (copy-on-write is broken); none of them, it is only reported. The entry then says
/// HMM_PFN_VALID with the pfn in its low bits, HMM_PFN_WRITE when the page can be written now, and
/// the order of the mapping (hmm_pfn_to_map_order()); or HMM_PFN_ERROR, where nothing is mapped or
/// it cannot be had; or 0, nothing is there. HMM_PFN_DMA_MAPPED, HMM_PFN_P2PDMA and
/// HMM_PFN_P2PDMA_BUS stay as the driver set them.
///
/// The range may span several mappings, and holes between them. After success every wish is
/// fulfilled, as of notifier_seq: the driver takes its update lock, and only if
/// mmu_interval_read_retry() is false there, the entries may go into the device's page table.
///
/// @param range  All arguments; the address space is that of range->notifier, locked by the caller.
/// @return 0, or:
///  - -EBUSY: the range was invalidated since notifier_seq: start over with
///    mmu_interval_read_begin();
///  - -EFAULT: a page that is wanted cannot be had, or nothing is mapped there;
///  - -EPERM: a page is wanted writable in a mapping that is not;
///  - -EINVAL: a pointer is NULL or misaligned, the notifier is not inserted, the bounds are not
///    page aligned, empty or reversed, or the lock is not held;
///  - -ENOMEM;
///  - -EDEADLK: inside ops->invalidate;
///  - -ENODEV: closed.
///
/// After an error, entries before the page that failed are final, and those behind it are as they
/// were.
///
/// Context: a thread that holds the lock of the address space, without a lock that callbacks take;
/// not inside a callback; may block; may call migrate_to_ram and fault.
/// Source: hmm_range_fault() of kernels v5.8 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_range_fault(range: *mut hmm_range_7_3) -> c_int {
    look_locked(range).into_c()
}

/// hmm_range_fault() with all that belongs around it: reads the number of the subscription, takes the
/// lock of the address space, looks, releases the lock, and starts over when the range was
/// invalidated meanwhile.
///
/// What is left to the driver is mmu_interval_read_retry() under its update lock, with
/// range->notifier_seq, which this call sets.
///
/// @param range       As for hmm_range_fault(); notifier_seq is an output.
/// @param timeout_ms  No new round begins after so many milliseconds (the kernel counts jiffies);
///                    HMM_RANGE_DEFAULT_TIMEOUT, or 0 for as many rounds as it takes.
/// @return As hmm_range_fault(), and -EBUSY when the time was over, or a page or the lock was not to
/// be had; -EDEADLK also when this thread holds the lock for writing.
///
/// Context: any thread, without the lock of the address space and without locks that callbacks take;
/// not inside a callback; may block; may call migrate_to_ram and fault.
/// Source: hmm_range_fault_unlocked_timeout() of kernel v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_range_fault_unlocked_timeout(
    range: *mut hmm_range_7_3,
    timeout_ms: c_ulong,
) -> c_int {
    look_unlocked(range, timeout_ms).into_c()
}
