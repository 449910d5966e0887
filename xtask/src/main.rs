//! The chores of this repository, as one program: `cargo xtask help` lists them.
#![expect(clippy::print_stdout, reason = "a command line program reports on standard output")]

mod aarch64;
mod header;
mod house_rules;
mod install;
mod kernel_names;
mod kselftest;
mod layering;
mod matrix;
mod promises;
mod source;
mod test;
mod workspace;

use std::process::ExitCode;

const HELP: &str = "\
usage: cargo xtask CHORE

  gen-header [--check]     write include/hmm.h from hmm-capi, or check that the committed one is fresh
  kernel-names             check that docs/KERNEL.md has every name of the header, and says rightly which are there
  layering                 check who uses whom, the length of files, and where unsafe code stands
  test [OPTION]... [TEXT]  run the tests, each in a process of its own and with a time limit
      TEXT                 only tests whose name contains it
      --suite NAME         only this suite: rust, doc, c, examples or python (may be repeated)
      --package NAME       only the Rust tests of this package
      --release            Rust tests with optimisation
      --time-limit SECONDS for one Rust test instead of the default
  aarch64 [--require]      compile everything for aarch64 and run the model engine's tests under qemu's user mode; what
                           is missing for that is named, and is a failure with --require
  matrix [OPTION]...       run the tests in environments that lack something (no userfaultfd, no rights, containers)
      --row NAME           only this row (may be repeated)
      --quick              only the rows and tests that tell the most
      --list               the rows, and what is expected of each
      --prices             what libhmm costs in each row, instead: the benchmark's ratios
  promises [--check]       run the tests of hmm.txt's promises on every engine, and write docs/PROMISES.md, or compare it
  kselftest [OPTION]...    run the kernel's own HMM tests, unmodified; the kernel's source is fetched once
      --runs N             so often, and each run must end alike
      --engine NAME        with this HMM_ENGINE
      --require            it is a failure when the source cannot be had
  install --prefix DIR     install the C library: header, libhmm.so, libhmm.a, pkg-config and CMake files
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match dispatch(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("xtask: {reason}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the chore that the command line names.
fn dispatch(words: &[&str]) -> Result<(), String> {
    match words {
        ["gen-header"] => header::run(false),
        ["gen-header", "--check"] => header::run(true),
        ["kernel-names"] => kernel_names::run(),
        ["layering"] => check_layering(),
        ["test", options @ ..] => test::run(&test::Options::parse(options)?),
        ["aarch64"] => aarch64::run(false),
        ["aarch64", "--require"] => aarch64::run(true),
        ["matrix", options @ ..] => matrix::run(&matrix::Options::parse(options)?),
        ["promises", options @ ..] => promises::run(options),
        ["kselftest", options @ ..] => kselftest::run(&kselftest::Options::parse(options)?),
        ["install", "--prefix", prefix] => install::run(prefix.as_ref()),
        ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            Ok(())
        }
        _ => Err(format!("no such chore: {words:?}\n{HELP}")),
    }
}

/// Reports every broken rule of the house, not only the first.
fn check_layering() -> Result<(), String> {
    let root = workspace::root();
    let mut broken = layering::check(&root)?;
    broken.extend(house_rules::check(&root)?);
    if broken.is_empty() {
        println!("layering: every edge, file length and unsafe block is where it may be");
        return Ok(());
    }
    for line in &broken {
        eprintln!("{line}");
    }
    Err(format!("{} broken rules of the house (ARCHITECTURE.md names them)", broken.len()))
}
