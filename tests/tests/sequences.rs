//! Random sequences of what a program, its devices and the library's callers do, on the engines for real memory and on
//! the model beside them: after each step every byte is what a plain map says, and every page is on the same side, of
//! the same device, as on the model.
//!
//! `HMM_SEED=n` plays the sequence of that seed (what a failure prints), `HMM_SEQUENCES=n` plays so many, each from the
//! seed after the last one's. One that fails is cut down before it is reported; `HMM_KEEP=0,5,7` plays these of its steps.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

#[allow(dead_code, reason = "one of its ways is used")]
#[path = "driver/child.rs"]
mod child;
#[path = "../../hmm-core/tests/support/mod.rs"]
mod support;

use child::{Ended, child_with, is_child};
use hmm_core::engine::model::{ModelConfig, ModelEngine, ModelFaults, PageCondition};
use hmm_core::{AddrRange, Capabilities, Error, Mm, Protection, VirtAddr};
use hmm_tests::current_mm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::memory::{Bytes, CpuMemory, RealMemory};
use support::steps::{Step, plain_sequence};
use support::world::World;

/// Steps of a sequence.
const LENGTH: usize = 60;
/// Sequences that are played on each engine.
const SEQUENCES: u64 = 20;
/// So many sequences take so long at most, on a busy machine.
const TIME: Duration = Duration::from_secs(60);
/// How long a failure is cut down.
const CUTTING: Duration = Duration::from_secs(30);
/// A layout change may be noticed so much later.
const SETTLING: Duration = Duration::from_millis(500);

/// A program's memory as one that keeps to an engine's rules uses it: it makes no bad access, and where nobody is told
/// of layout changes it brings home what it is about to move or protect. After a fork it writes to its pages: until
/// then the kernel takes them for shared with the child, even one that is gone, and they stay (`Stay::Busy`).
struct Careful {
    memory: Arc<dyn CpuMemory>,
    mm: Arc<Mm>,
    brings_home: bool,
    forked: AtomicBool,
}

impl Careful {
    fn prepare(&self, range: AddrRange) {
        if self.brings_home {
            self.mm.make_present(range, false).unwrap();
        }
    }

    /// Writes to a page what it holds.
    fn rewrite(&self, page: VirtAddr) {
        let mut byte = [0];
        self.memory.load(page, &mut byte).and_then(|()| self.memory.store(page, &byte)).unwrap();
    }
}

impl CpuMemory for Careful {
    fn reserve(&self, pages: usize, boundary: usize) -> AddrRange {
        self.memory.reserve(pages, boundary)
    }
    fn map(&self, range: AddrRange) {
        self.memory.map(range);
    }
    fn unmap(&self, range: AddrRange) {
        self.memory.unmap(range);
    }
    fn remap(&self, from: AddrRange, to: VirtAddr) {
        self.prepare(from);
        self.memory.remap(from, to);
    }
    fn drop_contents(&self, range: AddrRange) {
        self.memory.drop_contents(range);
    }
    fn protect(&self, range: AddrRange, writable: bool) {
        self.prepare(range);
        self.memory.protect(range, writable);
        if writable && self.forked.load(Ordering::Relaxed) {
            (0..range.pages()).for_each(|page| self.rewrite(range.page_at(page)));
        }
    }
    fn load(&self, addr: VirtAddr, out: &mut [u8]) -> Result<(), Error> {
        self.memory.load(addr, out)
    }
    fn store(&self, addr: VirtAddr, data: &[u8]) -> Result<(), Error> {
        self.memory.store(addr, data)
    }
    fn add(&self, addr: VirtAddr, value: u64) -> Result<u64, Error> {
        self.memory.add(addr, value)
    }
    fn inspect(&self, mm: &Mm, page: VirtAddr, out: &mut Bytes) -> bool {
        self.memory.inspect(mm, page, out)
    }
    fn survives_bad_accesses(&self) -> bool {
        false
    }
    fn settles_later(&self) -> bool {
        self.memory.settles_later()
    }
    fn set_condition(&self, range: AddrRange, condition: PageCondition) -> bool {
        self.memory.set_condition(range, condition)
    }
    fn idle(&self) {
        self.memory.idle();
    }
    fn set_faults(&self, faults: ModelFaults) -> bool {
        self.memory.set_faults(faults)
    }
    fn reports_changes(&self) -> bool {
        !self.brings_home
    }
    fn fork(&self, pages: &[(VirtAddr, &[u8])]) -> Option<Result<(), String>> {
        self.forked.store(true, Ordering::Relaxed);
        let compared = self.memory.fork(pages);
        let writable = |page: VirtAddr| {
            let vma = self.mm.find_vma(page).unwrap();
            vma.is_some_and(|vma| vma.protection.contains(Protection::WRITE))
        };
        let written = pages.iter().map(|(page, _)| *page).filter(|page| writable(*page));
        written.for_each(|page| self.rewrite(page));
        compared
    }
}

