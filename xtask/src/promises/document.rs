//! The text of docs/PROMISES.md, and reading its table again.

use super::limits::{self, CONDITIONS, LIMITS, Remark};
use super::run::{ENGINES, End, MODEL, Seen};
use super::table::{COUNT, SECTIONS, text_of};
use std::collections::{BTreeMap, BTreeSet};

/// What each engine shows of each promise: `yes`, `part`, `no`, or nothing.
pub(super) type Cells = BTreeMap<(u8, String), String>;

const NONE: &str = "–";
const CONDITIONAL: &str = "yes*";

fn columns() -> impl Iterator<Item = &'static str> {
    ENGINES.into_iter().chain([MODEL])
}

/// What was seen, for each promise and engine.
pub(super) fn cells(seen: &[Seen]) -> Result<Cells, String> {
    let mut cells = Cells::new();
    for number in 1..=COUNT {
        for engine in columns() {
            let here = || seen.iter().filter(|one| one.number == number && one.engine == engine);
            let passed = here().any(|one| one.end == End::Passed);
            let skipped = here().any(|one| one.end != End::Passed);
            let limited = limits::is_limited(number, engine);
            let cell = match (passed, skipped) {
                (false, false) if engine == MODEL => NONE,
                (true, false) if limits::is_conditional(number, engine) && !limited => CONDITIONAL,
                (true, false) if !limited => "yes",
                (true, _) => "part",
                (false, _) => "no",
            };
            cells.insert((number, engine.to_string()), cell.to_string());
        }
    }
    Ok(cells)
}

/// The table of a document.
pub(super) fn cells_of(document: &str) -> Cells {
    let mut cells = Cells::new();
    for line in document.lines() {
        let fields: Vec<&str> =
            line.split(" | ").map(|field| field.trim_matches(['|', ' '])).collect();
        let Some(number) = fields.first().and_then(|field| field.parse().ok()) else { continue };
        if fields.len() == 3 + columns().count() {
            for (engine, cell) in columns().zip(&fields[2..]) {
                cells.insert((number, engine.to_string()), (*cell).to_string());
            }
        }
    }
    cells
}

/// The whole document. An error names a cell that needs a reason and has none.
pub(super) fn text(cells: &Cells, seen: &[Seen]) -> Result<String, String> {
    let cell = |number: u8, engine: &str| -> &str {
        cells.get(&(number, engine.to_string())).map_or(NONE, String::as_str)
    };
    let mut out = String::from(HEAD);
    out.push_str("\n| engine | shown | of these with `*` | in part | not shown |\n| --- | --- | --- | --- | --- |\n");
    for engine in columns() {
        let count = |what: &str| (1..=COUNT).filter(|number| cell(*number, engine) == what).count();
        out +=
            &format!("| `{engine}` | {} | {} | {} |\n", count("yes"), count("part"), count("no"));
    }
    for (first, last, title) in SECTIONS {
        out += &format!("\n## {title}\n\n| # | promise |");
        columns().for_each(|engine| out += &format!(" {engine} |"));
        out += " tests |\n| --- | --- |";
        columns().for_each(|_| out += " --- |");
        out += " --- |\n";
        for number in *first..=*last {
            out += &format!("| {number} | {} |", text_of(number));
            for engine in columns() {
                let cell = cell(number, engine);
                let is_shown = ["yes", CONDITIONAL].contains(&cell);
                if ENGINES.contains(&engine) && !is_shown && !limits::is_limited(number, engine) {
                    return Err(format!(
                        "promise {number} is not shown on {engine}, and limits.rs has no reason"
                    ));
                }
                out += &format!(" {cell} |");
            }
            out += &format!(" {} |\n", tests_of(number, seen));
        }
    }
    out.push_str(CONDITIONS_HEAD);
    CONDITIONS.iter().for_each(|remark| out += &line(remark));
    out.push_str(LIMITS_HEAD);
    LIMITS.iter().for_each(|remark| out += &line(remark));
    Ok(out)
}

fn line(remark: &Remark) -> String {
    let engines: Vec<String> = remark.engines.iter().map(|name| format!("`{name}`")).collect();
    let (number, engines) = (remark.number, engines.join(" "));
    format!("| {number} | {engines} | {} | {} |\n", remark.what, remark.instead)
}

/// Links to the tests for real memory; those of the model are all in one file.
fn tests_of(number: u8, seen: &[Seen]) -> String {
    let own = seen.iter().filter(|one| one.number == number && one.engine != MODEL);
    let links: BTreeSet<String> = own
        .map(|one| {
            let name = one.test.trim_start_matches(&format!("promise_{number:02}_"));
            format!("[`{name}`](../{})", one.file)
        })
        .collect();
    if links.is_empty() {
        return String::from(NONE);
    }
    links.into_iter().collect::<Vec<_>>().join(" ")
}

const HEAD: &str = "\
# The promises

What hmm.txt, and the kernel's headers and code of its age, promise to users of HMM, as 82 statements, and which of them
the tests show on which engine. Written by `cargo xtask promises` from the run of the tests; `make test` compares it.

- **yes**: a test shows it, with its hard half, on real memory. `yes*`: under a condition, which stands below.
- **part**: a test shows a part of it; the rest has its reason below.
- **no**: it is not shown, for the reason below.

A test has the number of its promise in its name (`promise_48_free_runs_once`; the table leaves the number out). Each runs
in a process of its own, on each engine. Tests that end in `_in_order` run under `libhmm_preload.so` with
`HMM_LAYOUT=ordered`, which announces changes of the layout before they are made; [GUIDE.md](GUIDE.md) tells of it. The model
engine's are in [model_promises.rs](../hmm-core/tests/model_promises.rs) and its like; there `–` says that the promise is
about real memory or about C.
";

const CONDITIONS_HEAD: &str = "
## What is shown under a condition, and what holds without it

| # | engines | condition | without it |
| --- | --- | --- | --- |
";

const LIMITS_HEAD: &str = "
## What is missing, why, and what there is instead

| # | engines | missing | instead |
| --- | --- | --- | --- |
";

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(number: u8, engine: &'static str, end: End) -> Seen {
        let (test, file) = (format!("promise_{number:02}_x"), String::from("a.rs"));
        Seen { number, engine, test, file, end }
    }

    #[test]
    fn a_cell_tells_what_the_tests_did() {
        let skipped = || End::Skipped("no".into());
        let all = [
            seen(48, "uffd", End::Passed),
            seen(48, "signal", skipped()),
            seen(26, "uffd", End::Passed),
            seen(26, "uffd", skipped()),
        ];
        let cells = cells(&all).expect("they are plain");
        let cell = |number: u8, engine: &str| cells[&(number, engine.to_string())].clone();
        assert_eq!([cell(48, "uffd"), cell(48, "signal"), cell(26, "uffd")], ["yes", "no", "part"]);
        assert_eq!(cell(48, "model"), "–");
    }

    #[test]
    fn the_table_is_read_as_it_is_written() {
        let mut cells = Cells::new();
        for number in 1..=COUNT {
            columns().for_each(|engine| _ = cells.insert((number, engine.into()), "yes".into()));
        }
        let text = text(&cells, &[]).expect("every cell says yes");
        assert_eq!(cells_of(&text), cells);
    }
}
