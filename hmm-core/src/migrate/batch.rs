//! One batch: which pages it holds, what each of them is, and what becomes of it.

use super::MigrateRequest;
use crate::account::GroupId;
use crate::addr::{AddrRange, Pfn, VirtAddr};
use crate::arena::{self, Buffer, Shared};
use crate::devmem::LastFound;
use crate::error::{Error, Result};
use crate::flags::{MigrateFlags, MigratePfn, Protection, Select};
use crate::limits::{BATCH_LEAVES, DEADLINE, RANGE_DEADLINE};
use crate::mm::changes::Still;
use crate::mm::frames::Block;
use crate::mm::inflight::{Flight, why_not};
use crate::mm::page_table::{Entry, Leaf, Place};
use crate::mm::{Mm, Vma};
use crate::ops::OwnerId;
use crate::page_set::PageSet;
use crate::stay::Stay;
use crate::sync::this_thread;
use std::sync::Arc;
use std::time::Instant;

/// What a batch knows about a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// Not held (any more).
    No,
    /// Locked; the contents are still mapped.
    Mapped,
    /// The contents are in its frame.
    Taken,
    /// The contents are in its frame, and must go back: they could not be removed from where they were.
    Returning,
    /// There are no contents: a hole, or the zero page (which lies in its frame).
    Empty,
    /// The contents are on a device.
    OnDevice,
}

/// What becomes of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Stays what it was.
    Restore,
    /// The claimed device page has it now.
    ToDevice(Pfn),
    /// Its frame has it now.
    ToSystem,
    /// The device lost it.
    Lost,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    pub(super) held: Held,
    pub(super) fate: Fate,
    /// The entry before it was locked.
    pub(super) entry: Entry,
    /// The group that the page is charged to now.
    pub(super) group: Option<GroupId>,
    /// Why it stays, if it does.
    pub(super) stay: Stay,
}

/// A batch under way. Dropping it puts back what it still holds.
pub(super) struct Batch<'a> {
    pub(super) mm: &'a Arc<Mm>,
    pub(super) vma: &'a Vma,
    pub(super) owner: Option<OwnerId>,
    pub(super) range: AddrRange,
    pub(super) flight: Shared<Flight>,
    pub(super) pages: Buffer<Page>,
    pub(super) blocks: [Option<Block>; BATCH_LEAVES],
    /// Destination pages whose entry failed: back to their drivers at the end.
    pub(super) rejected: Option<Buffer<Pfn>>,
}

impl<'a> Batch<'a> {
    /// Locks the entries of every page that may migrate. Once it holds one, it waits for nobody (promise 71).
    pub(super) fn hold(
        mm: &'a Arc<Mm>,
        vma: &'a Vma,
        request: &MigrateRequest,
        range: AddrRange,
        keep: [Option<AddrRange>; 2],
    ) -> Result<Self> {
        let no_memory = || Error::NoMemory { what: "lists of a migration" };
        let (held, fate, stay) = (Held::No, Fate::Restore, Stay::NotSelected);
        let blank = Page { held, fate, entry: Entry::SYSTEM, group: None, stay };
        let stack = mm.own_stack(range);
        let keep = [keep[0], keep[1], stack];
        let flight = Flight::new(range, this_thread(), keep).ok_or_else(no_memory)?;
        let mut batch = Self {
            mm,
            vma,
            owner: request.owner,
            range,
            flight,
            pages: Buffer::new(range.pages(), |_| blank).ok_or_else(no_memory)?,
            blocks: [None; BATCH_LEAVES],
            rejected: None,
        };
        batch.take_off(request.select)?;
        batch.wait_for_others();
        batch.wait_for_removal(request.select);
        for part in range.by_leaf() {
            let blocked = batch.blocked(part);
            batch.hold_leaf(part, request.select, &blocked)?;
        }
        batch.borrow_frames();
        Ok(batch)
    }

