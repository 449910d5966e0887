//! The ordering logic of the core on the model engine, in schedules that shuttle chooses: at each lock and each wait it
//! decides who goes on. A wait that nobody ends is a failure here, since its deadline never comes.
//!
//! `HMM_SCHEDULES=n` tries so many schedules of each test, `HMM_SEED=n` chooses which. A failure prints its schedule;
//! `HMM_SCHEDULE=text`, with one test named, plays it again.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

extern crate hmm_core_scheduled as hmm_core;

mod support;

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelConfig, ModelEngine};
use hmm_core::{
    AddrRange, Error, Invalidation, Mm, NotifierOps, Protection, Residency, Result, VirtAddr,
};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{JoinHandle, spawn};
use shuttle::{Config, Runner};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::device::Device;

/// Schedules of each test.
const SCHEDULES: u64 = 60;
/// The library's frames in a debug build are larger than what shuttle thinks enough.
const STACK: usize = 1 << 20;
/// Changes of priority in one schedule.
const CHANGES: usize = 3;
const READ_WRITE: Protection = Protection::READ.union(Protection::WRITE);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// Tries a test in many schedules: half of them let anybody go on at each point, which changes threads often; half give
/// threads priorities that change rarely (PCT), which lets one wait at a point for long.
fn explore(test: impl Fn() + Send + Sync + 'static) {
    if let Ok(schedule) = std::env::var("HMM_SCHEDULE") {
        return shuttle::replay(test, &schedule);
    }
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("HMM_SEED").unwrap_or(now.as_micros() as u64 % 1_000_000_000);
    let count = number("HMM_SCHEDULES").unwrap_or(SCHEDULES) as usize;
    eprintln!("{count} schedules from HMM_SEED={seed}");
    let mut config = Config::new();
    config.stack_size = STACK;
    let test = Arc::new(test);
    let also = test.clone();
    let often = RandomScheduler::new_from_seed(seed, count.div_ceil(2));
    Runner::new(often, config.clone()).run(move || test());
    let rarely = PctScheduler::new_from_seed(seed, CHANGES, count.div_ceil(2));
    Runner::new(rarely, config).run(move || also());
}

/// A program of four pages, and two devices that mirror them.
struct Stage {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    area: AddrRange,
    devices: [Device; 2],
}

impl Stage {
    fn new() -> Arc<Self> {
        let engine = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(engine.clone()).unwrap();
        let area = engine.mmap(4, READ_WRITE, VmaKind::Anonymous).unwrap();
        let devices = [4, 4].map(|pages| Device::new(&mm, area, pages).unwrap());
        Arc::new(Self { engine, mm, area, devices })
    }

    fn page(&self, page: usize) -> VirtAddr {
        self.area.page_at(page)
    }

    /// Something that happens at the same time as everything else.
    fn beside(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) -> JoinHandle<()> {
        let stage = self.clone();
        spawn(move || work(&stage))
    }

    fn add(&self, page: usize, times: u64) {
        (0..times).for_each(|_| {
            self.engine.cpu_fetch_add(self.page(page), 1).unwrap();
        });
    }

    fn word(&self, page: usize) -> u64 {
        self.engine.cpu_fetch_add(self.page(page), 0).unwrap()
    }

    /// What devices map is where they say; nothing is lost, leaked or freed twice.
    fn end(&self) {
        let mut places = vec![Residency::Unmapped; self.area.pages()];
        self.mm.residency(self.area, &mut places).unwrap();
        for (number, device) in self.devices.iter().enumerate() {
            for (address, mapped) in device.mirrored() {
                let page = VirtAddr::new(address);
                let place = places[self.area.index_of(page)];
                let right = match place {
                    Residency::Device(pfn) => pfn == mapped.page,
                    Residency::System => mapped.page.to_addr() == Some(page),
                    _ => false,
                };
                assert!(right, "device {number} maps {page} as {mapped:?}: it is {place:?}");
            }
        }
        self.mm.check_accounts().unwrap();
        self.mm.close().unwrap();
        for device in &self.devices {
            device.remove().unwrap();
            assert_eq!(device.breaches(), Vec::<String>::new());
            assert_eq!(device.pages_in_use(), 0);
        }
    }
}

