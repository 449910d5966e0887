//! The one test runner: every Rust test in a process of its own and with a time limit, then the other suites. The
//! last line is `N passed, N failed, N skipped`. It needs nothing installed beside cargo.

mod process;
mod rust_tests;
mod state;
mod suites;
mod tally;

use process::Outcome;
use rust_tests::Program;
use std::time::{Duration, Instant};
use suites::Job;
use tally::Tally;

/// One Rust test takes no longer.
const TEST_LIMIT: Duration = Duration::from_secs(60);
/// A test with one of these words in its name may take longer: it works through many random cases.
const LONG: [&str; 2] = ["stress", "properties"];
/// A long test takes no longer.
const LONG_LIMIT: Duration = Duration::from_secs(240);
/// The suites, in the order in which they run.
const SUITES: [&str; 5] = ["rust", "examples", "doc", "c", "python"];

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
        if rust {
            runner.run_rust(&programs, options)?;
        }
        if examples {
            let mut jobs = suites::examples(&programs)?;
            jobs.retain(|job| job.name.contains(&options.filter));
            jobs.into_iter().for_each(|job| runner.run_job(job));
        }
    }
    for (suite, job) in [("doc", suites::doc()), ("c", suites::c()), ("python", suites::python())] {
        if options.wants(suite) {
            runner.run_job(job);
        }
    }
    runner.close(start.elapsed())
}

/// Runs tests one after the other and remembers what failed.
#[derive(Debug, Default)]
struct Runner {
    tally: Tally,
    failures: Vec<String>,
}

impl Runner {
    /// The Rust tests, each in a process of its own.
    fn run_rust(&mut self, programs: &[Program], options: &Options) -> Result<(), String> {
        for program in programs.iter().filter(|program| program.is_test) {
            let tests = match program.tests() {
                Ok(tests) => tests,
                Err(reason) => {
                    self.note_unstarted(&program.name, &reason);
                    continue;
                }
            };
            for test in tests {
                let name = test.full_name();
                if name.contains(&options.filter) {
                    let outcome = process::run(&mut test.command(), options.limit_of(&name))?;
                    let tally = Tally::one(outcome.success, &outcome.said());
                    self.note(&name, &outcome, tally);
                }
            }
        }
        Ok(())
    }

    fn run_job(&mut self, mut job: Job) {
        match process::run(&mut job.command, job.limit) {
            Ok(outcome) => {
                let read = if job.counts { Tally::of_report } else { Tally::one };
                let tally = read(outcome.success, &outcome.said());
                self.note(&job.name, &outcome, tally);
            }
            Err(reason) => self.note_unstarted(&job.name, &reason),
        }
    }

    fn note_unstarted(&mut self, name: &str, reason: &str) {
        println!("FAILED  {name}: {reason}");
        self.failures.push(name.to_string());
        self.tally.failed += 1;
    }

    /// Reports one program's outcome: one line, and everything it said if something failed.
    fn note(&mut self, name: &str, outcome: &Outcome, tally: Tally) {
        let seconds = outcome.time.as_secs_f64();
        let counts = if tally.passed + tally.failed + tally.skipped > 1 {
            format!(" ({tally})")
        } else {
            String::new()
        };
        if tally.failed > 0 {
            println!("FAILED  {name}{counts}  {seconds:.2} s: {}", outcome.ending);
            println!("--- what it said:\n{}\n---", outcome.said().trim_end());
            self.failures.push(name.to_string());
        } else if tally.passed > 0 {
            println!("ok      {name}{counts}  {seconds:.2} s");
        } else {
            let said = outcome.said();
            let reason = tally::skip_reason(&said).unwrap_or("no reason given");
            println!("skipped {name}: {reason}");
        }
        self.tally += tally;
    }

    /// Prints the closing lines.
    fn close(self, time: Duration) -> Result<(), String> {
        println!("\nall tests took {} s", time.as_secs());
        for name in &self.failures {
            println!("failed: {name}");
        }
        println!("{}", self.tally);
        if self.tally.failed > 0 {
            return Err(String::from("some tests failed"));
        }
        if self.tally.passed == 0 {
            return Err(String::from("no test ran: a run in which nothing passes proves nothing"));
        }
        Ok(())
    }
}
