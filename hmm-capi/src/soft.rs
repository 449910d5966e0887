//! The soft device: a software accelerator to try things with, and to test against.

use crate::handle::{Opaque, Table, invalid};
use crate::mm::{self, mm_struct};
use crate::ret::IntoC;
use crate::sized::{self, Sized32};
use hmm_core::{AddrRange, Result};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftCounters, SoftDevice};
use std::ffi::{c_int, c_long, c_void};
use std::sync::Arc;
use std::time::Duration;

/// A software accelerator: opaque.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct hmm_soft_device {
    _opaque: [u8; 0],
}

static DEVICES: Table<Opaque, SoftDevice, 64> =
    Table::new("not a live hmm_soft_device of this library", "hmm_soft_device handles (64)");

/// What a soft device shall be like. Set size to sizeof(struct hmm_soft_config), and every member
/// that is left 0 gets its default.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct hmm_soft_config {
    /// sizeof(struct hmm_soft_config).
    pub size: u32,
    /// When pages move to the device: HMM_SOFT_ON_REQUEST (the default), HMM_SOFT_ON_TOUCH or
    /// HMM_SOFT_NEVER.
    pub policy: u32,
    /// Device memory in bytes, a whole number of pages up to 256 GiB. Default: 64 MiB.
    pub memory_bytes: u64,
    /// Added for each batch copied and each device fault, in nanoseconds. Default: none.
    pub latency_ns: u64,
    /// Bytes per second of the copy engine. Default: as fast as memory is.
    pub bandwidth: u64,
    /// Most pages that one CPU fault brings home, 1 to 512. Default: 16.
    pub fault_around: u32,
    /// Device threads, 1 to 64: so many kernels run at once. Default: 1.
    pub threads: u32,
}

// SAFETY: repr(C), u32 first, integers only, no padding: two u32, three u64, two u32.
unsafe impl Sized32 for hmm_soft_config {}

/// What a soft device has counted since it was made. Set size to sizeof(struct hmm_soft_counters)
/// before the call; later versions may add members at the end.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct hmm_soft_counters {
    /// In: sizeof(struct hmm_soft_counters).
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Device page faults: a kernel met a page without a usable entry in the device's page table.
    pub device_faults: u64,
    /// CPU faults on device pages that the device was called for.
    pub cpu_faults: u64,
    /// Pages that moved into device memory.
    pub pages_to_device: u64,
    /// Pages that moved back into system memory, evicted ones included.
    pub pages_to_system: u64,
    /// Pages that moved back to make room for others.
    pub evictions: u64,
    /// Invalidation callbacks received.
    pub invalidations: u64,
    /// Times that a range changed while a device fault looked at it, or a page went away before it
    /// was used.
    pub retries: u64,
    /// Kernels that ended, well or not.
    pub jobs: u64,
}

// SAFETY: repr(C), u32 first, integers only, two u32 before the u64s leave no padding.
unsafe impl Sized32 for hmm_soft_counters {}

impl From<SoftCounters> for hmm_soft_counters {
    fn from(from: SoftCounters) -> Self {
        Self {
            size: 0,
            reserved: 0,
            device_faults: from.device_faults,
            cpu_faults: from.cpu_faults,
            pages_to_device: from.pages_to_device,
            pages_to_system: from.pages_to_system,
            evictions: from.evictions,
            invalidations: from.invalidations,
            retries: from.retries,
            jobs: from.jobs,
        }
    }
}

fn policy_of(number: u32) -> Result<Policy> {
    match number {
        0 => Ok(Policy::OnRequest),
        1 => Ok(Policy::OnTouch),
        2 => Ok(Policy::Never),
        _ => Err(invalid(u64::from(number), "unknown HMM_SOFT_ policy")),
    }
}

fn config_of(from: &hmm_soft_config) -> Result<SoftConfig> {
    let default = SoftConfig::default();
    let or = |value: u32, default: u32| if value == 0 { default } else { value };
    Ok(SoftConfig {
        memory: if from.memory_bytes == 0 { default.memory } else { from.memory_bytes },
        policy: policy_of(from.policy)?,
        latency: Duration::from_nanos(from.latency_ns),
        bandwidth: from.bandwidth,
        fault_around: or(from.fault_around, default.fault_around),
        threads: or(from.threads, default.threads),
    })
}

fn create(mm: *mut mm_struct, config: *const hmm_soft_config) -> Result<*mut hmm_soft_device> {
    let mm = mm::get(mm)?;
    let config = if config.is_null() {
        SoftConfig::default()
    } else {
        // SAFETY: the caller promises a struct whose size member says how large it is.
        config_of(&unsafe { sized::read(config) }?)?
    };
    let device = SoftDevice::new(&mm.core, config)?;
    Ok(DEVICES.insert(device)?.cast())
}

fn get(device: *const hmm_soft_device) -> Result<Arc<SoftDevice>> {
    DEVICES.get(device.cast())
}

