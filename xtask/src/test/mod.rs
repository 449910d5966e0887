//! The one test runner: every Rust test in a process of its own and with a time limit, then the other suites. The
//! last line is `N passed, N failed, N skipped`. It needs nothing installed beside cargo.

pub(crate) mod process;
pub(crate) mod runner;
pub(crate) mod rust_tests;
pub(crate) mod state;
pub(crate) mod suites;
pub(crate) mod surroundings;
pub(crate) mod tally;

use crate::promises;
use runner::Runner;
use std::time::{Duration, Instant};

/// One Rust test takes no longer.
const TEST_LIMIT: Duration = Duration::from_secs(60);
/// A test with one of these words in its name may take longer: it works through many random cases.
const LONG: [&str; 2] = ["stress", "properties"];
/// A long test takes no longer.
const LONG_LIMIT: Duration = Duration::from_secs(240);
/// The suites, in the order in which they run.
const SUITES: [&str; 6] = ["rust", "examples", "doc", "c", "preload", "python"];

/// What the command line asks for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    filter: String,
    suites: Vec<String>,
    limit: Option<Duration>,
    package: Option<String>,
    release: bool,
}

impl Options {
    /// Reads the words behind `cargo xtask test`.
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--suite" => {
                    let name = words.next().filter(|name| SUITES.contains(*name));
                    let name = name.ok_or_else(|| format!("--suite takes one of {SUITES:?}"))?;
                    options.suites.push((*name).to_string());
                }
                "--time-limit" => {
                    let seconds = words.next().and_then(|text| text.parse().ok());
                    let seconds = seconds.ok_or("--time-limit takes a number of seconds")?;
                    options.limit = Some(Duration::from_secs(seconds));
                }
                "--package" => {
                    let name = words.next().ok_or("--package takes a name")?;
                    options.package = Some((*name).to_string());
                }
                "--release" => options.release = true,
                text if text.starts_with('-') => return Err(format!("no such option: {text}")),
                text => options.filter = text.to_string(),
            }
        }
        Ok(options)
    }

    /// Whether a suite is wanted. Unless suites are named, a package means its Rust tests, and a filter means what has
    /// names of its own: Rust tests and examples.
    fn wants(&self, suite: &str) -> bool {
        if !self.suites.is_empty() {
            return self.suites.iter().any(|one| one == suite);
        }
        match suite {
            "rust" => true,
            "examples" => self.package.is_none(),
            _ => self.package.is_none() && self.filter.is_empty(),
        }
    }

    fn limit_of(&self, name: &str) -> Duration {
        let usual =
            if LONG.iter().any(|word| name.contains(word)) { LONG_LIMIT } else { TEST_LIMIT };
        self.limit.unwrap_or(usual)
    }
}

/// Runs the tests and fails if one failed, or if none could be tried.
pub(crate) fn run(options: &Options) -> Result<(), String> {
    let start = Instant::now();
    let mut runner = Runner::default();
    let (rust, examples) = (options.wants("rust"), options.wants("examples"));
    if rust || examples {
        let programs = rust_tests::build(options.package.as_deref(), options.release)?;
        // Unless they are named: `promises` runs them on every engine.
        let is_elsewhere = |name: &str| options.filter.is_empty() && promises::is_promise(name);
        let is_wanted = |name: &str| name.contains(&options.filter) && !is_elsewhere(name);
        for program in programs.iter().filter(|program| rust && program.is_test) {
            runner.run_program(program, is_wanted, |name| options.limit_of(name))?;
        }
        if examples {
            let jobs = suites::examples(&programs)?;
            jobs.iter().filter(|job| is_wanted(&job.name)).for_each(|job| runner.run_job(job));
        }
    }
    for (suite, job) in [
        ("doc", suites::doc()),
        ("c", suites::c()),
        ("preload", suites::preload()),
        ("python", suites::python()),
    ] {
        if options.wants(suite) {
            runner.run_job(&job);
        }
    }
    runner.close(start.elapsed())
}
