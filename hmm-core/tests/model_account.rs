//! Accounts on the model engine: random operations under random limits, checked after each; and devices at their limits.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults, PageCondition};
use hmm_core::engine::{Engine, Present, VmaKind};
use hmm_core::{AddrRange, Capabilities, Error, MemoryGroup, Mm, PAGE_SIZE, Protection, Rss};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::device::Device;

const FLAGS: Protection = Protection::READ.union(Protection::WRITE);
const PAGES: usize = 48;

fn pages(bytes: u64) -> u64 {
    bytes / PAGE_SIZE as u64
}

/// Pages charged, and of these on a device.
fn charged(group: &MemoryGroup) -> (u64, u64) {
    (pages(group.current()), pages(group.stat().device))
}

/// A generator of numbers; small, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }
    fn part(&mut self, of: AddrRange) -> AddrRange {
        let first = self.below(of.pages());
        let count = 1 + self.below(of.pages() - first);
        of.sub(first, count)
    }
}

/// A program with a device and two groups, one below the other.
struct Scene {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    device: Device,
    groups: [MemoryGroup; 2],
    area: AddrRange,
    /// Another place for mappings.
    spare: AddrRange,
}

impl Scene {
    fn new(config: ModelConfig) -> Self {
        let engine = ModelEngine::new(config);
        let mm = Mm::with_engine(engine.clone()).unwrap();
        let area = engine.mmap(PAGES, FLAGS, VmaKind::Anonymous).unwrap();
        let spare = engine.mmap(PAGES, FLAGS, VmaKind::Anonymous).unwrap();
        let parent = MemoryGroup::create(&MemoryGroup::root()).unwrap();
        let child = MemoryGroup::create(&parent).unwrap();
        mm.set_group(&child).unwrap();
        let device = Device::new(&mm, area, PAGES).unwrap();
        Self { engine, mm, device, groups: [parent, child], area, spare }
    }

    fn step(&self, random: &mut Random) {
        let part = random.part(self.area);
        let byte = random.below(255) as u8 + 1;
        match random.below(12) {
            0 | 1 => _ = self.device.migrate(part, random.below(3)),
            2 => _ = self.device.bring_home(part),
            3 => _ = self.engine.cpu_write(part.start(), &[byte]),
            4 => _ = self.engine.cpu_read(part.start(), &mut [0]),
            // Each is waited for before pages of the range leave.
            5 if byte > 200 => self.engine.madvise_dontneed(part).unwrap(),
            6 => {
                self.engine.munmap(part);
                self.engine.mmap_fixed(part, FLAGS, VmaKind::Anonymous);
            }
            7 => {
                let to = self.spare.page_at(self.area.index_of(part.start()));
                self.engine.mremap(part, to).unwrap();
                self.engine.mmap_fixed(part, FLAGS, VmaKind::Anonymous);
            }
            8 => {
                let max = (random.below(PAGES) * PAGE_SIZE) as u64;
                self.groups[random.below(2)].set_max((byte > 40).then_some(max)).unwrap();
            }
            9 => self.mm.set_group(&self.groups[random.below(2)]).unwrap(),
            10 => _ = self.mm.move_charges().unwrap(),
            _ => _ = self.mm.make_present(part, byte > 127),
        }
    }

    fn check(&self) {
        self.mm.check_accounts().unwrap();
        let [parent, child] = &self.groups;
        // Everything is charged below the parent.
        let on_device = self.mm.counters().device_pages;
        assert_eq!(charged(parent).1, on_device);
        assert!(charged(child).0 <= charged(parent).0 && charged(parent).0 >= on_device);
        assert!(parent.peak() >= parent.current());
        assert_eq!(pages(self.mm.rss().unwrap().anon), self.present() + on_device);
    }

    fn present(&self) -> u64 {
        let mut count = 0;
        for range in [self.area, self.spare] {
            let mut add = |run: AddrRange, present| {
                count += if present == Present::Page { run.pages() as u64 } else { 0 };
            };
            self.engine.scan(range, &mut add).unwrap();
        }
        count
    }

    fn end(self) {
        self.mm.close().unwrap();
        let [parent, child] = &self.groups;
        assert_eq!((charged(parent), charged(child)), ((0, 0), (0, 0)));
        assert_eq!(self.device.breaches(), Vec::<String>::new());
        self.device.remove().unwrap();
    }
}

