//! `struct page`: never a structure, always a pfn in a pointer's clothes.
//!
//! The header's `pfn_to_page` and `page_to_pfn` do the same conversion inline; the tests hold them together.

use hmm_core::Pfn;
use std::ptr;

/// A page of system or device memory: opaque, and nothing is behind the pointer. The pointer's
/// value carries the pfn, with bits set that make any access through it a fault.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct page {
    _opaque: [u8; 0],
}

/// Bits 48 to 63 of every page pointer.
const TAG: u64 = 0x4d50 << 48;
/// Bits of the pfn.
const PFN_MASK: u64 = (1 << 48) - 1;

/// The C pointer for a pfn.
pub(crate) fn from_pfn(pfn: Pfn) -> *mut page {
    ptr::without_provenance_mut((TAG | (pfn.get() & PFN_MASK)) as usize)
}

/// The pfn of a C pointer, if it is a page.
pub(crate) fn to_pfn(page: *const page) -> Option<Pfn> {
    let value = page.addr() as u64;
    (value & !PFN_MASK == TAG).then(|| Pfn::new(value & PFN_MASK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_carry_pfns_and_nothing_else_is_a_page() {
        for number in [0, 1, Pfn::DEVICE_BASE, PFN_MASK] {
            assert_eq!(to_pfn(from_pfn(Pfn::new(number))), Some(Pfn::new(number)));
        }
        assert_eq!(to_pfn(ptr::null()), None);
        let foreign = 7_u64;
        assert_eq!(to_pfn((&raw const foreign).cast()), None);
    }
}
