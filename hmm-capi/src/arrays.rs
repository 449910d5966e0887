//! The arrays of a migration's caller: copied in and out, and kept in system memory while pages are held.

use crate::mm::MmHandle;
use hmm_core::{AddrRange, Error, MigratePfn, Result};
use std::ffi::c_ulong;
use std::ptr;
use std::sync::Arc;

/// `count` entries of the library's own.
pub(crate) fn entries(count: usize) -> Result<Vec<MigratePfn>> {
    let mut entries = Vec::new();
    entries
        .try_reserve_exact(count)
        .map_err(|_| Error::NoMemory { what: "the entries of a migration" })?;
    entries.resize(count, MigratePfn::default());
    Ok(entries)
}

/// Writes entries to a caller's array.
pub(crate) fn write_out(entries: &[MigratePfn], to: *mut c_ulong) {
    // SAFETY: the caller promises one entry for each page; MigratePfn is a transparent u64, as unsigned long is.
    unsafe { ptr::copy_nonoverlapping(entries.as_ptr().cast(), to, entries.len()) };
}

/// Reads entries from a caller's array.
pub(crate) fn read_in(entries: &mut [MigratePfn], from: *const c_ulong) {
    // SAFETY: as for `write_out`, the other way.
    unsafe { ptr::copy_nonoverlapping(from.cast(), entries.as_mut_ptr(), entries.len()) };
}

/// Memory of a caller that a migration uses while it holds pages, kept from leaving: it may be the heap that migrates.
#[derive(Default)]
pub(crate) struct Pinned {
    mm: Option<Arc<MmHandle>>,
    ranges: [Option<AddrRange>; 3],
}

impl Pinned {
    /// Keeps up to three pieces, given by address and bytes. Not for callbacks: they run on memory that does not migrate
    /// anyway, and a service thread must not wait for faults.
    pub(crate) fn new(mm: &Arc<MmHandle>, pieces: &[(usize, usize)]) -> Result<Self> {
        let mut pinned = Self { mm: Some(Arc::clone(mm)), ranges: [None; 3] };
        for (place, (address, bytes)) in pinned.ranges.iter_mut().zip(pieces) {
            let range = AddrRange::covering(*address as u64, *bytes as u64)?;
            mm.core.pin_range(range)?;
            *place = Some(range);
        }
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let Some(mm) = &self.mm else { return };
        for range in self.ranges.iter().flatten() {
            // Fails only when the mm was closed meanwhile, and then there is nothing to unpin.
            let _ = mm.core.unpin_range(*range);
        }
    }
}
