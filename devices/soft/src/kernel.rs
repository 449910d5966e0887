//! The kernels by name and argument, and what is checked before any of them starts.

use hmm_core::{AddrRange, Error, Result, VirtAddr};

/// Bytes of the elements that kernels work on.
pub(crate) const WORD: u64 = 8;

/// A computation for the device. Every address is an address of the process, at whatever place its page is.
///
/// Elements are 64 bits wide and naturally aligned. As on any device, what happens to bytes that the CPU or another
/// job changes at the same time is up to the two; whole aligned words stay whole in device memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kernel {
    /// Sets bytes. Result: 0.
    Fill {
        /// First byte.
        dst: u64,
        /// Bytes.
        len: u64,
        /// The value.
        byte: u8,
    },
    /// Copies bytes between ranges that do not overlap. Result: 0.
    Copy {
        /// First byte to write.
        dst: u64,
        /// First byte to read.
        src: u64,
        /// Bytes.
        len: u64,
    },
    /// `y[i] += a * x[i]`; `x` and `y` are the same or do not overlap. Result: 0.
    AxpyF64 {
        /// The factor.
        a: f64,
        /// First `f64` to read.
        x: u64,
        /// First `f64` to change.
        y: u64,
        /// Elements.
        count: u64,
    },
    /// Sum of `f64`s, added one after another. Result: its bits.
    SumF64 {
        /// First element.
        src: u64,
        /// Elements.
        count: u64,
    },
    /// Sum of `u64`s modulo 2^64. Result: the sum.
    SumU64 {
        /// First element.
        src: u64,
        /// Elements.
        count: u64,
    },
    /// `dst[i] = src[index[i]]`; `dst` does not overlap `index`. Result: 0.
    GatherU64 {
        /// First `u64` to write.
        dst: u64,
        /// Element 0 of the source; the indices alone say how far it reaches.
        src: u64,
        /// First `u64` index.
        index: u64,
        /// Elements of `dst` and `index`.
        count: u64,
    },
    /// Follows a linked list. Result: nodes visited.
    Chase {
        /// Address of the first node.
        head: u64,
        /// Bytes from the start of a node to its 64-bit link; a link of 0 ends the list.
        next_offset: u64,
        /// Most nodes to visit.
        max_steps: u64,
    },
    /// Follows a linked list. Result: the sum, modulo 2^64, of one `u64` in each node.
    ChaseSumU64 {
        /// Address of the first node.
        head: u64,
        /// Bytes from the start of a node to its 64-bit link; a link of 0 ends the list.
        next_offset: u64,
        /// Bytes from the start of a node to the `u64`.
        value_offset: u64,
        /// Most nodes to visit.
        max_steps: u64,
    },
    /// Adds to a `u64` in device memory, atomically towards all jobs; its page is migrated first. The CPU cannot
    /// meanwhile reach it. Result: the old value.
    AtomicAddU64 {
        /// The word.
        addr: u64,
        /// What to add, modulo 2^64.
        value: u64,
    },
    /// Adds to `count` words by plain loads and stores. Result: 0.
    AddU64 {
        /// The first word.
        addr: u64,
        /// Words.
        count: u64,
        /// Bytes from one word to the next: a multiple of 8, at least 8.
        stride: u64,
        /// What to add, modulo 2^64.
        value: u64,
    },
}

impl Kernel {
    /// Checks every argument that can be checked without looking at memory.
    ///
    /// # Errors
    /// `Invalid` for NULL, a length of zero, misalignment, a range that leaves the address space, a forbidden overlap.
    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Fill { dst, len, .. } => bytes(dst, len),
            Self::Copy { dst, src, len } => {
                bytes(dst, len)?;
                bytes(src, len)?;
                disjoint(dst, src, len)
            }
            Self::AxpyF64 { x, y, count, .. } => {
                words(x, count)?;
                words(y, count)?;
                if x == y { Ok(()) } else { disjoint(x, y, count * WORD) }
            }
            Self::SumF64 { src, count } | Self::SumU64 { src, count } => words(src, count),
            Self::GatherU64 { dst, src, index, count } => {
                words(dst, count)?;
                words(index, count)?;
                words(src, 1)?;
                disjoint(dst, index, count * WORD)
            }
            Self::Chase { head, next_offset, max_steps } => {
                node_word(head, next_offset)?;
                positive(head, max_steps)
            }
            Self::ChaseSumU64 { head, next_offset, value_offset, max_steps } => {
                node_word(head, next_offset)?;
                node_word(head, value_offset)?;
                positive(head, max_steps)
            }
            Self::AtomicAddU64 { addr, .. } => words(addr, 1),
            Self::AddU64 { addr, count, stride, .. } => strided(addr, count, stride),
        }
    }
}

