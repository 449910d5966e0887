//! Things that happen while something else is under way.

use super::{Check, World};
use crate::support::device::{Interruption, happen};
use crate::support::steps::{Change, DEVICES, Span, Verb};
use hmm_core::{Access, Error, PAGE_SIZE, PfnEntry, RangeRequest, Residency};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an interruption is given: after a callback, it ends by itself.
const UNHINDERED: Duration = Duration::from_secs(3);
/// In the middle of the library, it may have to wait for a lock that is held there.
const HINDERED: Duration = Duration::from_millis(3);

/// A thread that makes a change while something else is under way.
type Running = Arc<Mutex<Option<JoinHandle<Result<(), Error>>>>>;

impl World {
    /// A migration in whose middle the process changes its memory.
    pub(super) fn during(
        &mut self,
        device: usize,
        span: Span,
        home: bool,
        late: bool,
        change: Change,
    ) -> Check {
        if !self.is_possible(change) {
            return Ok(());
        }
        let running = Running::default();
        let driver = self.devices[device].driver.clone();
        let slot = if late { &driver.late_interruption } else { &driver.interruption };
        *slot.lock() = Some(self.interruption(change, &running, UNHINDERED));
        let range = self.range(span);
        let result = if home {
            self.devices[device].bring_home(range)
        } else {
            self.devices[device].migrate(range, 0)
        };
        happen(slot);
        self.changed(change, &running)?;
        self.tolerate("migration", result)
    }

    /// A migration whose callback panics: every page stays what it was.
    pub(super) fn panic(&mut self, device: usize, span: Span, home: bool, late: bool) -> Check {
        let before = self.residency()?;
        let driver = self.devices[device].driver.clone();
        let slot = if late { &driver.late_interruption } else { &driver.interruption };
        // Unwinds without the message that a panic prints.
        *slot.lock() = Some(Box::new(|| resume_unwind(Box::new("a callback gave up"))));
        let range = self.range(span);
        let (device, result) = (&self.devices[device], Mutex::new(None));
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let done = if home { device.bring_home(range) } else { device.migrate(range, 0) };
            *result.lock().unwrap() = Some(done);
        }));
        *slot.lock() = None;
        if unwound.is_err() {
            let after = self.residency()?;
            let moved = |page: &usize| {
                matches!(before[*page], Residency::Device(_)) && before[*page] != after[*page]
            };
            let wrong = span.pages().find(moved);
            ensure!(wrong.is_none(), "page {wrong:?} left its device in a migration that failed");
        }
        match result.into_inner().unwrap() {
            Some(result) => self.judge("migrate", result, self.is_one_vma(span)).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Something of the library, interrupted at one of its engine's calls.
    pub(super) fn interrupted(&mut self, calls: usize, change: Change, verb: Verb) -> Check {
        let Some(moment) = self.moment.clone() else { return Ok(()) };
        if !self.is_possible(change) {
            return Ok(());
        }
        let running = Running::default();
        let before = self.seen_by(verb);
        moment.set(calls, self.interruption(change, &running, HINDERED));
        let seen = self.perform(verb);
        moment.end();
        self.changed(change, &running)?;
        let Some(seen) = seen? else { return Ok(()) };
        let after = self.seen_by(verb);
        let right = [before, after].into_iter().flatten().any(|one| one == seen);
        ensure!(right, "a load found neither what was there before nor what is there after");
        Ok(())
    }

    /// The bytes that a load must find.
    fn seen_by(&self, verb: Verb) -> Option<Vec<u8>> {
        match verb {
            Verb::Load { page } | Verb::DeviceLoad { page, .. } => {
                self.expected.get(&page).map(|one| one.bytes.clone())
            }
            _ => None,
        }
    }

    /// Does it; says what a load found. It may fail, as anything may whose memory changes under it.
    fn perform(&mut self, verb: Verb) -> Result<Option<Vec<u8>>, String> {
        let mut seen = vec![0; PAGE_SIZE];
        match verb {
            Verb::Load { page } => {
                let result = self.memory.load(self.area.page_at(page), &mut seen);
                let found = result.is_ok();
                self.tolerate("load", result)?;
                return Ok(found.then_some(seen));
            }
            Verb::DeviceLoad { device, page } => {
                let result = self.devices[device].load(self.area.page_at(page), &mut seen);
                let found = result.is_ok();
                self.tolerate("device load", result)?;
                return Ok(found.then_some(seen));
            }
            Verb::Migrate { device, span } => {
                let result = self.devices[device].migrate(self.range(span), 0);
                self.tolerate("migrate", result)?;
            }
            Verb::Home { device, span } => {
                let result = self.devices[device].bring_home(self.range(span));
                self.tolerate("bring home", result)?;
            }
            Verb::Pull { device, span } => {
                let other = &self.devices[(device + 1) % DEVICES];
                let result = self.devices[device].pull_from(other, self.range(span));
                self.tolerate("pull", result)?;
            }
            Verb::RangeFault { span, owner, write } => {
                let request = RangeRequest { range: self.range(span), owner: self.owner(owner) };
                let access = if write { Access::Write } else { Access::Read };
                let mut entries = vec![PfnEntry::default(); span.count];
                let result = self.mm.range_fault(&request, access, &mut entries);
                self.tolerate("range_fault", result)?;
            }
            Verb::MakePresent { span, write } => {
                let result = self.mm.make_present(self.range(span), write);
                self.tolerate("make_present", result)?;
            }
            Verb::Pin(span) => {
                let result = self.mm.pin_range(self.range(span));
                self.pins.extend(result.is_ok().then(|| self.range(span)));
                self.tolerate("pin_range", result)?;
            }
        }
        Ok(None)
    }

    /// What may come of a call while its memory changes.
    fn tolerate<T>(&self, what: &str, result: Result<T, Error>) -> Check {
        match result {
            Ok(_) | Err(Error::Fault { .. } | Error::Invalid { .. } | Error::Permission { .. }) => {
                Ok(())
            }
            Err(Error::Busy { .. } | Error::NoMemory { .. }) if self.troubled => Ok(()),
            Err(error) => Err(format!("{what} with an interruption: {error}")),
        }
    }

    /// Ends the thread that makes the change, and notes the change.
    pub(super) fn changed(&mut self, change: Change, running: &Running) -> Check {
        let thread = running.lock().unwrap().take();
        let thread = thread.ok_or("the change was not made")?;
        let result = thread.join().map_err(|_| format!("{change:?} panicked"))?;
        result.map_err(|error| format!("{change:?} during something else: {error}"))?;
        self.note(change);
        self.told_of(change);
        Ok(())
    }

    /// The change, made by another thread: at once for system calls, as soon as the page is home for stores.
    pub(super) fn interruption(
        &self,
        change: Change,
        running: &Running,
        time: Duration,
    ) -> Interruption {
        let (action, mm, running) = (self.action(change), self.mm.clone(), running.clone());
        Box::new(move || {
            let faults = mm.counters().cpu_faults;
            let thread = std::thread::spawn(action);
            let deadline = Instant::now() + time;
            let waits = |thread: &JoinHandle<_>| {
                // A store that waits for this migration cannot end before it.
                let stores = matches!(change, Change::Store(_) | Change::MoveAndStore { .. });
                let parked = stores && mm.counters().cpu_faults > faults;
                !thread.is_finished() && !parked
            };
            while waits(&thread) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(50));
            }
            *running.lock().unwrap() = Some(thread);
        })
    }
}
