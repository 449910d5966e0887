//! Taking contents out of the process: mirrors let go first, then pages move into frames.

use super::batch::{Batch, Collect, Held};
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::{Present, Stop, VmaKind, Watch};
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::{BATCH_LEAVES, DEADLINE};
use crate::mm::Vma;
use crate::ops::Invalidation;
use crate::page_set::PageSet;
use crate::stay::Stay;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What taking one run of pages ended in.
struct Taken {
    pages: usize,
    stop: Stop,
    /// Why the next page stays, where that is known.
    why: Option<Stay>,
}

impl Taken {
    fn none(why: Stay) -> Self {
        Self { pages: 0, stop: Stop::Refused, why: Some(why) }
    }
}

/// So often the kernel is asked which frames have pages.
const LOOKS: usize = 64;

impl Batch {
    /// Invalidates the mirrors, then empties the pages that the batch holds. Notifiers stay busy until that is done,
    /// so that no device maps a page again that is about to go.
    /// Returns the pages of each leaf that it let go of because they are shared or pinned.
    pub(super) fn take_contents(&mut self) -> Result<[PageSet; BATCH_LEAVES]> {
        if self.pages.iter().all(|page| page.held == Held::No) {
            return Ok([PageSet::default(); BATCH_LEAVES]);
        }
        self.mm.stats.invalidations.fetch_add(1, Ordering::Relaxed);
        let Collect { event, owner, .. } = self.collect;
        let update = Invalidation { range: self.range, event, owner };
        let mm = Arc::clone(&self.mm);
        let _invalid = mm.notifiers.invalidate(update);
        self.take_all()
    }

    /// The mapping was looked at before its pages were held; only from then on changes of its access wait for them.
    pub(super) fn let_go_of_what_changed(&mut self) {
        if !self.copies {
            return;
        }
        let now = self.mm.vma_covering(self.range);
        if now.is_ok_and(|now| self.mm.copies(&now)) {
            return;
        }
        for index in 0..self.pages.len() {
            if self.pages[index].held == Held::Mapped {
                self.release(index, Stay::Changing);
            }
        }
    }

    fn take_all(&mut self) -> Result<[PageSet; BATCH_LEAVES]> {
        if self.pages.iter().any(|page| page.held == Held::Mapped) {
            self.release_dropped()?;
        }
        let mut busy = [PageSet::default(); BATCH_LEAVES];
        for (number, part) in self.range.by_leaf().enumerate() {
            busy[number] = self.take_leaf(number, part);
            self.withdraw_leaf(part);
        }
        Ok(busy)
    }

    /// Lets go of pages that are present although their drop was reported: it may still come (holes may go).
    fn release_dropped(&mut self) -> Result<()> {
        let mm = Arc::clone(&self.mm);
        for dropped in mm.removed.within(self.range) {
            let mut next = dropped.start();
            while next < dropped.end() {
                let rest = AddrRange::from_bounds(next.get(), dropped.end().get());
                next = self.release_first_present(rest)?;
            }
        }
        Ok(())
    }

    /// Lets go of the first run of present pages; returns its end, or that of the range.
    fn release_first_present(&mut self, range: AddrRange) -> Result<VirtAddr> {
        let mut first = None;
        self.mm.engine.scan(range, &mut |run, what| {
            if what != Present::None && first.is_none() {
                first = Some(run);
            }
        })?;
        let Some(run) = first else { return Ok(range.end()) };
        for page in 0..run.pages() {
            let index = self.range.index_of(run.page_at(page));
            if self.pages[index].held == Held::Mapped {
                self.release(index, Stay::Dropped);
            }
        }
        Ok(run.end())
    }

