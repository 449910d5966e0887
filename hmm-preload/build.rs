//! What cargo does not say to the linker by itself: the SONAME, and that the library stays loaded once it is.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libhmm_preload.so");
    // libhmm keeps the address of `hmm_preload_attach`, and calls are under way in the wrappers at any time.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo::rerun-if-changed=build.rs");
}
