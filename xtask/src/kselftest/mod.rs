//! `cargo xtask kselftest`: the kernel's own HMM tests, unmodified, on libhmm. Gets `hmm-tests.c` from Debian's kernel
//! source, builds it as the kernel does, runs it with the shim of `examples/dmirror` in place of the kernel's test
//! device, and judges what it says. Nothing of the kernel's source leaves the target folder.

mod judge;
mod keeper;
mod pages;
mod source;
mod watch;

use crate::workspace;
use judge::{Allowed, Report};
use pages::HugePages;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The shim, as `make dmirror` builds it.
const SHIM: &str = "release/libhmm_dmirror.so";
/// The kernel's file behind which one of the tests works.
const GUP_TEST: &str = "/sys/kernel/debug/gup_test";
/// Huge pages of the default size that are reserved. Each test maps one; a child's copy and a device's take more.
const HUGE_PAGES: u64 = 4;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Runs, one after the other; all must end alike.
    runs: u32,
    /// `HMM_ENGINE` for the tests; none: as it is.
    engine: Option<String>,
    /// Whether it is a failure when the kernel's source cannot be had.
    require: bool,
}

impl Options {
    /// Reads the words behind `cargo xtask kselftest`.
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self { runs: 1, engine: None, require: false };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--runs" => {
                    let runs = words.next().and_then(|text| text.parse().ok());
                    options.runs =
                        runs.filter(|runs| *runs > 0).ok_or("--runs takes a number above 0")?;
                }
                "--engine" => {
                    let name = words.next().ok_or("--engine takes a name, as HMM_ENGINE does")?;
                    options.engine = Some((*name).to_string());
                }
                "--require" => options.require = true,
                other => return Err(format!("no such option: {other}")),
            }
        }
        Ok(options)
    }
}

/// Runs the tests as often as asked. A source that cannot be had is a failure only if the options say so.
pub(crate) fn run(options: &Options) -> Result<(), String> {
    let folder = workspace::target_dir().join("kselftest");
    let top = match source::get(&folder) {
        Ok(top) => top,
        Err(missing) if options.require => return Err(missing),
        Err(missing) => {
            println!("skipped: {missing}");
            return Ok(());
        }
    };
    let program = source::build(&top, &folder)?;
    let shim = workspace::target_dir().join(SHIM);
    if !shim.is_file() {
        return Err(format!("{} is missing: make dmirror builds it", shim.display()));
    }
    let pages = HugePages::reserve(HUGE_PAGES)?;
    let allowed = allowed(&pages);
    let ended = run_all(options, &program, &shim, &allowed);
    pages.give_back()?;
    ended
}

/// What may be skipped on this machine.
fn allowed(pages: &HugePages) -> Allowed {
    let gup_test = match std::fs::metadata(GUP_TEST) {
        Ok(_) => None,
        Err(error) => Some(format!("{GUP_TEST}: {error}")),
    };
    let allowed = Allowed { gup_test, huge_pages: pages.missing().map(str::to_string) };
    for reason in [&allowed.gup_test, &allowed.huge_pages].into_iter().flatten() {
        println!("# may be skipped: {reason}");
    }
    allowed
}

/// All runs. The first one that is not as it should be ends them.
fn run_all(
    options: &Options,
    program: &Path,
    shim: &Path,
    allowed: &Allowed,
) -> Result<(), String> {
    let mut first: Option<Report> = None;
    for number in 1..=options.runs {
        let report = run_once(options, program, shim, number)?;
        let faults = judge::faults(&report, allowed);
        if options.runs > 1 {
            println!("# run {number} of {}", options.runs);
        }
        println!("{}", report.tally());
        if !faults.is_empty() {
            for fault in &faults {
                println!("FAILED  {fault}");
            }
            return Err(format!("{} of the kernel's tests are not as they must be", faults.len()));
        }
        let first = first.get_or_insert_with(|| report.clone());
        if *first != report {
            return Err(format!("run {number} ended unlike the first one"));
        }
    }
    Ok(())
}

/// One run. What it says is printed, all of it if it is the only one.
fn run_once(options: &Options, program: &Path, shim: &Path, number: u32) -> Result<Report, String> {
    let mut words: Vec<PathBuf> = vec!["env".into()];
    words.push(format!("LD_PRELOAD={}", preloaded(shim)).into());
    words.push(program.into());
    let mut command = watch::in_session(&words);
    command.current_dir(workspace::root());
    set_engine(&mut command, options);
    println!("# hmm-tests with {}, run {number}", shim.display());
    let seen = watch::run(command, &watch::LIMITS, options.runs == 1)?;
    Ok(Report::of(&seen.lines, &seen.ending, seen.success))
}

/// The shim before what the caller preloads himself.
fn preloaded(shim: &Path) -> String {
    let before = std::env::var("LD_PRELOAD").unwrap_or_default();
    format!("{}{}{before}", shim.display(), if before.is_empty() { "" } else { ":" })
}

fn set_engine(command: &mut Command, options: &Options) {
    if let Some(engine) = &options.engine {
        command.env("HMM_ENGINE", engine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read() {
        let usual = Options { runs: 1, engine: None, require: false };
        assert_eq!(Options::parse(&[]), Ok(usual));
        let all = Options { runs: 10, engine: Some("uffd".into()), require: true };
        assert_eq!(Options::parse(&["--runs", "10", "--engine", "uffd", "--require"]), Ok(all));
        assert!(Options::parse(&["--runs", "0"]).is_err());
        assert!(Options::parse(&["--runs"]).is_err());
        assert!(Options::parse(&["--fast"]).is_err());
    }
}