/// Joins, and lets a panic of any of them be one of the test's.
fn all_of<const N: usize>(threads: [JoinHandle<()>; N]) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// What others do at the same time may keep a call from doing its work; nothing else may.
fn tolerate<T>(result: Result<T>) {
    match result {
        Ok(_) | Err(Error::Fault { .. } | Error::Invalid { .. } | Error::Busy { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// A device fills its page table while the program changes what it reads: other memory at the same place, and a page that
/// comes home.
#[test]
fn schedules_of_invalidations_and_range_done() {
    explore(|| {
        let stage = Stage::new();
        let page = AddrRange::new(stage.page(1).get(), stage.page(2).get()).unwrap();
        stage.engine.cpu_write(stage.page(1), b"old").unwrap();
        stage.engine.cpu_write(stage.page(2), b"away").unwrap();
        stage.devices[0].migrate(stage.area, 0).unwrap();
        // From now on it has to ask.
        stage.devices[0].forget(stage.area);
        let reader = stage.beside(|stage| {
            let mut found = [0; 4];
            stage.devices[0].load(stage.page(2), &mut found).unwrap();
            assert!([b"away", b"home"].contains(&&found), "{found:?}");
            stage.devices[0].load(stage.page(1), &mut found[..3]).unwrap();
            assert!([b"old", &[0; 3], b"new"].contains(&&found[..3].try_into().unwrap()));
        });
        let program = stage.beside(move |stage| {
            stage.engine.cpu_write(stage.page(2), b"home").unwrap();
            stage.engine.mmap_fixed(page, READ_WRITE, VmaKind::Anonymous);
            stage.engine.cpu_write(page.start(), b"new").unwrap();
        });
        all_of([reader, program]);
        let mut found = [0; 4];
        stage.devices[0].load(stage.page(1), &mut found[..3]).unwrap();
        assert_eq!(&found[..3], b"new");
        stage.devices[0].load(stage.page(2), &mut found).unwrap();
        assert_eq!(&found, b"home");
        stage.end();
    });
}

/// Notes calls that come after the end of its subscription.
#[derive(Default)]
struct Listener {
    is_over: AtomicBool,
    late: AtomicUsize,
    calls: AtomicUsize,
}

impl NotifierOps for Listener {
    fn invalidate(&self, _: &Invalidation) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        // A device takes its time.
        (0..8).for_each(|_| shuttle::thread::yield_now());
        self.late.fetch_add(usize::from(self.is_over.load(Ordering::SeqCst)), Ordering::SeqCst);
    }
}

/// Once a subscription has ended, none of its callbacks runs (promise 42); and it does end.
#[test]
fn schedules_of_unregistering_and_callbacks() {
    explore(|| {
        let stage = Stage::new();
        let listener = Arc::new(Listener::default());
        let notifier = stage.mm.notifier_insert(stage.area, listener.clone()).unwrap();
        stage.engine.cpu_write(stage.page(0), b"watched").unwrap();
        tolerate(stage.devices[0].migrate(stage.area, 0));
        let heard = listener.clone();
        let first = stage.beside(|stage| stage.engine.munmap(stage.area.sub(0, 2)));
        let second = stage.beside(|stage| tolerate(stage.devices[1].migrate(stage.area, 0)));
        let third = stage.beside(move |_| {
            notifier.remove().unwrap();
            heard.is_over.store(true, Ordering::SeqCst);
        });
        all_of([first, second, third]);
        assert!(listener.calls.load(Ordering::SeqCst) > 0);
        assert_eq!(listener.late.load(Ordering::SeqCst), 0);
        stage.end();
    });
}

/// Two devices want the same pages while the program adds to them.
#[test]
fn schedules_of_two_migrations_of_one_page() {
    explore(|| {
        let stage = Stage::new();
        stage.add(0, 1);
        let first = stage.beside(|stage| tolerate(stage.devices[0].migrate(stage.area, 0)));
        let second = stage.beside(|stage| {
            tolerate(stage.devices[1].migrate(stage.area.sub(0, 2), 0));
            tolerate(stage.devices[1].pull_from(&stage.devices[0], stage.area));
        });
        let program = stage.beside(|stage| stage.add(0, 2));
        all_of([first, second, program]);
        assert_eq!(stage.word(0), 3);
        stage.end();
    });
}

/// The program touches what a device brings home by itself, and takes again.
#[test]
fn schedules_of_cpu_faults_and_eviction() {
    explore(|| {
        let stage = Stage::new();
        stage.add(1, 1);
        stage.devices[0].migrate(stage.area, 0).unwrap();
        let first = stage.beside(|stage| stage.add(1, 2));
        let second = stage.beside(|stage| stage.add(1, 2));
        let device = stage.beside(|stage| {
            tolerate(stage.devices[0].bring_home(stage.area));
            tolerate(stage.devices[0].migrate(stage.area, 0));
        });
        all_of([first, second, device]);
        assert_eq!(stage.word(1), 5);
        stage.end();
    });
}

/// A page is unmapped, or moves, while a migration holds it: it is dropped once, or follows.
#[test]
fn schedules_of_layout_changes_and_migrations() {
    explore(|| {
        let stage = Stage::new();
        (0..3).for_each(|page| stage.add(page, 7));
        let there = stage.beside(|stage| tolerate(stage.devices[0].migrate(stage.area, 0)));
        let back = stage.beside(|stage| tolerate(stage.devices[0].bring_home(stage.area)));
        let program = stage.beside(|stage| {
            stage.engine.munmap(stage.area.sub(0, 1));
            stage.engine.mremap(stage.area.sub(1, 1), stage.page(3)).unwrap();
        });
        all_of([there, back, program]);
        assert_eq!((stage.word(2), stage.word(3)), (7, 7));
        assert!(stage.engine.cpu_read(stage.page(0), &mut [0]).is_err());
        stage.end();
    });
}
