//! Random sequences of everything a program, its devices and the library's callers can do, on the model engine,
//! against a plain map: after each step every byte is what the map says, wherever it is; at the end nothing is lost.
//!
//! More cases: `PROPTEST_CASES=10000 cargo test --test model_properties`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::Mm;
use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use std::sync::Arc;
use support::interrupted::{InterruptedEngine, Moment};
use support::steps::{Step, sequences};
use support::world::World;

const CASES: u32 = 200;
const LONGEST: usize = 80;

fn config() -> ProptestConfig {
    let failures = FileFailurePersistence::WithSource("regressions");
    let mut config = ProptestConfig {
        failure_persistence: Some(Box::new(failures)),
        ..ProptestConfig::default()
    };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = CASES;
    }
    config.max_shrink_iters = 20_000;
    if std::env::var_os("PROPTEST_MAX_SHRINK_TIME").is_none() {
        config.max_shrink_time = 60_000;
    }
    config
}

fn trouble() -> impl Strategy<Value = ModelFaults> {
    let rate = || prop_oneof![Just(0_u32), 2..8_u32];
    (rate(), rate(), rate(), rate(), rate()).prop_map(|(retry, busy, no_memory, partial, late)| {
        ModelFaults { retry, busy, no_memory, partial, late_drop: late, streak: 4 }
    })
}

fn run(
    seed: u64,
    faults: ModelFaults,
    troubled: bool,
    steps: &[Step],
) -> Result<(), TestCaseError> {
    let model = ModelEngine::new(ModelConfig { seed, ..ModelConfig::default() });
    let moment = Arc::new(Moment::default());
    let engine = InterruptedEngine { model: model.clone(), moment: moment.clone() };
    let mm = Mm::with_engine(Arc::new(engine)).unwrap();
    let mut world = World::new(model, mm, faults, Some(moment)).unwrap();
    world.step(Step::Trouble(troubled)).map_err(TestCaseError::fail)?;
    for (number, step) in steps.iter().enumerate() {
        world
            .step(*step)
            .map_err(|wrong| TestCaseError::fail(format!("step {number}, {step:?}: {wrong}")))?;
    }
    world.finish().map_err(|wrong| TestCaseError::fail(format!("at the end: {wrong}")))
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_byte_is_where_it_should_be(
        seed in any::<u64>(),
        faults in trouble(),
        troubled in any::<bool>(),
        steps in sequences(LONGEST),
    ) {
        run(seed, faults, troubled, &steps.0)?;
    }
}
