//! The return convention in one place: `Result` becomes `0` or `-errno`, a count or `-errno`, a pointer or
//! `ERR_PTR(-errno)`; the text goes to `hmm_last_error`.

use crate::error::record;
use hmm_core::{Error, Result};
use std::ffi::{c_int, c_long};
use std::ptr;

/// What an exported function ends with.
pub(crate) trait IntoC {
    /// What C gets.
    type C;
    /// Converts, and records an error.
    fn into_c(self) -> Self::C;
}

fn negative(error: &Error) -> c_int {
    record(error);
    -error.errno()
}

impl IntoC for Result<()> {
    type C = c_int;
    fn into_c(self) -> c_int {
        self.map_or_else(|error| negative(&error), |()| 0)
    }
}

impl IntoC for Result<usize> {
    type C = c_long;
    fn into_c(self) -> c_long {
        // A count of bytes or pages of one address space is far below c_long::MAX.
        self.map_or_else(|error| c_long::from(negative(&error)), |count| count as c_long)
    }
}

impl<T> IntoC for Result<*mut T> {
    type C = *mut T;
    fn into_c(self) -> *mut T {
        self.unwrap_or_else(|error| err_ptr(negative(&error)))
    }
}

/// `ERR_PTR` of the kernel: a negative errno in the last page of the address space.
fn err_ptr<T>(errno: c_int) -> *mut T {
    ptr::without_provenance_mut(errno as isize as usize)
}
