//! What `xtask install` puts under a prefix is what a C user expects: programs are built against it with nothing but
//! pkg-config's words, shared and static, and run.

use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = r#"
#include <hmm.h>
#include <stdio.h>
int main(void) { return puts(hmm_version_string()) < 0; }
"#;

/// Runs a program and returns what it printed.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{errors}");
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

fn install(prefix: &Path) {
    // A test of its own names the folder: what an earlier run left there is replaced.
    if prefix.exists() {
        std::fs::remove_dir_all(prefix).expect("the old prefix can be removed");
    }
    run(Command::new(env!("CARGO_BIN_EXE_xtask")).args(["install", "--prefix"]).arg(prefix));
}

fn library_is_built() -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    root.join(target).join("capi/libhmm.so").is_file()
}

/// Compiles the program with the words that pkg-config gives, runs it, and returns what it printed.
fn build_and_run(prefix: &Path, name: &str, options: &[&str]) -> String {
    let source = prefix.join("program.c");
    std::fs::write(&source, PROGRAM).expect("the program can be written");
    let words = run(Command::new("pkg-config")
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
        .args(["--cflags", "--libs"])
        .args(options)
        .arg("hmm"));
    let program: PathBuf = prefix.join(name);
    let mut compiler = Command::new("cc");
    compiler.arg("-Wall").arg("-Werror").arg("-o").arg(&program).arg(&source);
    for word in words.split_whitespace() {
        let is_library = word == "-lhmm" && options.contains(&"--static");
        compiler.arg(if is_library { "-l:libhmm.a" } else { word });
    }
    run(&mut compiler);
    run(Command::new(&program).env("LD_LIBRARY_PATH", prefix.join("lib")))
}

#[test]
fn the_links_lead_from_the_plain_name_to_the_versioned_one() {
    if !library_is_built() {
        return eprintln!("skipped: the C library is not built; make lib builds it");
    }
    let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("links");
    install(&prefix);
    let link = |name: &str| std::fs::read_link(prefix.join("lib").join(name)).expect("a link");
    let soname = link("libhmm.so");
    assert_eq!(soname, Path::new("libhmm.so.0.1"));
    assert_eq!(link("libhmm.so.0.1"), Path::new(concat!("libhmm.so.", env!("CARGO_PKG_VERSION"))));
    for file in ["include/hmm.h", "lib/libhmm.a", "lib/cmake/Hmm/HmmConfig.cmake"] {
        assert!(prefix.join(file).is_file(), "{file} is there");
    }
    install(&prefix);
}

#[test]
fn programs_build_with_pkg_config_and_run() {
    if !library_is_built() {
        return eprintln!("skipped: the C library is not built; make lib builds it");
    }
    if Command::new("pkg-config").arg("--version").output().is_err() {
        return eprintln!("skipped: this machine has no pkg-config");
    }
    let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("programs");
    install(&prefix);
    assert_eq!(build_and_run(&prefix, "shared", &[]), env!("CARGO_PKG_VERSION"));
    assert_eq!(build_and_run(&prefix, "static", &["--static"]), env!("CARGO_PKG_VERSION"));
}
