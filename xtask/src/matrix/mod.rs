//! `cargo xtask matrix`: the same tests in environments that lack something, one row each. Programs are built once,
//! without confinement; each test runs under `confine`, in a process of its own and with a time limit.

mod engine;
mod price;
mod rows;
mod stage;

use crate::test::process;
use crate::test::runner::Runner;
use crate::test::rust_tests::{self, Program};
use crate::test::suites::{self, Job};
use crate::test::surroundings::Surroundings;
use crate::test::tally::{Skip, Tally};
use engine::Engine;
use rows::{CHOOSERS, ELSEWHERE, PATIENCE, QUICK_ROWS, QUICK_TESTS, ROWS, Row};
use stage::Stage;
use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

/// One test takes no longer. Where mappings are read as text, some take a minute on a busy machine.
const TEST_LIMIT: Duration = Duration::from_secs(120);
/// A stress test takes no longer.
const LONG_LIMIT: Duration = Duration::from_secs(240);
/// Whether an environment can be had is known sooner.
const CHECK_LIMIT: Duration = Duration::from_secs(60);

/// Variables of every row. Other users cannot write into the repository, and need not; where a panic was says enough.
const ALWAYS: &[(&str, &str)] = &[
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("PYTEST_ADDOPTS", "-p no:cacheprovider"),
    ("RUST_BACKTRACE", "0"),
];
/// So many failures are named again at the end of a row.
const MOST_NAMED: usize = 3;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Options {
    rows: Vec<&'static Row>,
    /// Whether the rows were named: then each must run.
    is_named: bool,
    is_quick: bool,
    only_lists: bool,
    /// What the rows cost, instead of whether they work.
    only_prices: bool,
}

impl Options {
    /// Reads the words behind `cargo xtask matrix`.
    pub(crate) fn parse(words: &[&str]) -> Result<Self, String> {
        let mut options = Self {
            rows: Vec::new(),
            is_named: false,
            is_quick: false,
            only_lists: false,
            only_prices: false,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match *word {
                "--row" => {
                    let name = words.next().ok_or("--row takes a name")?;
                    let row = ROWS.iter().find(|row| row.name == *name);
                    options.rows.push(row.ok_or_else(|| format!("no such row: {name}"))?);
                    options.is_named = true;
                }
                "--quick" => options.is_quick = true,
                "--list" => options.only_lists = true,
                "--prices" => options.only_prices = true,
                other => return Err(format!("no such option: {other}")),
            }
        }
        if !options.is_named {
            let is_in = |row: &&Row| !options.is_quick || QUICK_ROWS.contains(&row.name);
            options.rows = ROWS.iter().filter(is_in).collect();
        }
        Ok(options)
    }
}

/// How a row ended.
struct Line {
    row: &'static Row,
    engine: String,
    tally: Tally,
    time: Duration,
    /// Why it failed, or could not be tried.
    trouble: Option<String>,
    /// Whether this machine does not allow it.
    is_impossible: bool,
}

impl Line {
    fn impossible(row: &'static Row, reason: String) -> Self {
        let (engine, trouble) = (String::from("-"), Some(reason));
        let (tally, time) = (Tally::default(), Duration::ZERO);
        Self { row, engine, tally, time, trouble, is_impossible: true }
    }
}

/// Runs the rows, and fails if one does.
pub(crate) fn run(options: &Options) -> Result<(), String> {
    if options.only_lists {
        options.rows.iter().for_each(|row| println!("{}", describe(row)));
        return Ok(());
    }
    if options.only_prices {
        return print_prices(options);
    }
    let programs = rust_tests::build(None, false)?;
    let c_build = process::run(&mut suites::c_build().command, suites::c_build().limit)?;
    if !c_build.success {
        return Err(format!("the C tests do not build:\n{}", c_build.said()));
    }
    let mut lines = Vec::new();
    for row in &options.rows {
        lines.push(run_row(row, &programs, options.is_quick)?);
    }
    print_table(&lines);
    let is_bad = |line: &&Line| line.trouble.is_some() && (options.is_named || !line.is_impossible);
    let bad: Vec<&str> = lines.iter().filter(is_bad).map(|line| line.row.name).collect();
    if !bad.is_empty() {
        return Err(format!("rows that failed: {}", bad.join(" ")));
    }
    if lines.iter().all(|line| line.is_impossible) {
        return Err(String::from("no row can be tried on this machine"));
    }
    Ok(())
}

