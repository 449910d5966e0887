//! The version, at run time.

use std::ffi::{c_char, c_uint};

/// The version as one number, like the header's `HMM_VERSION_NUMBER`.
pub const VERSION_NUMBER: c_uint = number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
    | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
    | number(env!("CARGO_PKG_VERSION_PATCH"));

const fn number(digits: &str) -> c_uint {
    let (bytes, mut value, mut at) = (digits.as_bytes(), 0, 0);
    while at < bytes.len() {
        value = value * 10 + (bytes[at] - b'0') as c_uint;
        at += 1;
    }
    value
}

/// The version of the library that runs, which may be newer than the header that was compiled in.
///
/// A program that needs something of version 0.2.0 asks for `hmm_version() >= HMM_VERSION(0, 2,
/// 0)`.
///
/// @return The number that HMM_VERSION() composes: major << 16 | minor << 8 | patch.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub extern "C" fn hmm_version() -> c_uint {
    VERSION_NUMBER
}

/// The version of the library that runs, as text.
///
/// @return A constant string such as "0.1.0".
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub extern "C" fn hmm_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
