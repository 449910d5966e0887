//! Random sequences of everything at once on the model engine, with trouble, against a plain array.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{POLICIES, scramble};
use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults};
use hmm_core::{AddrRange, Error, Mm, PAGE_SIZE, Protection, Result, VirtAddr, VmaKind};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use std::sync::Arc;

const PAGES: usize = 24;
const BYTES: usize = PAGES * PAGE_SIZE;
const DEVICES: usize = 2;

/// The model, two devices, and what memory must hold: `None` where nothing is mapped.
struct World {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    devices: Vec<Arc<SoftDevice>>,
    window: AddrRange,
    expected: Vec<Option<Vec<u8>>>,
    random: u64,
    /// Jobs may end for want of memory, with half of their work done.
    short: bool,
}

impl World {
    fn new(seed: u64, policy: Policy, faults: ModelFaults) -> Self {
        let engine = ModelEngine::new(ModelConfig { seed, ..ModelConfig::default() });
        let mm = Mm::with_engine(Arc::clone(&engine) as _).unwrap();
        let config = SoftConfig {
            memory: 7 * PAGE_SIZE as u64,
            policy,
            fault_around: 4,
            ..SoftConfig::default()
        };
        let devices = (0..DEVICES).map(|_| SoftDevice::new(&mm, config).unwrap()).collect();
        let protection = Protection::READ | Protection::WRITE;
        let window = engine.mmap(PAGES, protection, VmaKind::Anonymous).unwrap();
        let expected = vec![Some(vec![0; PAGE_SIZE]); PAGES];
        engine.set_faults(faults);
        Self { engine, mm, devices, window, expected, random: seed, short: faults.no_memory > 0 }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_add(1);
        (scramble(self.random) % bound as u64) as usize
    }

    fn device(&mut self) -> Arc<SoftDevice> {
        let number = self.below(DEVICES);
        Arc::clone(&self.devices[number])
    }

    /// Runs a kernel that may be run again, until memory suffices.
    fn run(&mut self, kernel: Kernel) -> Result<u64> {
        for _ in 0..100 {
            match self.device().run(kernel) {
                Err(Error::NoMemory { .. }) if self.short => {}
                done => return done,
            }
        }
        panic!("{kernel:?} never finds memory");
    }

    /// First page and number of pages.
    fn some_pages(&mut self, most: usize) -> (usize, usize) {
        let count = 1 + self.below(most);
        (self.below(PAGES - count + 1), count)
    }

    /// Offset and length of words; with one page in four unmapped, some of them may be.
    fn some_words(&mut self, most: usize) -> (usize, usize) {
        let count = 1 + self.below(most);
        (8 * self.below(BYTES / 8 - count + 1), 8 * count)
    }

    fn is_mapped(&self, offset: usize, len: usize) -> bool {
        self.expected[offset / PAGE_SIZE..=(offset + len - 1) / PAGE_SIZE]
            .iter()
            .all(Option::is_some)
    }

    fn address(&self, offset: usize) -> u64 {
        self.window.start().get() + offset as u64
    }

    fn byte(&mut self, offset: usize) -> &mut u8 {
        &mut self.expected[offset / PAGE_SIZE].as_mut().unwrap()[offset % PAGE_SIZE]
    }

    fn word(&mut self, offset: usize) -> u64 {
        u64::from_ne_bytes(std::array::from_fn(|byte| *self.byte(offset + byte)))
    }

    fn set_word(&mut self, offset: usize, word: u64) {
        for (index, byte) in word.to_ne_bytes().into_iter().enumerate() {
            *self.byte(offset + index) = byte;
        }
    }

    fn step(&mut self) {
        match self.below(12) {
            0 | 1 => self.cpu_write(),
            2 => self.cpu_read(),
            3 | 4 => self.move_pages(),
            5 => self.fill(),
            6 => self.copy(),
            7 => self.add(),
            8 => self.atomic_add(),
            9 => self.sum(),
            _ => self.change_layout(),
        }
    }

    fn cpu_write(&mut self) {
        let (offset, len) = self.some_words(700);
        if self.is_mapped(offset, len) {
            let data: Vec<_> = (0..len).map(|_| self.below(256) as u8).collect();
            self.engine.cpu_write(VirtAddr::new(self.address(offset)), &data).unwrap();
            data.into_iter().enumerate().for_each(|(at, byte)| *self.byte(offset + at) = byte);
        }
    }

    fn cpu_read(&mut self) {
        let (offset, len) = self.some_words(700);
        if self.is_mapped(offset, len) {
            let mut out = vec![0; len];
            self.engine.cpu_read(VirtAddr::new(self.address(offset)), &mut out).unwrap();
            assert!(out.into_iter().enumerate().all(|(at, byte)| *self.byte(offset + at) == byte));
        }
    }

    fn move_pages(&mut self) {
        let (first, count) = self.some_pages(9);
        let range = self.window.sub(first, count);
        let device = self.device();
        // Refused by the policy, or nothing mapped: never anything else.
        let moved =
            if self.below(3) > 0 { device.migrate(range) } else { device.bring_home(range) };
        if let Err(error) = moved {
            let short = self.short && error.errno() == libc::ENOMEM;
            assert!(short || matches!(error.errno(), libc::EFAULT | libc::EOPNOTSUPP), "{error}");
        }
    }

