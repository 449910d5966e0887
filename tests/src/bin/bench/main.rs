//! `make bench`: what the library costs, each figure against a bare baseline measured in the same rounds.
//!
//! Prints a table and writes `target/bench.json`: a list of `{name, unit, ours, baseline, ratio}`. Figures are medians
//! over rounds in which ours and the baseline take turns; the ratio is the median of each round's ratio, so that a
//! noisy neighbour hits both.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot run may stop"
)]

mod bare;
mod faults;
mod ranges;

use std::fmt::Write as _;

const ROUNDS: usize = 7;

/// One figure.
struct Figure {
    name: &'static str,
    unit: &'static str,
    ours: Vec<f64>,
    baseline: Vec<f64>,
}

impl Figure {
    fn new(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, ours: Vec::new(), baseline: Vec::new() }
    }
    fn add(&mut self, ours: f64, baseline: f64) {
        self.ours.push(ours);
        self.baseline.push(baseline);
    }
    fn ratio(&self) -> f64 {
        median(self.ours.iter().zip(&self.baseline).map(|(ours, base)| ours / base).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(figures: &[Figure]) {
    let mut json = String::from("[\n");
    println!("{:<34} {:>10} {:>10} {:>8}  unit", "figure", "ours", "baseline", "ratio");
    for (number, figure) in figures.iter().enumerate() {
        let (ours, base) = (median(figure.ours.clone()), median(figure.baseline.clone()));
        let (name, unit, ratio) = (figure.name, figure.unit, figure.ratio());
        println!("{name:<34} {ours:>10.2} {base:>10.2} {ratio:>8.3}  {unit}");
        let comma = if number + 1 < figures.len() { "," } else { "" };
        let _ = writeln!(
            json,
            "  {{\"name\": \"{name}\", \"unit\": \"{unit}\", \"ours\": {ours:.4}, \
             \"baseline\": {base:.4}, \"ratio\": {ratio:.4}}}{comma}"
        );
    }
    json.push_str("]\n");
    let target = std::env::var("CARGO_TARGET_DIR").unwrap_or_else(|_| "target".into());
    let path = std::path::Path::new(&target).join("bench.json");
    match std::fs::create_dir_all(&target).and_then(|()| std::fs::write(&path, json)) {
        Ok(()) => println!("written to {}", path.display()),
        Err(reason) => println!("not written to {}: {reason}", path.display()),
    }
}

fn main() {
    let mut figures = faults::measure();
    figures.extend(ranges::measure());
    report(&figures);
}
