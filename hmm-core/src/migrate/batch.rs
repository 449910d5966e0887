//! One batch: which pages it holds, what each of them is, and what becomes of it.

use crate::account::GroupId;
use crate::addr::{AddrRange, Pfn, VirtAddr};
use crate::arena::{self, Buffer, Shared};
use crate::devmem::LastFound;
use crate::error::{Error, Result};
use crate::flags::{Capabilities, MigrateFlags, MigratePfn, Protection, Select};
use crate::limits::{BATCH_LEAVES, DEADLINE, RANGE_DEADLINE};
use crate::mm::changes::Still;
use crate::mm::frames::Block;
use crate::mm::inflight::Flight;
use crate::mm::page_table::{Entry, Place};
use crate::mm::{Mm, Vma};
use crate::ops::{InvalidateEvent, OwnerId};
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
    /// Its contents go back to where they were, as those of the claimed device page.
    ToCoherent(Pfn),
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

/// Which pages a batch collects, and what mirrors are told of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Collect {
    pub(super) select: Select,
    /// Only this owner's device pages.
    pub(super) owner: Option<OwnerId>,
    /// Only these device pages: the first, and the one behind the last.
    pub(super) pages: Option<(Pfn, Pfn)>,
    /// What mirrors are told.
    pub(super) event: InvalidateEvent,
    /// It may wait for a fork to be over, which in turn may wait for what the caller holds.
    pub(super) waits: bool,
}

impl Page {
    /// It is on a device, and may come home.
    fn comes_home(&self) -> bool {
        self.held != Held::No && self.entry.is_on_device()
    }
}

/// A batch under way. Dropping it puts back what it still holds.
pub(super) struct Batch {
    pub(super) mm: Arc<Mm>,
    pub(super) vma: Vma,
    /// Pages leave by copy, since nobody can write to them.
    pub(super) copies: bool,
    pub(super) collect: Collect,
    pub(super) range: AddrRange,
    pub(super) flight: Shared<Flight>,
    pub(super) pages: Buffer<Page>,
    pub(super) blocks: [Option<Block>; BATCH_LEAVES],
    /// Destination pages whose entry failed: back to their drivers at the end.
    pub(super) rejected: Option<Buffer<Pfn>>,
}