#[test]
fn accounts_agree_after_every_random_operation() {
    for seed in 1..=12_u64 {
        let scene = Scene::new(ModelConfig { seed, ..ModelConfig::default() });
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for step in 0..100 {
            eprintln!("seed {seed} step {step}");
            scene.step(&mut random);
            scene.check();
        }
        scene.end();
    }
}

#[test]
fn accounts_agree_when_the_engine_is_short_of_everything() {
    let faults =
        ModelFaults { retry: 10, busy: 10, no_memory: 10, partial: 10, late_drop: 0, streak: 4 };
    for seed in 1..=6_u64 {
        let scene = Scene::new(ModelConfig { seed, ..ModelConfig::default() });
        scene.engine.set_faults(faults);
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for step in 0..100 {
            eprintln!("seed {seed} step {step}");
            scene.step(&mut random);
            scene.mm.check_accounts().unwrap();
        }
        scene.engine.set_faults(ModelFaults::default());
        scene.end();
    }
}

#[test]
fn charges_of_dropped_pages_end_when_somebody_looks() {
    // An engine that is told of no change: the library asks it instead.
    let without = Capabilities::EVENTS;
    let scene = Scene::new(ModelConfig { without, ..ModelConfig::default() });
    let child = &scene.groups[1];
    (0..8).for_each(|page| scene.engine.cpu_write(scene.area.page_at(page), &[1]).unwrap());
    assert_eq!(scene.device.migrate(scene.area.sub(0, 8), 0).unwrap(), 8);
    assert_eq!(scene.device.bring_home(scene.area.sub(0, 8)).unwrap(), 8);
    scene.mm.settle_charges().unwrap();
    assert_eq!(charged(child), (8, 0));
    scene.engine.set_condition(scene.area.sub(0, 2), PageCondition::Swapped);
    scene.mm.settle_charges().unwrap();
    assert_eq!(charged(child), (8, 0), "a page in swap is charged");
    scene.end();
}

#[test]
fn resident_pages_are_counted_by_kind() {
    let scene = Scene::new(ModelConfig::default());
    let kinds = [(VmaKind::Shared, 3), (VmaKind::PrivateFile, 4), (VmaKind::SharedFile, 5)];
    for (kind, count) in kinds {
        let range = scene.engine.mmap(count, FLAGS, kind).unwrap();
        (0..count).for_each(|page| scene.engine.cpu_write(range.page_at(page), &[1]).unwrap());
    }
    (0..6).for_each(|page| scene.engine.cpu_write(scene.area.page_at(page), &[1]).unwrap());
    let size = PAGE_SIZE as u64;
    let expected = Rss { anon: 6 * size, file: 9 * size, shmem: 3 * size };
    assert_eq!(scene.mm.rss(), Ok(expected));
    assert_eq!(scene.device.migrate(scene.area.sub(0, 6), 0).unwrap(), 6);
    assert_eq!(scene.mm.rss(), Ok(expected));
    assert_eq!(scene.device.bring_home(scene.area.sub(0, 3)).unwrap(), 3);
    assert_eq!(scene.mm.rss(), Ok(expected));
    scene.end();
}

#[test]
fn a_charge_ends_with_the_data() {
    let scene = Scene::new(ModelConfig::default());
    let (child, range) = (&scene.groups[1], scene.area.sub(0, 4));
    (0..4).for_each(|page| scene.engine.cpu_write(range.page_at(page), &[1]).unwrap());
    assert_eq!(scene.device.migrate(range, 0).unwrap(), 4);
    scene.device.lose(range.page_at(1));
    scene.device.lose(range.page_at(2));
    // In a migration, and at a touch.
    assert_eq!(scene.device.bring_home(range.sub(0, 2)).unwrap(), 1);
    assert!(matches!(scene.engine.cpu_read(range.page_at(2), &mut [0]), Err(Error::Lost { .. })));
    assert_eq!(charged(child), (2, 1));
    scene.mm.check_accounts().unwrap();
    assert_eq!(scene.device.driver.short_of_memory.load(Ordering::Relaxed), 0);
    scene.end();
}
