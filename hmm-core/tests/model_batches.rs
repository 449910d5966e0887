//! A request longer than one batch of callbacks, on the model engine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::model::{ModelConfig, ModelEngine};
use hmm_core::limits::BATCH_PAGES;
use hmm_core::{Mm, Residency};
use std::sync::atomic::Ordering;
use support::device::Device;
use support::memory::CpuMemory;

const PAGES: usize = BATCH_PAGES + 700;

#[test]
fn a_request_of_several_batches_moves_every_page_and_back() {
    let engine = ModelEngine::new(ModelConfig::default());
    let mm = Mm::with_engine(engine.clone()).unwrap();
    let range = engine.reserve(PAGES, 100);
    engine.map(range);
    for page in 0..PAGES {
        engine.cpu_write(range.page_at(page), &page.to_ne_bytes()).unwrap();
    }
    let device = Device::new(&mm, range, PAGES).unwrap();
    assert_eq!(device.migrate(range, 0), Ok(PAGES));
    let mut places = vec![Residency::None; PAGES];
    mm.residency(range, &mut places).unwrap();
    assert!(places.iter().all(|place| matches!(place, Residency::Device(_))));

    device.driver.fault_around.store(16, Ordering::Relaxed);
    let first_word = |page: usize| {
        let mut word = [0; 8];
        engine.cpu_read(range.page_at(page), &mut word).unwrap();
        usize::from_ne_bytes(word)
    };
    assert!((0..PAGES).step_by(97).all(|page| first_word(page) == page));
    let around = device.frees();
    assert_eq!(around, PAGES.div_ceil(97) * 16, "each touch brought its neighbours");
    assert_eq!(device.bring_home(range), Ok(PAGES - around));
    assert!((0..PAGES).all(|page| first_word(page) == page));
    mm.close().unwrap();
    assert_eq!((device.pages_in_use(), device.breaches()), (0, vec![]));
    device.remove().unwrap();
}
