//! The end of a batch: every page is installed where its fate says, unlocked, and whoever waited is woken.

use super::batch::{Batch, Fate, Held};
use crate::addr::{AddrRange, Pfn};
use crate::devmem::{Devmem, LastFound};
use crate::engine::{Give, Present, Stop, VmaKind};
use crate::flags::Capabilities;
use crate::limits::{DEADLINE, MOVE_MINIMUM};
use crate::mm::page_table::Entry;
use crate::ops::{InvalidateEvent, Invalidation};
use crate::stats::Stats;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What giving one run of pages ended in.
struct Given {
    pages: usize,
    stop: Stop,
}

impl Batch {
    /// Consumes the batch.
    pub(super) fn land(mut self) {
        self.land_all();
    }

    fn land_all(&mut self) {
        let strays = self.settle_without_contents();
        self.give_contents();
        self.return_frames();
        self.mm.inflight.remove(&self.flight);
        if strays {
            self.invalidate_again();
        }
        self.put_pages();
        // Last of all: whoever waited runs on this core as soon as this thread sleeps, and finds no lock held.
        self.mm.engine.wake(self.range);
    }

    /// Installs every page that needs no contents in system memory. True when the driver was told of a success that
    /// a layout change undid or moved: mirrors must hear of it.
    fn settle_without_contents(&mut self) -> bool {
        let mut strays = false;
        let mm = Arc::clone(&self.mm);
        let _layout = mm.engine.layout().hold();
        for index in 0..self.pages.len() {
            let page = self.pages[index];
            match (page.held, page.fate) {
                (Held::No, _)
                | (Held::Taken | Held::Returning, Fate::Restore | Fate::ToCoherent(_))
                | (_, Fate::ToSystem) => {}
                (Held::Empty, Fate::ToCoherent(target)) => {
                    if let Some(at) = self.flight.address(index) {
                        // What is no page of zeros now is one at the next touch.
                        let _ = mm.engine.zero(at, true);
                    }
                    strays |= self.land_on_device(index, target, Entry::coherent(target));
                }
                (_, Fate::ToDevice(target) | Fate::ToCoherent(target)) => {
                    let write = page.held != Held::OnDevice || page.entry.is_writable();
                    strays |= self.land_on_device(index, target, Entry::device(target, write));
                }
                (_, Fate::Lost) => {
                    self.land_lost(index);
                }
                (held, Fate::Restore) => {
                    let mut entry = page.entry;
                    if held == Held::Empty {
                        // What it was charged for is gone, and nobody reported it.
                        entry = Entry::SYSTEM;
                        if page.entry.is_on_device() {
                            Stats::subtract(&mm.stats.device_pages, 1);
                            self.pages[index].fate = Fate::ToSystem;
                        }
                        self.flight
                            .address(index)
                            .into_iter()
                            .for_each(|at| mm.engine.give_hole(at));
                    }
                    let kept = self.install(index, entry);
                    self.count_dropped(index, kept);
                }
            }
        }
        strays
    }

    /// True when its place is gone, or another one by now.
    fn land_on_device(&mut self, index: usize, target: Pfn, entry: Entry) -> bool {
        let page = self.pages[index];
        let in_place = self.flight.is_in_place(index);
        let kept = self.install(index, entry.charged_to(page.group));
        let came_from_device = page.entry.is_on_device();
        let stats = &self.mm.stats;
        if kept {
            stats.migrated_to_device.fetch_add(1, Ordering::Relaxed);
            if !came_from_device {
                stats.device_pages.fetch_add(1, Ordering::Relaxed);
            }
        } else if came_from_device {
            stats.device_pages.fetch_sub(1, Ordering::Relaxed);
        }
        // Marks what `put_pages` must drop: the old page if there was one, and the new one if its place is gone.
        self.pages[index].fate = if kept { Fate::ToSystem } else { Fate::ToDevice(target) };
        !in_place
    }

