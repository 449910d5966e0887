//! Reads what the kernel's tests say and judges it. Their own count is not enough: a test that was skipped while its
//! device was opened is counted as passed.

use crate::test::tally::Tally;

/// Tests that there are: 26 of one device and 3 of two, each for private and for coherent memory.
const COUNT: usize = 58;
/// What the tests say when they begin with one.
const BEGINS: &str = "#  RUN           ";
/// What they say when they skip one.
const SKIPS: &str = "#      SKIP      ";
/// The test that needs a file of the kernel.
const NEEDS_GUP_TEST: &str = "hmm_gup_test";
/// The tests that need huge pages.
const NEED_HUGE_PAGES: [&str; 2] = ["anon_write_hugetlbfs", "compound"];

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Passed,
    /// What it said.
    Failed(Vec<String>),
    /// Why.
    Skipped(String),
}

/// One test.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Instance {
    /// Fixture, variant and test: `hmm.hmm_device_private.migrate`.
    name: String,
    end: End,
}

impl Instance {
    /// The last part of its name.
    fn test(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }
}

/// Why a machine may skip tests; none: it may not.
#[derive(Debug, Default)]
pub(super) struct Allowed {
    /// Why the kernel's file for one of them is not there.
    pub(super) gup_test: Option<String>,
    /// Why there are no huge pages.
    pub(super) huge_pages: Option<String>,
}

impl Allowed {
    fn allows(&self, test: &str) -> bool {
        (test == NEEDS_GUP_TEST && self.gup_test.is_some())
            || (NEED_HUGE_PAGES.contains(&test) && self.huge_pages.is_some())
    }
}

/// What one run of the tests said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    instances: Vec<Instance>,
    /// How many were announced.
    planned: usize,
    /// How the program ended, if it should not have ended so.
    ending: Option<String>,
}

impl Report {
    /// Reads the lines of a run.
    pub(super) fn of(lines: &[String], ending: &str, success: bool) -> Self {
        let mut report = Self {
            instances: Vec::new(),
            planned: 0,
            ending: (!success).then(|| ending.to_string()),
        };
        // The test that has begun and not ended, and what it said.
        let mut begun: Option<(String, Vec<String>)> = None;
        for line in lines {
            if let Some(count) = line.strip_prefix("1..") {
                report.planned = count.trim().parse().unwrap_or(0);
            } else if let Some(name) = line.strip_prefix(BEGINS) {
                report.close(begun.take(), false);
                begun = Some((name.trim_end_matches("...").trim().to_string(), Vec::new()));
            } else if let Some((_, said)) = &mut begun {
                said.push(line.clone());
                if line.starts_with("ok ") || line.starts_with("not ok ") {
                    report.close(begun.take(), line.starts_with("ok "));
                }
            }
        }
        report.close(begun, false);
        report
    }

    /// Notes the end of a test. One that began and said nothing of its end has failed.
    fn close(&mut self, begun: Option<(String, Vec<String>)>, is_ok: bool) {
        let Some((name, said)) = begun else { return };
        let end = match skip_reason(&said) {
            Some(reason) if is_ok => End::Skipped(reason),
            None if is_ok => End::Passed,
            _ => End::Failed(said),
        };
        self.instances.push(Instance { name, end });
    }

    /// How many ended how.
    pub(super) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for instance in &self.instances {
            match instance.end {
                End::Passed => tally.passed += 1,
                End::Failed(_) => tally.failed += 1,
                End::Skipped(_) => tally.skipped += 1,
            }
        }
        tally
    }
}

/// The reason that a test gave, on a line of its own or on the one that counts it.
fn skip_reason(said: &[String]) -> Option<String> {
    said.iter().find_map(|line| {
        let reason = line.strip_prefix(SKIPS).or_else(|| Some(line.split_once("# SKIP")?.1));
        Some(reason?.trim().to_string())
    })
}

