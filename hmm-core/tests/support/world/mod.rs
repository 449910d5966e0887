//! A program, two devices and the library, beside a plain map of what every byte must be.

use super::device::Device;
use super::interrupted::Moment;
use super::memory::CpuMemory;
use super::steps::{BOUNDARY, Bytes, DEVICES, PAGES, Span, Step};
use hmm_core::engine::model::{ModelFaults, PageCondition};
use hmm_core::{AddrRange, Error, LEAF_SIZE, Mm, PAGE_SIZE, VirtAddr};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What was found wrong, in words.
pub(crate) type Check = Result<(), String>;

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

pub(crate) mod check;
mod process;
mod schedules;
mod verbs;

/// A step that takes longer hangs somewhere, and only a deadline ended it.
const PATIENCE: Duration = Duration::from_secs(4);

/// By how much it is longer where everything is slow; the matrix sets it.
fn more_patience() -> u32 {
    std::env::var("HMM_TEST_PATIENCE").ok().and_then(|told| told.parse().ok()).unwrap_or(1)
}

/// The accounts are compared after so many steps, and at the end.
const ACCOUNTED: usize = 16;

/// A page as it must be.
#[derive(Clone)]
struct Expected {
    bytes: Vec<u8>,
    writable: bool,
}

impl Expected {
    fn fresh() -> Self {
        Self { bytes: vec![0; PAGE_SIZE], writable: true }
    }
}

/// See the module.
pub(crate) struct World {
    memory: Arc<dyn CpuMemory>,
    mm: Arc<Mm>,
    /// Where the library can be interrupted, if it can.
    moment: Option<Arc<Moment>>,
    devices: Vec<Device>,
    area: AddrRange,
    /// Pages that are mapped.
    expected: BTreeMap<usize, Expected>,
    pins: Vec<AddrRange>,
    faults: ModelFaults,
    /// Calls may fail for no visible reason.
    troubled: bool,
    /// Some pages were made unmovable at some time.
    unmovable: bool,
    /// Some pages were swapped out at some time.
    swapped: bool,
    /// Steps done.
    steps: usize,
}

/// A part of some bytes that lies in one page: page, offset in it, offset in the bytes, length.
type Part = (usize, usize, usize, usize);

fn parts(bytes: Bytes) -> impl Iterator<Item = Part> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = bytes.at + done;
        let (page, at) = (here / PAGE_SIZE, here % PAGE_SIZE);
        let len = (PAGE_SIZE - at).min(bytes.len - done);
        let from = done;
        done += len;
        (len > 0).then_some((page, at, from, len))
    })
}

fn data_of(bytes: Bytes) -> Vec<u8> {
    (0..bytes.len).map(|index| bytes.seed.wrapping_add(index as u8)).collect()
}

/// The leaves in which an area lies; nothing else does.
fn leaves_around(area: AddrRange) -> AddrRange {
    let start = area.start().get() / LEAF_SIZE * LEAF_SIZE;
    AddrRange::new(start, area.end().get().next_multiple_of(LEAF_SIZE)).unwrap()
}

impl World {
    /// A world on `mm`, which manages `memory`. `faults` is what goes wrong while a step has switched trouble on;
    /// `moment` belongs to the engine, if that can be interrupted.
    pub(crate) fn new(
        memory: Arc<dyn CpuMemory>,
        mm: Arc<Mm>,
        faults: ModelFaults,
        moment: Option<Arc<Moment>>,
    ) -> Result<Self, Error> {
        let area = memory.reserve(PAGES, BOUNDARY);
        // Whole leaves, so that the library may watch them as such.
        memory.map(leaves_around(area));
        let mut world = Self {
            memory,
            mm,
            moment,
            devices: Vec::new(),
            area,
            expected: (0..PAGES).map(|page| (page, Expected::fresh())).collect(),
            pins: Vec::new(),
            faults,
            troubled: false,
            unmovable: false,
            swapped: false,
            steps: 0,
        };
        for capacity in [PAGES, 24].into_iter().take(DEVICES) {
            world.devices.push(Device::new(&world.mm, area, capacity)?);
        }
        Ok(world)
    }

    fn range(&self, span: Span) -> AddrRange {
        self.area.sub(span.first, span.count)
    }

    fn addr(&self, at: usize) -> VirtAddr {
        VirtAddr::new(self.area.start().get() + at as u64)
    }

    fn is_mapped(&self, span: Span) -> bool {
        span.pages().all(|page| self.expected.contains_key(&page))
    }

    /// Whether the pages are mapped alike: one vma.
    fn is_one_vma(&self, span: Span) -> bool {
        let writable = self.expected.get(&span.first).map(|page| page.writable);
        writable.is_some()
            && span.pages().all(|page| self.expected.get(&page).map(|one| one.writable) == writable)
    }