/// Runs the benchmark in each row, built as users build it.
fn print_prices(options: &Options) -> Result<(), String> {
    let programs = rust_tests::build(Some("hmm-tests"), true)?;
    let mut lines = Vec::new();
    for row in &options.rows {
        let mut surroundings = surroundings_of(row, &programs)?;
        if let Err(reason) = prepare(row, &programs, &mut surroundings).and_then(|(stage, _)| {
            let engine = engine::probe(&programs, &surroundings)?;
            let prices = price::measure(&programs, &surroundings)?;
            drop(stage);
            lines.push((row.name, engine.name.unwrap_or_default(), prices));
            Ok(())
        }) {
            println!("{}: not measured: {reason}", row.name);
        }
    }
    println!("{}", price::table(&lines));
    if lines.is_empty() { Err(String::from("no row could be measured")) } else { Ok(()) }
}

/// A row for people: its name, its meaning, its surroundings, and what is expected.
fn describe(row: &Row) -> String {
    let mut parts: Vec<String> = Vec::new();
    if !row.confine.is_empty() {
        parts.push(format!("confine {}", row.confine.join(" ")));
    }
    parts.extend(row.variables.iter().map(|(name, value)| format!("{name}={value}")));
    if parts.is_empty() {
        parts.push(String::from("nothing changed"));
    }
    let engines = row.engines.join(" or ");
    format!("{}: {}\n    {}\n    engine: {engines}", row.name, row.what, parts.join(", "))
}

fn run_row(row: &'static Row, programs: &[Program], is_quick: bool) -> Result<Line, String> {
    let start = Instant::now();
    println!("\n=== {}", describe(row));
    let mut surroundings = surroundings_of(row, programs)?;
    let (_stage, python) = match prepare(row, programs, &mut surroundings) {
        Ok(prepared) => prepared,
        Err(reason) => {
            println!("not possible: {reason}");
            return Ok(Line::impossible(row, reason));
        }
    };
    let engine = engine::probe(programs, &surroundings)?;
    println!("    found: {}", engine.name.as_deref().unwrap_or("no engine"));
    println!("    because: {}", engine.reason);
    let mut runner = Runner::brief(surroundings);
    run_tests(&mut runner, programs, python, is_quick, row.patience)?;
    print_skips(runner.skips());
    println!("{}: {}", row.name, runner.tally());
    let trouble = trouble_of(row, &engine, &runner);
    if let Some(trouble) = &trouble {
        println!("{} FAILED: {trouble}", row.name);
    }
    let engine = engine.name.unwrap_or_else(|| String::from("none"));
    let (tally, time) = (runner.tally(), start.elapsed());
    Ok(Line { row, engine, tally, time, trouble, is_impossible: false })
}

/// Whether Python tests can run in a row, or why not.
type Python = Result<(), String>;

/// Tries a row's environment, and makes readable what its user could not read. An error says why it cannot be had.
fn prepare(
    row: &Row,
    programs: &[Program],
    surroundings: &mut Surroundings,
) -> Result<(Option<Stage>, Python), String> {
    let check = process::run(&mut surroundings.around(&Command::new("true")), CHECK_LIMIT)?;
    if !check.success {
        return Err(check.said().trim().to_string());
    }
    if row.user().is_none() {
        return Ok((None, Ok(())));
    }
    let stage = Stage::for_programs(surroundings, programs)?;
    let python = stage.python(surroundings);
    Ok((Some(stage), python))
}

fn surroundings_of(row: &Row, programs: &[Program]) -> Result<Surroundings, String> {
    let mut surroundings = Surroundings::default();
    if !row.confine.is_empty() {
        let confine = programs.iter().find(|one| one.name == "confine" && !one.is_test);
        let confine = confine.ok_or("the program confine was not built")?;
        surroundings.before.push(confine.path.clone().into());
        surroundings.before.extend(row.confine.iter().map(Into::into));
        surroundings.before.push("--".into());
    }
    let removed = CHOOSERS.iter().map(|name| ((*name).to_string(), None));
    surroundings.variables.extend(removed);
    let set = row.variables.iter().map(|(name, value)| ((*name).into(), Some((*value).into())));
    surroundings.variables.extend(set);
    surroundings.variables.push((PATIENCE.into(), Some(row.patience.to_string().into())));
    for (name, value) in ALWAYS {
        surroundings.variables.push(((*name).into(), Some((*value).into())));
    }
    Ok(surroundings)
}

