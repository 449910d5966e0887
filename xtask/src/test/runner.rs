//! Runs tests one after the other, each in its surroundings, and remembers what became of them.

use super::process::{self, Outcome};
use super::rust_tests::Program;
use super::suites::Job;
use super::surroundings::Surroundings;
use super::tally::{self, Skip, Tally};
use std::time::Duration;

/// A brief runner gives up after so many programs that do not end: they say enough, and cost a time limit each.
const MOST_HUNG: usize = 3;

/// Runs tests and counts them.
#[derive(Debug, Default)]
pub(crate) struct Runner {
    surroundings: Surroundings,
    /// Whether only failures are told one by one.
    is_brief: bool,
    tally: Tally,
    failures: Vec<String>,
    skips: Vec<Skip>,
    hung: usize,
}

impl Runner {
    /// A runner for programs in special surroundings, which tells of failures only.
    pub(crate) fn brief(surroundings: Surroundings) -> Self {
        Self { surroundings, is_brief: true, ..Self::default() }
    }

    /// What was counted so far.
    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// The names of what failed.
    pub(crate) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// What was skipped, and why.
    pub(crate) fn skips(&self) -> &[Skip] {
        &self.skips
    }

    /// Whether so many programs did not end that the others are not tried any more.
    pub(crate) fn has_given_up(&self) -> bool {
        self.is_brief && self.hung >= MOST_HUNG
    }

    /// The tests of a program that are wanted, each in a process of its own with a time limit.
    pub(crate) fn run_program(
        &mut self,
        program: &Program,
        is_wanted: impl Fn(&str) -> bool,
        limit_of: impl Fn(&str) -> Duration,
    ) -> Result<(), String> {
        let tests = match program.tests() {
            Ok(tests) => tests,
            Err(reason) => {
                self.note_unstarted(&program.name, &reason);
                return Ok(());
            }
        };
        for test in tests {
            let name = test.full_name();
            if is_wanted(&name) && !self.has_given_up() {
                let mut command = self.surroundings.around(&test.command());
                let outcome = process::run(&mut command, limit_of(&name))?;
                let tally = Tally::one(outcome.success, &outcome.said());
                self.note(&name, &outcome, tally);
            }
        }
        Ok(())
    }

    /// A program that is a test, or counts tests of its own.
    pub(crate) fn run_job(&mut self, job: &Job) {
        if self.has_given_up() {
            return;
        }
        let mut command = self.surroundings.around(&job.command);
        match process::run(&mut command, job.limit) {
            Ok(outcome) => {
                let read = if job.counts { Tally::of_report } else { Tally::one };
                let tally = read(outcome.success, &outcome.said());
                self.note(&job.name, &outcome, tally);
            }
            Err(reason) => self.note_unstarted(&job.name, &reason),
        }
    }

    /// A test that could not be tried, counted as skipped.
    pub(crate) fn note_skipped(&mut self, name: &str, reason: &str) {
        self.tally.skipped += 1;
        self.skips.push(Skip { name: name.to_string(), reason: reason.to_string() });
    }

    fn note_unstarted(&mut self, name: &str, reason: &str) {
        println!("FAILED  {name}: {reason}");
        self.failures.push(name.to_string());
        self.tally.failed += 1;
    }

    /// Reports one program's outcome: one line, and everything it said if something failed.
    fn note(&mut self, name: &str, outcome: &Outcome, tally: Tally) {
        let seconds = outcome.time.as_secs_f64();
        let said = outcome.said();
        let counts = if tally.passed + tally.failed + tally.skipped > 1 {
            format!(" ({tally})")
        } else {
            String::new()
        };
        if tally.failed > 0 {
            println!("FAILED  {name}{counts}  {seconds:.2} s: {}", outcome.ending);
            println!("--- what it said:\n{}\n---", said.trim_end());
            self.failures.push(name.to_string());
        } else if !self.is_brief && tally.passed > 0 {
            println!("ok      {name}{counts}  {seconds:.2} s");
        } else if !self.is_brief {
            let reason = tally::skip_reason(&said).unwrap_or("no reason given");
            println!("skipped {name}: {reason}");
        }
        if tally.skipped > 0 {
            self.skips.extend(tally::skips(name, &said));
        }
        self.hung += usize::from(outcome.hung);
        self.tally += tally;
    }

    /// Prints the closing lines.
    pub(crate) fn close(self, time: Duration) -> Result<(), String> {
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