    /// Takes the mapped pages of one leaf; returns the slots of those that are shared or pinned, which it let go of.
    fn take_leaf(&mut self, number: usize, part: AddrRange) -> PageSet {
        let mut busy = PageSet::default();
        let first = self.range.index_of(part.start());
        let end = first + part.pages();
        let deadline = Instant::now() + DEADLINE;
        let mut index = first;
        // Where contents are copied, frames may have been filled in vain, too: they must not be thought empty.
        let is_copied = self.vma.kind != VmaKind::Anonymous
            && self.pages[first..end].iter().any(|page| page.held == Held::Mapped);
        let mut taken = is_copied.then_some((first, end));
        while index < end {
            let run = self.mapped_run(index, end);
            if run == 0 {
                index += 1;
                continue;
            }
            let Taken { pages: done, stop, why } = self.take_run(index, run);
            if done > 0 {
                taken = Some((taken.map_or(index, |(from, _)| from), index + done));
            }
            index += done;
            match stop {
                Stop::Done => {}
                Stop::Retry if Instant::now() < deadline => {
                    self.drain();
                    self.mm.removed.renew(self.range);
                    if self.release_dropped().is_err() {
                        return busy;
                    }
                }
                // The kernel moved the page, and says that it was there already.
                Stop::Exists if self.has_left(number, index) => {
                    self.pages[index].held = Held::Taken;
                    taken = Some((taken.map_or(index, |(from, _)| from), index + 1));
                    index += 1;
                }
                Stop::Exists if Instant::now() < deadline && self.empty_slot(number, index) => {}
                _ if index < end => {
                    if stop == Stop::Busy {
                        busy.insert(self.slot_of(index).1);
                    }
                    let why = why.unwrap_or_else(|| self.why_stopped(index, stop));
                    self.release(index, why);
                    index += 1;
                }
                _ => {}
            }
        }
        if let Some((from, to)) = taken {
            self.classify(number, from, to);
        }
        busy
    }

    /// Pages from `index` on that are still mapped and in place.
    fn mapped_run(&mut self, index: usize, end: usize) -> usize {
        (index..end)
            .take_while(|page| {
                self.pages[*page].held == Held::Mapped && self.flight.is_in_place(*page)
            })
            .count()
    }

    /// One engine call. The watch is renewed under the same hold of the layout lock: a range that was unmapped and
    /// mapped anew is not watched any more.
    fn take_run(&mut self, index: usize, count: usize) -> Taken {
        let mm = Arc::clone(&self.mm);
        let _layout = mm.engine.layout().hold();
        let count = count.min(self.mapped_run(index, index + count));
        if count == 0 {
            return Taken::none(Stay::Changing);
        }
        let Some(frame) = self.frame_of(index) else { return Taken::none(Stay::NoMemory) };
        let run = match self.watch_absence(self.range.sub(index, count)) {
            Ok(run) => run,
            Err(Error::Busy { .. }) => return Taken::none(Stay::Watched),
            Err(Error::NoMemory { .. }) => return Taken::none(Stay::NoMemory),
            Err(_) => return Taken { pages: 0, stop: Stop::Refused, why: None },
        };
        let progress = match self.copies {
            true => self.mm.engine.take_by_copy(run, frame),
            false => self.mm.engine.take(run, frame),
        };
        for page in index..index + progress.pages {
            self.pages[page].held = Held::Taken;
        }
        Taken { pages: progress.pages, stop: progress.stop, why: None }
    }

    /// Why a page that the engine stopped at stays.
    fn why_stopped(&self, index: usize, stop: Stop) -> Stay {
        match stop {
            Stop::Busy if self.vma.kind == VmaKind::PrivateFile => Stay::File,
            Stop::Busy => Stay::Busy,
            Stop::Retry => Stay::Changing,
            Stop::NoMemory | Stop::Exists => Stay::NoMemory,
            _ => self.why_refused(index),
        }
    }

    /// The mapping may be another one by now.
    fn why_refused(&self, index: usize) -> Stay {
        let (engine, page) = (&*self.mm.engine, self.range.page_at(index));
        let vma = match engine.mapping_at(page) {
            Ok(Some(mapping)) if mapping.range.contains(page) => {
                Vma::from_mapping(engine, &mapping)
            }
            _ => return Stay::Changing,
        };
        match self.mm.stays(&vma) {
            Some(why) => why,
            None if engine.is_locked(page) => Stay::Locked,
            None => Stay::Refused,
        }
    }

    /// What was taken is removed from where it was, unless the engine did so at once. No lock is held: the engine may
    /// have to wait for an event to be read.
    fn withdraw_leaf(&mut self, part: AddrRange) {
        let (mut index, deadline) = (self.range.index_of(part.start()), Instant::now() + DEADLINE);
        let end = index + part.pages();
        while index < end {
            let count = (index..end).take_while(|page| self.is_taken_in_place(*page)).count();
            if count == 0 {
                index += 1;
                continue;
            }
            let run = self.range.sub(index, count);
            let progress = match self.copies {
                true => self.mm.engine.withdraw_copied(run),
                false => self.mm.engine.withdraw(run),
            };
            index += progress.pages;
            match progress.stop {
                Stop::Done => {}
                Stop::Retry if Instant::now() < deadline => self.drain(),
                stop => {
                    self.pages[index].stay = self.why_stopped(index, stop);
                    self.pages[index].held = Held::Returning;
                    index += 1;
                }
            }
        }
    }

