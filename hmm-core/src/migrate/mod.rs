//! Migration: pages leave for a device, come home, or change devices (`migrate_vma`, hmm.txt section 6).
//!
//! A request is cut into batches at leaf boundaries. Each batch goes through the same phases:
//! *hold* (lock the entries) → *invalidate* (mirrors let go) → *take* (contents into frames) → the driver's
//! `alloc_and_copy` → *decide* (claim destinations) → the driver's `finalize_and_map` → *land* (install, unlock, wake).
//! Whatever fails after *take* is undone: a batch that is dropped at any point puts every page back.
//!
//! The driver's part comes in two shapes: as callbacks ([`Mm::migrate`]), or between three calls ([`Mm::migrate_setup`]).

mod batch;
mod by_page;
mod exclusive;
mod land;
mod phases;
mod take;

pub use by_page::DeviceMigration;
pub use exclusive::unlock_exclusive;
pub use phases::Migration;

use crate::addr::{AddrRange, LEAF_SIZE, Pfn, VirtAddr};
use crate::error::{Error, Result};
use crate::flags::{MigratePfn, Select};
use crate::inject::{self, Point};
use crate::limits::BATCH_LEAVES;
use crate::mm::inflight::Flight;
use crate::mm::{Mm, Vma};
use crate::ops::{InvalidateEvent, MigrateOps, OwnerId};
use crate::page_set::PageSet;
use crate::sync::this_thread;
use batch::{Batch, Collect};
use std::sync::Arc;

/// What to migrate (`struct migrate_vma`).
#[derive(Debug, Clone, Copy)]
pub struct MigrateRequest {
    /// Pages, all in one vma.
    pub range: AddrRange,
    /// System pages, device pages, or both (Gen A collects both).
    pub select: Select,
    /// Only this owner's device pages; also told to the mirrors, so that a driver knows its own migrations.
    pub owner: Option<OwnerId>,
    /// The page for which a CPU fault asked. A hint, kept for the kernel's shape.
    pub fault_page: Option<Pfn>,
}

/// What a driver's migration callbacks see: one batch of a request.
///
/// `src[i]` and `dst[i]` belong to the page at `range.start() + i` pages. Source pfns of system pages are *frames*: read
/// their contents at `pfn.to_addr()` during the callbacks. Nobody else can change them (promise 61).
#[derive(Debug)]
pub struct MigrateBatch<'a> {
    /// The address space.
    pub mm: &'a Arc<Mm>,
    /// The vma.
    pub vma: &'a Vma,
    /// The pages of this batch.
    pub range: AddrRange,
    /// What the core collected.
    pub src: &'a [MigratePfn],
    /// Where the driver put it; all 0 at first.
    pub dst: &'a mut [MigratePfn],
    flight: &'a Flight,
}

impl MigrateBatch<'_> {
    /// A destination for a device page that comes home: a frame, writable at `pfn.to_addr()` until the callbacks are
    /// over. `None` for pages that this batch does not bring home. (`hmm_vma_alloc_locked_page`.)
    pub fn alloc_system_page(&mut self, addr: VirtAddr) -> Option<Pfn> {
        let inside = self.range.contains(addr);
        inside.then(|| self.flight.frame(self.range.index_of(addr))).flatten().map(Pfn::of_addr)
    }
}

impl Mm {
    /// Migrates pages of one vma. Never all or nothing: each page moves or stays as it was, and `src` tells which
    /// moved (`MIGRATE` still set), and why the others did not ([`MigratePfn::reason`]). `Ok` even if none moved
    /// (promise 58).
    ///
    /// Runs in the calling thread; the callbacks run in it too, once for each batch (32 MiB) in which at least one
    /// page can migrate. Mirrors are invalidated before contents are copied (promise 73). Call it with no driver lock
    /// held that an invalidation callback takes.
    ///
    /// # Errors
    /// `Invalid` when the range leaves its vma, or `src`/`dst` have not one element per page; `Fault` when nothing is
    /// mapped; `Deadlock` from a notifier callback; `Gone`. Nothing was changed then.
    pub fn migrate(
        self: &Arc<Self>,
        request: &MigrateRequest,
        ops: &mut dyn MigrateOps,
        src: &mut [MigratePfn],
        dst: &mut [MigratePfn],
    ) -> Result<()> {
        let start = request.range.start();
        let pages = request.range.pages();
        if src.len() != pages || dst.len() != pages {
            return Err(Error::invalid(start.get(), "src and dst need one element per page"));
        }
        let vma = self.check_migration(request)?;
        src.fill(MigratePfn::default());
        dst.fill(MigratePfn::default());
        let job = Job { mm: self, vma: &vma, collect: request.collect() };
        let mut done = 0;
        for range in batches(request.range) {
            let here = done..done + range.pages();
            done = here.end;
            let (src, dst) = (&mut src[here.clone()], &mut dst[here]);
            let busy = job.run_batch(range, ops, src, dst)?;
            job.run_busy(range, &busy, ops, src, dst)?;
        }
        Ok(())
    }

    /// The vma of a migration that can begin.
    fn check_migration(&self, request: &MigrateRequest) -> Result<Vma> {
        self.check_open()?;
        if request.select.contains(Select::SYSTEM) {
            self.check_not_closing()?;
            self.engine.check_ready(request.range)?;
        }
        if self.notifiers.in_callback() {
            return Err(Error::Deadlock { what: "migration from inside a notifier callback" });
        }
        let vma = self.vma_covering(request.range)?;
        self.engine.refresh(request.range);
        Ok(vma)
    }

