//! Threads that add, migrate, unmap and look at the same pages: no increment is lost, and nothing is leaked.

use super::device::Device;
use super::memory::CpuMemory;
use super::steps::{BOUNDARY, PAGES};
use hmm_core::{
    Access, AddrRange, Error, Mm, PAGE_SIZE, PfnEntry, RangeRequest, Residency, VirtAddr,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Scope;
use std::time::Duration;

const ADDERS: u64 = 3;

/// xorshift64: enough to choose pages with.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % bound
    }
}

/// What the threads share.
struct Stage {
    memory: Arc<dyn CpuMemory>,
    mm: Arc<Mm>,
    area: AddrRange,
    devices: [Device; 2],
    stop: AtomicBool,
    added: AtomicU64,
}

/// Every fourth page belongs to whoever changes mappings; the others count.
fn counts(page: usize) -> bool {
    page % 4 != 3
}

impl Stage {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn span(&self, random: &mut Random) -> AddrRange {
        let first = random.below(PAGES);
        let count = [4, 16, 100][random.below(3)];
        self.area.sub(first, (1 + random.below(count)).min(PAGES - first))
    }

    /// Adds one, somewhere, again and again.
    fn add(&self, mut random: Random) -> Result<(), Error> {
        while self.goes_on() {
            let page = random.below(PAGES);
            if counts(page) {
                let word = (random.below(512) * 8) as u64;
                let address = VirtAddr::new(self.area.page_at(page).get() + word);
                self.memory.add(address, 1)?;
                self.added.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Moves pages between one device, the other, and the system.
    fn migrate(&self, which: usize, mut random: Random) -> Result<(), Error> {
        let (device, other) = (&self.devices[which], &self.devices[1 - which]);
        while self.goes_on() {
            let span = self.span(&mut random);
            let result = match random.below(6) {
                0 => device.bring_home(span),
                1 => device.pull_from(other, span),
                _ => device.migrate(span, 0),
            };
            tolerate(result)?;
        }
        Ok(())
    }

    /// Drops, unmaps and maps pages that do not count.
    fn change(&self, mut random: Random) -> Result<(), Error> {
        while self.goes_on() {
            let page = random.below(PAGES);
            if counts(page) {
                continue;
            }
            let range = self.area.sub(page, 1);
            // Few drops: they keep present pages from migrating for a while.
            match random.below(40) {
                0 => self.memory.drop_contents(range),
                1..20 => self.memory.map(range),
                _ => {
                    self.memory.unmap(range);
                    self.memory.map(range);
                }
            }
            self.memory.store(range.start(), b"!")?;
            std::thread::sleep(Duration::from_micros(300));
        }
        Ok(())
    }

    /// Looks, and makes present.
    fn look(&self, mut random: Random) -> Result<(), Error> {
        let owner = Some(self.devices[0].owner());
        while self.goes_on() {
            let range = self.span(&mut random);
            let mut entries = vec![PfnEntry::default(); range.pages()];
            let mut places = vec![Residency::Unmapped; range.pages()];
            let request = RangeRequest { range, owner };
            let access = if random.below(2) == 0 { Access::Read } else { Access::Write };
            match random.below(5) {
                0 => tolerate(self.mm.range_fault(&request, access, &mut entries))?,
                1 => tolerate(self.mm.snapshot(&request, &mut entries))?,
                2 => tolerate(self.mm.make_present(range, true))?,
                3 => tolerate(self.mm.residency(range, &mut places))?,
                _ => self.device_load(&mut random)?,
            }
        }
        Ok(())
    }

    /// The device reads a page that counts.
    fn device_load(&self, random: &mut Random) -> Result<(), Error> {
        let page = random.below(PAGES / 4) * 4;
        tolerate(self.devices[1].load(self.area.page_at(page), &mut [0; 8]))
    }
}

/// Mappings come and go, and so do pages: calls may fail, but not for other reasons.
fn tolerate<T>(result: Result<T, Error>) -> Result<(), Error> {
    match result {
        Ok(_)
        | Err(
            Error::Fault { .. }
            | Error::Invalid { .. }
            | Error::Busy { .. }
            | Error::NoMemory { .. },
        ) => Ok(()),
        Err(error) => Err(error),
    }
}

fn spawn<'a>(
    scope: &'a Scope<'a, '_>,
    stage: &'a Stage,
    work: impl FnOnce() -> Result<(), Error> + Send + 'a,
) -> std::thread::ScopedJoinHandle<'a, Result<(), Error>> {
    scope.spawn(move || work().inspect_err(|_| stage.stop.store(true, Ordering::Relaxed)))
}

/// Lets all of them work for a while; then everything comes home, and the sum is right.
pub(crate) fn increments_survive(
    memory: Arc<dyn CpuMemory>,
    mm: Arc<Mm>,
    seed: u64,
    time: Duration,
) -> Result<(), String> {
    let area = memory.reserve(PAGES, BOUNDARY);
    memory.map(area);
    let device = |pages| Device::new(&mm, area, pages).map_err(|error| format!("device: {error}"));
    let devices = [device(PAGES)?, device(40)?];
    devices[0].driver.fault_around.store(8, Ordering::Relaxed);
    let (stop, added) = (AtomicBool::new(false), AtomicU64::new(0));
    let stage = Stage { memory, mm, area, devices, stop, added };
    let shared = &stage;
    let results: Vec<Result<(), Error>> = std::thread::scope(|scope| {
        let random = |number| Random::new(seed ^ (number << 32));
        let mut threads: Vec<_> = (0..ADDERS)
            .map(|number| spawn(scope, shared, move || shared.add(random(number))))
            .collect();
        threads.push(spawn(scope, shared, move || shared.migrate(0, random(10))));
        threads.push(spawn(scope, shared, move || shared.migrate(1, random(11))));
        threads.push(spawn(scope, shared, move || shared.change(random(12))));
        threads.push(spawn(scope, shared, move || shared.look(random(13))));
        std::thread::sleep(time);
        shared.stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    results
        .into_iter()
        .collect::<Result<(), Error>>()
        .map_err(|error| format!("a thread: {error}; {:?}", stage.mm.counters()))?;
    finish(&stage)
}

fn finish(stage: &Stage) -> Result<(), String> {
    let counters = stage.mm.counters();
    stage.mm.close().map_err(|error| format!("close: {error}; {counters:?}"))?;
    let mut sum = 0_u64;
    for page in (0..PAGES).filter(|page| counts(*page)) {
        let mut bytes = [0; PAGE_SIZE];
        stage
            .memory
            .load(stage.area.page_at(page), &mut bytes)
            .map_err(|error| error.to_string())?;
        sum += bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .sum::<u64>();
    }
    let added = stage.added.load(Ordering::Relaxed);
    if sum != added {
        return Err(format!("{added} increments, and the sum is {sum}; {counters:?}"));
    }
    for (number, device) in stage.devices.iter().enumerate() {
        let (in_use, breaches) = (device.pages_in_use(), device.breaches());
        if in_use > 0 || !breaches.is_empty() {
            return Err(format!(
                "device {number}: {in_use} pages in use; {breaches:?}; {counters:?}"
            ));
        }
        device.remove().map_err(|error| format!("device {number}: {error}"))?;
    }
    if added == 0 || counters.migrated_to_device == 0 || counters.migrated_to_system == 0 {
        return Err(format!("nothing happened: {added} increments, {counters:?}"));
    }
    Ok(())
}