    fn is_taken_in_place(&self, index: usize) -> bool {
        matches!(self.pages[index].held, Held::Taken | Held::Empty)
            && self.flight.is_in_place(index)
    }

    /// Returns the part of a run, from its start on, whose absence is watched.
    fn watch_absence(&self, run: AddrRange) -> Result<AddrRange> {
        // Without events nobody says what became of a watch.
        let lasts = self.mm.engine.capabilities().contains(Capabilities::EVENTS);
        let leaf = self.mm.table.leaf(run.start()).filter(|_| lasts);
        if leaf.is_some_and(|leaf| leaf.absence_watched.load(Ordering::Acquire)) {
            return Ok(run);
        }
        // The whole vma: a registration of a part would cut it, and mremap refuses to move pieces.
        let range = self.vma.range;
        match self.mm.engine.watch(range, Watch::Absence) {
            // Somebody else watches a piece of it.
            Err(error @ Error::Busy { .. }) => return self.watch_piece(run).ok_or(error),
            done => done?,
        }
        if let Some(leaf) = leaf.filter(|leaf| range.covers(leaf.range())) {
            leaf.absence_watched.store(true, Ordering::Release);
        }
        Ok(run)
    }

    fn watch_piece(&self, run: AddrRange) -> Option<AddrRange> {
        let mapping = self.mm.engine.mapping_at(run.start()).ok()??;
        let piece = mapping.range.intersect(self.vma.range)?;
        self.mm.engine.watch(piece, Watch::Absence).ok()?;
        piece.intersect(run).filter(|part| part.start() == run.start())
    }

    /// Layout changes wait to be applied: the calling thread does it.
    pub(super) fn drain(&self) {
        self.mm.stats.retries.fetch_add(1, Ordering::Relaxed);
        self.mm.engine.drain();
        crate::sync::yield_now();
    }

    /// Whether a page is in a slot that was known to be empty, and not where it was any more.
    fn has_left(&self, number: usize, index: usize) -> bool {
        let slot = self.slot_of(index).1;
        let Some(block) = self.blocks[number].filter(|block| !block.populated.contains(slot))
        else {
            return false;
        };
        let page = AddrRange::page_of(self.range.page_at(index));
        let frame = AddrRange::page_of(block.slot(slot));
        let is = |range, wanted: fn(Present) -> bool| {
            let mut all = true;
            let scanned = self.mm.engine.scan(range, &mut |_, state| all &= wanted(state));
            all && scanned.is_ok()
        };
        is(page, |state| state == Present::None) && is(frame, |state| state != Present::None)
    }

    /// A slot that was thought empty has a page: a give that fell back from moving to copying left it there. Service
    /// threads read the event that freeing raises, and only note it.
    fn empty_slot(&mut self, number: usize, index: usize) -> bool {
        let (slot, service) = (self.slot_of(index).1, self.mm.engine.is_service_thread());
        let Some(block) = &mut self.blocks[number] else { return false };
        if service {
            block.populated.insert(slot);
            return false;
        }
        self.mm.engine.empty_frames(AddrRange::page_of(block.slot(slot)));
        true
    }

    /// Which taken pages have contents: the frames of holes are empty, and the zero page is as good as a hole.
    fn classify(&mut self, number: usize, from: usize, to: usize) {
        let Some(block) = self.blocks[number] else { return };
        let first = block.slot(self.slot_of(from).1).get();
        let frames = AddrRange::from_bounds(first, first + ((to - from) as u64) * 4096);
        let mut populated = block.populated;
        let (pages, base) = (&mut self.pages, from);
        let mut note = |run: AddrRange, present| {
            for page in 0..run.pages() {
                let offset = frames.index_of(run.page_at(page));
                let page = &mut pages[base + offset];
                if page.held == Held::Taken && matches!(present, Present::None | Present::Zero) {
                    page.held = Held::Empty;
                }
                if present != Present::None {
                    populated.insert(frames.page_at(offset).index_in_leaf());
                }
            }
        };
        // A kernel that does not say is asked again: a frame that is thought empty, and is not, would give what it has
        // to the next hole.
        let mut known = false;
        for _ in 0..LOOKS {
            known = self.mm.engine.scan(frames, &mut note).is_ok();
            if known {
                break;
            }
        }
        if !known {
            populated.insert_pages(frames);
        }
        if let Some(block) = &mut self.blocks[number] {
            block.populated = populated;
        }
    }
}
