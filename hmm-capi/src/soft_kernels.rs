//! The kernels of the soft device: each a function that runs it and waits.

use crate::handle::check_pointer;
use crate::ret::IntoC;
use crate::soft::{hmm_soft_device, run};
use hmm_core::Result;
use hmm_soft::Kernel;
use std::ffi::{c_int, c_void};

fn address<T>(pointer: *const T) -> u64 {
    pointer.expose_provenance() as u64
}

/// Runs a kernel without a result.
fn plain(device: *mut hmm_soft_device, kernel: Kernel) -> c_int {
    run(device, kernel).map(|_| ()).into_c()
}

/// Runs a kernel and stores its result; on errors nothing is stored.
fn with_result<T>(
    device: *mut hmm_soft_device,
    kernel: Kernel,
    result: *mut T,
    convert: impl FnOnce(u64) -> T,
) -> Result<()> {
    check_pointer(result, "result is NULL or misaligned")?;
    let value = convert(run(device, kernel)?);
    // SAFETY: not NULL and aligned; the caller promises that it is writable.
    unsafe { result.write(value) };
    Ok(())
}

/// The device sets bytes: `memset(dst, byte, length)`.
///
/// @param device  The device.
/// @param dst     First byte; any address of the process.
/// @param length  Bytes.
/// @param byte    The value.
/// @return 0, or:
///  - -EINVAL: not a live device, NULL, zero length or overflow (nothing was written);
///  - -EFAULT: something is not mapped;
///  - -EPERM: not writable;
///  - -EBUSY: the device is stuck or its queue full;
///  - -ENODEV: closed.
///
/// After -EFAULT and -EPERM a part may be written.
///
/// Context: any thread, but not inside a callback; blocks until the kernel is done.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_fill(
    device: *mut hmm_soft_device,
    dst: *mut c_void,
    length: usize,
    byte: u8,
) -> c_int {
    plain(device, Kernel::Fill { dst: address(dst), len: length as u64, byte })
}

/// The device copies bytes: `memcpy(dst, src, length)`.
///
/// @param device  The device.
/// @param dst     First byte to write.
/// @param src     First byte to read.
/// @param length  Bytes; the two ranges must not overlap.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when the ranges overlap.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_copy(
    device: *mut hmm_soft_device,
    dst: *mut c_void,
    src: *const c_void,
    length: usize,
) -> c_int {
    plain(device, Kernel::Copy { dst: address(dst), src: address(src), len: length as u64 })
}

/// The device computes `y[i] += a * x[i]`.
///
/// @param device  The device.
/// @param a       The factor.
/// @param x       Elements to read.
/// @param y       Elements to change; the same as x, or apart from it.
/// @param count   Elements.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when a pointer is misaligned or the ranges overlap in part.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_axpy_f64(
    device: *mut hmm_soft_device,
    a: f64,
    x: *const f64,
    y: *mut f64,
    count: usize,
) -> c_int {
    plain(device, Kernel::AxpyF64 { a, x: address(x), y: address(y), count: count as u64 })
}

/// The device adds up doubles, one after another.
///
/// @param device  The device.
/// @param src     Elements.
/// @param count   How many.
/// @param result  Where the sum goes; written on success only.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when a pointer is misaligned or result is NULL.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_sum_f64(
    device: *mut hmm_soft_device,
    src: *const f64,
    count: usize,
    result: *mut f64,
) -> c_int {
    let kernel = Kernel::SumF64 { src: address(src), count: count as u64 };
    with_result(device, kernel, result, f64::from_bits).into_c()
}

/// The device adds up 64-bit words, modulo 2^64.
///
/// @param device  The device.
/// @param src     Elements.
/// @param count   How many.
/// @param result  Where the sum goes; written on success only.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when a pointer is misaligned or result is NULL.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_sum_u64(
    device: *mut hmm_soft_device,
    src: *const u64,
    count: usize,
    result: *mut u64,
) -> c_int {
    let kernel = Kernel::SumU64 { src: address(src), count: count as u64 };
    with_result(device, kernel, result, |sum| sum).into_c()
}

