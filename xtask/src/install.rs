//! Installs the C library under a prefix, as a C user expects to find it: header, shared library with its links,
//! static library, pkg-config file and CMake package. Everything refers to its own place, so that the prefix can move.

use crate::workspace::{self, describe};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const MAJOR: &str = env!("CARGO_PKG_VERSION_MAJOR");
const MINOR: &str = env!("CARGO_PKG_VERSION_MINOR");
/// System libraries that the static library needs (`rustc --print native-static-libs`).
const STATIC_NEEDS: &[&str] = &["gcc_s", "util", "rt", "pthread", "m", "dl", "c"];

/// Installs what `cargo build --profile capi -p hmm-capi` built.
pub(crate) fn run(prefix: &Path) -> Result<(), String> {
    let built = workspace::target_dir().join("capi");
    let lib = prefix.join("lib");
    let shared = format!("libhmm.so.{VERSION}");
    let soname = format!("libhmm.so.{MAJOR}.{MINOR}");
    copy(&workspace::root().join("include/hmm.h"), &prefix.join("include/hmm.h"))?;
    copy(&built.join("libhmm.so"), &lib.join(&shared))?;
    copy(&built.join("libhmm.a"), &lib.join("libhmm.a"))?;
    let preload = workspace::target_dir().join("release/libhmm_preload.so");
    copy(&preload, &lib.join("libhmm_preload.so"))?;
    link(&shared, &lib.join(&soname))?;
    link(&soname, &lib.join("libhmm.so"))?;
    write(&lib.join("pkgconfig/hmm.pc"), &pkg_config())?;
    let cmake = lib.join("cmake/Hmm");
    write(&cmake.join("HmmConfig.cmake"), &cmake_config(&shared, &soname))?;
    write(&cmake.join("HmmConfigVersion.cmake"), &cmake_version())?;
    println!("installed libhmm {VERSION} under {}", prefix.display());
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    if !from.is_file() {
        return Err(format!("{} is missing: run `make lib` first", from.display()));
    }
    make_parent(to)?;
    // The old file may be mapped by running programs: it is replaced, not overwritten.
    remove(to)?;
    fs::copy(from, to).map(drop).map_err(|error| describe(to, &error))
}

fn link(target: &str, at: &Path) -> Result<(), String> {
    remove(at)?;
    symlink(target, at).map_err(|error| describe(at, &error))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    make_parent(path)?;
    fs::write(path, text).map_err(|error| describe(path, &error))
}

fn make_parent(path: &Path) -> Result<(), String> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(|error| describe(parent, &error))
}

fn remove(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(describe(path, &error)),
        _ => Ok(()),
    }
}

fn pkg_config() -> String {
    let private: Vec<String> = STATIC_NEEDS.iter().map(|name| format!("-l{name}")).collect();
    let private = private.join(" ");
    format!(
        "prefix=${{pcfiledir}}/../..\n\
         includedir=${{prefix}}/include\n\
         libdir=${{prefix}}/lib\n\
         \n\
         Name: hmm\n\
         Description: Heterogeneous memory management in user space\n\
         Version: {VERSION}\n\
         Cflags: -I${{includedir}}\n\
         Libs: -L${{libdir}} -lhmm\n\
         Libs.private: {private}\n"
    )
}

fn cmake_config(shared: &str, soname: &str) -> String {
    let needs = STATIC_NEEDS.join(";");
    format!(
        "# Targets: Hmm::hmm (shared) and Hmm::hmm_static.\n\
         get_filename_component(_hmm_prefix \"${{CMAKE_CURRENT_LIST_DIR}}/../../..\" ABSOLUTE)\n\
         if(NOT TARGET Hmm::hmm)\n\
         \x20 add_library(Hmm::hmm SHARED IMPORTED)\n\
         \x20 set_target_properties(Hmm::hmm PROPERTIES\n\
         \x20   IMPORTED_LOCATION \"${{_hmm_prefix}}/lib/{shared}\"\n\
         \x20   IMPORTED_SONAME \"{soname}\"\n\
         \x20   INTERFACE_INCLUDE_DIRECTORIES \"${{_hmm_prefix}}/include\")\n\
         \x20 add_library(Hmm::hmm_static STATIC IMPORTED)\n\
         \x20 set_target_properties(Hmm::hmm_static PROPERTIES\n\
         \x20   IMPORTED_LOCATION \"${{_hmm_prefix}}/lib/libhmm.a\"\n\
         \x20   INTERFACE_INCLUDE_DIRECTORIES \"${{_hmm_prefix}}/include\"\n\
         \x20   INTERFACE_LINK_LIBRARIES \"{needs}\")\n\
         endif()\n\
         unset(_hmm_prefix)\n"
    )
}

/// Before 1.0 each minor version has an interface of its own.
fn cmake_version() -> String {
    format!(
        "set(PACKAGE_VERSION {VERSION})\n\
         set(PACKAGE_VERSION_COMPATIBLE FALSE)\n\
         if(\"${{PACKAGE_FIND_VERSION_MAJOR}}.${{PACKAGE_FIND_VERSION_MINOR}}\" STREQUAL \"{MAJOR}.{MINOR}\"\n\
         \x20  AND NOT PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)\n\
         \x20 set(PACKAGE_VERSION_COMPATIBLE TRUE)\n\
         endif()\n\
         if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)\n\
         \x20 set(PACKAGE_VERSION_EXACT TRUE)\n\
         endif()\n"
    )
}