    fn is_writable(&self, span: Span) -> bool {
        span.pages().all(|page| self.expected.get(&page).is_some_and(|one| one.writable))
    }

    /// Sorts results: what should succeed did, or failed for trouble; what should not, did not.
    fn judge<T>(
        &self,
        what: &str,
        result: Result<T, Error>,
        possible: bool,
    ) -> Result<Option<T>, String> {
        match result {
            Ok(value) if possible => Ok(Some(value)),
            Ok(_) => Err(format!("{what} succeeded, but is not possible")),
            Err(Error::Busy { .. } | Error::NoMemory { .. }) if self.troubled => Ok(None),
            Err(Error::Fault { .. } | Error::Invalid { .. } | Error::Permission { .. })
                if !possible =>
            {
                Ok(None)
            }
            Err(error) => Err(format!("{what}: {error}")),
        }
    }

    /// Does one step, then compares every byte.
    pub(crate) fn step(&mut self, step: Step) -> Check {
        let begin = Instant::now();
        self.run(step)?;
        let time = begin.elapsed();
        ensure!(time < PATIENCE * more_patience(), "it took {time:?}");
        self.check()?;
        self.steps += 1;
        if self.steps.is_multiple_of(ACCOUNTED) { self.check_accounts() } else { Ok(()) }
    }

    fn run(&mut self, step: Step) -> Check {
        match step {
            Step::Change(change) => self.change(change),
            Step::Load(bytes) => self.load(bytes),
            Step::Add { word, value } => self.add(word, value),
            Step::SystemRead(bytes) => self.system_read(bytes),
            Step::SystemWrite(bytes) => self.system_write(bytes),
            Step::DeviceLoad { device, bytes } => self.device_load(device, bytes),
            Step::DeviceStore { device, bytes } => self.device_store(device, bytes),
            Step::Migrate { device, span, leave } => self.migrate(device, span, leave),
            Step::Home { device, span } => self.home(device, span),
            Step::Pull { device, span } => self.pull(device, span),
            Step::During { device, span, home, late, change } => {
                self.during(device, span, home, late, change)
            }
            Step::Panic { device, span, home, late } => self.panic(device, span, home, late),
            Step::Interrupted { calls, change, verb } => self.interrupted(calls, change, verb),
            Step::Snapshot { span, owner } => self.snapshot(span, owner),
            Step::RangeFault { span, owner, write } => self.range_fault(span, owner, write),
            Step::MakePresent { span, write } => self.make_present(span, write),
            Step::Pin(span) => self.pin(span),
            Step::Unpin => self.unpin(),
            Step::Idle => {
                self.memory.idle();
                Ok(())
            }
            Step::FaultAround { device, pages } => {
                self.devices[device].driver.fault_around.store(pages, Ordering::Relaxed);
                Ok(())
            }
            Step::Condition { span, condition } => {
                let range = self.range(span);
                let done = self.memory.set_condition(range, condition);
                self.unmovable |= done && condition == PageCondition::Pinned;
                self.swapped |= done && condition == PageCondition::Swapped;
                Ok(())
            }
            Step::Trouble(on) => {
                let faults = if on { self.faults } else { ModelFaults::default() };
                self.troubled = self.memory.set_faults(faults) && on;
                Ok(())
            }
            Step::Fork => self.fork(),
        }
    }

    /// Closes the mm, whatever is where: everything comes home, and nothing is freed twice or not at all.
    pub(crate) fn finish(mut self) -> Check {
        self.check_accounts()?;
        self.mm.close().map_err(|error| format!("close: {error}"))?;
        self.mm.close().map_err(|error| format!("second close: {error}"))?;
        self.memory.set_faults(ModelFaults::default());
        for page in 0..PAGES {
            self.load(Bytes { at: page * PAGE_SIZE, len: PAGE_SIZE, seed: 0 })?;
        }
        let gone = self.mm.read(self.area.start(), &mut [0]);
        ensure!(matches!(gone, Err(Error::Gone { .. })), "read after close: {gone:?}");
        for (number, device) in self.devices.iter().enumerate() {
            let (in_use, releases) = (device.pages_in_use(), device.releases());
            ensure!(in_use == 0, "device {number}: {in_use} pages in use after close");
            ensure!(releases == 101, "device {number}: release came {releases} times, not 101");
            let breaches = device.breaches();
            ensure!(breaches.is_empty(), "device {number}: {}", breaches.join("; "));
            device.remove().map_err(|error| format!("device {number}: {error}"))?;
        }
        self.devices.clear();
        self.memory.unmap(leaves_around(self.area));
        Ok(())
    }
}

impl Drop for World {
    /// After a failure: the next world needs the pfn windows.
    fn drop(&mut self) {
        self.memory.set_faults(ModelFaults::default());
        let _ = self.mm.close();
        for device in &self.devices {
            let _ = device.remove();
        }
    }
}
