//! Counting what passed, and reading the counts that other test programs print.

use std::fmt;
use std::ops::AddAssign;

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// All went well.
    pub(crate) passed: usize,
    /// Something did not.
    pub(crate) failed: usize,
    /// Could not be tried here; the reason was printed.
    pub(crate) skipped: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl Tally {
    /// One test.
    pub(crate) fn one(success: bool, output: &str) -> Self {
        let skipped = success && skip_reason(output).is_some();
        Self {
            passed: usize::from(success && !skipped),
            failed: usize::from(!success),
            skipped: usize::from(skipped),
        }
    }

    /// What a test program's own report says: TAP lines, or closing lines like pytest's and cargo's. A program that
    /// counts nothing is one test; one that fails without counting a failure has failed once.
    pub(crate) fn of_report(success: bool, report: &str) -> Self {
        let mut tally = tap(report);
        if tally == Self::default() {
            tally = closing_lines(report);
        }
        if tally == Self::default() {
            return Self::one(success, report);
        }
        if !success && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }
}

/// The reason why a test was skipped, if its output gives one.
pub(crate) fn skip_reason(output: &str) -> Option<&str> {
    output.lines().find_map(|line| line.strip_prefix("skipped: "))
}

/// A test that was skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Skip {
    /// Which.
    pub(crate) name: String,
    /// Why.
    pub(crate) reason: String,
}

/// What a program skipped: itself, or tests of its own, in TAP lines or in pytest's summary (`-rs`).
pub(crate) fn skips(program: &str, report: &str) -> Vec<Skip> {
    let skip = |name: String, reason: &str| Skip { name, reason: reason.trim().to_string() };
    let own = |line: &str| {
        if let Some((test, reason)) = skipped_by_tap(line) {
            return Some(skip(format!("{program} {test}"), reason));
        }
        let (place, reason) = line.strip_prefix("SKIPPED ")?.split_once(": ")?;
        Some(skip(place.to_string(), reason))
    };
    let found: Vec<Skip> = report.lines().filter_map(own).collect();
    if !found.is_empty() {
        return found;
    }
    vec![skip(program.to_string(), skip_reason(report).unwrap_or("no reason given"))]
}

/// The name and the reason in a TAP line of a skipped test.
fn skipped_by_tap(line: &str) -> Option<(&str, &str)> {
    let at = line.to_ascii_uppercase().find("# SKIP")?;
    let name = line.strip_prefix("ok ")?.get(..at.checked_sub(3)?)?.trim();
    let name = name.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ' || c == '-');
    Some((name, &line[at + "# SKIP".len()..]))
}

/// Counts lines of the Test Anything Protocol. A test that was announced and did not come has failed.
fn tap(report: &str) -> Tally {
    let (mut tally, mut planned) = (Tally::default(), 0usize);
    for line in report.lines() {
        if line.starts_with("not ok ") {
            tally.failed += 1;
        } else if line.starts_with("ok ") {
            let skipped = skipped_by_tap(line).is_some();
            tally.skipped += usize::from(skipped);
            tally.passed += usize::from(!skipped);
        } else if let Some(count) = line.strip_prefix("1..") {
            planned += count.trim().parse().unwrap_or(0);
        }
    }
    tally.failed += planned.saturating_sub(tally.passed + tally.failed + tally.skipped);
    tally
}

/// Cargo closes each program's part with a line of its own; every other runner has one closing line, the last.
fn closing_lines(report: &str) -> Tally {
    let mut tally = Tally::default();
    report
        .lines()
        .filter(|line| line.starts_with("test result:"))
        .for_each(|line| tally += counts(line));
    if tally != Tally::default() {
        return tally;
    }
    report.lines().rev().map(counts).find(|line| *line != Tally::default()).unwrap_or_default()
}

/// Reads `3 passed, 1 skipped in 0.1s` and `test result: ok. 3 passed; 0 failed; 1 ignored`.
fn counts(line: &str) -> Tally {
    let mut tally = Tally::default();
    let words: Vec<&str> =
        line.split([' ', ',', ';', '=']).filter(|word| !word.is_empty()).collect();
    for pair in words.windows(2) {
        let Ok(count) = pair[0].parse::<usize>() else { continue };
        match pair[1] {
            "passed" => tally.passed += count,
            "failed" | "error" | "errors" => tally.failed += count,
            "skipped" | "ignored" => tally.skipped += count,
            _ => {}
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: usize, failed: usize, skipped: usize) -> Tally {
        Tally { passed, failed, skipped }
    }

    #[test]
    fn a_skipped_test_gives_its_reason() {
        assert_eq!(Tally::one(true, "x\nskipped: no userfaultfd\n"), tally(0, 0, 1));
        assert_eq!(Tally::one(true, "nothing was skipped: all is well"), tally(1, 0, 0));
        assert_eq!(Tally::one(false, "skipped: but it failed"), tally(0, 1, 0));
    }

    #[test]
    fn reports_of_other_runners_are_read() {
        let tap = "1..3\nok 1 - a\nnot ok 2 - b\nok 3 - c # SKIP no compiler\n";
        assert_eq!(Tally::of_report(false, tap), tally(1, 1, 1));
        assert_eq!(Tally::of_report(true, "..s\n12 passed, 1 skipped in 0.31s\n"), tally(12, 0, 1));
        assert_eq!(
            Tally::of_report(false, "== 2 failed, 3 passed, 1 error in 1s =="),
            tally(3, 3, 0)
        );
        let cargo = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out";
        assert_eq!(Tally::of_report(true, &format!("{cargo}\n\n{cargo}\n")), tally(6, 0, 2));
    }

    #[test]
    fn announced_tests_that_do_not_come_have_failed() {
        assert_eq!(Tally::of_report(false, "1..3\nok 1 - a\n"), tally(1, 2, 0));
        assert_eq!(Tally::of_report(true, "1..2\nok 1 - a\n"), tally(1, 1, 0));
        assert_eq!(Tally::of_report(false, "1..2\n"), tally(0, 2, 0));
    }

    #[test]
    fn skipped_tests_have_names_and_reasons() {
        let skip = |name: &str, reason: &str| Skip { name: name.into(), reason: reason.into() };
        let tap = "1..2\nok 1 - a - b\nok 2 - c # SKIP no engine: x\n";
        assert_eq!(skips("t/x", tap), [skip("t/x c", "no engine: x")]);
        let pytest = "s\nSKIPPED [2] t/a.py:12: no engine: x\n1 passed, 2 skipped in 0.1s\n";
        assert_eq!(skips("py", pytest), [skip("[2] t/a.py:12", "no engine: x")]);
        assert_eq!(skips("one", "skipped: why\n"), [skip("one", "why")]);
    }

    #[test]
    fn a_report_without_counts_is_one_test() {
        assert_eq!(Tally::of_report(true, "fine"), tally(1, 0, 0));
        assert_eq!(Tally::of_report(false, "Segmentation fault"), tally(0, 1, 0));
        assert_eq!(Tally::of_report(false, "ok 1 - a\ncrash"), tally(1, 1, 0));
    }
}