/// Everything that is not as it must be, one text each.
pub(super) fn faults(report: &Report, allowed: &Allowed) -> Vec<String> {
    let mut faults: Vec<String> =
        report.instances.iter().filter_map(|instance| fault(instance, allowed)).collect();
    let count = report.instances.len();
    if report.planned != COUNT || count != COUNT {
        let last = report.instances.last().map_or("nothing", |instance| &instance.name);
        faults.push(format!(
            "{COUNT} tests were expected: {} were announced, {count} ran; the last was {last}",
            report.planned
        ));
    }
    let mut names: Vec<&str> = report.instances.iter().map(|one| one.name.as_str()).collect();
    names.sort_unstable();
    let twice = names.windows(2).filter(|pair| pair[0] == pair[1]);
    faults.extend(twice.map(|pair| format!("{} ran twice", pair[0])));
    if let (Some(ending), true) = (&report.ending, faults.is_empty()) {
        faults.push(format!("hmm-tests: {ending}, although no test failed"));
    }
    faults
}

fn fault(instance: &Instance, allowed: &Allowed) -> Option<String> {
    let name = &instance.name;
    match &instance.end {
        End::Failed(said) => Some(format!("{name}\n  {}", said.join("\n  "))),
        End::Skipped(reason) if !allowed.allows(instance.test()) => {
            Some(format!("{name} must not be skipped here: {reason}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a run says in which every test passes but those that `special` speaks for.
    fn said(special: impl Fn(usize) -> Option<Vec<String>>) -> Vec<String> {
        let mut lines = vec![String::from("TAP version 13"), format!("1..{COUNT}")];
        for number in 1..=COUNT {
            let test = if number == 7 { NEEDS_GUP_TEST } else { "test" };
            let name = format!("hmm.variant{number}.{test}");
            lines.push(format!("{BEGINS}{name} ..."));
            lines.extend(special(number).unwrap_or_else(|| {
                vec![format!("#            OK  {name}"), format!("ok {number} {name}")]
            }));
        }
        lines.push(String::from("# PASSED: 58 / 58 tests passed."));
        lines
    }

    fn only(number: usize, lines: &'static [&'static str]) -> Vec<String> {
        said(|one| (one == number).then(|| lines.iter().map(ToString::to_string).collect()))
    }

    fn faults_of(lines: &[String], allowed: &Allowed) -> Vec<String> {
        faults(&Report::of(lines, "exit status: 0", true), allowed)
    }

    #[test]
    fn all_that_pass_are_no_fault() {
        let report = Report::of(&said(|_| None), "exit status: 0", true);
        assert_eq!(report.tally(), Tally { passed: COUNT, failed: 0, skipped: 0 });
        assert_eq!(faults(&report, &Allowed::default()), [""; 0]);
        let killed = Report::of(&said(|_| None), "signal: 9", false);
        assert!(faults(&killed, &Allowed::default())[0].contains("signal: 9"));
    }

    #[test]
    fn a_failure_has_its_name_and_what_was_said() {
        let lines = only(3, &["# x.c:1:test:Expected 0 == 1", "not ok 3 hmm.variant3.test"]);
        let faults = faults_of(&lines, &Allowed::default());
        assert_eq!(faults.len(), 1);
        assert!(faults[0].starts_with("hmm.variant3.test\n") && faults[0].contains("Expected 0"));
    }

    #[test]
    fn a_skip_that_is_counted_as_passed_is_seen() {
        let lines = only(30, &["#      SKIP      no device", "ok 30 hmm.variant30.test"]);
        let faults = faults_of(&lines, &Allowed::default());
        assert_eq!(faults, ["hmm.variant30.test must not be skipped here: no device"]);
    }

    #[test]
    fn only_what_the_machine_lacks_may_be_skipped() {
        let lines = only(7, &["ok 7 # SKIP unable to open it"]);
        assert_eq!(faults_of(&lines, &Allowed::default()).len(), 1);
        let other = Allowed { huge_pages: Some("none".into()), ..Allowed::default() };
        assert_eq!(faults_of(&lines, &other).len(), 1);
        let missing = Allowed { gup_test: Some("not there".into()), ..Allowed::default() };
        assert_eq!(faults_of(&lines, &missing), [""; 0]);
        assert!(other.allows("compound") && !other.allows("migrate"));
    }

    #[test]
    fn tests_that_do_not_come_are_missed() {
        let lines = said(|_| None);
        let faults = faults_of(&lines[..11], &Allowed::default());
        assert_eq!(faults.len(), 1);
        assert!(faults[0].contains("3 ran; the last was hmm.variant3.test"), "{faults:?}");
        // The fourth begins and says nothing.
        let begun = Report::of(&lines[..12], "signal: 11", false);
        assert_eq!(begun.tally(), Tally { passed: 3, failed: 1, skipped: 0 });
    }
}