    /// As [`MigrateBatch::alloc_system_page`], for C: finds the batch by the calling thread.
    pub fn alloc_system_page(&self, addr: VirtAddr) -> Option<Pfn> {
        let flight = self.inflight.of_thread(this_thread(), addr)?;
        flight.frame(flight.range.index_of(addr)).map(Pfn::of_addr)
    }
}

/// One request under way.
struct Job<'a> {
    mm: &'a Arc<Mm>,
    vma: &'a Vma,
    collect: Collect,
}

impl MigrateRequest {
    fn collect(&self) -> Collect {
        let (select, owner, event) = (self.select, self.owner, InvalidateEvent::Migrate);
        Collect { select, owner, pages: None, event, waits: true }
    }
}

impl Job<'_> {
    /// Migrates one batch; returns the pages of each leaf that were shared or pinned.
    fn run_batch(
        &self,
        range: AddrRange,
        ops: &mut dyn MigrateOps,
        src: &mut [MigratePfn],
        dst: &mut [MigratePfn],
    ) -> Result<[PageSet; BATCH_LEAVES]> {
        let (mm, vma) = (self.mm, self.vma);
        let keep = [memory_of(src), memory_of(dst)];
        let (mut batch, busy) = Batch::begin(mm, vma, self.collect, range, keep, src)?;
        if src.iter().any(|page| page.migrates()) {
            let flight = &*batch.flight.clone();
            if inject::fails(Point::Allocate).is_none() {
                ops.alloc_and_copy(&mut MigrateBatch { mm, vma, range, src: &*src, dst, flight });
            }
            batch.decide(src, dst);
            ops.finalize_and_map(&MigrateBatch { mm, vma, range, src, dst, flight });
        }
        batch.end(src);
        Ok(busy)
    }

    /// Migrates one page, and tells what became of it.
    fn run_one(&self, page: AddrRange, ops: &mut dyn MigrateOps) -> Result<MigratePfn> {
        let (mut src, mut dst) = ([MigratePfn::default()], [MigratePfn::default()]);
        let busy = self.run_batch(page, ops, &mut src, &mut dst)?;
        self.run_busy(page, &busy, ops, &mut src, &mut dst)?;
        Ok(src[0])
    }

    /// Pages that a fork left shared can be taken once a write made them private. Nothing is held meanwhile: the write
    /// may fault, and wait for a migration. What is still busy then is pinned by somebody, and stays (promise 66).
    fn run_busy(
        &self,
        range: AddrRange,
        busy: &[PageSet; BATCH_LEAVES],
        ops: &mut dyn MigrateOps,
        src: &mut [MigratePfn],
        dst: &mut [MigratePfn],
    ) -> Result<()> {
        if self.mm.engine.is_service_thread() {
            return Ok(());
        }
        for run in busy_runs(range, busy) {
            if self.mm.engine.populate(run, true).is_ok() {
                let first = range.index_of(run.start());
                let here = first..first + run.pages();
                dst[here.clone()].fill(MigratePfn::default());
                self.run_batch(run, ops, &mut src[here.clone()], &mut dst[here])?;
            }
        }
        Ok(())
    }
}

/// The runs of pages that were shared or pinned when a batch over `range` looked.
fn busy_runs(
    range: AddrRange,
    busy: &[PageSet; BATCH_LEAVES],
) -> impl Iterator<Item = AddrRange> + use<'_> {
    range.by_leaf().zip(busy).flat_map(|(part, busy)| {
        let mut next = 0;
        std::iter::from_fn(move || {
            let is_busy = |page: &usize| busy.contains(part.page_at(*page).index_in_leaf());
            let first = (next..part.pages()).find(is_busy)?;
            let count = (first..part.pages()).take_while(is_busy).count();
            next = first + count;
            Some(part.sub(first, count))
        })
    })
}

/// The pages that hold an array of the caller's: they stay, or filling the array would wait for itself.
fn memory_of(array: &[MigratePfn]) -> Option<AddrRange> {
    AddrRange::covering(VirtAddr::from_ptr(array).get(), size_of_val(array) as u64).ok()
}

/// Cut so that each batch touches at most [`BATCH_LEAVES`] leaves.
fn batches(range: AddrRange) -> impl Iterator<Item = AddrRange> {
    let mut next = Some(range);
    std::iter::from_fn(move || {
        let rest = next?;
        let cut = rest.start().leaf().get() + BATCH_LEAVES as u64 * LEAF_SIZE;
        if cut >= rest.end().get() {
            next = None;
            return Some(rest);
        }
        next = Some(AddrRange::from_bounds(cut, rest.end().get()));
        Some(AddrRange::from_bounds(rest.start().get(), cut))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_cover_the_range_and_end_at_leaf_boundaries() {
        let range = AddrRange::new(0x1f_f000, 0x1f_f000 + 40 * LEAF_SIZE).unwrap();
        let parts: Vec<_> = batches(range).collect();
        assert_eq!(parts.iter().map(|part| part.pages()).sum::<usize>(), range.pages());
        assert!(parts.iter().all(|part| part.by_leaf().count() <= BATCH_LEAVES));
        assert_eq!(parts[1].start().leaf(), parts[1].start());
    }
}
