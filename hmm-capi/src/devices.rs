//! `struct hmm_device`: a device to hang device memory on, for drivers that have none of their own.

use crate::error::record_outcome;
use crate::handle::{Public, Table, lock};
use crate::ret::IntoC;
use hmm_core::{Error, Result, VirtAddr};
use std::ffi::{c_uint, c_ulong, c_void};
use std::ptr;
use std::sync::{Arc, Mutex};

/// A device, as far as the library knows devices: the driver's own pointer, and room.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct device {
    /// The driver's, for dev_get_drvdata() and dev_set_drvdata().
    pub driver_data: *mut c_void,
    /// Room for later versions.
    pub reserved: [c_ulong; 3],
}

/// A device without hardware. Pass its device member to hmm_devmem_add().
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_device {
    /// What hmm_devmem_add() takes.
    pub device: device,
    /// Its number, from 0 on; 256 exist.
    pub minor: c_uint,
    /// Room for later versions.
    pub reserved: [c_uint; 3],
}

impl Public for hmm_device {
    const EMPTY: Self = Self {
        device: device { driver_data: ptr::null_mut(), reserved: [0; 3] },
        minor: 0,
        reserved: [0; 3],
    };
}

/// Devices at once (`HMM_DEVICE_MAX`).
const DEVICES_MAX: usize = 256;

/// What stands behind a device: its number.
struct Device {
    minor: u32,
}

static DEVICES: Table<hmm_device, Device, DEVICES_MAX> =
    Table::new("not a live hmm_device of this library", "hmm_device numbers (256)");
static NUMBERING: Mutex<()> = Mutex::new(());

fn new(drvdata: *mut c_void) -> Result<*mut hmm_device> {
    let _guard = lock(&NUMBERING);
    let taken = |minor: u32| DEVICES.find(|device| device.minor == minor).is_some();
    let busy =
        Error::Busy { address: VirtAddr::new(0), what: "all 256 hmm_device numbers are taken" };
    let minor = (0..DEVICES_MAX as u32).find(|minor| !taken(*minor)).ok_or(busy)?;
    let handle = DEVICES.insert(Arc::new(Device { minor }))?;
    let public = hmm_device::EMPTY;
    let device = device { driver_data: drvdata, ..public.device };
    DEVICES.edit(handle, hmm_device { device, minor, ..public });
    Ok(handle)
}

/// Makes a device for drivers that have none of their own; a convenience, needed by nothing else.
///
/// @param drvdata  The driver's pointer, kept in device.driver_data.
/// @return The device, to be given back with hmm_device_put(). On failure ERR_PTR(-EBUSY): all 256
/// numbers are taken.
///
/// Context: any thread; does not block for long.
/// Source: hmm_device_new() of kernels v4.14 to v5.2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_device_new(drvdata: *mut c_void) -> *mut hmm_device {
    new(drvdata).into_c()
}

/// Gives a device back. Device memory that was added on it must be removed before.
///
/// @param hmm_device  What hmm_device_new() returned.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a live device (nothing is
/// changed).
///
/// Context: any thread; does not block for long.
/// Source: hmm_device_put() of kernels v4.14 to v5.2.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_device_put(hmm_device: *mut hmm_device) {
    record_outcome(DEVICES.get(hmm_device).map(|_| {
        DEVICES.remove(hmm_device);
    }));
}
