//! A program, two devices and the library, beside a plain map of what every byte must be.

use super::device::Device;
use super::memory::CpuMemory;
use super::steps::{BOUNDARY, Bytes, Change, DEVICES, PAGES, Span, Step};
use hmm_core::engine::model::{ModelFaults, PageCondition};
use hmm_core::{
    Access, AddrRange, Error, Mm, PAGE_SIZE, PfnEntry, PfnFlags, RangeRequest, Residency, VirtAddr,
};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
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

impl World {
    /// A world on `mm`, which manages `memory`. `faults` is what goes wrong while a step has switched trouble on.
    pub(crate) fn new(
        memory: Arc<dyn CpuMemory>,
        mm: Arc<Mm>,
        faults: ModelFaults,
    ) -> Result<Self, Error> {
        let area = memory.reserve(PAGES, BOUNDARY);
        memory.map(area);
        let mut world = Self {
            memory,
            mm,
            devices: Vec::new(),
            area,
            expected: (0..PAGES).map(|page| (page, Expected::fresh())).collect(),
            pins: Vec::new(),
            faults,
            troubled: false,
            unmovable: false,
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
            Step::During { device, span, home, change } => self.during(device, span, home, change),
            Step::Snapshot { span, owner } => self.snapshot(span, owner),
            Step::RangeFault { span, owner, write } => self.range_fault(span, owner, write),
            Step::MakePresent { span, write } => self.make_present(span, write),
            Step::Pin(span) => self.pin(span),
            Step::Unpin => self.unpin(),
            Step::FaultAround { device, pages } => {
                self.devices[device].driver.fault_around.store(pages, Ordering::Relaxed);
                Ok(())
            }
            Step::Condition { span, condition } => {
                let range = self.range(span);
                let done = self.memory.set_condition(range, condition);
                self.unmovable |= done && condition == PageCondition::Pinned;
                Ok(())
            }
            Step::Trouble(on) => {
                let faults = if on { self.faults } else { ModelFaults::default() };
                self.troubled = self.memory.set_faults(faults) && on;
                Ok(())
            }
        }?;
        self.check()
    }

    // --- The process and its memory -------------------------------------------------------------------------------

    fn is_possible(&self, change: Change) -> bool {
        match change {
            Change::Map(_) | Change::Unmap(_) => true,
            Change::Drop(span) | Change::Protect { span, .. } => self.is_mapped(span),
            Change::Move { from, to } => {
                let fits = to + from.count <= PAGES;
                let apart = to + from.count <= from.first || from.first + from.count <= to;
                fits && apart && self.is_mapped(from)
            }
            Change::Store(bytes) => {
                parts(bytes).all(|(page, ..)| self.is_writable(Span { first: page, count: 1 }))
            }
        }
    }

    /// What the change does to the expected bytes.
    fn note(&mut self, change: Change) {
        match change {
            Change::Map(span) => {
                self.expected.extend(span.pages().map(|page| (page, Expected::fresh())));
            }
            Change::Unmap(span) => {
                self.expected.retain(|page, _| !span.pages().contains(page));
            }
            Change::Drop(span) => {
                for (_, page) in self.expected.range_mut(span.pages()) {
                    page.bytes.fill(0);
                }
            }
            Change::Move { from, to } => {
                let moved: Vec<_> = from
                    .pages()
                    .filter_map(|page| Some((page - from.first + to, self.expected.remove(&page)?)))
                    .collect();
                self.expected.extend(moved);
            }
            Change::Protect { span, writable } => {
                for (_, page) in self.expected.range_mut(span.pages()) {
                    page.writable = writable;
                }
            }
            Change::Store(bytes) => self.note_store(bytes),
        }
    }

