//! The driver proper: migration in both directions on the device's own account, and eviction.

use crate::copy::{ToDevice, ToSystem};
use crate::counters::add;
use crate::mapped::Mapped;
use crate::state::{State, pfn_of};
use crate::stays::Stays;
use hmm_core::limits::{BATCH_LEAVES, BATCH_PAGES};
use hmm_core::sync::Mutex;
use hmm_core::{
    AddrRange, Devmem, Error, LEAF_SIZE, MigrateOps, MigratePfn, MigrateRequest, Mm, PAGE_SIZE,
    Residency, Result, Select, Stay, VirtAddr,
};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Pages whose residency is asked for at once.
const LOOK_PAGES: usize = 512;
/// How often a migration comes back for pages that something else held. The core waits for nobody: a page whose CPU
/// fault is just being finished, say, would be left behind.
const ROUNDS: usize = 8;
const ROUND_PAUSE: Duration = Duration::from_micros(100);
/// Lists that are kept for the next migration.
const SPARE_LISTS: usize = 4;

/// One device at work on one address space.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) mm: Arc<Mm>,
    pub(crate) state: Arc<State>,
    pub(crate) devmem: Arc<Devmem>,
    /// Counts the steps of all jobs: whoever waits for a job can see whether the device is still moving.
    pub(crate) progress: AtomicU64,
    /// Device page that eviction looks at next. Pages are handed out in rising order, so the oldest come first.
    hand: Mutex<u32>,
    spare: Mutex<[Option<Mapped<MigratePfn>>; SPARE_LISTS]>,
}

/// Pages that a migration left behind.
#[derive(Debug, Default)]
struct Left {
    /// Held by another migration.
    migrating: usize,
    /// On another device.
    foreign: usize,
}

impl Left {
    /// Gives other migrations a moment; false when none is in the way.
    fn wait_for_others(&self) -> bool {
        if self.migrating > 0 {
            std::thread::sleep(ROUND_PAUSE);
        }
        self.migrating > 0
    }
}

impl Driver {
    pub(crate) fn new(mm: Arc<Mm>, state: Arc<State>, devmem: Arc<Devmem>) -> Self {
        Self {
            mm,
            state,
            devmem,
            progress: AtomicU64::new(0),
            hand: Mutex::new(0),
            spare: Mutex::new([const { None }; SPARE_LISTS]),
        }
    }

    /// Moves what it can of a range into device memory; returns the pages moved. Ends early when the device is full.
    pub(crate) fn migrate(&self, range: AddrRange, stays: &mut Stays) -> Result<usize> {
        self.mm.sync();
        self.each_piece(range, |piece| {
            if self.state.memory.free_pages() == 0 {
                let rest = AddrRange::new(piece.start().get(), range.end().get())?;
                stays.add(Stay::LeftOut, rest.pages());
                return Ok(None);
            }
            self.move_in(piece, stays).map(Some)
        })
    }

    /// Brings the device's pages of a range home; returns the pages moved.
    pub(crate) fn bring_home(&self, range: AddrRange) -> Result<usize> {
        self.mm.sync();
        self.each_piece(range, |piece| {
            if self.devmem.in_use() == 0 {
                return Ok(None);
            }
            self.move_out(piece).map(Some)
        })
    }

    /// Moves a piece of one vma in, also from other devices (through system memory).
    pub(crate) fn move_in(&self, piece: AddrRange, stays: &mut Stays) -> Result<usize> {
        let mut ops = ToDevice::new(&self.state, &self.devmem);
        let before = *stays;
        for _ in 0..ROUNDS {
            // What the last round says counts.
            *stays = before;
            self.migrate_piece(piece, Select::SYSTEM, &mut ops, stays)?;
            if ops.moved >= piece.pages() || self.state.memory.free_pages() == 0 {
                break;
            }
            let left = self.look(piece)?;
            self.fetch(piece, &left)?;
            if !left.wait_for_others() && left.foreign == 0 {
                break;
            }
        }
        Ok(ops.moved)
    }

    /// Moves our pages of a piece of one vma out.
    fn move_out(&self, piece: AddrRange) -> Result<usize> {
        let mut ops = ToSystem::new(&self.state, &self.devmem);
        for _ in 0..ROUNDS {
            self.migrate_piece(piece, Select::DEVICE, &mut ops, &mut Stays::default())?;
            if self.devmem.in_use() == 0 || !self.look(piece)?.wait_for_others() {
                break;
            }
        }
        if ops.out_of_memory && ops.moved == 0 {
            return Err(Error::NoMemory { what: "system pages for device pages to come home" });
        }
        Ok(ops.moved)
    }

    fn migrate_piece(
        &self,
        range: AddrRange,
        select: Select,
        ops: &mut dyn MigrateOps,
        stays: &mut Stays,
    ) -> Result<()> {
        let owner = Some(self.state.owner);
        let request = MigrateRequest { range, select, owner, fault_page: None };
        let mut list = self.take_list()?;
        let (src, dst) = list.split_at_mut(BATCH_PAGES);
        let pages = range.pages();
        let done = self.mm.migrate(&request, ops, &mut src[..pages], &mut dst[..pages]);
        if done.is_ok() {
            stays.add_entries(&src[..pages]);
        }
        self.return_list(list);
        done
    }