fn destroy(device: *mut hmm_soft_device) -> Result<()> {
    get(device)?.close()?;
    DEVICES.remove(device.cast());
    Ok(())
}

/// Makes a soft device on an address space.
///
/// It has memory that the CPU is never given an address of, a page table that is filled by device
/// faults and kept in step by a mirror, a copy engine, and threads that run kernels on the
/// process's own pointers.
///
/// @param mm      The address space.
/// @param config  What it shall be like; NULL for all defaults.
/// @return The device, to be given to hmm_soft_destroy(). On failure ERR_PTR():
///  - -EINVAL: mm is no live handle, or a member of config is out of its bounds;
///  - -ENOMEM;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_create(
    mm: *mut mm_struct,
    config: *const hmm_soft_config,
) -> *mut hmm_soft_device {
    create(mm, config).into_c()
}

/// Takes a soft device down: lets its kernels end, brings all its pages home, frees it.
///
/// @param device  The device.
/// @return 0, or:
///  - -EINVAL: not a live device;
///  - -EBUSY: a kernel or a page did not let go in time: the device stays, nothing is lost, try
///    again.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_destroy(device: *mut hmm_soft_device) -> c_int {
    destroy(device).into_c()
}

/// Runs `call` with the device and the pages that `length` bytes at `addr` touch.
fn on_range(
    device: *mut hmm_soft_device,
    addr: *const c_void,
    length: usize,
    call: impl FnOnce(&SoftDevice, AddrRange) -> Result<usize>,
) -> c_long {
    let range = AddrRange::covering(addr.addr() as u64, length as u64);
    range.and_then(|range| call(&*get(device)?, range)).into_c()
}

/// Moves the pages of a range to the device. May span mappings; pages that cannot migrate stay; a
/// full device takes what fits.
///
/// @param device  The device.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes; every page that they touch is meant.
/// @return Pages that moved, or:
///  - -EINVAL: not a live device, or a bad range;
///  - -EOPNOTSUPP: its policy is HMM_SOFT_NEVER;
///  - -EFAULT: nothing is mapped there;
///  - -EBUSY;
///  - -ENOMEM;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; policy is the driver's (promise 16).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_migrate(
    device: *mut hmm_soft_device,
    addr: *const c_void,
    length: usize,
) -> c_long {
    on_range(device, addr, length, SoftDevice::migrate)
}

/// Moves this device's pages of a range back to system memory.
///
/// @param device  The device.
/// @param addr    Anywhere in the first page.
/// @param length  Bytes; every page that they touch is meant.
/// @return Pages that moved, or:
///  - -EINVAL: not a live device, or a bad range;
///  - -EFAULT: nothing is mapped there;
///  - -EBUSY;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; promise 74.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_bring_home(
    device: *mut hmm_soft_device,
    addr: *const c_void,
    length: usize,
) -> c_long {
    on_range(device, addr, length, SoftDevice::bring_home)
}

/// Reads the counters of a soft device.
///
/// @param device    The device.
/// @param counters  Its size member says how much the caller knows; the rest is filled in.
/// @return 0, or:
///  - -EINVAL: not a live device, counters is NULL or misaligned, or its size is below 4.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_counters(
    device: *const hmm_soft_device,
    counters: *mut hmm_soft_counters,
) -> c_int {
    let now = get(device).map(|device| hmm_soft_counters::from(device.counters()));
    // SAFETY: the caller promises a struct whose size member says how large it is.
    now.and_then(|now| unsafe { sized::write(counters, &now) }).into_c()
}

/// Changes when pages move, from the next device fault on. Pages stay where they are.
///
/// @param device  The device.
/// @param policy  HMM_SOFT_ON_REQUEST, HMM_SOFT_ON_TOUCH or HMM_SOFT_NEVER.
/// @return 0, or:
///  - -EINVAL: not a live device, or an unknown policy.
///
/// Context: any thread; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_set_policy(device: *mut hmm_soft_device, policy: u32) -> c_int {
    get(device)
        .and_then(|device| policy_of(policy).map(|policy| device.set_policy(policy)))
        .into_c()
}

/// Changes how slow the device is.
///
/// @param device      The device.
/// @param latency_ns  Added for each batch copied and each device fault, in nanoseconds.
/// @param bandwidth   Bytes per second of the copy engine; 0 means as fast as memory is.
/// @return 0, or:
///  - -EINVAL: not a live device.
///
/// Context: any thread; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_soft_set_speed(
    device: *mut hmm_soft_device,
    latency_ns: u64,
    bandwidth: u64,
) -> c_int {
    let set = |device: Arc<SoftDevice>| {
        device.set_latency(Duration::from_nanos(latency_ns));
        device.set_bandwidth(bandwidth);
    };
    get(device).map(set).into_c()
}

/// Runs a kernel on a device and waits for it.
pub(crate) fn run(device: *mut hmm_soft_device, kernel: Kernel) -> Result<u64> {
    get(device)?.run(kernel)
}
