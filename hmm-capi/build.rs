//! What cargo does not say to the linker by itself: the SONAME, and that the library stays loaded once it is.

fn main() {
    // While the version is 0.x every minor version may break the ABI, so it is part of the SONAME.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libhmm.so.0.1");
    // Service threads and fault handlers run this code until the process ends: dlclose must not unmap it.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
}
