//! What children of `fork` get of pages that are away.

use crate::mm::{get, mm_struct};
use crate::ret::IntoC;
use hmm_core::{Error, ForkMode, VirtAddr};
use std::ffi::c_int;

/// The `HMM_FORK_*` numbers of hmm.h.
const MODES: [(c_int, ForkMode); 2] = [(0, ForkMode::Home), (1, ForkMode::DontCopy)];

/// Sets what children of fork() get of pages that are on a device, from the next fork on.
///
/// In every mode a child never reads zeros for data. What does not come home, because its device
/// fails or fork() is called inside a callback, is left out of the child as HMM_FORK_DONT_COPY
/// leaves it out.
///
/// @param mm    The address space.
/// @param mode  HMM_FORK_HOME (the default) or HMM_FORK_DONT_COPY.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, or there is no such mode;
///  - -ENODEV: closed.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; compare MADV_DONTFORK of madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_set_fork_mode(mm: *mut mm_struct, mode: c_int) -> c_int {
    let set = || {
        let what = "the mode is none of HMM_FORK_HOME, HMM_FORK_DONT_COPY";
        let known = MODES.iter().find(|one| one.0 == mode);
        let known = known.ok_or(Error::Invalid { address: VirtAddr::new(0), what })?;
        get(mm)?.core.set_fork_mode(known.1)
    };
    set().into_c()
}

/// Tells what children of fork() get of pages that are on a device.
///
/// @param mm  The address space.
/// @return HMM_FORK_HOME or HMM_FORK_DONT_COPY; -EINVAL when mm is no live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_fork_mode(mm: *const mm_struct) -> c_int {
    let number = get(mm).map(|mm| mm.core.fork_mode() as usize);
    number.into_c() as c_int
}
