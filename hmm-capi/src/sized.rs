//! Structs of ours that can grow: their first member says how large the caller's version is.

use crate::handle::{check_pointer, invalid};
use hmm_core::Result;
use std::ptr;

/// A C struct whose first member is `uint32_t size`, made of integers only, for which all zeros is a valid value.
///
/// # Safety
/// `repr(C)`, first field `u32`, no padding, no field with invalid bit patterns.
pub(crate) unsafe trait Sized32: Copy + Default {}

/// Bytes of the size member; smaller structs are refused.
const SIZE_MEMBER: usize = size_of::<u32>();

/// Reads a struct that may be older (shorter: the rest is zero) or newer (longer: the rest must be zero) than ours.
///
/// # Errors
/// `Invalid` for NULL, a size below 4, or a newer struct that asks for something this library does not know.
///
/// # Safety
/// If `from` is not NULL, its first member is readable and says how many bytes are.
pub(crate) unsafe fn read<T: Sized32>(from: *const T) -> Result<T> {
    check_pointer(from, "the struct is NULL or misaligned")?;
    // SAFETY: the caller promises a readable size member, which every Sized32 begins with.
    let size = unsafe { ptr::read(from.cast::<u32>()) } as usize;
    if size < SIZE_MEMBER {
        return Err(invalid(from.addr() as u64, "set the size member to sizeof the struct"));
    }
    let bytes = from.cast::<u8>();
    for at in size_of::<T>()..size {
        // SAFETY: the caller promises `size` readable bytes.
        if unsafe { ptr::read(bytes.add(at)) } != 0 {
            return Err(invalid(
                from.addr() as u64,
                "the struct asks for more than this version knows",
            ));
        }
    }
    let mut value = T::default();
    // SAFETY: both sides have at least the smaller of the two sizes, and any bytes are a valid T (Sized32).
    unsafe {
        ptr::copy_nonoverlapping(bytes, (&raw mut value).cast::<u8>(), size.min(size_of::<T>()));
    }
    Ok(value)
}

/// Fills a struct that may be older (shorter: the rest is left out) or newer (longer: the rest becomes zero) than ours.
/// Its size member stays as the caller set it.
///
/// # Errors
/// `Invalid` for NULL or a size below 4.
///
/// # Safety
/// If `to` is not NULL, its first member is readable and says how many bytes are writable.
pub(crate) unsafe fn write<T: Sized32>(to: *mut T, value: &T) -> Result<()> {
    check_pointer(to, "the struct is NULL or misaligned")?;
    // SAFETY: the caller promises a readable size member, which every Sized32 begins with.
    let size = unsafe { ptr::read(to.cast::<u32>()) } as usize;
    if size < SIZE_MEMBER {
        return Err(invalid(to.addr() as u64, "set the size member to sizeof the struct"));
    }
    let known = size.min(size_of::<T>());
    let from = ptr::from_ref(value).cast::<u8>();
    // SAFETY: the caller promises `size` writable bytes, `value` has size_of::<T>(), and both skip the size member.
    unsafe {
        let bytes = to.cast::<u8>();
        ptr::copy_nonoverlapping(
            from.add(SIZE_MEMBER),
            bytes.add(SIZE_MEMBER),
            known - SIZE_MEMBER,
        );
        ptr::write_bytes(bytes.add(known), 0, size - known);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Default, PartialEq, Debug)]
    #[repr(C)]
    struct Pair {
        size: u32,
        first: u32,
        second: u64,
    }
    // SAFETY: repr(C) without padding, u32 first, integers only.
    unsafe impl Sized32 for Pair {}

    #[repr(C)]
    struct Longer {
        pair: Pair,
        tail: u64,
    }

    #[test]
    fn shorter_structs_are_padded_and_longer_ones_must_be_zero_behind() {
        let pair = Pair { size: 8, first: 1, second: 2 };
        // SAFETY: the size says 8, and 16 bytes are there.
        assert_eq!(unsafe { read(&raw const pair) }, Ok(Pair { size: 8, first: 1, second: 0 }));
        let mut long = Longer { pair: Pair { size: 24, ..pair }, tail: 0 };
        // SAFETY: 24 bytes are there, as the size says.
        assert!(unsafe { read((&raw const long).cast::<Pair>()) }.is_ok());
        long.tail = 1;
        // SAFETY: as above.
        assert!(unsafe { read((&raw const long).cast::<Pair>()) }.is_err());
    }

    #[test]
    fn writing_respects_the_callers_size() {
        let value = Pair { size: 16, first: 3, second: 4 };
        let mut long = Longer { pair: Pair { size: 24, first: 0, second: 0 }, tail: 9 };
        // SAFETY: 24 bytes are there, as the size says.
        unsafe { write((&raw mut long).cast::<Pair>(), &value) }.unwrap();
        assert_eq!((long.pair, long.tail), (Pair { size: 24, first: 3, second: 4 }, 0));
        let mut short = Pair { size: 8, first: 0, second: 7 };
        // SAFETY: the size says 8, and 16 bytes are there.
        unsafe { write(&raw mut short, &value) }.unwrap();
        assert_eq!(short, Pair { size: 8, first: 3, second: 7 });
    }
}