    fn land_lost(&mut self, index: usize) {
        let address = self.flight.address(index);
        if self.install(index, Entry::POISON)
            && let Some(address) = address
        {
            self.mm.stats.poisoned.fetch_add(1, Ordering::Relaxed);
            self.mm.engine.poison(address);
        }
        self.mm.stats.device_pages.fetch_sub(1, Ordering::Relaxed);
        self.pages[index].fate = Fate::ToSystem;
    }

    /// A restored page whose place went away: its contents go with it.
    pub(super) fn count_dropped(&mut self, index: usize, kept: bool) {
        if !kept && self.pages[index].entry.is_on_device() {
            self.mm.stats.device_pages.fetch_sub(1, Ordering::Relaxed);
            self.pages[index].fate = Fate::ToSystem;
        }
    }

    /// Gives frames to the process: pages that come home, and pages that could not leave.
    fn give_contents(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        let mut index = 0;
        while index < self.pages.len() {
            if self.pages[index].held == Held::No {
                index += 1;
                continue;
            }
            let given = self.give_run(index);
            index += given.pages;
            match given.stop {
                Stop::Done => {}
                // The page is there already: what the CPU sees is what counts.
                Stop::Exists => {
                    self.gave(index);
                    index += 1;
                }
                _ if Instant::now() < deadline => {
                    self.drain();
                    if given.stop != Stop::Retry {
                        crate::sync::sleep(Duration::from_micros(200));
                    }
                }
                _ => {
                    self.cannot_give(index);
                    index += 1;
                }
            }
        }
    }

    /// Gives the run of pages that begins at `index`, as far as one engine call goes.
    fn give_run(&mut self, index: usize) -> Given {
        let mm = Arc::clone(&self.mm);
        let _layout = mm.engine.layout().hold();
        let Some(address) = self.flight.address(index) else {
            // Unmapped meanwhile: nobody wants the contents.
            self.gave(index);
            return Given { pages: 1, stop: Stop::Done };
        };
        let Some(frame) = self.frame_of(index) else {
            return Given { pages: 0, stop: Stop::Refused };
        };
        let count = if self.flight.is_in_place(index) { self.run_in_place(index) } else { 1 };
        // An engine that cannot move leaves the frames populated.
        let can_move = self.vma.kind == VmaKind::Anonymous
            && mm.engine.capabilities().contains(Capabilities::MOVE);
        let how = if can_move && count >= MOVE_MINIMUM { Give::Move } else { Give::Copy };
        let range = AddrRange::from_bounds(
            address.get(),
            address.get() + count as u64 * crate::addr::PAGE_SIZE as u64,
        );
        let progress = mm.engine.give(range, frame, how);
        mm.after_home_in_fork(range);
        for page in index..index + progress.pages {
            if how == Give::Move {
                let (leaf, slot) = self.slot_of(page);
                if let Some(block) = &mut self.blocks[leaf] {
                    block.populated.remove(slot);
                }
            }
            self.gave(page);
        }
        if how == Give::Move && progress.pages > 0 {
            self.note_copied_frames(index, progress.pages);
        }
        Given { pages: progress.pages, stop: progress.stop }
    }

    /// Where an engine copied instead of moving, the frames are still populated: a later take must know it.
    fn note_copied_frames(&mut self, index: usize, pages: usize) {
        let (leaf, slot) = self.slot_of(index);
        let Some(mut block) = self.blocks[leaf] else { return };
        let start = block.slot(slot).get();
        let frames = AddrRange::from_bounds(start, start + (pages * crate::addr::PAGE_SIZE) as u64);
        let _ = self.mm.engine.scan(frames, &mut |run, state| {
            if state != Present::None {
                block.populated.insert_pages(run);
            }
        });
        self.blocks[leaf] = Some(block);
    }

    /// Pages from `index` on, inside its leaf, that are to be given and still in place.
    fn run_in_place(&self, index: usize) -> usize {
        let leaf = self.slot_of(index).0;
        (index..self.pages.len())
            .take_while(|page| {
                self.slot_of(*page).0 == leaf
                    && self.pages[*page].held != Held::No
                    && self.flight.is_in_place(*page)
            })
            .count()
    }

