//! The suites beside the Rust tests: documentation tests, C tests, every example as a smoke test, Python tests.

use super::rust_tests::Program;
use crate::workspace;
use std::path::PathBuf;
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
    /// Whether it counts its own tests; else it is one.
    pub(crate) counts: bool,
}

/// The examples in the documentation of the Rust crates.
pub(crate) fn doc() -> Job {
    let mut command = workspace::cargo();
    command.args(["test", "--doc", "--workspace", "--quiet"]);
    // The latter is hmm-core under another name.
    command.args(["--exclude", "hmm-py", "--exclude", "hmm-schedules"]);
    suite("documentation tests", command)
}

/// The tests that are written in C.
pub(crate) fn c() -> Job {
    let mut command = Command::new("bash");
    command.arg("tests/c/run.sh");
    suite("tests/c/run.sh", command)
}

/// Only builds the tests that are written in C.
pub(crate) fn c_build() -> Job {
    let mut job = c();
    job.command.env("BUILD_ONLY", "1");
    job
}

/// The programs that [`c_build`] built, one by one.
pub(crate) fn c_programs() -> Result<Vec<Job>, String> {
    let built = workspace::target_dir().join("tests-c");
    let folder = workspace::root().join("tests/c");
    let sources = workspace::files(&folder, &["c"])?;
    let names = sources.iter().map(|source| workspace::below(&folder, &source.with_extension("")));
    let programs = names.filter(|name| !name.ends_with("_other_unit"));
    let job = |name: String| {
        let job = suite(&format!("tests/c/{name}"), Command::new(built.join(&name)));
        Job { limit: EXAMPLE_LIMIT, ..job }
    };
    Ok(programs.chain([String::from("migrate-static")]).map(job).collect())
}

/// The tests of libhmm_preload.so.
pub(crate) fn preload() -> Job {
    let mut command = Command::new("bash");
    command.arg("tests/preload/run.sh");
    suite("tests/preload/run.sh", command)
}

/// The Python tests.
pub(crate) fn python() -> Job {
    let mut command = interpreter();
    command.args(["-m", "pytest", "-q", "-rs", "hmm-py/tests"]);
    suite("hmm-py/tests", command)
}

/// Every example, in its small form.
pub(crate) fn examples(programs: &[Program]) -> Result<Vec<Job>, String> {
    let root = workspace::root();
    let mut jobs = Vec::new();
    for source in workspace::files(&root.join("examples/c"), &["c"])? {
        let stem = source.file_stem().unwrap_or_default();
        let built = workspace::target_dir().join("demo").join(stem);
        jobs.push(example(&workspace::below(&root, &source), Command::new(built)));
    }
    for program in programs.iter().filter(|program| program.is_example && !program.is_test) {
        let name = format!("examples/rust/{}.rs", program.name);
        jobs.push(example(&name, Command::new(&program.path)));
    }
    for script in workspace::files(&root.join("examples/python"), &["py"])? {
        let mut command = interpreter();
        command.arg(&script);
        jobs.push(example(&workspace::below(&root, &script), command));
    }
    Ok(jobs)
}

fn example(name: &str, mut command: Command) -> Job {
    command.current_dir(workspace::root());
    if let Some((_, arguments)) = SMALL.iter().find(|(example, _)| *example == name) {
        command.args(*arguments);
    }
    Job { name: name.to_string(), command, limit: EXAMPLE_LIMIT, counts: false }
}

fn suite(name: &str, mut command: Command) -> Job {
    command.current_dir(workspace::root());
    Job { name: name.to_string(), command, limit: SUITE_LIMIT, counts: true }
}

/// The interpreter that `make python` set up.
pub(crate) fn interpreter() -> Command {
    let venv: PathBuf = workspace::root().join(".venv");
    let mut command = Command::new(venv.join("bin/python"));
    command.env("VIRTUAL_ENV", venv).env("PYTHONUNBUFFERED", "1");
    command
}
