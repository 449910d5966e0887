//! The copy engine: the driver's side of a migration, one batch at a time.

use crate::counters::add;
use crate::state::{State, index_of, pfn_of};
use hmm_core::{Devmem, MigrateBatch, MigrateFlags, MigrateOps, MigratePfn, PAGE_SIZE};

/// Moves pages into device memory.
#[derive(Debug)]
pub(crate) struct ToDevice<'a> {
    state: &'a State,
    devmem: &'a Devmem,
    /// Pages that this migration moved.
    pub(crate) moved: usize,
}

impl<'a> ToDevice<'a> {
    pub(crate) fn new(state: &'a State, devmem: &'a Devmem) -> Self {
        Self { state, devmem, moved: 0 }
    }

    /// A device page with the contents of a source page; `None` when the device is full.
    fn take_in(&self, src: MigratePfn) -> Option<u32> {
        let index = self.state.memory.allocate()?;
        match src.pfn().and_then(|frame| frame.to_addr()) {
            Some(frame) => self.state.memory.copy_in(index, frame),
            // A hole or the zero page; what the device page held before must not show.
            None => self.state.memory.clear(index),
        }
        Some(index)
    }
}

impl MigrateOps for ToDevice<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let mut copied = 0;
        for (position, src) in batch.src.iter().enumerate() {
            if !src.migrates() || src.flags().contains(MigrateFlags::DEVICE) {
                continue;
            }
            // Full: the rest stays where it is.
            let Some(index) = self.take_in(*src) else { break };
            let page = pfn_of(self.devmem, index);
            self.devmem.set_drvdata(page, batch.range.page_at(position).get());
            batch.dst[position] =
                MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
            copied += 1;
        }
        if copied > 0 {
            self.state.settings.delay((copied * PAGE_SIZE) as u64);
        }
    }

    /// The device's page table is not filled here: an invalidation may have overtaken this call, and only a device
    /// fault validates its entries against that.
    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        let moved = count_moved(batch);
        self.moved += moved;
        add(&self.state.stats.pages_to_device, moved);
    }
}

/// Moves device pages home. Runs on service threads.
#[derive(Debug)]
pub(crate) struct ToSystem<'a> {
    state: &'a State,
    devmem: &'a Devmem,
    /// Pages that this migration moved.
    pub(crate) moved: usize,
    /// Some page stays on the device because no frame could be had.
    pub(crate) out_of_memory: bool,
}

impl<'a> ToSystem<'a> {
    pub(crate) fn new(state: &'a State, devmem: &'a Devmem) -> Self {
        Self { state, devmem, moved: 0, out_of_memory: false }
    }
}

impl MigrateOps for ToSystem<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let mut copied = 0;
        for position in 0..batch.src.len() {
            let src = batch.src[position];
            let page = src.pfn().and_then(|page| index_of(self.devmem, page));
            let (true, Some(index)) = (src.migrates(), page) else { continue };
            let frame = batch.alloc_system_page(batch.range.page_at(position));
            let Some((frame, to)) = frame.and_then(|frame| Some((frame, frame.to_addr()?))) else {
                self.out_of_memory = true;
                break;
            };
            self.state.memory.copy_out(index, to);
            batch.dst[position] = MigratePfn::new(frame, MigrateFlags::LOCKED);
            copied += 1;
        }
        if copied > 0 {
            self.state.settings.delay((copied * PAGE_SIZE) as u64);
        }
    }

    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        let moved = count_moved(batch);
        self.moved += moved;
        add(&self.state.stats.pages_to_system, moved);
    }
}

/// Entries that were given a destination and moved there.
fn count_moved(batch: &MigrateBatch<'_>) -> usize {
    let pairs = batch.src.iter().zip(batch.dst.iter());
    pairs.filter(|(src, dst)| src.migrates() && dst.pfn().is_some()).count()
}
