//! Addresses, page frame numbers and page ranges: types instead of integers, checked arithmetic only.

use crate::error::{Error, Result};
use std::fmt;

/// log2 of the page size. The library works on 4 KiB pages.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// Pages covered by one leaf of the page table (2 MiB of addresses, like one PTE page).
pub const LEAF_PAGES: usize = 512;
/// Bytes covered by one leaf of the page table.
pub const LEAF_SIZE: u64 = (LEAF_PAGES * PAGE_SIZE) as u64;
/// First address above the user address space that the library manages.
pub const USER_END: u64 = 1 << 47;

const PAGE_MASK: u64 = PAGE_SIZE as u64 - 1;

/// A virtual address of the process (in bytes, any alignment).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct VirtAddr(u64);

impl VirtAddr {
    /// Wraps an address.
    pub const fn new(address: u64) -> Self {
        Self(address)
    }
    /// The address of what a pointer points to.
    pub fn from_ptr<T: ?Sized>(pointer: *const T) -> Self {
        Self(pointer.cast::<u8>().addr() as u64)
    }
    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
    /// As a pointer, for a driver's copy engine.
    pub fn as_ptr(self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
    /// Rounded down to its page.
    pub const fn page(self) -> Self {
        Self(self.0 & !PAGE_MASK)
    }
    /// Rounded down to its leaf (2 MiB).
    pub const fn leaf(self) -> Self {
        Self(self.0 & !(LEAF_SIZE - 1))
    }
    /// Index of its page inside its leaf, `0..512`.
    pub const fn index_in_leaf(self) -> usize {
        ((self.0 >> PAGE_SHIFT) as usize) & (LEAF_PAGES - 1)
    }
    /// Offset inside its page.
    pub const fn offset_in_page(self) -> usize {
        (self.0 & PAGE_MASK) as usize
    }
    /// `self + bytes`, or `None` on overflow.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
    /// The page `count` pages further on. Callers stay inside a checked range.
    pub(crate) const fn plus_pages(self, count: usize) -> Self {
        Self(self.0 + ((count as u64) << PAGE_SHIFT))
    }
}

impl fmt::Debug for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for VirtAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A page frame number. System memory is numbered by address (`address >> 12`), as behind an IOMMU that maps a
/// process's addresses one to one; device memory has windows of its own from [`Pfn::DEVICE_BASE`] on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pfn(u64);

impl Pfn {
    /// First pfn of the device windows (just above the user address space).
    pub const DEVICE_BASE: u64 = 1 << 36;
    /// First number that is no pfn at all (what `hmm_pfn_t` and `MIGRATE_PFN` can carry, with room to spare).
    pub const END: u64 = 1 << 52;

    /// Wraps a pfn.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
    /// The pfn of the system page at an address.
    pub const fn of_addr(address: VirtAddr) -> Self {
        Self(address.get() >> PAGE_SHIFT)
    }
    /// True for pages of device memory.
    pub const fn is_device(self) -> bool {
        self.0 >= Self::DEVICE_BASE
    }
    /// The address at which the CPU can read this system page or frame; device pages have none.
    pub const fn to_addr(self) -> Option<VirtAddr> {
        if self.is_device() { None } else { Some(VirtAddr::new(self.0 << PAGE_SHIFT)) }
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}pfn {:#x}", if self.is_device() { "device " } else { "" }, self.0)
    }
}

/// A page-aligned, non-empty range of addresses `[start, end)` inside the user address space.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddrRange {
    start: u64,
    end: u64,
}

impl AddrRange {
    /// A range from page-aligned bounds.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a bound is not page aligned, the range is empty or reversed, or it leaves the
    /// user address space.
    pub fn new(start: u64, end: u64) -> Result<Self> {
        if start & PAGE_MASK != 0 || end & PAGE_MASK != 0 {
            return Err(Error::invalid(start, "range is not page aligned"));
        }
        if start >= end {
            return Err(Error::invalid(start, "range is empty or reversed"));
        }
        if end > USER_END {
            return Err(Error::invalid(start, "range ends above the user address space"));
        }
        Ok(Self { start, end })
    }