fn invalid(address: u64, what: &'static str) -> Error {
    Error::Invalid { address: VirtAddr::new(address), what }
}

fn bytes(address: u64, len: u64) -> Result<()> {
    AddrRange::covering(address, len).map(|_| ())
}

fn words(address: u64, count: u64) -> Result<()> {
    let len = count.checked_mul(WORD).ok_or_else(|| invalid(address, "length overflows"))?;
    if !address.is_multiple_of(WORD) {
        return Err(invalid(address, "64-bit elements must be aligned to 8 bytes"));
    }
    bytes(address, len)
}

fn strided(address: u64, count: u64, stride: u64) -> Result<()> {
    if stride == 0 || !stride.is_multiple_of(WORD) {
        return Err(invalid(address, "the stride must be a positive multiple of 8 bytes"));
    }
    words(address, count.min(1))?;
    let length = (count - 1).checked_mul(stride).and_then(|last| last.checked_add(WORD));
    bytes(address, length.ok_or_else(|| invalid(address, "length overflows"))?)
}

/// Ranges of which each was checked by itself.
fn disjoint(one: u64, other: u64, len: u64) -> Result<()> {
    if one.abs_diff(other) < len {
        return Err(invalid(one, "the ranges overlap"));
    }
    Ok(())
}

fn positive(address: u64, steps: u64) -> Result<()> {
    if steps == 0 { Err(invalid(address, "zero steps")) } else { Ok(()) }
}

/// The address of a word in a node.
///
/// # Errors
/// `Invalid` when it is misaligned or outside the address space.
pub(crate) fn node_word(node: u64, offset: u64) -> Result<VirtAddr> {
    let address = node.checked_add(offset).ok_or_else(|| invalid(node, "offset overflows"))?;
    if node == 0 {
        return Err(invalid(node, "NULL node"));
    }
    words(address, 1)?;
    Ok(VirtAddr::new(address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_core::USER_END;

    #[test]
    fn bad_arguments_are_refused() {
        let bad = [
            Kernel::Fill { dst: 0, len: 1, byte: 0 },
            Kernel::Fill { dst: 0x1000, len: 0, byte: 0 },
            Kernel::Fill { dst: u64::MAX - 4, len: 8, byte: 0 },
            Kernel::Fill { dst: USER_END - 4, len: 8, byte: 0 },
            Kernel::Copy { dst: 0x1000, src: 0x1001, len: 2 },
            Kernel::AxpyF64 { a: 1.0, x: 0x1000, y: 0x1008, count: 2 },
            Kernel::SumU64 { src: 0x1004, count: 1 },
            Kernel::SumF64 { src: 0x1000, count: u64::MAX / 8 + 2 },
            Kernel::GatherU64 { dst: 0x1000, src: 0, index: 0x2000, count: 1 },
            Kernel::Chase { head: 0x1000, next_offset: 4, max_steps: 1 },
            Kernel::Chase { head: 0x1000, next_offset: u64::MAX, max_steps: 1 },
            Kernel::Chase { head: 0x1000, next_offset: 0, max_steps: 0 },
            Kernel::AtomicAddU64 { addr: 0x1001, value: 1 },
            Kernel::AddU64 { addr: 0x1000, count: 0, stride: 8, value: 1 },
            Kernel::AddU64 { addr: 0x1000, count: 2, stride: 12, value: 1 },
            Kernel::AddU64 { addr: 0x1000, count: 2, stride: 0, value: 1 },
            Kernel::AddU64 { addr: 0x1000, count: 1 << 40, stride: 1 << 40, value: 1 },
        ];
        for kernel in bad {
            assert!(matches!(kernel.validate(), Err(Error::Invalid { .. })), "{kernel:?}");
        }
    }

    #[test]
    fn good_arguments_pass() {
        let good = [
            Kernel::Fill { dst: USER_END - 4, len: 4, byte: 0 },
            Kernel::Copy { dst: 0x1001, src: 0x1003, len: 2 },
            Kernel::AxpyF64 { a: 1.0, x: 0x1000, y: 0x1000, count: 2 },
            Kernel::AddU64 { addr: 0x1000, count: 3, stride: 4096, value: 1 },
            Kernel::ChaseSumU64 { head: 0x1004, next_offset: 4, value_offset: 12, max_steps: 1 },
        ];
        for kernel in good {
            assert_eq!(kernel.validate(), Ok(()), "{kernel:?}");
        }
    }
}
