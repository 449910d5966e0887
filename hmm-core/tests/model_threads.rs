//! Many threads on the model engine: adding, migrating, unmapping and looking, with and without trouble.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults};
use hmm_core::{Mm, Protection};
use std::time::Duration;
use support::device::Device;
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

#[test]
fn contents_that_are_dropped_late_are_not_saved_by_a_migration() {
    let engine = ModelEngine::new(ModelConfig::default());
    let mm = Mm::with_engine(engine.clone()).unwrap();
    let read_write = Protection::READ | Protection::WRITE;
    let range = engine.mmap(4, read_write, VmaKind::Anonymous).unwrap();
    let device = Device::new(&mm, range, 4).unwrap();
    device.load(range.start(), &mut [0]).unwrap(); // From now on the range is watched.
    engine.cpu_write(range.start(), b"about to go").unwrap();

    engine.set_faults(ModelFaults { late_drop: 1, ..ModelFaults::default() });
    let events = mm.counters().map_events;
    std::thread::scope(|scope| {
        let drop = scope.spawn(|| engine.madvise_dontneed(range));
        while mm.counters().map_events == events {
            std::thread::yield_now();
        }
        device.migrate(range, 0).unwrap();
        drop.join().unwrap().unwrap();
    });
    let mut found = [0; 11];
    engine.cpu_read(range.start(), &mut found).unwrap();
    assert_eq!(found, [0; 11]);
    mm.close().unwrap();
    device.remove().unwrap();
}