    /// Registers the flight. Only then looks whether pages may leave: whoever forbids it (a fork, a close) waits for
    /// the flights that were registered before.
    fn take_off(&self, select: Select) -> Result<()> {
        let mm = self.mm;
        loop {
            if !mm.inflight.add(&self.flight, DEADLINE) {
                let what = "64 migrations are under way and none ends";
                return Err(Error::Busy { address: self.range.start(), what });
            }
            if !select.contains(Select::SYSTEM) {
                return Ok(());
            }
            mm.check_not_closing()?;
            if !mm.is_forking() {
                return Ok(());
            }
            mm.inflight.remove(&self.flight);
            mm.pass_fork_gate()?;
        }
    }

    /// A page that just came home may still be held by the service thread that brought it. While this batch holds
    /// nothing it can wait for others without a deadlock, for a moment; what is locked afterwards is skipped.
    fn wait_for_others(&self) {
        if self.mm.engine.is_service_thread() || self.mm.inflight.count_of_thread(this_thread()) > 1
        {
            return;
        }
        let deadline = Instant::now() + RANGE_DEADLINE;
        self.mm.changes.wait_until_over(self.range, Still::Stay, deadline);
        self.mm.wait_while(self.range, deadline, |entry| entry.is_locked());
        // What this migration needs itself: once its flight is registered, no other one takes it.
        for kept in self.flight.keep.iter().flatten() {
            self.mm.wait_while(*kept, Instant::now() + DEADLINE, |entry| entry.is_locked());
        }
    }

    /// Pages that every migration under way needs while it holds others: the callers' arrays and stacks.
    fn blocked(&self, part: AddrRange) -> PageSet {
        let mut blocked = PageSet::default();
        self.mm.inflight.each_kept(|kept| {
            kept.intersect(part).into_iter().for_each(|pages| blocked.insert_pages(pages));
        });
        blocked
    }