    fn fill(&mut self) {
        let (offset, len, byte) = (self.below(BYTES - 9000), 1 + self.below(9000), self.below(256));
        if self.is_mapped(offset, len) {
            let kernel =
                Kernel::Fill { dst: self.address(offset), len: len as u64, byte: byte as u8 };
            self.run(kernel).unwrap();
            (offset..offset + len).for_each(|at| *self.byte(at) = byte as u8);
        }
    }

    fn copy(&mut self) {
        let len = 1 + self.below(9000);
        let (dst, src) = (self.below(BYTES - len), self.below(BYTES - len));
        if dst.abs_diff(src) >= len && self.is_mapped(dst, len) && self.is_mapped(src, len) {
            let (to, from) = (self.address(dst), self.address(src));
            self.run(Kernel::Copy { dst: to, src: from, len: len as u64 }).unwrap();
            (0..len).for_each(|at| *self.byte(dst + at) = *self.byte(src + at));
        }
    }

    fn add(&mut self) {
        let (offset, len) = self.some_words(1500);
        let stride = [8, 40, 4096][self.below(3)];
        if !self.short && self.is_mapped(offset, len) {
            let (addr, count) = (self.address(offset), len.div_ceil(stride) as u64);
            let kernel = Kernel::AddU64 { addr, count, stride: stride as u64, value: 3 };
            self.device().run(kernel).unwrap();
            for at in (offset..offset + len).step_by(stride) {
                let word = self.word(at).wrapping_add(3);
                self.set_word(at, word);
            }
        }
    }

    fn atomic_add(&mut self) {
        let (offset, len) = self.some_words(1);
        if self.is_mapped(offset, len) {
            let kernel = Kernel::AtomicAddU64 { addr: self.address(offset), value: 5 };
            let old = self.word(offset);
            match self.run(kernel) {
                Ok(found) => {
                    assert_eq!(found, old);
                    self.set_word(offset, old.wrapping_add(5));
                }
                Err(error) => assert_eq!(error.errno(), libc::EOPNOTSUPP),
            }
        }
    }

    fn sum(&mut self) {
        let (offset, len) = self.some_words(5000);
        let kernel = Kernel::SumU64 { src: self.address(offset), count: len as u64 / 8 };
        let sum = self.run(kernel);
        if self.is_mapped(offset, len) {
            let words = (offset..offset + len).step_by(8);
            let expected = words.map(|at| self.word(at)).fold(0, u64::wrapping_add);
            assert_eq!(sum, Ok(expected));
        } else {
            assert_eq!(sum.unwrap_err().errno(), libc::EFAULT);
        }
    }

    fn change_layout(&mut self) {
        let (first, count) = self.some_pages(4);
        let range = self.window.sub(first, count);
        match self.below(6) {
            0 => {
                self.engine.munmap(range);
                self.expected[first..first + count].fill(None);
            }
            1 => {
                if self.is_mapped(first * PAGE_SIZE, count * PAGE_SIZE) {
                    self.engine.madvise_dontneed(range).unwrap();
                    self.expected[first..first + count].fill(Some(vec![0; PAGE_SIZE]));
                }
            }
            2 => {
                let to = self.below(PAGES - count + 1);
                if to.abs_diff(first) >= count
                    && self.is_mapped(first * PAGE_SIZE, count * PAGE_SIZE)
                {
                    self.engine.mremap(range, self.window.page_at(to)).unwrap();
                    for page in 0..count {
                        self.expected[to + page] = self.expected[first + page].take();
                    }
                }
            }
            _ => {
                let protection = Protection::READ | Protection::WRITE;
                self.engine.mmap_fixed(range, protection, VmaKind::Anonymous);
                self.expected[first..first + count].fill(Some(vec![0; PAGE_SIZE]));
            }
        }
    }

    fn check_all(&mut self) {
        for page in 0..PAGES {
            let mut out = vec![0; PAGE_SIZE];
            let read = self.engine.cpu_read(self.window.page_at(page), &mut out);
            let found = read.is_ok().then_some(out);
            assert!(self.expected[page] == found, "page {page}");
        }
    }
}

fn run(policy: Policy, faults: ModelFaults, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut world = World::new(seed << 32, policy, faults);
        for _ in 0..300 {
            world.step();
        }
        world.check_all();
        for device in &world.devices {
            device.close().unwrap();
        }
        world.check_all();
        world.mm.close().unwrap();
    }
}

#[test]
fn random_sequences_without_trouble() {
    for policy in POLICIES {
        run(policy, ModelFaults::default(), 0..8);
    }
}

#[test]
fn random_sequences_with_stops_and_retries() {
    for policy in POLICIES {
        let faults =
            ModelFaults { retry: 6, partial: 4, busy: 9, streak: 3, ..ModelFaults::default() };
        run(policy, faults, 100..108);
    }
}

#[test]
fn random_sequences_with_late_drops() {
    for policy in POLICIES {
        let faults = ModelFaults { late_drop: 2, partial: 5, ..ModelFaults::default() };
        run(policy, faults, 200..204);
    }
}

#[test]
fn random_sequences_without_memory_at_times() {
    for policy in POLICIES {
        let faults = ModelFaults { no_memory: 7, streak: 2, ..ModelFaults::default() };
        run(policy, faults, 300..304);
    }
}
