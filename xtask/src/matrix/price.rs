//! What libhmm costs in a row: the benchmark, run in the row's surroundings.

use crate::test::process;
use crate::test::rust_tests::Program;
use crate::test::surroundings::Surroundings;
use std::time::Duration;

/// The benchmark takes no longer.
const LIMIT: Duration = Duration::from_secs(240);
/// The figures that say most, each a ratio to a bare baseline of the same run.
const FIGURES: &[(&str, &str)] = &[
    ("fault_p50", "touch, uffd loop = 1"),
    ("fault_p50_native", "touch, first touch = 1"),
    ("migrate_out_2m", "out, memcpy = 1"),
    ("migrate_back_2m", "home, memcpy = 1"),
    ("present_access", "present, unwatched = 1"),
];

/// The ratios of one row; a figure that could not be measured there is missing.
#[derive(Debug)]
pub(crate) struct Prices([Option<f64>; FIGURES.len()]);

/// Runs the benchmark of these programs.
pub(crate) fn measure(programs: &[Program], surroundings: &Surroundings) -> Result<Prices, String> {
    let bench = programs.iter().find(|one| one.name == "bench" && !one.is_test);
    let mut command = bench.ok_or("the program bench was not built")?.command();
    // The report is read; nobody needs the file.
    command.env("CARGO_TARGET_DIR", std::env::temp_dir().join("hmm-matrix-bench"));
    let outcome = process::run(&mut surroundings.around(&command), LIMIT)?;
    if !outcome.success {
        return Err(format!("the benchmark fails: {}", outcome.said().trim()));
    }
    Ok(prices_in(&outcome.output))
}

fn prices_in(report: &str) -> Prices {
    Prices(std::array::from_fn(|number| {
        let named = |line: &&str| line.split_whitespace().next() == Some(FIGURES[number].0);
        let ratio = report.lines().find(named)?.split_whitespace().nth(3)?;
        ratio.parse().ok()
    }))
}

/// A table in Markdown, one line for each row.
pub(crate) fn table(lines: &[(&str, String, Prices)]) -> String {
    let names: Vec<&str> = FIGURES.iter().map(|(_, meaning)| *meaning).collect();
    let mut text = format!("| row | engine | {} |\n", names.join(" | "));
    text += &"| --- ".repeat(FIGURES.len() + 2);
    text += "|\n";
    for (row, engine, prices) in lines {
        let cell = |price: &Option<f64>| price.map_or("–".into(), |ratio| format!("{ratio:.2}"));
        let cells: Vec<String> = prices.0.iter().map(cell).collect();
        text += &format!("| `{row}` | `{engine}` | {} |\n", cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_read_and_missing_ones_are_told() {
        let report = "figure ours baseline ratio unit\nfault_p50_native 20.0 2.0 10.000 ns\n\
                      migrate_out_2m 4.5 9.0 0.500 GB/s, against memcpy\n";
        let table = table(&[("root", "uffd".into(), prices_in(report))]);
        assert!(table.ends_with("| `root` | `uffd` | – | 10.00 | 0.50 | – | – |\n"), "{table}");
    }
}
