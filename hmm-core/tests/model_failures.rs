//! Devices that fail, on the model engine: lost data is SIGBUS at the touch, never zeros, and costs no neighbour.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelConfig, ModelEngine};
use hmm_core::{
    Access, AddrRange, Error, Mm, PfnEntry, PfnFlags, Protection, RangeRequest, Residency,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::device::Device;

/// Four pages on a device, each beginning with its number, one of them lost.
struct Scene {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    device: Device,
    range: AddrRange,
}

const LOST: usize = 1;

impl Scene {
    fn new() -> Self {
        let engine = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(engine.clone()).unwrap();
        let flags = Protection::READ | Protection::WRITE;
        let range = engine.mmap(4, flags, VmaKind::Anonymous).unwrap();
        for page in 0..4 {
            engine.cpu_write(range.page_at(page), &[page as u8 + 1]).unwrap();
        }
        let device = Device::new(&mm, range, 4).unwrap();
        assert_eq!(device.migrate(range, 0).unwrap(), 4);
        device.lose(range.page_at(LOST));
        Self { engine, mm, device, range }
    }

    fn first_byte(&self, page: usize) -> Result<u8, Error> {
        let mut byte = [0];
        self.engine.cpu_read(self.range.page_at(page), &mut byte)?;
        Ok(byte[0])
    }

    /// The lost page is lost, for the CPU and for devices; the others are well.
    fn check(&self) {
        for page in (0..4).filter(|page| *page != LOST) {
            assert_eq!(self.first_byte(page), Ok(page as u8 + 1));
        }
        assert!(matches!(self.first_byte(LOST), Err(Error::Lost { .. })));
        let lost = self.range.sub(LOST, 1);
        let mut place = [Residency::None];
        self.mm.residency(lost, &mut place).unwrap();
        assert_eq!(place, [Residency::Poisoned]);
        let request = RangeRequest { range: lost, owner: Some(self.device.owner()) };
        let mut entry = [PfnEntry::default()];
        let fault = self.mm.range_fault(&request, Access::Read, &mut entry);
        assert!(matches!(fault, Err(Error::Fault { .. })), "{fault:?}");
        assert_eq!(entry[0].flags(), PfnFlags::ERROR);
        assert_eq!(self.mm.counters().poisoned, 1);
    }

    /// Dropping the contents makes the page usable again; closing finds nothing amiss.
    fn end(self) {
        self.engine.madvise_dontneed(self.range.sub(LOST, 1)).unwrap();
        assert_eq!(self.first_byte(LOST), Ok(0));
        self.mm.close().unwrap();
        assert_eq!((self.device.pages_in_use(), self.device.breaches()), (0, vec![]));
        self.device.remove().unwrap();
    }
}

#[test]
fn a_page_lost_at_a_touch_is_poisoned() {
    let scene = Scene::new();
    assert!(matches!(scene.first_byte(LOST), Err(Error::Lost { .. })));
    scene.check();
    scene.end();
}

#[test]
fn a_page_lost_in_a_migration_is_poisoned() {
    let scene = Scene::new();
    assert_eq!(scene.device.bring_home(scene.range).unwrap(), 3);
    scene.check();
    scene.end();
}

#[test]
fn a_page_lost_when_it_is_made_present_is_poisoned() {
    let scene = Scene::new();
    let result = scene.mm.make_present(scene.range, false);
    assert!(matches!(result, Err(Error::Lost { .. })), "{result:?}");
    scene.check();
    scene.end();
}

#[test]
fn closing_says_once_that_a_page_is_lost() {
    let scene = Scene::new();
    let first = scene.mm.close();
    assert!(matches!(first, Err(Error::Lost { .. })), "{first:?}");
    scene.mm.close().unwrap();
    assert!(matches!(scene.first_byte(LOST), Err(Error::Lost { .. })));
    assert_eq!(scene.first_byte(0), Ok(1));
    assert_eq!((scene.device.pages_in_use(), scene.device.breaches()), (0, vec![]));
    scene.device.remove().unwrap();
}

#[test]
fn a_driver_short_of_memory_is_asked_again() {
    let scene = Scene::new();
    scene.device.driver.short_of_memory.store(5, Ordering::Relaxed);
    assert_eq!(scene.first_byte(0), Ok(1));
    scene.device.driver.short_of_memory.store(5, Ordering::Relaxed);
    assert_eq!(scene.mm.make_present(scene.range.sub(2, 2), true), Ok(2));
    assert!(matches!(scene.first_byte(LOST), Err(Error::Lost { .. })));
    scene.check();
    scene.end();
}