impl Batch {
    /// Locks the entries of every page that may migrate. Once it holds one, it waits for nobody (promise 71).
    pub(super) fn hold(
        mm: &Arc<Mm>,
        vma: &Vma,
        collect: Collect,
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
            mm: Arc::clone(mm),
            vma: *vma,
            copies: mm.copies(vma),
            collect,
            range,
            flight,
            pages: Buffer::new(range.pages(), |_| blank).ok_or_else(no_memory)?,
            blocks: [None; BATCH_LEAVES],
            rejected: None,
        };
        batch.take_off(collect.select)?;
        batch.wait_for_others();
        batch.wait_for_removal(collect.select);
        for part in range.by_leaf() {
            let blocked = batch.blocked(part);
            batch.hold_leaf(part, &blocked)?;
        }
        batch.let_go_of_what_changed();
        batch.borrow_frames();
        Ok(batch)
    }

    /// Registers the flight. Only then looks whether pages may leave: whoever forbids it (a fork, a close) waits for
    /// the flights that were registered before.
    fn take_off(&self, select: Select) -> Result<()> {
        let mm = &self.mm;
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
            if !self.collect.waits {
                let what = "the process forks";
                return Err(Error::Busy { address: self.range.start(), what });
            }
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

    fn hold_leaf(&mut self, part: AddrRange, blocked: &PageSet) -> Result<()> {
        let stays = self.mm.stays(&self.vma);
        let mm = Arc::clone(&self.mm);
        let no_memory = Error::NoMemory { what: "page table leaf" };
        let leaf = mm.table.leaf_or_new(part.start()).ok_or(no_memory)?;
        let mut devices = LastFound::default();
        let _layout = mm.engine.layout().hold();
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
            let at_home = || match () {
                () if stays.is_some() => stays,
                () if pinned.contains(slot) => Some(self.why_pinned(address)),
                () if staying.contains(slot) => Some(Stay::Changing),
                () => blocked.contains(slot).then_some(Stay::Needed),
            };
            let index = self.range.index_of(address);
            let stay = self.why_not(entry, at_home, &mut devices);
            let rests = resting.contains(slot).then_some(Stay::Changing);
            if let Some(stay) = stay.or(rests) {
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

    /// Why a page is not collected, seen under its leaf's lock; `at_home` says it of pages that are mapped.
    fn why_not(
        &self,
        entry: Entry,
        at_home: impl Fn() -> Option<Stay>,
        devices: &mut LastFound,
    ) -> Option<Stay> {
        let selected = |kind| {
            let wanted = self.collect.select.contains(kind);
            (!wanted).then_some(Stay::NotSelected)
        };
        let mut foreign = |page| (!self.may_take(page, devices)).then_some(Stay::Foreign);
        match entry.place() {
            _ if entry.is_locked() => Some(Stay::Migrating),
            Place::Poisoned => Some(Stay::Poisoned),
            Place::System => selected(Select::SYSTEM).or_else(at_home),
            Place::Device(page) => selected(Select::DEVICE).or_else(|| foreign(page)),
            Place::Coherent(page) => {
                selected(Select::COHERENT).or_else(|| foreign(page)).or_else(at_home)
            }
        }
    }

    fn may_take(&self, page: Pfn, devices: &mut LastFound) -> bool {
        let Collect { owner, pages, .. } = self.collect;
        pages.is_none_or(|(first, end)| first <= page && page < end)
            && owner.is_none_or(|owner| {
                devices.find(page).is_some_and(|devmem| devmem.owner() == owner)
            })
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
            let can_move = engine.capabilities().contains(Capabilities::MOVE);
            let huge = can_move && empty.is_full() && engine.is_huge(part);
            self.blocks[number] = self.mm.frames.borrow(engine, &empty, &full, huge);
            for offset in 0..part.pages() {
                let index = self.range.index_of(part.page_at(offset));
                match (self.blocks[number], self.pages[index].held) {
                    (None, held) if held != Held::No => self.release(index, Stay::NoMemory),
                    (Some(block), _) if self.pages[index].comes_home() => {
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
        let mm = Arc::clone(&self.mm);
        let _layout = mm.engine.layout().hold();
        let entry = self.pages[index].entry;
        let kept = self.install(index, entry);
        self.count_dropped(index, kept);
    }

    /// Fills `src` for the driver.
    pub(super) fn describe(&self, src: &mut [MigratePfn]) {
        const BASE: MigrateFlags = MigrateFlags::MIGRATE.union(MigrateFlags::LOCKED);
        let vma_write = match self.vma.protection.contains(Protection::WRITE) {
            true => MigrateFlags::WRITE,
            false => MigrateFlags::empty(),
        };
        for (index, (page, out)) in self.pages.iter().zip(src).enumerate() {
            *out = match (page.held, page.entry.place(), self.frame_of(index)) {
                (Held::Taken, Place::Coherent(page), _) => {
                    MigratePfn::new(page, BASE | MigrateFlags::DEVICE | vma_write)
                }
                // Dropped, and nobody has said so yet.
                (Held::Empty, Place::Coherent(_), _) => MigratePfn::stays(Stay::Dropped),
                (Held::Taken, _, Some(frame)) => {
                    MigratePfn::new(Pfn::of_addr(frame), BASE | vma_write)
                }
                (Held::Empty, ..) => MigratePfn::bare(MigrateFlags::MIGRATE),
                (Held::OnDevice, Place::Device(device), _) => {
                    // The vma may have become read-only while the page was away.
                    let write = match page.entry.is_writable() {
                        true => vma_write,
                        false => MigrateFlags::empty(),
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
                let Some(devmem) = devices.find(target) else { return Fate::Restore };
                let is_coherent = devmem.is_coherent();
                // The contents would have to come home first.
                let fits = !(is_coherent && page.held == Held::OnDevice);
                match fits && self.charge(index, group) && devmem.claim(target) {
                    true if is_coherent => Fate::ToCoherent(target),
                    true => Fate::ToDevice(target),
                    false => Fate::Restore,
                }
            }
            Some(target)
                if page.comes_home()
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
