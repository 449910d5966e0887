//! `cargo xtask promises`: the promises of hmm.txt. Runs the test of each on every engine that works here, and writes
//! docs/PROMISES.md from what it saw, or compares it.

mod document;
mod limits;
mod run;
mod table;

use crate::workspace;
use document::Cells;
use run::{ENGINES, End, Seen};
use std::fs;
use std::time::Instant;

/// What is written.
const DOCUMENT: &str = "docs/PROMISES.md";

/// Whether a test belongs here: it has the number of a promise in its name, and other chores leave it to this one.
pub(crate) fn is_promise(test: &str) -> bool {
    let name = test.rsplit([' ', ':', '/']).next().unwrap_or(test);
    number_of(name).is_some() || name == "promises"
}

/// The number in a test's name.
fn number_of(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("promise_")?.split('_').next()?;
    digits.parse().ok().filter(|number| (1..=table::COUNT).contains(number))
}

/// Runs the tests; `--check` compares the document instead of writing it.
pub(crate) fn run(words: &[&str]) -> Result<(), String> {
    let only_checks = match words {
        [] => false,
        ["--check"] => true,
        other => return Err(format!("no such option: {other:?}")),
    };
    let start = Instant::now();
    let engines = run::engines()?;
    let seen = run::all(&engines)?;
    let failed = report(&seen);
    println!("the promises took {} s", start.elapsed().as_secs());
    if failed > 0 {
        return Err(format!("{failed} tests of promises failed"));
    }
    let path = workspace::root().join(DOCUMENT);
    let old = fs::read_to_string(&path).unwrap_or_default();
    let mut cells = document::cells(&seen)?;
    let missing: Vec<&str> =
        ENGINES.iter().copied().filter(|engine| !engines.contains(engine)).collect();
    if only_checks {
        for engine in &missing {
            println!("not compared: {engine} does not work here");
        }
        keep_what_cannot_be_seen(&mut cells, &document::cells_of(&old), &missing, &seen);
    } else if !missing.is_empty() {
        return Err(format!(
            "{DOCUMENT} is written where every engine works; not here: {missing:?}"
        ));
    }
    let new = document::text(&cells, &seen)?;
    if new == old {
        println!("{DOCUMENT} says what the tests show");
        return Ok(());
    }
    if only_checks {
        print_difference(&old, &new);
        return Err(format!(
            "{DOCUMENT} is not what the tests show: cargo xtask promises writes it"
        ));
    }
    fs::write(&path, new).map_err(|error| workspace::describe(&path, &error))?;
    println!("{DOCUMENT} was written");
    Ok(())
}

/// Prints each failure with what it said, and the counts; returns the number of failures.
fn report(seen: &[Seen]) -> usize {
    let count = |is: fn(&End) -> bool| seen.iter().filter(|one| is(&one.end)).count();
    for one in seen {
        if let End::Failed(said) = &one.end {
            println!("FAILED  {} on {}\n{}", one.test, one.engine, said.trim_end());
        }
    }
    let failed = count(|end| matches!(end, End::Failed(_)));
    let (passed, skipped) =
        (count(|end| *end == End::Passed), count(|end| matches!(end, End::Skipped(_))));
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    failed
}

/// What this machine cannot show is taken as the document has it: engines that do not work here, and tests of what this
/// kernel's engine lacks.
fn keep_what_cannot_be_seen(cells: &mut Cells, old: &Cells, missing: &[&str], seen: &[Seen]) {
    let is_lacking = |number: u8, engine: &str| {
        let here = seen.iter().filter(|one| one.number == number && one.engine == engine);
        here.filter(|one| !limits::is_limited(one.number, one.engine)).find_map(|one| {
            match &one.end {
                End::Skipped(reason)
                    if reason.contains(" lacks ") || reason.contains("there is no") =>
                {
                    Some(reason.clone())
                }
                _ => None,
            }
        })
    };
    for ((number, engine), cell) in cells.iter_mut() {
        let lacking = is_lacking(*number, engine);
        if let Some(reason) = &lacking {
            println!("not compared: promise {number} on {engine}: {reason}");
        }
        if (lacking.is_some() || missing.contains(&engine.as_str()))
            && let Some(before) = old.get(&(*number, engine.clone()))
        {
            cell.clone_from(before);
        }
    }
}

fn print_difference(old: &str, new: &str) {
    let (old, new): (Vec<&str>, Vec<&str>) = (old.lines().collect(), new.lines().collect());
    old.iter().filter(|line| !new.contains(line)).for_each(|line| println!("- {line}"));
    new.iter().filter(|line| !old.contains(line)).for_each(|line| println!("+ {line}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_in_names() {
        assert_eq!(number_of("promise_48_free_runs_once"), Some(48));
        assert_eq!(number_of("promise_99_x"), None);
        assert_eq!(number_of("a_promise_48"), None);
        assert!(is_promise("tests promises range::promise_27_a_fault"));
        assert!(is_promise("tests/c/promises"));
        assert!(!is_promise("tests faults a_promise"));
    }
}