    fn leaf(&self, address: VirtAddr) -> Result<&'a Leaf> {
        let mm: &'a Arc<Mm> = self.mm;
        mm.table.leaf_or_new(address).ok_or(Error::NoMemory { what: "page table leaf" })
    }

    pub(super) fn hold_leaf(
        &mut self,
        part: AddrRange,
        select: Select,
        blocked: &PageSet,
    ) -> Result<()> {
        let system = match select.contains(Select::SYSTEM) {
            true => self.vma.stays(),
            false => Some(Stay::NotSelected),
        };
        let want_device = select.contains(Select::DEVICE);
        let leaf = self.leaf(part.start())?;
        let mut devices = LastFound::default();
        let _layout = self.mm.engine.layout().hold();
        let mut entries = leaf.lock();
        // Under the lock: whoever pins inserts the pin first, and then looks at the entries for pages to bring home.
        let mut pinned = PageSet::default();
        self.mm.pins.within(part, |pin| pinned.insert_pages(pin));
        // Likewise whoever is about to change the layout.
        let (mut staying, mut resting) = (PageSet::default(), PageSet::default());
        self.mm.changes.within(part, Still::Stay, |still| staying.insert_pages(still));
        self.mm.changes.within(part, Still::Rest, |still| resting.insert_pages(still));
        for offset in 0..part.pages() {
            let address = part.page_at(offset);
            let slot = address.index_in_leaf();
            let entry = entries[slot];
            // Pinned pages do not leave, but they come home.
            let system = system.or_else(|| match () {
                () if pinned.contains(slot) => Some(self.why_pinned(address)),
                () if staying.contains(slot) => Some(Stay::Changing),
                () => blocked.contains(slot).then_some(Stay::Needed),
            });
            let index = self.range.index_of(address);
            let stay = match (why_not(entry, system, want_device), entry.place()) {
                (None, _) if resting.contains(slot) => Some(Stay::Changing),
                (None, Place::Device(page)) if !self.may_take(page, &mut devices) => {
                    Some(Stay::Foreign)
                }
                (why, _) => why,
            };
            if let Some(stay) = stay {
                self.pages[index].stay = stay;
                continue;
            }
            let held = match entry.place() {
                Place::Device(_) => Held::OnDevice,
                _ => Held::Mapped,
            };
            entries[slot] = entry.locked();
            let (fate, stay) = (Fate::Restore, Stay::LeftOut);
            self.pages[index] = Page { held, fate, entry, group: entry.group(), stay };
            self.flight.hold(index);
        }
        Ok(())
    }

    fn may_take(&self, page: Pfn, devices: &mut LastFound) -> bool {
        self.owner
            .is_none_or(|owner| devices.find(page).is_some_and(|devmem| devmem.owner() == owner))
    }

    fn why_pinned(&self, page: VirtAddr) -> Stay {
        let mut own = self.mm.frames.area().contains(page);
        arena::each_own(|range| own |= range.contains(page));
        if own { Stay::Library } else { Stay::Pinned }
    }

    /// One block of frames for each leaf; without one, the leaf's pages stay.
    fn borrow_frames(&mut self) {
        for (number, part) in self.range.by_leaf().enumerate() {
            let (mut empty, mut full) = (PageSet::default(), PageSet::default());
            for offset in 0..part.pages() {
                let address = part.page_at(offset);
                match self.pages[self.range.index_of(address)].held {
                    Held::Mapped => empty.insert(address.index_in_leaf()),
                    Held::OnDevice => full.insert(address.index_in_leaf()),
                    _ => {}
                }
            }
            if empty.is_empty() && full.is_empty() {
                continue;
            }
            let engine = &*self.mm.engine;
            let huge = empty.is_full() && engine.is_huge(part);
            self.blocks[number] = self.mm.frames.borrow(engine, &empty, &full, huge);
            for offset in 0..part.pages() {
                let index = self.range.index_of(part.page_at(offset));
                match (self.blocks[number], self.pages[index].held) {
                    (None, held) if held != Held::No => self.release(index, Stay::NoMemory),
                    (Some(block), Held::OnDevice) => {
                        let slot = part.page_at(offset).index_in_leaf();
                        self.flight.set_frame(index, block.slot(slot));
                    }
                    _ => {}
                }
            }
        }
    }

    /// Number of the leaf (within the batch) that holds page `index`, and its slot.
    pub(super) fn slot_of(&self, index: usize) -> (usize, usize) {
        let address = self.range.page_at(index);
        let first = self.range.start().leaf().get();
        let number = (address.leaf().get() - first) / crate::addr::LEAF_SIZE;
        (number as usize, address.index_in_leaf())
    }

    pub(super) fn frame_of(&self, index: usize) -> Option<VirtAddr> {
        let (leaf, slot) = self.slot_of(index);
        self.blocks[leaf].map(|block| block.slot(slot))
    }

    /// Sets the entry of a held page at the place where it is now, unlocked, and lets go of the page. False when it
    /// is gone. The layout lock is held for reading.
    pub(super) fn install(&mut self, index: usize, entry: Entry) -> bool {
        self.pages[index].held = Held::No;
        let address = self.flight.address(index);
        self.settle_charge(index, address.map(|_| entry));
        let Some(address) = address else { return false };
        self.flight.let_go(index);
        if let Some(leaf) = self.mm.table.leaf(address) {
            leaf.lock()[address.index_in_leaf()] = entry.unlocked();
            leaf.notify();
        }
        if address != self.range.page_at(index) {
            self.mm.engine.wake(AddrRange::page_of(address));
        }
        true
    }

    /// Lets go of a page whose contents were not taken: it stays what it was.
    pub(super) fn release(&mut self, index: usize, why: Stay) {
        self.pages[index].stay = why;
        let _layout = self.mm.engine.layout().hold();
        let entry = self.pages[index].entry;
        let kept = self.install(index, entry);
        self.count_dropped(index, kept);
    }

    /// Fills `src` for the driver.
    pub(super) fn describe(&self, src: &mut [MigratePfn]) {
        const BASE: MigrateFlags = MigrateFlags::MIGRATE.union(MigrateFlags::LOCKED);
        for (index, (page, out)) in self.pages.iter().zip(src).enumerate() {
            *out = match (page.held, page.entry.place(), self.frame_of(index)) {
                (Held::Taken, _, Some(frame)) => {
                    MigratePfn::new(Pfn::of_addr(frame), BASE | MigrateFlags::WRITE)
                }
                (Held::Empty, ..) => MigratePfn::bare(MigrateFlags::MIGRATE),
                (Held::OnDevice, Place::Device(device), _) => {
                    // The vma may have become read-only while the page was away.
                    let vma_writable = self.vma.protection.contains(Protection::WRITE);
                    let write = if vma_writable && page.entry.is_writable() {
                        MigrateFlags::WRITE
                    } else {
                        MigrateFlags::empty()
                    };
                    MigratePfn::new(device, BASE | MigrateFlags::DEVICE | write)
                }
                (Held::No, ..) => MigratePfn::stays(page.stay),
                _ if !self.flight.is_in_place(index) => MigratePfn::stays(Stay::Changing),
                _ => MigratePfn::stays(page.stay),
            };
        }
    }

    /// After the copy: claims the destinations. From here on `src` tells what moves (promise 62).
    pub(super) fn decide(&mut self, src: &mut [MigratePfn], dst: &[MigratePfn]) {
        let (mut rejected, mut devices) = (0, LastFound::default());
        let group = self.mm.group_reference();
        let mut list = Buffer::new(dst.len(), |_| Pfn::new(0));
        for index in 0..src.len() {
            if !src[index].migrates() {
                continue;
            }
            let fate = self.fate(index, dst[index], &mut devices, group.id());
            self.pages[index].fate = fate;
            if matches!(fate, Fate::Restore | Fate::Lost) {
                src[index] = src[index].but_stays(self.why_restored(index, dst[index], fate));
                if let (Some(page), Some(list)) = (dst[index].pfn(), list.as_mut())
                    && page.is_device()
                {
                    list[rejected] = page;
                    rejected += 1;
                }
            }
        }
        self.rejected = list.filter(|_| rejected > 0);
    }

    fn fate(
        &mut self,
        index: usize,
        dst: MigratePfn,
        devices: &mut LastFound,
        group: GroupId,
    ) -> Fate {
        let page = self.pages[index];
        if !self.flight.is_in_place(index) {
            return Fate::Restore;
        }
        match dst.pfn() {
            Some(target) if target.is_device() => {
                let mut claim = || devices.find(target).is_some_and(|devmem| devmem.claim(target));
                if self.charge(index, group) && claim() {
                    Fate::ToDevice(target)
                } else {
                    Fate::Restore
                }
            }
            Some(target)
                if page.held == Held::OnDevice
                    && self.flight.frame(index).map(Pfn::of_addr) == Some(target) =>
            {
                Fate::ToSystem
            }
            None if dst.flags().contains(MigrateFlags::ERROR) && page.held == Held::OnDevice => {
                Fate::Lost
            }
            _ => Fate::Restore,
        }
    }

    /// Charges a page that is about to leave for the first time. False when it stays for want of room in its group: only
    /// a hole, since what has contents is memory that the process has already.
    fn charge(&mut self, index: usize, group: GroupId) -> bool {
        let page = &mut self.pages[index];
        if page.group.is_some() {
            return true;
        }
        if page.held == Held::Empty && !group.try_charge() {
            page.stay = Stay::Limit;
            return false;
        }
        if page.held != Held::Empty {
            group.charge();
        }
        page.group = Some(group);
        true
    }

    /// The charge follows the page to what its entry will be; without one there, it ends.
    fn settle_charge(&mut self, index: usize, entry: Option<Entry>) {
        let page = &mut self.pages[index];
        let Some(group) = page.group.take() else { return };
        let was_on_device = page.entry.is_on_device();
        match entry {
            Some(entry) if entry.group() == Some(group) => {
                group.moved(was_on_device, entry.is_on_device());
            }
            _ => group.uncharge(was_on_device),
        }
    }

    fn why_restored(&self, index: usize, dst: MigratePfn, fate: Fate) -> Stay {
        match () {
            () if fate == Fate::Lost => Stay::Lost,
            () if !self.flight.is_in_place(index) => Stay::Changing,
            () if dst == MigratePfn::default() => Stay::LeftOut,
            () if self.pages[index].stay == Stay::Limit => Stay::Limit,
            () => Stay::BadDestination,
        }
    }

    /// Drops of this range that were reported a moment ago are over soon. Waits once, while nothing is held; pages of
    /// later drops stay where they are.
    fn wait_for_removal(&self, select: Select) {
        if select.contains(Select::SYSTEM)
            && !self.mm.engine.is_service_thread()
            && let Some(end) = self.mm.removed.busy_until(self.range)
        {
            crate::sync::sleep(end.saturating_duration_since(Instant::now()));
        }
    }
}
