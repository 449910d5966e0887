//! What both forms of range calls share: checks, the look at the page table, and the tracking from a successful look
//! to `hmm_vma_range_done`.

use crate::handle::{Opaque, Table, invalid};
use crate::mirror::hmm_list;
use crate::mm::MmHandle;
use crate::vma::{self, CVma, vm_area_struct};
use hmm_core::{
    Access, AddrRange, Error, OwnerId, PfnEntry, RangeRequest, RangeTracker, Result, VmaKind,
};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A range between a successful look and its `hmm_vma_range_done`.
pub(crate) struct Tracked {
    list: usize,
    mm: Arc<MmHandle>,
    tracker: RangeTracker,
    sequence: u64,
    range: AddrRange,
    pfns: usize,
}

pub(crate) static RANGES: Table<Opaque, Tracked, 4096> = Table::new(
    "not an active hmm_range",
    "active ranges (4096): is hmm_vma_range_done called for each?",
);

/// What a caller wants to know of a part of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Want {
    /// Fault it in (`None`: only look).
    pub(crate) fault: Option<Access>,
    /// Device pages come home instead of being reported.
    pub(crate) home: bool,
}

/// A look at a range that succeeded.
pub(crate) struct Look {
    tracker: RangeTracker,
    sequence: u64,
    /// One entry for each page.
    pub(crate) entries: Vec<PfnEntry>,
}

/// A look that failed, with the entries as far as they are known.
pub(crate) struct Failure {
    pub(crate) error: Error,
    pub(crate) entries: Vec<PfnEntry>,
}

/// The vma and the range of a call, checked in the kernel's order: bounds, then mirror.
pub(crate) fn check(
    vma: *const vm_area_struct,
    start: u64,
    end: u64,
) -> Result<(Arc<CVma>, AddrRange)> {
    let vma = vma::get(vma)?;
    let range = AddrRange::new(start, end)?;
    if !vma.vma.range.covers(range) {
        return Err(invalid(start, "the range leaves the vma"));
    }
    if vma.mm.mirrors.load(Ordering::Acquire) == 0 {
        return Err(invalid(start, "register a mirror of this address space first"));
    }
    Ok((vma, range))
}

/// Whether the vma can be mirrored at all (`VM_SPECIAL` and hugetlbfs cannot).
pub(crate) fn is_special(vma: &CVma) -> bool {
    matches!(vma.vma.kind, VmaKind::Special | VmaKind::Huge)
}

/// `count` zeroed entries.
fn entries(count: usize) -> Result<Vec<PfnEntry>> {
    let mut entries = Vec::new();
    entries
        .try_reserve_exact(count)
        .map_err(|_| Error::NoMemory { what: "the entries of a range" })?;
    entries.resize(count, PfnEntry::default());
    Ok(entries)
}

/// Looks at a range, whose parts (in order, covering it) may be wanted differently.
pub(crate) fn look(
    vma: &CVma,
    range: AddrRange,
    parts: impl IntoIterator<Item = (AddrRange, Want)>,
) -> std::result::Result<Look, Failure> {
    let early = |error| Failure { error, entries: Vec::new() };
    let core = &vma.mm.core;
    let mut entries = entries(range.pages()).map_err(early)?;
    let tracker = core.track(range).map_err(early)?;
    let sequence = tracker.begin().map_err(early)?;
    for (part, want) in parts {
        let first = range.index_of(part.start());
        let found = &mut entries[first..first + part.pages()];
        let request = RangeRequest { range: part, owner: want.home.then(OwnerId::unique) };
        let done = match want.fault {
            Some(access) => core.range_fault(&request, access, found),
            None => core.snapshot(&request, found),
        };
        if let Err(error) = done {
            return Err(Failure { error, entries });
        }
    }
    Ok(Look { tracker, sequence, entries })
}

/// Starts tracking: the range is active until [`finish`]. A range that is active already starts anew.
pub(crate) fn start(
    list: *mut hmm_list,
    mm: &Arc<MmHandle>,
    range: AddrRange,
    look: Look,
    pfns: *mut u64,
) -> Result<()> {
    take(list);
    let tracked = Tracked {
        list: list.addr(),
        mm: Arc::clone(mm),
        tracker: look.tracker,
        sequence: look.sequence,
        range,
        pfns: pfns.expose_provenance(),
    };
    let handle = RANGES.insert(Arc::new(tracked))?;
    // SAFETY: the caller promises a range structure, of which `list` is the member.
    unsafe { ptr::write(list, hmm_list { next: handle.cast(), prev: ptr::null_mut() }) };
    Ok(())
}

/// Takes a range's tracking out, if it is active. Its memory may hold anything before its first use.
fn take(list: *mut hmm_list) -> Option<Arc<Tracked>> {
    // SAFETY: the caller promises a range structure, of which `list` is the member.
    let handle = unsafe { ptr::read(&raw const (*list).next) };
    let tracked = RANGES.get(handle.cast()).ok()?;
    if tracked.list != list.addr() {
        return None;
    }
    RANGES.remove(handle.cast())
}

/// Ends tracking: true when nothing in the range was invalidated since the look began. Otherwise the entries of what
/// was invalidated are zeroed (promise 40).
///
/// # Errors
/// `Invalid` when the range is not active.
pub(crate) fn finish(list: *mut hmm_list) -> Result<bool> {
    let not_active = || invalid(list.addr() as u64, "the range is not active");
    let tracked = take(list).ok_or_else(not_active)?;
    // SAFETY: `take` found `list` to be the member of a range structure that is active.
    unsafe { (&raw mut (*list).next).write(ptr::null_mut()) };
    if !tracked.tracker.changed(tracked.sequence) {
        return Ok(true);
    }
    if let Some(gone) = tracked.tracker.invalidated().and_then(|gone| gone.intersect(tracked.range))
    {
        let pfns: *mut u64 = ptr::with_exposed_provenance_mut(tracked.pfns);
        let first = tracked.range.index_of(gone.start());
        // SAFETY: the caller promised one entry for each page of the range until the range is done.
        unsafe { ptr::write_bytes(pfns.add(first), 0, gone.pages()) };
    }
    Ok(false)
}

/// Forgets the ranges of an address space that is closed.
pub(crate) fn forget(mm: &Arc<MmHandle>) {
    while let Some((handle, _)) = RANGES.find(|one| Arc::ptr_eq(&one.mm, mm)) {
        RANGES.remove(handle);
    }
}
