//! Many threads on the model engine: adding, migrating, unmapping and looking, with and without trouble.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::Mm;
use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults};
use std::time::Duration;
use support::stress::increments_survive;

fn run(seed: u64, faults: ModelFaults) {
    let engine = ModelEngine::new(ModelConfig { seed, ..ModelConfig::default() });
    let mm = Mm::with_engine(engine.clone()).unwrap();
    engine.set_faults(faults);
    increments_survive(engine, mm, seed, Duration::from_secs(2)).unwrap();
}

#[test]
fn no_increment_is_lost() {
    run(1, ModelFaults::default());
}

#[test]
fn no_increment_is_lost_in_trouble() {
    let faults =
        ModelFaults { retry: 20, busy: 20, no_memory: 20, partial: 10, late_drop: 3, streak: 4 };
    run(2, faults);
}
