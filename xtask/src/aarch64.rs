//! Compiles the workspace for aarch64 and runs the tests of the model engine under qemu's user mode. That shows what
//! depends on the processor: layouts, atomics, the C library. It shows nothing of the kernel there.
//!
//! Three pieces are needed that not every machine has. Without them the chore says which, and how to get them.

use crate::workspace;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
/// The emulator, and the name of its build without shared libraries.
const EMULATORS: [&str; 2] = ["qemu-aarch64", "qemu-aarch64-static"];
/// Seconds for one test program. The slowest, `model_properties`, takes a minute on two cores.
const PROGRAM_LIMIT: u32 = 300;
/// Unit tests that ask the real kernel about mappings: the emulator refuses the ioctls that they need.
const KERNEL_TESTS: &str = "engine::linux";

/// Compiles everything and runs the model's tests. A missing piece is a failure only if `require` says so.
pub(crate) fn run(require: bool) -> Result<(), String> {
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) if require => return Err(missing),
        Err(missing) => {
            println!("skipped: {missing}");
            return Ok(());
        }
    };
    tools.compile()?;
    tools.run_model_tests()
}

/// What it takes beside cargo.
#[derive(Debug)]
struct Tools {
    /// The emulator.
    emulator: &'static str,
    /// The folder in which the emulator finds the C library of the target.
    root: PathBuf,
}

impl Tools {
    /// Looks for every piece, so that one answer names all that are missing.
    fn find() -> Result<Self, String> {
        let mut missing = Vec::new();
        if !has_standard_library() {
            missing.push(format!("no Rust library for {TARGET}: rustup target add {TARGET}"));
        }
        let root = target_root();
        if root.is_none() {
            missing.push(format!(
                "no {LINKER} with a C library: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
            ));
        }
        let emulator = EMULATORS.into_iter().find(|name| said(name, &["--version"]).is_some());
        if emulator.is_none() {
            missing.push(format!("no {}: apt-get install qemu-user", EMULATORS[0]));
        }
        match (emulator, root) {
            (Some(emulator), Some(root)) if missing.is_empty() => Ok(Self { emulator, root }),
            _ => Err(missing.join("; ")),
        }
    }

    /// Builds and links the libraries, the Python module and all test programs.
    fn compile(&self) -> Result<(), String> {
        let all = ["--workspace", "--exclude", "xtask"];
        // A test program of the Python module would need Python's library for the target; the module itself does not.
        let tests = ["--exclude", "hmm-py"];
        succeed(self.cargo("build").args(all), "the libraries do not build")?;
        let mut test = self.cargo("test");
        succeed(test.args(all).args(tests).arg("--no-run"), "the tests do not build")?;
        println!("{TARGET}: libraries, Python module and tests are built");
        Ok(())
    }

