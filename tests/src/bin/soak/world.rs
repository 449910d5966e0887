//! What the workers share: the mm, two devices, the ranges that migrate, and what each worker did.

use hmm_core::{AddrRange, Capabilities, Mm};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::Region;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Pages of the region whose contents never change.
const CONSTANT: usize = 256;
/// Pages of the region in which everybody counts.
const COUNTED: usize = 256;
/// Ranges of the slots whose layout changes.
pub(crate) const SLOTS: usize = 3;
const WORKERS: [&str; 7] = ["cpu", "kernels", "slots", "migrations", "devices", "forks", "calls"];

/// A worker, by its place in the report.
#[derive(Clone, Copy)]
pub(crate) enum Worker {
    Cpu,
    Kernels,
    Slots,
    Migrations,
    Devices,
    Forks,
    Calls,
}

pub(crate) struct World {
    pub(crate) mm: Arc<Mm>,
    pub(crate) devices: [Arc<SoftDevice>; 2],
    pub(crate) constant: Region,
    pub(crate) counted: Region,
    /// Where the slots are now.
    pub(crate) slots: [Mutex<Option<AddrRange>>; SLOTS],
    /// Without MOVE nothing may be unmapped while it migrates: migrations hold it for reading, changes for writing.
    gate: RwLock<()>,
    stop: AtomicBool,
    steps: [AtomicU64; WORKERS.len()],
}

/// What a word of the constant region holds.
pub(crate) fn constant_word(word: usize) -> u64 {
    (word as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl World {
    pub(crate) fn open() -> Result<Self, String> {
        let mm = hmm_tests::current_mm()?;
        let device = |pages: u64| {
            let config = SoftConfig { memory: pages * 4096, ..SoftConfig::default() };
            // Where failures are injected, some tries find no memory.
            (0..100).find_map(|_| SoftDevice::new(&mm, config).ok()).unwrap()
        };
        let devices = [device(512), device(200)];
        let (constant, counted) = (Region::new(CONSTANT), Region::new(COUNTED));
        for word in 0..constant.words() {
            constant.word(word).store(constant_word(word), Ordering::Relaxed);
        }
        Ok(Self {
            devices,
            constant,
            counted,
            slots: [const { Mutex::new(None) }; SLOTS],
            gate: RwLock::new(()),
            stop: AtomicBool::new(false),
            steps: [const { AtomicU64::new(0) }; WORKERS.len()],
            mm,
        })
    }

    pub(crate) fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    pub(crate) fn finish(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(crate) fn step(&self, worker: Worker) {
        self.steps[worker as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn steps(&self) -> Vec<u64> {
        self.steps.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    fn can_move(&self) -> bool {
        self.mm.capabilities().contains(Capabilities::MOVE)
    }

    /// Held while something migrates.
    pub(crate) fn migrating(&self) -> Option<RwLockReadGuard<'_, ()>> {
        (!self.can_move()).then(|| self.gate.read().unwrap())
    }

    /// Held while the layout changes.
    pub(crate) fn changing(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        (!self.can_move()).then(|| self.gate.write().unwrap())
    }

    /// The ranges that may migrate, those of the slots as they are now or were a moment ago.
    pub(crate) fn ranges(&self) -> Vec<AddrRange> {
        let slots = self.slots.iter().filter_map(|slot| *slot.lock().unwrap());
        slots.chain([self.constant.range(), self.counted.range()]).collect()
    }

    /// After all workers ended: nothing was lost, nothing is left on a device.
    pub(crate) fn check(&self) {
        for word in 0..self.constant.words() {
            assert_eq!(self.constant.word(word).load(Ordering::Relaxed), constant_word(word));
        }
        self.devices.iter().for_each(|device| device.close().unwrap());
        let counters = self.mm.counters();
        assert_eq!((counters.poisoned, counters.self_faults, counters.device_pages), (0, 0, 0));
        self.mm.close().unwrap();
    }

    pub(crate) fn report(&self) -> String {
        let counters = self.mm.counters();
        let steps = WORKERS.iter().zip(self.steps());
        let steps: Vec<String> = steps.map(|(name, count)| format!("{name} {count}")).collect();
        format!(
            "{}; pages out {} home {} dropped {}, faults {}, layout events {}",
            steps.join(" "),
            counters.migrated_to_device,
            counters.migrated_to_system,
            counters.device_pages_dropped,
            counters.cpu_faults,
            counters.map_events
        )
    }
}

/// Random numbers of one worker.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }
}