    fn note_store(&mut self, bytes: Bytes) {
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            if let Some(expected) = self.expected.get_mut(&page) {
                expected.bytes[at..at + len].copy_from_slice(&data[from..from + len]);
            }
        }
    }

    /// The change, as something that any thread can do.
    fn action(&self, change: Change) -> Box<dyn FnOnce() -> Result<(), Error> + Send> {
        let (memory, area) = (self.memory.clone(), self.area);
        let range = move |span: Span| area.sub(span.first, span.count);
        Box::new(move || {
            match change {
                Change::Map(span) => memory.map(range(span)),
                Change::Unmap(span) => memory.unmap(range(span)),
                Change::Drop(span) => memory.drop_contents(range(span)),
                Change::Move { from, to } => memory.remap(range(from), area.page_at(to)),
                Change::Protect { span, writable } => memory.protect(range(span), writable),
                Change::Store(bytes) => {
                    let data = data_of(bytes);
                    for (page, at, from, len) in parts(bytes) {
                        let addr = area.page_at(page).checked_add(at as u64).unwrap();
                        memory.store(addr, &data[from..from + len])?;
                    }
                }
            }
            Ok(())
        })
    }

    fn change(&mut self, change: Change) -> Check {
        let possible = self.is_possible(change);
        if !possible {
            let Change::Store(bytes) = change else { return Ok(()) };
            return self.bad_store(bytes);
        }
        (self.action(change))().map_err(|error| format!("{change:?}: {error}"))?;
        self.note(change);
        self.told_of(change);
        Ok(())
    }

    /// Stores up to the page where it must fail.
    fn bad_store(&mut self, bytes: Bytes) -> Check {
        if !self.memory.survives_bad_accesses() {
            return Ok(());
        }
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            let possible = self.is_writable(Span { first: page, count: 1 });
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.memory.store(addr, &data[from..from + len]);
            self.judge("store", result, possible)?;
            if possible {
                let part = Bytes { at: page * PAGE_SIZE + at, len, seed: data[from] };
                self.note_store(part);
            }
        }
        Ok(())
    }

    /// No event tells of a changed protection; the drivers know it otherwise.
    fn told_of(&self, change: Change) {
        if let Change::Protect { span, .. } = change {
            self.devices.iter().for_each(|device| device.forget(self.range(span)));
        }
    }

    fn load(&mut self, bytes: Bytes) -> Check {
        for (page, at, _, len) in parts(bytes) {
            let possible = self.expected.contains_key(&page);
            if !possible && !self.memory.survives_bad_accesses() {
                continue;
            }
            let mut out = vec![0; len];
            let result = self.memory.load(self.addr(page * PAGE_SIZE + at), &mut out);
            if self.judge("load", result, possible)?.is_some() {
                self.compare(page, at, &out, "a load")?;
            }
        }
        Ok(())
    }

    fn add(&mut self, word: usize, value: u64) -> Check {
        let (page, at) = (word * 8 / PAGE_SIZE, word * 8 % PAGE_SIZE);
        if !self.is_writable(Span { first: page, count: 1 }) {
            return Ok(());
        }
        let before = self.memory.add(self.addr(word * 8), value);
        let before = before.map_err(|error| format!("add: {error}"))?;
        self.compare(page, at, &before.to_ne_bytes(), "an atomic add")?;
        if let Some(expected) = self.expected.get_mut(&page) {
            expected.bytes[at..at + 8].copy_from_slice(&before.wrapping_add(value).to_ne_bytes());
        }
        Ok(())
    }

    /// How many of the bytes come before the first page that `allowed` refuses.
    fn prefix(&self, bytes: Bytes, allowed: impl Fn(&Expected) -> bool) -> usize {
        parts(bytes)
            .take_while(|(page, ..)| self.expected.get(page).is_some_and(&allowed))
            .map(|(.., len)| len)
            .sum()
    }

    fn system_read(&mut self, bytes: Bytes) -> Check {
        let reachable = self.prefix(bytes, |_| true);
        let mut out = vec![0; bytes.len];
        let result = self.mm.read(self.addr(bytes.at), &mut out);
        let Some(count) = self.judge("Mm::read", result, reachable > 0)? else { return Ok(()) };
        ensure!(count == reachable, "Mm::read gave {count} bytes of {reachable}");
        for (page, at, from, len) in parts(Bytes { len: count, ..bytes }) {
            self.compare(page, at, &out[from..from + len], "Mm::read")?;
        }
        Ok(())
    }

    fn system_write(&mut self, bytes: Bytes) -> Check {
        let reachable = self.prefix(bytes, |page| page.writable);
        let result = self.mm.write(self.addr(bytes.at), &data_of(bytes));
        let Some(count) = self.judge("Mm::write", result, reachable > 0)? else { return Ok(()) };
        ensure!(count == reachable, "Mm::write took {count} bytes of {reachable}");
        self.note_store(Bytes { len: count, ..bytes });
        Ok(())
    }

    // --- The devices ----------------------------------------------------------------------------------------------

    fn device_load(&mut self, device: usize, bytes: Bytes) -> Check {
        for (page, at, _, len) in parts(bytes) {
            let possible = self.expected.contains_key(&page);
            let mut out = vec![0; len];
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.devices[device].load(addr, &mut out);
            if self.judge("device load", result, possible)?.is_some() {
                self.compare(page, at, &out, "a device load")?;
            }
        }
        Ok(())
    }

    fn device_store(&mut self, device: usize, bytes: Bytes) -> Check {
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            let possible = self.is_writable(Span { first: page, count: 1 });
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.devices[device].store(addr, &data[from..from + len]);
            if self.judge("device store", result, possible)?.is_some() {
                let part = Bytes { at: page * PAGE_SIZE + at, len, seed: data[from] };
                self.note_store(part);
            }
        }
        Ok(())
    }

    fn is_pinned(&self, page: usize) -> bool {
        self.pins.iter().any(|pin| pin.contains(self.area.page_at(page)))
    }

    fn migrate(&mut self, device: usize, span: Span, leave: usize) -> Check {
        let before = self.residency()?;
        let room = PAGES.min(if device == 0 { PAGES } else { 24 });
        let room = room - self.devices[device].pages_in_use();
        let result = self.devices[device].migrate(self.range(span), leave);
        let result = self.judge("migrate", result, self.is_one_vma(span))?;
        let after = self.residency()?;
        for page in span.pages().filter(|page| self.is_pinned(*page)) {
            let went = before[page] != after[page] && matches!(after[page], Residency::Device(_));
            ensure!(!went, "page {page} is pinned, and went to a device");
        }
        let Some(moved) = result else { return Ok(()) };
        if !self.is_writable(span) {
            ensure!(moved == 0, "{moved} pages of read-only memory went to a device");
        } else if !self.troubled && !self.unmovable && leave == 0 {
            let wanted = span.pages().filter(|page| {
                !self.is_pinned(*page) && !matches!(before[*page], Residency::Device(_))
            });
            let wanted = wanted.count().min(room);
            ensure!(moved == wanted, "{moved} pages went to a device, and {wanted} could");
        }
        Ok(())
    }

    fn home(&mut self, device: usize, span: Span) -> Check {
        let result = self.devices[device].bring_home(self.range(span));
        let result = self.judge("bring home", result, self.is_one_vma(span))?;
        if result.is_some() && !self.troubled {
            let left = self.on_device(device, span)?;
            ensure!(left == 0, "{left} pages did not come home");
        }
        Ok(())
    }

    fn on_device(&self, device: usize, span: Span) -> Result<usize, String> {
        let residency = self.residency()?;
        let driver = &self.devices[device].driver;
        Ok(span
            .pages()
            .filter(|page| match residency[*page] {
                Residency::Device(pfn) => driver.contents(pfn).is_some(),
                _ => false,
            })
            .count())
    }

    fn pull(&mut self, device: usize, span: Span) -> Check {
        let other = (device + 1) % DEVICES;
        let result = self.devices[device].pull_from(&self.devices[other], self.range(span));
        self.judge("pull", result, self.is_one_vma(span)).map(|_| ())
    }

    /// A migration in whose middle the process changes its memory.
    fn during(&mut self, device: usize, span: Span, home: bool, change: Change) -> Check {
        if !self.is_possible(change) {
            return Ok(());
        }
        let running: Arc<Mutex<Option<JoinHandle<Result<(), Error>>>>> = Arc::default();
        let happen = self.interruption(change, running.clone());
        let slot = &self.devices[device].driver.interruption;
        *slot.lock().unwrap() = Some(happen);
        let range = self.range(span);
        let result = if home {
            self.devices[device].bring_home(range)
        } else {
            self.devices[device].migrate(range, 0)
        };
        if let Err(error) = result {
            let known = matches!(
                error,
                Error::Fault { .. } | Error::Invalid { .. } | Error::Busy { .. } | Error::NoMemory { .. }
            );
            ensure!(known, "migration with an interruption: {error}");
        }
        let unused = slot.lock().unwrap().take();
        if let Some(happen) = unused {
            happen();
        }
        let thread = running.lock().unwrap().take();
        if let Some(thread) = thread {
            let result = thread.join().map_err(|_| format!("{change:?} panicked"))?;
            result.map_err(|error| format!("{change:?} during a migration: {error}"))?;
        }
        self.note(change);
        self.told_of(change);
        Ok(())
    }

    /// The change, made by another thread: at once for system calls, as soon as the page is home for stores.
    fn interruption(
        &self,
        change: Change,
        running: Arc<Mutex<Option<JoinHandle<Result<(), Error>>>>>,
    ) -> Box<dyn FnOnce() + Send> {
        let (action, mm) = (self.action(change), self.mm.clone());
        Box::new(move || {
            let faults = mm.counters().cpu_faults;
            let thread = std::thread::spawn(action);
            let deadline = Instant::now() + Duration::from_secs(5);
            let waits = |thread: &JoinHandle<_>| {
                // A store that waits for this migration cannot end before it.
                let parked = matches!(change, Change::Store(_)) && mm.counters().cpu_faults > faults;
                !thread.is_finished() && !parked
            };
            while waits(&thread) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(50));
            }
            *running.lock().unwrap() = Some(thread);
        })
    }

    // --- The library's other verbs --------------------------------------------------------------------------------

    fn owner(&self, device: Option<usize>) -> Option<hmm_core::OwnerId> {
        device.map(|device| self.devices[device].owner())
    }

    fn snapshot(&mut self, span: Span, owner: Option<usize>) -> Check {
        let request = RangeRequest { range: self.range(span), owner: self.owner(owner) };
        let mut entries = vec![PfnEntry::default(); span.count];
        let result = self.mm.snapshot(&request, &mut entries);
        if self.judge("snapshot", result, self.is_one_vma(span))?.is_some() {
            self.check_entries(span, owner, &entries)?;
        }
        Ok(())
    }

    fn range_fault(&mut self, span: Span, owner: Option<usize>, write: bool) -> Check {
        let request = RangeRequest { range: self.range(span), owner: self.owner(owner) };
        let access = if write { Access::Write } else { Access::Read };
        let possible = self.is_one_vma(span) && (!write || self.is_writable(span));
        let mut entries = vec![PfnEntry::default(); span.count];
        let result = self.mm.range_fault(&request, access, &mut entries);
        if self.judge("range_fault", result, possible)?.is_some() {
            self.check_entries(span, owner, &entries)?;
            for (page, entry) in span.pages().zip(&entries) {
                ensure!(entry.pfn().is_some(), "range_fault left page {page} as {entry:?}");
                let writable = entry.flags().contains(PfnFlags::WRITE);
                ensure!(writable || !write, "range_fault to write left page {page} as {entry:?}");
            }
        }
        Ok(())
    }

    /// Entries tell the truth about where pages are.
    fn check_entries(&self, span: Span, owner: Option<usize>, entries: &[PfnEntry]) -> Check {
        let residency = self.residency()?;
        for (page, entry) in span.pages().zip(entries) {
            let place = residency[page];
            let foreign = |pfn| owner.is_some_and(|one| self.devices[one].driver.contents(pfn).is_none());
            let right = match (place, entry.pfn()) {
                (Residency::Device(pfn), None) => foreign(pfn),
                (Residency::Device(pfn), Some(told)) => {
                    told == pfn && !foreign(pfn) && entry.flags().contains(PfnFlags::DEVICE)
                }
                (Residency::System, Some(told)) => told.to_addr() == Some(self.area.page_at(page)),
                (Residency::System, None) => self.is_zero(page),
                (Residency::None, told) => told.is_none(),
                _ => false,
            };
            ensure!(right, "page {page} is {place:?}, and its entry says {entry:?}");
            let writable = self.is_writable(Span { first: page, count: 1 });
            let write = entry.flags().contains(PfnFlags::WRITE);
            ensure!(writable || !write, "page {page} is read-only, and its entry says {entry:?}");
        }
        Ok(())
    }

    fn is_zero(&self, page: usize) -> bool {
        self.expected.get(&page).is_none_or(|one| one.bytes.iter().all(|byte| *byte == 0))
    }

    fn make_present(&mut self, span: Span, write: bool) -> Check {
        let possible = self.is_mapped(span) && (!write || self.is_writable(span));
        let result = self.mm.make_present(self.range(span), write);
        if self.judge("make_present", result, possible)?.is_some() {
            let residency = self.residency()?;
            for page in span.pages() {
                let place = residency[page];
                ensure!(place == Residency::System, "page {page} was made present, and is {place:?}");
            }
        }
        Ok(())
    }

    fn pin(&mut self, span: Span) -> Check {
        let range = self.range(span);
        if self.judge("pin_range", self.mm.pin_range(range), true)?.is_some() {
            self.pins.push(range);
            let residency = self.residency()?;
            let away = span.pages().find(|page| matches!(residency[*page], Residency::Device(_)));
            ensure!(away.is_none(), "page {away:?} was pinned, and is on a device");
        }
        Ok(())
    }

    fn unpin(&mut self) -> Check {
        let Some(pin) = self.pins.pop() else { return Ok(()) };
        self.mm.unpin_range(pin).map_err(|error| format!("unpin_range: {error}"))
    }

    // --- What must hold -------------------------------------------------------------------------------------------

    fn residency(&self) -> Result<Vec<Residency>, String> {
        let mut residency = vec![Residency::Unmapped; PAGES];
        self.mm
            .residency(self.area, &mut residency)
            .map_err(|error| format!("residency: {error}"))?;
        Ok(residency)
    }

    fn compare(&self, page: usize, at: usize, found: &[u8], by: &str) -> Check {
        let Some(expected) = self.expected.get(&page) else {
            return Err(format!("page {page} is not mapped, and {by} found something"));
        };
        let expected = &expected.bytes[at..at + found.len()];
        let Some(wrong) = (0..found.len()).find(|index| found[*index] != expected[*index]) else {
            return Ok(());
        };
        let (is, must) = (found[wrong], expected[wrong]);
        Err(format!("page {page} byte {}: {by} found {is:#x} instead of {must:#x}", at + wrong))
    }

    /// Every byte, where it is now, without moving anything; mirrors and counters agree.
    fn check(&self) -> Check {
        let residency = self.residency()?;
        for (page, place) in residency.iter().enumerate() {
            self.check_page(page, *place)?;
        }
        let on_devices =
            residency.iter().filter(|place| matches!(place, Residency::Device(_))).count();
        let in_use: usize = self.devices.iter().map(Device::pages_in_use).sum();
        ensure!(in_use == on_devices, "{in_use} device pages in use, {on_devices} pages on devices");
        let counted = self.mm.counters().device_pages;
        ensure!(counted == on_devices as u64, "{counted} device pages counted, {on_devices} there");
        self.check_mirrors(&residency)
    }

    fn check_page(&self, page: usize, place: Residency) -> Check {
        let mapped = self.expected.contains_key(&page);
        let mut bytes = Box::new([0; PAGE_SIZE]);
        match place {
            Residency::Unmapped => {
                ensure!(!mapped, "page {page} is mapped, and residency says it is not");
                return Ok(());
            }
            Residency::None => {}
            Residency::System => {
                let there = self.memory.inspect(&self.mm, self.area.page_at(page), &mut bytes);
                ensure!(there, "page {page} is said to be in system memory, and is not there");
            }
            Residency::Device(pfn) => {
                let found = self.devices.iter().find_map(|device| device.driver.contents(pfn));
                bytes = found.ok_or_else(|| format!("page {page} is on {pfn:?}, which is free"))?;
            }
            other => return Err(format!("page {page} is {other:?}")),
        }
        self.compare(page, 0, &*bytes, &format!("the check ({place:?})"))
    }

    /// What a device's page table maps is where it says.
    fn check_mirrors(&self, residency: &[Residency]) -> Check {
        for (number, device) in self.devices.iter().enumerate() {
            for (address, mapped) in device.mirrored() {
                let page = self.area.index_of(VirtAddr::new(address));
                let place = residency[page];
                let right = match place {
                    Residency::Device(pfn) => pfn == mapped.page,
                    Residency::System => mapped.page.to_addr() == Some(VirtAddr::new(address)),
                    _ => false,
                };
                ensure!(right, "device {number} maps page {page} as {mapped:?}: it is {place:?}");
            }
            let breaches = device.breaches();
            ensure!(breaches.is_empty(), "device {number}: {}", breaches.join("; "));
        }
        Ok(())
    }

    /// Closes the mm, whatever is where: everything comes home, and nothing is freed twice or not at all.
    pub(crate) fn finish(mut self) -> Check {
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