    /// Why pages of a range did not move.
    fn look(&self, range: AddrRange) -> Result<Left> {
        let mut left = Left::default();
        self.each_residency(range, |_, seen| {
            left.migrating += usize::from(*seen == Residency::Migrating);
            left.foreign += usize::from(self.is_foreign(seen));
            Ok(())
        })?;
        Ok(left)
    }

    /// Brings pages of a range home that are on other devices.
    fn fetch(&self, range: AddrRange, left: &Left) -> Result<()> {
        if left.foreign == 0 {
            return Ok(());
        }
        self.each_residency(range, |page, seen| match self.is_foreign(seen) {
            true => self.mm.make_present(page, false).map(|_| ()),
            false => Ok(()),
        })
    }

    fn each_residency(
        &self,
        range: AddrRange,
        mut each: impl FnMut(AddrRange, &Residency) -> Result<()>,
    ) -> Result<()> {
        for first in (0..range.pages()).step_by(LOOK_PAGES) {
            let part = range.sub(first, LOOK_PAGES.min(range.pages() - first));
            let mut seen = [Residency::None; LOOK_PAGES];
            let seen = &mut seen[..part.pages()];
            self.mm.residency(part, seen)?;
            for (position, one) in seen.iter().enumerate() {
                each(part.sub(position, 1), one)?;
            }
        }
        Ok(())
    }

    fn is_foreign(&self, seen: &Residency) -> bool {
        let ours = self.devmem.pfn_first()..self.devmem.pfn_last();
        matches!(seen, Residency::Device(page) if !ours.contains(page))
    }

    /// Calls `each` for the mapped parts of a range, in pieces of one vma and at most `BATCH_PAGES`, until it says
    /// `None`. Adds up what it returns.
    ///
    /// # Errors
    /// `Fault` when nothing of the range is mapped; `Gone`; otherwise the first error, if nothing was moved at all.
    fn each_piece(
        &self,
        range: AddrRange,
        mut each: impl FnMut(AddrRange) -> Result<Option<usize>>,
    ) -> Result<usize> {
        let address = range.start();
        let mut outcome = Err(Error::Fault { address, what: "nothing is mapped there" });
        let mut next = address;
        while let Some(piece) = self.piece_from(next, range)? {
            next = piece.end();
            match (each(piece), &mut outcome) {
                (Ok(Some(pages)), Ok(sum)) => *sum += pages,
                (Ok(Some(pages)), _) => outcome = Ok(pages),
                (Ok(None), outcome) => return outcome.clone().or(Ok(0)),
                (Err(error @ Error::Gone { .. }), _) => return Err(error),
                (Err(_), Ok(1..)) => {}
                (Err(error), outcome) => *outcome = Err(error),
            }
        }
        outcome
    }

    /// The first mapped piece of `range` at or above `next`.
    fn piece_from(&self, next: VirtAddr, range: AddrRange) -> Result<Option<AddrRange>> {
        if next >= range.end() {
            return Ok(None);
        }
        let rest = AddrRange::new(next.get(), range.end().get())?;
        let Some(part) = self.mm.find_vma(next)?.and_then(|vma| rest.intersect(vma.range)) else {
            return Ok(None);
        };
        let bound = part.start().leaf().get() + BATCH_LEAVES as u64 * LEAF_SIZE;
        AddrRange::new(part.start().get(), part.end().get().min(bound)).map(Some)
    }

    /// Brings the oldest pages home until `need` pages are free. Best effort: looks at each page twice at most.
    pub(crate) fn make_room(&self, need: usize) {
        let memory = &self.state.memory;
        let need = need.min(memory.pages());
        let mut looks = memory.pages() * 2;
        while memory.free_pages() < need && looks > 0 {
            let wanted = need - memory.free_pages();
            let (run, looked) = self.oldest_run(wanted, looks);
            looks -= looked;
            let Some(run) = run else { return };
            let moved = self.each_piece(run, |piece| self.move_out(piece).map(Some));
            add(&self.state.stats.evictions, moved.unwrap_or(0));
        }
    }

    /// The next pages to evict that are neighbours both in the device and in the address space, and how many pages
    /// were looked at.
    fn oldest_run(&self, wanted: usize, looks: usize) -> (Option<AddrRange>, usize) {
        let mut hand = self.hand.lock();
        let mut looked = 0;
        let (mut start, mut end) = (0, 0);
        while looked < looks && end - start < (wanted * PAGE_SIZE) as u64 {
            let address = self.devmem.drvdata(pfn_of(&self.devmem, *hand));
            if start != 0 && address != end {
                break;
            }
            if address != 0 {
                start = if start == 0 { address } else { start };
                end = address + PAGE_SIZE as u64;
            }
            *hand = (*hand + 1) % self.state.memory.pages() as u32;
            looked += 1;
        }
        (AddrRange::new(start, end).ok(), looked)
    }

    fn take_list(&self) -> Result<Mapped<MigratePfn>> {
        let spare = self.spare.lock().iter_mut().find_map(Option::take);
        spare.map_or_else(|| Mapped::new(2 * BATCH_PAGES), Ok)
    }

    fn return_list(&self, list: Mapped<MigratePfn>) {
        if let Some(place) = self.spare.lock().iter_mut().find(|place| place.is_none()) {
            *place = Some(list);
        }
    }
}