/// The device gathers: `dst[i] = src[index[i]]`.
///
/// @param device  The device.
/// @param dst     Elements to write; apart from index.
/// @param src     Elements to choose from; the indices say how far it reaches.
/// @param index   Indices into src.
/// @param count   Elements of dst and index.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when a pointer is misaligned or dst overlaps index.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_gather_u64(
    device: *mut hmm_soft_device,
    dst: *mut u64,
    src: *const u64,
    index: *const u64,
    count: usize,
) -> c_int {
    let (dst, src, index) = (address(dst), address(src), address(index));
    plain(device, Kernel::GatherU64 { dst, src, index, count: count as u64 })
}

/// The device follows a linked list by the process's own pointers, and counts its nodes.
///
/// @param device       The device.
/// @param head         The first node.
/// @param next_offset  offsetof the pointer to the next node; NULL ends the list.
/// @param max_steps    Most nodes to visit.
/// @param visited      Where the number of nodes visited goes; written on success only.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when the link or visited is misaligned, or visited is NULL.
///
/// Context: as hmm_soft_fill().
/// Source: ours; promise 2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_chase(
    device: *mut hmm_soft_device,
    head: *const c_void,
    next_offset: usize,
    max_steps: u64,
    visited: *mut u64,
) -> c_int {
    let kernel = Kernel::Chase { head: address(head), next_offset: next_offset as u64, max_steps };
    with_result(device, kernel, visited, |nodes| nodes).into_c()
}

/// The device follows a linked list and adds up one 64-bit word of each node, modulo 2^64.
///
/// @param device        The device.
/// @param head          The first node.
/// @param next_offset   offsetof the pointer to the next node; NULL ends the list.
/// @param value_offset  offsetof the word.
/// @param max_steps     Most nodes to visit.
/// @param result        Where the sum goes; written on success only.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when the link, the word or result is misaligned, or result is NULL.
///
/// Context: as hmm_soft_fill().
/// Source: ours; promise 2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_chase_sum_u64(
    device: *mut hmm_soft_device,
    head: *const c_void,
    next_offset: usize,
    value_offset: usize,
    max_steps: u64,
    result: *mut u64,
) -> c_int {
    let (next_offset, value_offset) = (next_offset as u64, value_offset as u64);
    let kernel = Kernel::ChaseSumU64 { head: address(head), next_offset, value_offset, max_steps };
    with_result(device, kernel, result, |sum| sum).into_c()
}

/// The device adds to a 64-bit word, atomically towards all its kernels; the word's page migrates
/// first.
///
/// @param device  The device.
/// @param addr    The word.
/// @param value   What to add, modulo 2^64.
/// @param old     Where the value before goes; NULL if it is not wanted. Written on success only.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when a pointer is misaligned;
///  - -EOPNOTSUPP: the policy is HMM_SOFT_NEVER.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_atomic_add_u64(
    device: *mut hmm_soft_device,
    addr: *mut u64,
    value: u64,
    old: *mut u64,
) -> c_int {
    let kernel = Kernel::AtomicAddU64 { addr: address(addr), value };
    if old.is_null() {
        return plain(device, kernel);
    }
    with_result(device, kernel, old, |old| old).into_c()
}

/// The device adds to words at regular distances, by plain loads and stores.
///
/// @param device  The device.
/// @param addr    The first word.
/// @param count   Words.
/// @param stride  Bytes from one word to the next: a multiple of 8, at least 8.
/// @param value   What to add to each, modulo 2^64.
/// @return As hmm_soft_fill(), or:
///  - -EINVAL: also when addr is misaligned or stride is bad.
///
/// Context: as hmm_soft_fill().
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_add_u64(
    device: *mut hmm_soft_device,
    addr: *mut u64,
    count: usize,
    stride: usize,
    value: u64,
) -> c_int {
    let (count, stride) = (count as u64, stride as u64);
    plain(device, Kernel::AddU64 { addr: address(addr), count, stride, value })
}
