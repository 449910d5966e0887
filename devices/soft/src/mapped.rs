//! Arrays in mappings of the device's own. What a CPU fault needs must not live in memory that may migrate, and the
//! process's heap may.

use hmm_core::{Error, MigratePfn, Result};
use memmap2::{Advice, MmapMut, MmapOptions};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Types for which a run of zero bytes is a value, and every value can be forgotten.
///
/// # Safety
/// All-zero bytes are a valid value, alignment is at most a page, and there is no drop glue.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: an integer.
unsafe impl Plain for u64 {}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
// SAFETY: a transparent wrapper of an integer.
unsafe impl Plain for MigratePfn {}

/// A zeroed array of fixed length in an anonymous mapping; pages take memory once they are written.
#[derive(Debug)]
pub(crate) struct Mapped<T> {
    map: MmapMut,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Mapped<T> {
    /// # Errors
    /// `NoMemory` when the mapping cannot be had.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let no_memory = Error::NoMemory { what: "a mapping for the device's tables" };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| no_memory.clone())?;
        let map = MmapOptions::new()
            .len(bytes.max(1))
            .no_reserve_swap()
            .map_anon()
            .map_err(|_| no_memory)?;
        // A mark that the program's mappings lack: the kernel joins equal neighbours, and a watch on the joined mapping
        // would make first touches here, under the table's lock, wait for service threads that wait for that lock.
        let _ = map.advise(Advice::DontDump);
        Ok(Self { map, len, element: PhantomData })
    }
}

impl<T: Plain> Deref for Mapped<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is page aligned, holds `len` elements, starts as zeros, which are values of T (Plain),
        // and is reached only through this object.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Mapped<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}
