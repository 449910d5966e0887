//! Frames: pages of a staging area that hold contents while no vma maps them. Recycled, never allocated on the hot
//! path, bounded.
//!
//! The area is cut into blocks of 2 MiB. A migration borrows one block for each leaf it touches and uses slot `i` for
//! the leaf's page `i`, so that whole huge pages stay aligned on both sides. A slot is *populated* (it has a page) or
//! empty; taking pages out of a vma needs empty slots, giving pages needs populated ones.
//!
//! A huge page stays one only if the kernel has no page table at its new place: not even an empty one, which small pages
//! leave behind. Blocks that are *whole* have none, or one huge page; they are kept for huge pages.

use crate::addr::{AddrRange, LEAF_PAGES, LEAF_SIZE, PAGE_SIZE, VirtAddr};
use crate::engine::{Engine, Present};
use crate::error::Result;
use crate::inject::{self, Point};
use crate::limits::{FRAME_BLOCKS, IDLE_BLOCKS, MOVE_MINIMUM, RESTING_BLOCKS};
use crate::page_set::PageSet;
use crate::sync::Mutex;

/// A borrowed block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    number: u16,
    /// Address of slot 0.
    pub(crate) base: VirtAddr,
    /// Which slots have a page.
    pub(crate) populated: PageSet,
}

impl Block {
    pub(crate) fn slot(&self, index: usize) -> VirtAddr {
        self.base.plus_pages(index)
    }
}

#[derive(Debug)]
struct Pool {
    populated: [PageSet; FRAME_BLOCKS],
    whole: [bool; FRAME_BLOCKS],
    /// Blocks that nobody borrows, most recently used last.
    idle: [u16; FRAME_BLOCKS],
    idle_count: usize,
    /// Blocks from here on were never used.
    untouched: u16,
    /// Something was borrowed since the last [`Frames::trim`].
    used: bool,
}

/// The frames of one mm.
#[derive(Debug)]
pub(crate) struct Frames {
    area: AddrRange,
    pool: Mutex<Pool>,
}

impl Pool {
    /// Position in `idle` of the best block: no slot of `empty` populated, fewest slots of `full` to fill; and whole or
    /// not, as is wanted.
    fn best(&self, empty: &PageSet, full: &PageSet, whole: bool) -> Option<usize> {
        let mut best = None;
        for at in (0..self.idle_count).rev() {
            let number = usize::from(self.idle[at]);
            let populated = &self.populated[number];
            if populated.overlaps(empty) {
                continue;
            }
            let cost = 2 * populated.missing(full) + u32::from(self.whole[number] != whole);
            if cost == 0 {
                return Some(at);
            }
            if best.is_none_or(|(_, least)| cost < least) {
                best = Some((at, cost));
            }
        }
        best.map(|(at, _)| at)
    }

    fn remove(&mut self, at: usize) -> u16 {
        let number = self.idle[at];
        self.idle.copy_within(at + 1..self.idle_count, at);
        self.idle_count -= 1;
        number
    }

    fn push(&mut self, number: u16) {
        self.idle[self.idle_count] = number;
        self.idle_count += 1;
    }

    fn fresh(&mut self) -> Option<u16> {
        let number = self.untouched;
        (usize::from(number) < FRAME_BLOCKS).then(|| {
            self.untouched += 1;
            number
        })
    }

    /// The longest idle block with memory, if more of them are idle than may be.
    fn surplus(&mut self, allowed: usize) -> Option<u16> {
        let with_memory =
            |pool: &Self, at: usize| !pool.populated[usize::from(pool.idle[at])].is_empty();
        let count = (0..self.idle_count).filter(|at| with_memory(self, *at)).count();
        if count <= allowed {
            return None;
        }
        let oldest = (0..self.idle_count).find(|at| with_memory(self, *at))?;
        Some(self.remove(oldest))
    }
}

impl Frames {
    pub(crate) fn new(engine: &dyn Engine) -> Result<Self> {
        let area = engine.reserve_frames(FRAME_BLOCKS as u64 * LEAF_SIZE)?;
        let pool = Pool {
            populated: [PageSet::default(); FRAME_BLOCKS],
            whole: [true; FRAME_BLOCKS],
            idle: [0; FRAME_BLOCKS],
            idle_count: 0,
            untouched: 0,
            used: false,
        };
        Ok(Self { area, pool: Mutex::new(pool) })
    }

    pub(crate) fn area(&self) -> AddrRange {
        self.area
    }

    fn block(&self, number: u16) -> AddrRange {
        self.area.sub(usize::from(number) * LEAF_PAGES, LEAF_PAGES)
    }

