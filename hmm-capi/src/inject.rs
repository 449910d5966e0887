//! Failures on request, for C.

use crate::handle::check_pointer;
use crate::ret::IntoC;
use hmm_core::inject;
use std::ffi::{CStr, c_char, c_int};

/// Lets calls to the kernel, allocations and callbacks fail now and then, on real memory, for tests
/// of drivers and programs.
///
/// The rules are those of the environment variable HMM_INJECT, such as "move=EBUSY/10,arena/100":
/// one UFFDIO_MOVE in ten says EBUSY, one allocation of the library in a hundred fails. An empty
/// text ends all failures. Pages stay where they are, or the call is tried again; no data is lost.
///
/// @param rules  A NUL-terminated text; replaces all rules of the process.
/// @return 0, or (and then nothing was changed):
///  - -EINVAL: rules is NULL.
///  - -EOPNOTSUPP: a rule makes no sense; hmm_last_error() names it and lists the points.
///
/// Context: any thread, but not inside a callback (it may allocate).
/// Source: ours; the kernel has CONFIG_FAULT_INJECTION for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_inject(rules: *const c_char) -> c_int {
    check_pointer(rules.cast::<u8>(), "rules is NULL")
        .and_then(|()| {
            // SAFETY: a terminated string, by the caller's promise.
            let rules = unsafe { CStr::from_ptr(rules) };
            inject::configure(&rules.to_string_lossy())
        })
        .into_c()
}