    /// All pages touched by `length` bytes at `address`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `length` is 0, `address` is 0, or the end overflows the user address space.
    pub fn covering(address: u64, length: u64) -> Result<Self> {
        if address == 0 || length == 0 {
            return Err(Error::invalid(address, "NULL address or zero length"));
        }
        let end = address
            .checked_add(length)
            .and_then(|end| end.checked_add(PAGE_MASK))
            .ok_or_else(|| Error::invalid(address, "address + length overflows"))?;
        Self::new(address & !PAGE_MASK, end & !PAGE_MASK)
    }

    /// The single page that holds `address` (an address inside the user address space).
    pub(crate) const fn page_of(address: VirtAddr) -> Self {
        let start = address.page().get();
        Self { start, end: start + PAGE_SIZE as u64 }
    }
    /// From bounds that are known to be good (results of arithmetic on valid ranges).
    pub(crate) const fn from_bounds(start: u64, end: u64) -> Self {
        debug_assert!(start < end && start & PAGE_MASK == 0 && end & PAGE_MASK == 0);
        Self { start, end }
    }
    /// First address.
    pub const fn start(self) -> VirtAddr {
        VirtAddr::new(self.start)
    }
    /// First address behind the range.
    pub const fn end(self) -> VirtAddr {
        VirtAddr::new(self.end)
    }
    /// Bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }
    /// Never true: a range has at least one page.
    pub const fn is_empty(self) -> bool {
        false
    }
    /// Pages.
    pub const fn pages(self) -> usize {
        ((self.end - self.start) >> PAGE_SHIFT) as usize
    }
    /// Whether the address lies inside.
    pub const fn contains(self, address: VirtAddr) -> bool {
        self.start <= address.get() && address.get() < self.end
    }
    /// Whether the other range lies inside.
    pub const fn covers(self, other: AddrRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }
    /// Whether they share a page.
    pub const fn overlaps(self, other: AddrRange) -> bool {
        self.start < other.end && other.start < self.end
    }
    /// The common part.
    pub fn intersect(self, other: AddrRange) -> Option<AddrRange> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
    /// The smallest range that covers both.
    pub fn hull(self, other: AddrRange) -> AddrRange {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
    /// Address of page `index`.
    pub fn page_at(self, index: usize) -> VirtAddr {
        self.start().plus_pages(index)
    }
    /// Index of the page that holds `address`, which must lie inside.
    pub const fn index_of(self, address: VirtAddr) -> usize {
        ((address.get() - self.start) >> PAGE_SHIFT) as usize
    }
    /// `count` pages from page `first` on.
    pub fn sub(self, first: usize, count: usize) -> AddrRange {
        let start = self.page_at(first).get();
        Self::from_bounds(start, start + ((count as u64) << PAGE_SHIFT))
    }
    /// Cut at leaf boundaries: one piece for each leaf touched.
    pub fn by_leaf(self) -> impl Iterator<Item = AddrRange> {
        let mut next = self.start;
        std::iter::from_fn(move || {
            if next >= self.end {
                return None;
            }
            let start = next;
            next = ((start & !(LEAF_SIZE - 1)) + LEAF_SIZE).min(self.end);
            Some(Self { start, end: next })
        })
    }
}

impl fmt::Debug for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_refuse_bad_bounds() {
        assert!(AddrRange::new(1, 0x1000).is_err());
        assert!(AddrRange::new(0x1000, 0x1000).is_err());
        assert!(AddrRange::new(0x2000, 0x1000).is_err());
        assert!(AddrRange::new(0, USER_END + 0x1000).is_err());
        assert!(AddrRange::covering(u64::MAX - 10, 100).is_err());
        assert!(AddrRange::covering(0, 10).is_err());
        assert_eq!(AddrRange::covering(0x1fff, 2).unwrap().pages(), 2);
    }

    #[test]
    fn by_leaf_cuts_at_two_mebibytes() {
        let range = AddrRange::new(0x1f_f000, 0x40_1000).unwrap();
        let pieces: Vec<_> = range.by_leaf().map(AddrRange::pages).collect();
        assert_eq!(pieces, [1, 512, 1]);
    }
}