fn world(memory: Arc<dyn CpuMemory>, mm: Arc<Mm>, brings_home: bool) -> Result<World, String> {
    let forked = AtomicBool::new(false);
    let careful = Careful { memory, mm: mm.clone(), brings_home, forked };
    let world = World::new(Arc::new(careful), mm, ModelFaults::default(), None);
    world.map_err(|error| error.to_string())
}

/// Every page is on the same side as in the model.
fn compare(real: &World, model: &World) -> Result<(), String> {
    let deadline = Instant::now() + SETTLING;
    let must = model.whereabouts()?;
    loop {
        let is = real.whereabouts()?;
        let Some(page) = (0..is.len()).find(|page| is[*page] != must[*page]) else { return Ok(()) };
        if Instant::now() >= deadline {
            return Err(format!(
                "page {page} is {:?}, and {:?} on the model",
                is[page], must[page]
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Plays steps on the engine of this process and on the model.
fn play(mm: Arc<Mm>, seed: u64, steps: &[Step]) -> Result<(), String> {
    let brings_home = !mm.capabilities().contains(Capabilities::EVENTS);
    let engine = ModelEngine::new(ModelConfig { seed, ..ModelConfig::default() });
    let model_mm = Mm::with_engine(engine.clone()).map_err(|error| error.to_string())?;
    let mut model = world(engine, model_mm, brings_home)?;
    let mut real = world(RealMemory::new(), mm, brings_home)?;
    for (number, step) in steps.iter().enumerate() {
        let at = |wrong| format!("step {number}, {step:?}: {wrong}");
        model.step(*step).map_err(|wrong| at(format!("on the model: {wrong}")))?;
        real.step(*step).map_err(at)?;
        compare(&real, &model).map_err(at)?;
    }
    real.finish().map_err(|wrong| format!("at the end: {wrong}"))?;
    model.finish().map_err(|wrong| format!("at the end, on the model: {wrong}"))
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

/// The steps of a sequence that are to be played.
fn steps_of(seed: u64) -> Vec<Step> {
    let steps = plain_sequence(seed, LENGTH).0;
    match std::env::var("HMM_KEEP") {
        Ok(kept) => kept.split(',').map(|one| steps[one.parse::<usize>().unwrap()]).collect(),
        Err(_) => steps,
    }
}

/// The child's part: plays as many sequences as it is told to.
fn play_all() {
    let first = number("HMM_SEED").unwrap();
    for seed in first..first + number("HMM_SEQUENCES").unwrap_or(1) {
        eprintln!("sequence {seed}");
        let mm = match current_mm() {
            Ok(mm) => mm,
            Err(reason) => hmm_tests::skip!("{reason}"),
        };
        let name = mm.engine_name();
        if let Err(wrong) = play(mm, seed, &steps_of(seed)) {
            panic!("engine {name}: {wrong}");
        }
    }
}

/// A test and the environment of the engine that it is about.
struct Stage {
    test: &'static str,
    engine: &'static [(&'static str, &'static str)],
}

impl Stage {
    fn run(&self, seed: u64, more: &[(&'static str, String)], limit: Duration) -> Ended {
        let mut variables = self.engine.to_vec();
        variables.push(("RUST_BACKTRACE", "0"));
        variables.push(("HMM_SEED", seed.to_string().leak()));
        variables.extend(more.iter().map(|(name, value)| (*name, &*value.clone().leak())));
        child_with(self.test, limit, &variables)
    }

    fn fails(&self, seed: u64, kept: &[usize]) -> Option<Ended> {
        let kept: Vec<_> = kept.iter().map(usize::to_string).collect();
        let ended = self.run(seed, &[("HMM_KEEP", kept.join(","))], Duration::from_secs(15));
        (!ended.is_good()).then_some(ended)
    }

    /// Leaves out halves, quarters, … of the steps as long as it still fails.
    fn cut(&self, seed: u64) -> Option<(Vec<usize>, Ended)> {
        let deadline = Instant::now() + CUTTING;
        let mut kept: Vec<_> = (0..LENGTH).collect();
        let mut failed = self.fails(seed, &kept)?;
        let mut piece = LENGTH / 2;
        while piece > 0 {
            let mut at = 0;
            while at < kept.len() && Instant::now() < deadline {
                let end = (at + piece).min(kept.len());
                let rest = [&kept[..at], &kept[end..]].concat();
                match self.fails(seed, &rest).filter(|_| !rest.is_empty()) {
                    Some(ended) => (kept, failed) = (rest, ended),
                    None => at = end,
                }
            }
            piece /= 2;
        }
        Some((kept, failed))
    }

    fn report(&self, ended: &Ended) {
        let started = |line: &str| line.strip_prefix("sequence ").map(|seed| seed.parse().unwrap());
        let Some(seed) = ended.stderr.lines().rev().find_map(started) else {
            panic!("{:?}: no sequence began: {ended:?}", self.engine);
        };
        let Some((kept, failed)) = self.cut(seed) else {
            panic!("HMM_SEED={seed} failed on {:?}, and not again: {ended:?}", self.engine);
        };
        let steps = plain_sequence(seed, LENGTH).0;
        kept.iter().for_each(|number| eprintln!("{number:4} {:?}", steps[*number]));
        let kept: Vec<_> = kept.iter().map(usize::to_string).collect();
        eprintln!("{}", failed.stderr);
        panic!(
            "HMM_SEED={seed} HMM_KEEP={} on {:?}: {:?}",
            kept.join(","),
            self.engine,
            failed.status
        );
    }
}

/// The parent's part: the sequences of one engine, in a child, since each may end its process.
fn sequences_on(test: &'static str, engine: &'static [(&'static str, &'static str)]) {
    if is_child() {
        return play_all();
    }
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("HMM_SEED").unwrap_or(now.as_micros() as u64 % 1_000_000_000);
    let usual = if std::env::var_os("HMM_SEED").is_some() { 1 } else { SEQUENCES };
    let count = number("HMM_SEQUENCES").unwrap_or(usual);
    eprintln!("{count} sequences from HMM_SEED={seed} on {engine:?}");
    let stage = Stage { test, engine };
    let limit = TIME * hmm_tests::patience() * (1 + count / SEQUENCES) as u32;
    let ended = stage.run(seed, &[("HMM_SEQUENCES", count.to_string())], limit);
    match ended.skipped() {
        Some(reason) => eprintln!("skipped: {reason}"),
        None if ended.is_good() => {}
        None => stage.report(&ended),
    }
}

#[test]
fn sequences_on_uffd() {
    sequences_on("sequences_on_uffd", &[("HMM_ENGINE", "uffd")]);
}

#[test]
fn sequences_on_uffd_without_move() {
    let engine = &[("HMM_ENGINE", "uffd"), ("HMM_UFFD_DISABLE", "move")];
    sequences_on("sequences_on_uffd_without_move", engine);
}

#[test]
fn sequences_on_uffd_inline() {
    sequences_on("sequences_on_uffd_inline", &[("HMM_ENGINE", "uffd-inline")]);
}

#[test]
fn sequences_on_signal() {
    sequences_on("sequences_on_signal", &[("HMM_ENGINE", "signal")]);
}
