//! Device page faults: what happens when a kernel meets a page without a usable entry.
//!
//! The protocol is the one of hmm.txt ("Address space mirroring implementation and API"): take the range's sequence
//! number, let the core fault the range, and enter the result under the table's lock only if the number still stands.

use crate::access::{Step, Touch, View};
use crate::config::{Policy, WINDOW_PAGES};
use crate::counters::add;
use crate::migrate::Driver;
use crate::state::index_of;
use crate::stays::Stays;
use crate::table::{Place, Translation};
use hmm_core::limits::{DEADLINE, RANGE_DEADLINE};
use hmm_core::{
    Access, AddrRange, Error, PAGE_SIZE, Pfn, PfnEntry, PfnFlags, Protection, RangeRequest, Result,
    VirtAddr, Vma,
};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long an atomic operation waits for its page to become migratable: longer than the core's grace periods.
const ATOMIC_DEADLINE: Duration = Duration::from_secs(1);
/// Misses in a row before a kernel sleeps between them, and for how long.
const EAGER_MISSES: u32 = 4;
const MISS_PAUSE: Duration = Duration::from_micros(500);

/// Misses of one access in a row.
#[derive(Debug, Default)]
struct Misses {
    count: u32,
    since: Option<Instant>,
}

impl Driver {
    /// Runs a kernel step by step: each under the table's lock, with device faults between them.
    ///
    /// # Errors
    /// Those of `step`; those of device faults; `Busy` when a page stays out of reach; `Gone` when the device closes.
    pub(crate) fn run(&self, mut step: impl FnMut(&View<'_>) -> Result<Step>) -> Result<()> {
        let mut misses = Misses::default();
        loop {
            if self.state.stopping.load(Ordering::Acquire) {
                return Err(Error::Gone { what: "the device was closed while the job ran" });
            }
            let outcome = step(&self.view())?;
            if let Step::Miss(touch) = outcome {
                self.miss(&touch, &mut misses)?;
                continue;
            }
            misses = Misses::default();
            self.progress.fetch_add(1, Ordering::Relaxed);
            if let Step::Done = outcome {
                return Ok(());
            }
        }
    }

    fn view(&self) -> View<'_> {
        View { radix: self.state.table.read(), memory: &self.state.memory, mm: &self.mm }
    }

    fn miss(&self, touch: &Touch, misses: &mut Misses) -> Result<()> {
        let since = *misses.since.get_or_insert_with(Instant::now);
        let limit = if touch.device { ATOMIC_DEADLINE } else { DEADLINE };
        if since.elapsed() >= limit {
            return Err(unreachable_page(touch));
        }
        if misses.count > 0 {
            add(&self.state.stats.retries, 1);
        }
        if misses.count >= EAGER_MISSES {
            std::thread::sleep(MISS_PAUSE);
        }
        let first = misses.count == 0;
        misses.count += 1;
        match self.device_fault(touch, first) {
            // It keeps changing; the limit above decides for how long that is tolerated.
            Err(Error::Busy { .. }) => Ok(()),
            other => other,
        }
    }

    /// Resolves one device fault. Holds no lock.
    fn device_fault(&self, touch: &Touch, first: bool) -> Result<()> {
        add(&self.state.stats.device_faults, 1);
        self.state.settings.delay(0);
        let vma = self.vma_for(touch)?;
        let window = self.window(touch, &vma)?;
        if touch.device {
            self.pull(window, &vma)?;
        } else if first && self.state.settings.policy() == Policy::OnTouch && vma.can_migrate() {
            // Best effort, and once for each access: what does not come is used where it is.
            self.make_room(window.pages());
            let _ = self.move_in(window, &mut Stays::default());
        }
        match self.populate(window, touch.write) {
            // Some other page of the window is at fault, perhaps.
            Err(_) if window.pages() > 1 => self.populate(window.sub(0, 1), touch.write),
            outcome => outcome,
        }
    }