    /// Frames that have a page now, borrowed or idle.
    pub(crate) fn resident(&self, engine: &dyn Engine) -> Result<u64> {
        let used = usize::from(self.pool.lock().untouched);
        let mut count = 0;
        if used > 0 {
            engine.scan(self.area.sub(0, used * LEAF_PAGES), &mut |run, present| {
                count += if present == Present::Page { run.pages() as u64 } else { 0 };
            })?;
        }
        Ok(count)
    }

    /// Borrows a block in which the slots of `empty` are empty and those of `full` are populated. With `huge`, the empty
    /// ones are for a huge page.
    pub(crate) fn borrow(
        &self,
        engine: &dyn Engine,
        empty: &PageSet,
        full: &PageSet,
        huge: bool,
    ) -> Option<Block> {
        inject::checked(Point::Frames).ok()?;
        let mut pool = self.pool.lock();
        pool.used = true;
        let number = match pool.best(empty, full, huge || full.is_full()) {
            Some(at) => pool.remove(at),
            None => match pool.fresh() {
                Some(number) => number,
                None if engine.is_service_thread() => return None,
                None => {
                    // Every block is populated where it must not be: free the oldest one's memory.
                    let number = pool.surplus(0)?;
                    pool.populated[usize::from(number)] = PageSet::default();
                    drop(pool);
                    engine.empty_frames(self.block(number));
                    pool = self.pool.lock();
                    pool.whole[usize::from(number)] = true;
                    number
                }
            },
        };
        let populated = pool.populated[usize::from(number)];
        let was_whole = pool.whole[usize::from(number)];
        // A single page is copied out of a huge one.
        let keeps = populated.missing(full) == 0 && empty.is_empty() && full.count() < MOVE_MINIMUM;
        let frees = huge && !was_whole && !engine.is_service_thread();
        let stays = was_whole && (keeps || full.is_full() && populated.is_full());
        pool.whole[usize::from(number)] = stays || huge && (was_whole || frees);
        drop(pool);
        if frees {
            // It has no page, but a page table.
            engine.empty_frames(self.block(number));
        }
        let mut block = Block { number, base: self.block(number).start(), populated };
        if fill(engine, &mut block, full) {
            return Some(block);
        }
        self.give_back(engine, &block);
        None
    }

    /// Frees the memory of blocks that nobody used since the last call.
    pub(crate) fn trim(&self, engine: &dyn Engine) {
        let mut pool = self.pool.lock();
        if std::mem::take(&mut pool.used) {
            return;
        }
        while let Some(number) = pool.surplus(RESTING_BLOCKS) {
            pool.populated[usize::from(number)] = PageSet::default();
            drop(pool);
            engine.empty_frames(self.block(number));
            pool = self.pool.lock();
            pool.whole[usize::from(number)] = true;
            pool.push(number);
        }
    }

    /// Returns a block with what `block.populated` says about it, and frees memory above the bound.
    pub(crate) fn give_back(&self, engine: &dyn Engine, block: &Block) {
        let mut pool = self.pool.lock();
        pool.populated[usize::from(block.number)] = block.populated;
        pool.whole[usize::from(block.number)] &=
            block.populated.is_empty() || block.populated.is_full();
        pool.push(block.number);
        if engine.is_service_thread() {
            // It reads the events that freeing raises; the next ordinary thread does it.
            return;
        }
        while let Some(number) = pool.surplus(IDLE_BLOCKS) {
            pool.populated[usize::from(number)] = PageSet::default();
            drop(pool);
            engine.empty_frames(self.block(number));
            pool = self.pool.lock();
            pool.whole[usize::from(number)] = true;
            pool.push(number);
        }
    }
}

/// Populates what is missing of `wanted`, run by run.
fn fill(engine: &dyn Engine, block: &mut Block, wanted: &PageSet) -> bool {
    if block.populated.missing(wanted) == 0 {
        return true;
    }
    let mut slot = 0;
    while slot < LEAF_PAGES {
        let is_missing = |slot: &usize| wanted.contains(*slot) && !block.populated.contains(*slot);
        let count = (slot..LEAF_PAGES).take_while(is_missing).count();
        if count == 0 {
            slot += 1;
            continue;
        }
        let start = block.slot(slot).get();
        let end = block.slot(slot + count).get();
        let filled = engine.fill_frames(AddrRange::from_bounds(start, end));
        (slot..slot + filled).for_each(|slot| block.populated.insert(slot));
        if filled < count {
            return false;
        }
        slot += count;
    }
    true
}

const _: () = assert!(FRAME_BLOCKS <= u16::MAX as usize && LEAF_PAGES * PAGE_SIZE == 2 << 20);
