//! The suites beside the Rust tests: documentation tests, C tests, every example as a smoke test, Python tests.

use super::rust_tests::Program;
use crate::workspace;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Arguments that make an example small: as a test it shall work, not show off.
const SMALL: &[(&str, &[&str])] = &[
    ("examples/c/wordindex.c", &["README.md", "ARCHITECTURE.md"]),
    ("examples/python/oversubscribe.py", &["--rounds", "1"]),
];
/// A whole suite takes no longer.
const SUITE_LIMIT: Duration = Duration::from_secs(300);
/// One example takes no longer.
const EXAMPLE_LIMIT: Duration = Duration::from_secs(120);

/// A program that is run as a test, or as several.
#[derive(Debug)]
pub(crate) struct Job {
    /// For people.
    pub(crate) name: String,
    /// How to run it.
    pub(crate) command: Command,
    /// How long at most.
    pub(crate) limit: Duration,
}

/// The examples in the documentation of the Rust crates.
pub(crate) fn doc() -> Job {
    let mut command = workspace::cargo();
    command.args(["test", "--doc", "--workspace", "--exclude", "hmm-py", "--quiet"]);
    job("documentation tests", command, SUITE_LIMIT)
}

/// The tests that are written in C.
pub(crate) fn c() -> Job {
    let mut command = Command::new("bash");
    command.arg("tests/c/run.sh");
    job("tests/c/run.sh", command, SUITE_LIMIT)
}

/// The Python tests.
pub(crate) fn python() -> Job {
    let mut command = interpreter();
    command.args(["-m", "pytest", "-q", "-rs", "hmm-py/tests"]);
    job("hmm-py/tests", command, SUITE_LIMIT)
}

/// Every example, in its small form.
pub(crate) fn examples(programs: &[Program]) -> Result<Vec<Job>, String> {
    let root = workspace::root();
    let mut jobs = Vec::new();
    for source in workspace::files(&root.join("examples/c"), &["c"])? {
        let stem = source.file_stem().unwrap_or_default();
        jobs.push(example(
            &root,
            &source,
            Command::new(workspace::target_dir().join("demo").join(stem)),
        ));
    }
    for program in programs.iter().filter(|program| program.is_example && !program.is_test) {
        jobs.push(job(&format!("example {}", program.name), program.command(), EXAMPLE_LIMIT));
    }
    for script in workspace::files(&root.join("examples/python"), &["py"])? {
        let mut command = interpreter();
        command.arg(&script);
        jobs.push(example(&root, &script, command));
    }
    Ok(jobs)
}

fn example(root: &Path, source: &Path, mut command: Command) -> Job {
    let name = workspace::below(root, source);
    if let Some((_, arguments)) = SMALL.iter().find(|(example, _)| *example == name) {
        command.args(*arguments);
    }
    job(&name, command, EXAMPLE_LIMIT)
}

fn job(name: &str, mut command: Command, limit: Duration) -> Job {
    if command.get_current_dir().is_none() {
        command.current_dir(workspace::root());
    }
    Job { name: name.to_string(), command, limit }
}

/// The interpreter that `make python` set up.
fn interpreter() -> Command {
    let venv: PathBuf = workspace::root().join(".venv");
    let mut command = Command::new(venv.join("bin/python"));
    command.env("VIRTUAL_ENV", venv).env("PYTHONUNBUFFERED", "1");
    command
}