    /// The page is in system memory again (or its place is gone). The layout lock may be held for reading.
    fn gave(&mut self, index: usize) {
        if self.pages[index].fate == Fate::ToSystem {
            // Counted while the page is still locked: whoever finds it unlocked finds it counted.
            let kept = self.flight.address(index).is_some();
            Stats::subtract(&self.mm.stats.device_pages, 1);
            Stats::add(&self.mm.stats.migrated_to_system, usize::from(kept));
        }
        let page = self.pages[index];
        match page.fate {
            Fate::ToCoherent(target) => {
                self.land_on_device(index, target, Entry::coherent(target));
            }
            Fate::Restore if page.entry.is_on_device() => {
                let kept = self.install(index, page.entry);
                self.count_dropped(index, kept);
            }
            _ => _ = self.install(index, Entry::SYSTEM.charged_to(page.entry.group())),
        }
    }

    /// No memory for a page that comes home: it stays on its device. Contents that only a frame has can go nowhere:
    /// SIGBUS at the touch, never zeros.
    fn cannot_give(&mut self, index: usize) {
        if self.pages[index].held == Held::OnDevice {
            self.pages[index].fate = Fate::Restore;
            let entry = self.pages[index].entry;
            let mm = Arc::clone(&self.mm);
            let _layout = mm.engine.layout().hold();
            let kept = self.install(index, entry);
            self.count_dropped(index, kept);
        } else if let Some(address) = self.flight.address(index) {
            let mm = Arc::clone(&self.mm);
            let _layout = mm.engine.layout().hold();
            self.lose_device_page(index);
            self.mm.stats.poisoned.fetch_add(1, Ordering::Relaxed);
            self.mm.engine.poison(address);
            self.install(index, Entry::POISON);
        }
    }

    /// The contents are lost, and with them the claim to a device page that they had or were to have.
    fn lose_device_page(&mut self, index: usize) {
        let page = &mut self.pages[index];
        if page.entry.is_on_device() {
            Stats::subtract(&self.mm.stats.device_pages, 1);
        }
        page.fate = match page.fate {
            Fate::ToCoherent(target) => Fate::ToDevice(target),
            _ if page.entry.is_on_device() => Fate::ToSystem,
            fate => fate,
        };
    }

    fn return_frames(&mut self) {
        for block in &mut self.blocks {
            if let Some(block) = block.take() {
                self.mm.frames.give_back(&*self.mm.engine, &block);
            }
        }
    }

    fn invalidate_again(&self) {
        let update = Invalidation { range: self.range, event: InvalidateEvent::Unmap, owner: None };
        drop(self.mm.notifiers.invalidate(update));
    }

    /// Drops references, with no lock held: source pages whose contents are elsewhere now, claimed pages whose place
    /// is gone, and hands back destinations that were never claimed.
    fn put_pages(&mut self) {
        let mut devices = LastFound::default();
        let mut put = |page: Pfn| {
            if let Some(devmem) = devices.find(page) {
                devmem.put(page);
            }
        };
        for page in self.pages.iter_mut() {
            let fate = std::mem::replace(&mut page.fate, Fate::Restore);
            if fate == Fate::Restore {
                continue;
            }
            if let Fate::ToDevice(target) | Fate::ToCoherent(target) = fate {
                put(target);
            }
            if let Some(source) = page.entry.device_page() {
                put(source);
            }
        }
        for page in self.rejected.take().iter().flat_map(|list| list.iter()) {
            if let Some(devmem) = devices.find(*page) {
                devmem.reject(*page);
            }
        }
    }
}

impl Drop for Batch {
    /// After a panic in a callback or an error on the way: claimed destinations go back, every page is restored.
    fn drop(&mut self) {
        if self.pages.iter().all(|page| page.held == Held::No) {
            self.return_frames();
            self.mm.inflight.remove(&self.flight);
            // Pages that were let go of may have lost their place before that.
            self.put_pages();
            return;
        }
        for index in 0..self.pages.len() {
            let fate = std::mem::replace(&mut self.pages[index].fate, Fate::Restore);
            if let Fate::ToDevice(target) | Fate::ToCoherent(target) = fate
                && let Some(devmem) = Devmem::find(target)
            {
                devmem.put(target);
            }
        }
        self.land_all();
    }
}
