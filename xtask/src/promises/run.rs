//! Runs the tests of promises: those in Rust one by one, those in C as one program for each engine.

use super::number_of;
use crate::test::process;
use crate::test::rust_tests::{self, Program, Test};
use crate::test::suites;
use crate::test::tally;
use crate::workspace;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// The engines for real memory, as `HMM_ENGINE` has them.
pub(super) const ENGINES: [&str; 3] = ["uffd", "uffd-inline", "signal"];
/// The engine whose tests choose it themselves.
pub(super) const MODEL: &str = "model";
/// One test takes no longer.
const LIMIT: Duration = Duration::from_secs(60);
/// Building a library takes no longer.
const BUILD_LIMIT: Duration = Duration::from_secs(300);
/// Tests whose name ends so run under libhmm_preload.so, which announces changes of the layout.
const IN_ORDER: &str = "_in_order";
/// The packages whose tests are looked through, and the engines that are chosen for them; none: they choose themselves.
const PACKAGES: [(&str, bool); 2] = [("tests", true), ("hmm-core", false)];

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    Passed,
    /// What it said.
    Failed(String),
    /// Why.
    Skipped(String),
}

/// One test on one engine.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) number: u8,
    pub(super) engine: &'static str,
    /// Its name, without modules.
    pub(super) test: String,
    /// The file that holds it, from the root of the repository.
    pub(super) file: String,
    pub(super) end: End,
}

/// Something to run.
struct Job {
    command: Command,
    engine: &'static str,
    /// The test; none for a program that reports several.
    test: Option<String>,
    file: String,
}

fn programs() -> Result<Vec<Program>, String> {
    rust_tests::build(None, false)
}

/// The engines that work here.
pub(super) fn engines() -> Result<Vec<&'static str>, String> {
    let programs = programs()?;
    let probe = programs.iter().find(|one| one.name == "engine" && !one.is_test);
    let probe = probe.ok_or("the program engine was not built")?;
    let mut working = Vec::new();
    for engine in ENGINES {
        let outcome = process::run(probe.command().env("HMM_ENGINE", engine), LIMIT)?;
        if outcome.output.contains(&format!("\"engine\": \"{engine}\"")) {
            working.push(engine);
        }
    }
    if working.is_empty() {
        return Err(String::from("no engine works on this machine"));
    }
    Ok(working)
}