/// Runs what belongs to a row: Rust tests, C tests, examples, Python tests.
fn run_tests(
    runner: &mut Runner,
    programs: &[Program],
    python: Python,
    is_quick: bool,
    patience: u32,
) -> Result<(), String> {
    let is_wanted = |name: &str| {
        !ELSEWHERE.iter().any(|start| name.starts_with(start))
            && (!is_quick || QUICK_TESTS.iter().any(|part| name.contains(part)))
    };
    let limit_of =
        |name: &str| patience * if name.contains("stress") { LONG_LIMIT } else { TEST_LIMIT };
    for program in programs.iter().filter(|program| program.is_test) {
        runner.run_program(program, is_wanted, limit_of)?;
    }
    let mut jobs = suites::c_programs()?;
    jobs.extend(suites::examples(programs)?);
    jobs.push(suites::python());
    jobs.iter_mut().for_each(|job| job.limit *= patience);
    for job in jobs.iter().filter(|job| is_wanted(&job.name)) {
        match &python {
            Err(reason) if is_python(job) => runner.note_skipped(&job.name, reason),
            _ => runner.run_job(job),
        }
    }
    Ok(())
}

fn is_python(job: &Job) -> bool {
    job.command.get_program() == suites::interpreter().get_program()
}

/// Why a row has failed, if so.
fn trouble_of(row: &Row, engine: &Engine, runner: &Runner) -> Option<String> {
    let mut reasons = Vec::new();
    let name = engine.name.as_deref();
    if !name.is_some_and(|name| row.engines.contains(&name)) {
        let (found, expected) = (name.unwrap_or("none"), row.engines.join(" or "));
        reasons.push(format!("the engine is {found}, not {expected}"));
    }
    let failures = runner.failures();
    if !failures.is_empty() {
        let named = failures.iter().take(MOST_NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = failures.len().saturating_sub(MOST_NAMED);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        reasons.push(format!("failed: {named}{more}"));
    }
    if runner.has_given_up() {
        reasons.push(String::from("too many tests did not end: the rest was not tried"));
    }
    if runner.tally().passed == 0 {
        reasons.push(String::from("nothing passed, which proves nothing"));
    }
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

/// The skipped tests, by their reasons.
fn print_skips(skips: &[Skip]) {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for skip in skips {
        groups.entry(&skip.reason).or_default().push(&skip.name);
    }
    for (reason, names) in groups {
        println!("skipped, {}: {reason}", names.len());
        names.iter().for_each(|name| println!("    {name}"));
    }
}

fn print_table(lines: &[Line]) {
    let head = ["row", "engine", "passed", "failed", "skipped", "seconds"];
    let [row, engine, passed, failed, skipped, seconds] = head;
    println!("\n{row:<20} {engine:<12} {passed:>6} {failed:>6} {skipped:>7} {seconds:>7}");
    for line in lines {
        let Line { row, engine, tally, time, trouble, is_impossible } = line;
        let verdict = match trouble {
            None => "ok".to_string(),
            Some(reason) if *is_impossible => format!("not possible: {reason}"),
            Some(_) => String::from("FAILED"),
        };
        println!(
            "{:<20} {engine:<12} {:>6} {:>6} {:>7} {:>7} {verdict}",
            row.name,
            tally.passed,
            tally.failed,
            tally.skipped,
            time.as_secs()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_choose_rows() {
        let names = |words: &[&str]| -> Result<Vec<&str>, String> {
            Options::parse(words).map(|options| options.rows.iter().map(|row| row.name).collect())
        };
        assert_eq!(names(&[]).map(|names| names.len()), Ok(ROWS.len()));
        assert_eq!(names(&["--quick"]).map(|names| names.len()), Ok(QUICK_ROWS.len()));
        assert_eq!(names(&["--row", "root", "--row", "gvisor"]), Ok(vec!["root", "gvisor"]));
        assert!(names(&["--row", "moon"]).is_err_and(|reason| reason.contains("moon")));
        assert!(names(&["--slow"]).is_err());
    }

    #[test]
    fn a_row_without_its_engine_or_without_a_passed_test_fails() {
        let row = &ROWS[0];
        let trouble = |name: Option<&str>| {
            let engine = Engine { name: name.map(Into::into), reason: String::new() };
            trouble_of(row, &engine, &Runner::default()).unwrap_or_default()
        };
        assert!(trouble(Some("signal")).contains("the engine is signal, not uffd"));
        assert!(trouble(None).contains("the engine is none"));
        assert!(trouble(Some("uffd")).starts_with("nothing passed"));
    }
}