    /// Runs the model's tests and the unit tests that leave the kernel alone, each program under a time limit.
    fn run_model_tests(&self) -> Result<(), String> {
        let mut cargo = self.cargo("test");
        cargo.args(["--package", "hmm-core", "--package", "hmm-soft", "--package", "hmm-capi"]);
        cargo.args(["--lib", "--test", "model*", "--no-fail-fast", "--", "--skip", KERNEL_TESTS]);
        cargo.stderr(Stdio::inherit());
        let output = cargo.output().map_err(|error| format!("cannot start cargo: {error}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        let tally = Tally::of(&said);
        if !output.status.success() {
            println!("{said}");
        }
        println!("skipped under the emulator: unit tests of {KERNEL_TESTS}");
        println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
        match (output.status.success(), tally.passed) {
            (false, _) => Err(format!("{TARGET}: some tests failed")),
            (true, 0) => Err(format!("{TARGET}: no test ran")),
            (true, _) => Ok(()),
        }
    }

    /// Cargo with everything that it must know of the target.
    fn cargo(&self, command: &str) -> Command {
        let name = TARGET.replace('-', "_");
        let setting = format!("CARGO_TARGET_{}", name.to_ascii_uppercase());
        let runner = format!("timeout --signal=KILL {PROGRAM_LIMIT} {}", self.emulator);
        let mut cargo = workspace::cargo();
        cargo
            .args([command, "--target", TARGET])
            .env(format!("{setting}_LINKER"), LINKER)
            .env(format!("{setting}_RUNNER"), runner)
            .env(format!("CC_{name}"), LINKER)
            .env("QEMU_LD_PREFIX", &self.root)
            // The Python of this machine says nothing about the target; the stable interface needs none.
            .env("PYO3_NO_PYTHON", "1")
            .env("PYO3_BUILD_EXTENSION_MODULE", "1")
            .current_dir(workspace::root());
        cargo
    }
}

/// Whether the compiler that cargo uses has the standard library of the target.
fn has_standard_library() -> bool {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| String::from("rustc"));
    let Some(folder) = said(&rustc, &["--print", "target-libdir", "--target", TARGET]) else {
        return false;
    };
    workspace::files(Path::new(folder.trim()), &["rlib"]).is_ok_and(|libraries| {
        let mut names = libraries.iter().filter_map(|path| path.file_name()?.to_str());
        names.any(|name| name.starts_with("libstd-"))
    })
}

/// The folder that is the root directory for programs of the target. The linker knows the loader's file only if the C
/// library is there.
fn target_root() -> Option<PathBuf> {
    said(LINKER, &["-print-file-name=crt1.o"]).filter(|file| file.starts_with('/'))?;
    let loader = said(LINKER, &["-print-file-name=ld-linux-aarch64.so.1"])?;
    let folder = Path::new(loader.trim()).parent()?.canonicalize().ok()?;
    folder.parent().filter(|_| loader.starts_with('/')).map(Path::to_path_buf)
}

/// What a program prints, if it is there and ends well.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs cargo to its end.
fn succeed(cargo: &mut Command, otherwise: &str) -> Result<(), String> {
    match cargo.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(format!("{TARGET}: {otherwise}")),
        Err(error) => Err(format!("cannot start cargo: {error}")),
    }
}

/// How many tests ended how.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Tally {
    /// Reads what test programs say one after the other. One that says how many tests it runs but not how they ended
    /// has crashed, or was killed when its time was over: that is one failure.
    fn of(report: &str) -> Self {
        let mut tally = Self::default();
        let begun = report.lines().filter(|line| line.starts_with("running ")).count();
        let mut ended = 0;
        for line in report.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            ended += 1;
            for part in line.split(['.', ';']) {
                tally.add(part.trim());
            }
        }
        tally.failed += usize::saturating_sub(begun, ended);
        tally
    }

    /// Adds one part of a closing line, like `3 passed`.
    fn add(&mut self, part: &str) {
        let Some((count, word)) = part.split_once(' ') else { return };
        let Ok(count) = count.parse::<usize>() else { return };
        match word {
            "passed" => self.passed += count,
            "failed" => self.failed += count,
            "ignored" | "filtered out" => self.skipped += count,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\nrunning 2 tests\ntest a ... ok\ntest b ... ok\n\ntest result: ok. 2 passed; 0 failed; \
                        1 ignored; 0 measured; 4 filtered out; finished in 1.18s\n";

    #[test]
    fn closing_lines_are_added_up() {
        let bad = GOOD.replace("ok. 2 passed; 0 failed", "FAILED. 1 passed; 1 failed");
        let tally = Tally::of(&format!("{GOOD}{bad}"));
        assert_eq!(tally, Tally { passed: 3, failed: 1, skipped: 10 });
    }

    #[test]
    fn a_program_that_was_killed_is_a_failure() {
        let tally = Tally::of(&format!("running 5 tests\ntest a ... ok\n{GOOD}"));
        assert_eq!(tally, Tally { passed: 2, failed: 1, skipped: 5 });
    }

    #[test]
    fn a_program_that_is_missing_says_nothing() {
        assert_eq!(said("no-such-program-of-libhmm", &[]), None);
        assert_eq!(said("sh", &["-c", "echo yes"]).as_deref(), Some("yes\n"));
        assert_eq!(said("sh", &["-c", "echo no; exit 1"]), None);
    }
}