    /// The mapping around the touched address, if it allows the access.
    fn vma_for(&self, touch: &Touch) -> Result<Vma> {
        let address = touch.addr;
        let vma = self.mm.find_vma(address)?.filter(|vma| vma.range.contains(address));
        let vma =
            vma.ok_or(Error::Fault { address, what: "the device touched an unmapped address" })?;
        let needed = if touch.write { Protection::WRITE } else { Protection::READ };
        if !vma.protection.contains(needed) {
            return Err(Error::Permission { address, what: "the mapping forbids the access" });
        }
        Ok(vma)
    }

    /// What to resolve at once: the touched page and those that the kernel will touch next.
    fn window(&self, touch: &Touch, vma: &Vma) -> Result<AddrRange> {
        let start = touch.addr.page().get();
        // With half of a small device memory at most, one window does not evict itself.
        let pages = WINDOW_PAGES.min(self.state.memory.pages() / 2).max(1);
        let end = touch.end.min(start + (pages * PAGE_SIZE) as u64).min(vma.range.end().get());
        AddrRange::covering(start, end - start)
    }

    /// Moves the page of an atomic operation into device memory, as far as that is possible now.
    fn pull(&self, window: AddrRange, vma: &Vma) -> Result<()> {
        if self.state.settings.policy() == Policy::Never {
            return Err(never());
        }
        if !vma.can_migrate() {
            return Err(Error::Unsupported {
                what: format!("atomic at {}: this kind of memory does not migrate", window.start()),
            });
        }
        self.make_room(window.pages());
        self.move_in(window, &mut Stays::default()).map(|_| ())
    }

    /// Enters a range into the device's page table.
    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let request = RangeRequest { range, owner: Some(self.state.owner) };
        let access = if write { Access::Write } else { Access::Read };
        let mut entries = [PfnEntry::default(); WINDOW_PAGES];
        let entries = &mut entries[..range.pages()];
        let deadline = Instant::now() + RANGE_DEADLINE;
        let tracker = self.mm.track(range)?;
        loop {
            let sequence = tracker.begin()?;
            self.mm.range_fault(&request, access, entries)?;
            let mut table = self.state.table.write();
            if !tracker.changed(sequence) {
                for (position, entry) in entries.iter().enumerate() {
                    let addr = range.page_at(position);
                    if let Some(translation) = self.translate(addr, *entry) {
                        table.set(addr, translation);
                    }
                }
                return Ok(());
            }
            drop(table);
            add(&self.state.stats.retries, 1);
            if Instant::now() >= deadline {
                let address = range.start();
                return Err(Error::Busy { address, what: "the range kept changing" });
            }
        }
    }

    fn translate(&self, addr: VirtAddr, entry: PfnEntry) -> Option<Translation> {
        let flags = entry.flags();
        if flags.intersects(PfnFlags::ERROR | PfnFlags::SPECIAL) {
            return None;
        }
        let pfn = entry.pfn()?;
        let place =
            if pfn.is_device() { Place::Device(self.own_page(addr, pfn)?) } else { Place::System };
        Some(Translation { place, write: flags.contains(PfnFlags::WRITE) })
    }

    /// Index of a page of ours; also notes where it is mapped now, which `mremap` may have changed.
    fn own_page(&self, addr: VirtAddr, pfn: Pfn) -> Option<u32> {
        let index = index_of(&self.devmem, pfn)?;
        if self.devmem.drvdata(pfn) != addr.get() {
            self.devmem.set_drvdata(pfn, addr.get());
        }
        Some(index)
    }
}

/// What a device says that must not migrate anything.
pub(crate) fn never() -> Error {
    Error::Unsupported { what: "the device's policy is never to migrate; set another".to_owned() }
}

fn unreachable_page(touch: &Touch) -> Error {
    if touch.device {
        let what =
            format!("atomic at {}: its page could not be migrated to the device", touch.addr);
        return Error::Unsupported { what };
    }
    Error::Busy { address: touch.addr, what: "the device could not get at the page" }
}