/// Runs every test on each of these engines, and the model's.
pub(super) fn all(engines: &[&'static str]) -> Result<Vec<Seen>, String> {
    let preload = preload()?;
    let mut jobs = Vec::new();
    for program in programs()?.iter().filter(|program| program.is_test) {
        let package = program.package.file_name().unwrap_or_default();
        let Some((_, is_chosen)) = PACKAGES.iter().find(|(name, _)| package == *name) else {
            continue;
        };
        let on = if *is_chosen { engines } else { &[MODEL] };
        let has_number = |test: &Test<'_>| number_of(last_part(&test.name)).is_some();
        for test in program.tests()?.into_iter().filter(has_number) {
            let file = file_of(program, &test.name);
            for engine in on {
                let mut command = test.command();
                command.env("HMM_ENGINE", engine).env("RUST_BACKTRACE", "0");
                if test.name.ends_with(IN_ORDER) {
                    command.env("LD_PRELOAD", &preload).env("HMM_LAYOUT", "ordered");
                }
                let (test, file) = (Some(test.name.clone()), file.clone());
                jobs.push(Job { command, engine, test, file });
            }
        }
    }
    jobs.extend(c_jobs(engines)?);
    work_off(jobs)
}

/// libhmm_preload.so, as `make lib` builds it.
fn preload() -> Result<PathBuf, String> {
    let mut build = workspace::cargo();
    build.args(["build", "--quiet", "--release", "--package", "hmm-preload"]);
    let built = process::run(build.current_dir(workspace::root()), BUILD_LIMIT)?;
    if !built.success {
        return Err(format!("libhmm_preload.so does not build:\n{}", built.said()));
    }
    Ok(workspace::target_dir().join("release/libhmm_preload.so"))
}

/// The file of a Rust test: a program of several has one for each module.
fn file_of(program: &Program, test: &str) -> String {
    let package = program.package.file_name().unwrap_or_default().to_string_lossy();
    match test.split_once("::") {
        Some((module, _)) => format!("{package}/tests/{}/{module}.rs", program.name),
        None => format!("{package}/tests/{}.rs", program.name),
    }
}

fn c_jobs(engines: &[&'static str]) -> Result<Vec<Job>, String> {
    let mut build = suites::c_build();
    build.command.env("ONLY", "promises");
    let built = process::run(&mut build.command, build.limit)?;
    if !built.success {
        return Err(format!("the C tests do not build:\n{}", built.said()));
    }
    let mut jobs = Vec::new();
    for engine in engines {
        for program in suites::c_programs()? {
            if program.name.starts_with("tests/c/promises") {
                let mut command = program.command;
                command.env("HMM_ENGINE", engine);
                jobs.push(Job { command, engine, test: None, file: format!("{}.c", program.name) });
            }
        }
    }
    Ok(jobs)
}

/// Two at a time: tests sleep more than they work, and wait for one another when there are many.
fn work_off(jobs: Vec<Job>) -> Result<Vec<Seen>, String> {
    let (jobs, seen) = (Mutex::new(jobs.into_iter()), Mutex::new(Vec::new()));
    let work = || -> Result<(), String> {
        loop {
            let next = lock(&jobs).next();
            let Some(mut job) = next else { return Ok(()) };
            let found = run_one(&mut job)?;
            lock(&seen).extend(found);
        }
    };
    std::thread::scope(|scope| {
        let workers = [scope.spawn(work), scope.spawn(work)];
        let ended = |worker: std::thread::ScopedJoinHandle<'_, Result<(), String>>| {
            worker.join().unwrap_or_else(|_| Err(String::from("a worker panicked")))
        };
        workers.into_iter().try_for_each(ended)
    })?;
    let mut seen = lock(&seen).clone();
    seen.sort_by(|a, b| {
        (a.number, &a.file, &a.test, a.engine).cmp(&(b.number, &b.file, &b.test, b.engine))
    });
    Ok(seen)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn run_one(job: &mut Job) -> Result<Vec<Seen>, String> {
    let outcome = process::run(&mut job.command, LIMIT)?;
    let said = outcome.said();
    let seen = |name: &str, end: End| -> Result<Seen, String> {
        let test = last_part(name).to_string();
        let number = number_of(&test).ok_or_else(|| format!("{test} names no promise"))?;
        Ok(Seen { number, engine: job.engine, test, file: job.file.clone(), end })
    };
    if let Some(name) = &job.test {
        let end = match (outcome.success, tally::skip_reason(&said)) {
            (false, _) => End::Failed(format!("{said}\n{}", outcome.ending)),
            (true, Some(reason)) => End::Skipped(reason.to_string()),
            (true, None) => End::Passed,
        };
        return Ok(vec![seen(name, end)?]);
    }
    let lines = tap(&outcome.output);
    let whole = lines.len() == planned(&outcome.output);
    if !whole || (!outcome.success && lines.iter().all(|(_, end)| !matches!(end, End::Failed(_)))) {
        return Err(format!("{} on {}: {}\n{said}", job.file, job.engine, outcome.ending));
    }
    lines.into_iter().map(|(name, end)| seen(&name, end)).collect()
}

/// A test's name without the modules around it.
fn last_part(name: &str) -> &str {
    name.rsplit("::").next().unwrap_or(name)
}

fn planned(report: &str) -> usize {
    report.lines().find_map(|line| line.strip_prefix("1..")?.trim().parse().ok()).unwrap_or(0)
}

/// The tests of a report in TAP lines. What stands before a failure tells of it.
fn tap(report: &str) -> Vec<(String, End)> {
    let (mut tests, mut remarks) = (Vec::new(), String::new());
    for line in report.lines() {
        let (line, is_ok) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => {
                remarks.push_str(line);
                remarks.push('\n');
                continue;
            }
        };
        let rest = line.split_once(" - ").map_or(line, |(_, rest)| rest);
        let (name, skip) = match rest.split_once(" # SKIP ") {
            Some((name, reason)) => (name, Some(reason)),
            None => (rest, None),
        };
        let end = match (is_ok, skip) {
            (false, _) => End::Failed(std::mem::take(&mut remarks)),
            (true, Some(reason)) => End::Skipped(reason.to_string()),
            (true, None) => End::Passed,
        };
        remarks.clear();
        tests.push((name.trim().to_string(), end));
    }
    tests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tap_lines_are_tests() {
        let report = "# engine x\n1..3\nok 1 - a\n# why\nnot ok 2 - b\nok 3 - c # SKIP no d\n";
        let expected = [
            ("a".to_string(), End::Passed),
            ("b".to_string(), End::Failed("# why\n".into())),
            ("c".to_string(), End::Skipped("no d".into())),
        ];
        assert_eq!((tap(report), planned(report)), (expected.to_vec(), 3));
    }
}
