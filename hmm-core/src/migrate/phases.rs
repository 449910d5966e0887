//! Migration in three calls, between which the driver does its part (`migrate_vma_setup`, `_pages`, `_finalize`).

use super::batch::{Batch, Collect};
use super::{MigrateRequest, batches, busy_runs, memory_of};
use crate::addr::{AddrRange, Pfn};
use crate::arena::Buffer;
use crate::error::{Error, Result};
use crate::flags::MigratePfn;
use crate::limits::{BATCH_LEAVES, MIGRATIONS};
use crate::mm::{Mm, Vma};
use crate::page_set::PageSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Batch {
    /// Holds pages, invalidates mirrors, takes contents, and tells the driver in `src` what there is. With the batch
    /// come the pages of each leaf that were shared or pinned.
    pub(super) fn begin(
        mm: &Arc<Mm>,
        vma: &Vma,
        collect: Collect,
        range: AddrRange,
        keep: [Option<AddrRange>; 2],
        src: &mut [MigratePfn],
    ) -> Result<(Self, [PageSet; BATCH_LEAVES])> {
        let mut batch = Self::hold(mm, vma, collect, range, keep)?;
        let busy = batch.take_contents()?;
        batch.describe(src);
        Ok((batch, busy))
    }

    /// What `src` says is final: every page is where it belongs, and whoever waited goes on.
    pub(super) fn end(self, src: &[MigratePfn]) {
        let mm = Arc::clone(&self.mm);
        self.land();
        let moved = src.iter().filter(|page| page.migrates()).count();
        mm.stats.not_migrated.fetch_add((src.len() - moved) as u64, Ordering::Relaxed);
    }
}

/// Batches that one migration holds at once.
pub(super) const MOST_BATCHES: usize = MIGRATIONS / 2;

/// A migration between its calls (`struct migrate_vma` after `migrate_vma_setup`). It holds its pages: touches of them
/// wait. Dropping it puts every page back where it was.
pub struct Migration {
    range: AddrRange,
    batches: Buffer<Option<Batch>>,
}

/// What a try to begin ended in.
enum Setup {
    Done(Migration),
    /// Pages of a part are shared or pinned: [`Tries::busy`].
    Busy(AddrRange),
    /// A fork waits until nothing is held.
    Fork,
}

/// What may still be tried.
struct Tries {
    /// The first part whose busy pages were not written yet.
    next_part: usize,
    busy: [PageSet; BATCH_LEAVES],
    forks: usize,
}

impl Default for Tries {
    fn default() -> Self {
        Self { next_part: 0, busy: [PageSet::default(); BATCH_LEAVES], forks: 16 }
    }
}

impl Mm {
    /// Takes the pages of a range that can migrate from the CPU, and tells in `src` which these are
    /// (`migrate_vma_setup`). The driver then names destinations and copies, calls [`Migration::pages`], updates its own
    /// tables for what moved, and calls [`Migration::finalize`]; all on one thread, and soon: touches of the pages wait.
    ///
    /// The calling thread must not touch memory of the range meanwhile: what it needs is pinned, or outside of it.
    ///
    /// # Errors
    /// As for [`Mm::migrate`]. Nothing was changed then.
    pub fn migrate_setup(
        self: &Arc<Self>,
        request: &MigrateRequest,
        src: &mut [MigratePfn],
    ) -> Result<Migration> {
        let range = request.range;
        if src.len() != range.pages() {
            return Err(Error::invalid(range.start().get(), "src needs one element per page"));
        }
        if batches(range).count() > MOST_BATCHES {
            return Err(Error::invalid(range.start().get(), "more than 1 GiB in one migration"));
        }
        let vma = self.check_migration(request)?;
        src.fill(MigratePfn::default());
        let mut tries = Tries::default();
        loop {
            match self.try_setup(request, &vma, src, &mut tries)? {
                Setup::Done(migration) => return Ok(migration),
                Setup::Busy(part) => self.make_private(part, &tries.busy),
                Setup::Fork => self.pass_fork_gate()?,
            }
        }
    }

    /// One try. What stops it half-way has put everything back: whoever waits for others holds nothing.
    fn try_setup(
        self: &Arc<Self>,
        request: &MigrateRequest,
        vma: &Vma,
        src: &mut [MigratePfn],
        tries: &mut Tries,
    ) -> Result<Setup> {
        let (range, keep) = (request.range, memory_of(src));
        let mut migration = Migration::of(range)?;
        for (number, part) in batches(range).enumerate() {
            let src = &mut src[range.index_of(part.start())..][..part.pages()];
            let begun = Batch::begin(self, vma, request.collect(), part, [keep, None], src);
            let (batch, busy) = match begun {
                Err(Error::Busy { .. }) if number > 0 && self.is_forking() && tries.forks > 0 => {
                    tries.forks -= 1;
                    return Ok(Setup::Fork);
                }
                begun => begun?,
            };
            if number >= tries.next_part && busy_runs(part, &busy).next().is_some() {
                (tries.next_part, tries.busy) = (number + 1, busy);
                return Ok(Setup::Busy(part));
            }
            migration.batches[number] = Some(batch);
        }
        Ok(Setup::Done(migration))
    }

    /// A write makes pages private that a fork left shared. What is still busy then is pinned by somebody, and stays.
    fn make_private(&self, range: AddrRange, busy: &[PageSet; BATCH_LEAVES]) {
        if !self.engine.is_service_thread() {
            busy_runs(range, busy).for_each(|run| _ = self.engine.populate(run, true));
        }
    }
}

impl Migration {
    fn of(range: AddrRange) -> Result<Self> {
        let no_memory = Error::NoMemory { what: "the batches of a migration" };
        let batches = Buffer::new(batches(range).count(), |_| None).ok_or(no_memory)?;
        Ok(Self { range, batches })
    }

    /// The pages that it was asked for.
    pub fn range(&self) -> AddrRange {
        self.range
    }

    /// The frame that is reserved for page `index`, which comes home: the destination to name, writable at
    /// `pfn.to_addr()` until [`Migration::pages`]. `None` for pages that do not come home.
    pub fn system_page(&self, index: usize) -> Option<Pfn> {
        let (batch, here) = self.parts().find(|(_, here)| here.contains(&index))?;
        batch.flight.frame(index - here.start).map(Pfn::of_addr)
    }

    /// Commits (`migrate_vma_pages`): afterwards entries of `src` that still say `MIGRATE` moved, and only those.
    ///
    /// # Errors
    /// `Invalid` when `src` or `dst` has not one element per page.
    pub fn pages(&mut self, src: &mut [MigratePfn], dst: &[MigratePfn]) -> Result<()> {
        if src.len() != self.range.pages() || dst.len() != self.range.pages() {
            let address = self.range.start().get();
            return Err(Error::invalid(address, "src and dst need one element per page"));
        }
        let start = self.range;
        for batch in self.batches.iter_mut().flatten() {
            let first = start.index_of(batch.range.start());
            let here = first..first + batch.range.pages();
            batch.decide(&mut src[here.clone()], &dst[here]);
        }
        Ok(())
    }

    /// Ends it (`migrate_vma_finalize`): pages are visible where they are now, and whoever waited goes on. Without
    /// [`Migration::pages`] before, every page is put back. `src` is what `pages` left.
    pub fn finalize(mut self, src: &[MigratePfn]) {
        for slot in self.batches.iter_mut() {
            let Some(batch) = slot.take() else { continue };
            let first = self.range.index_of(batch.range.start());
            let pages = batch.range.pages();
            batch.end(src.get(first..first + pages).unwrap_or_default());
        }
    }

    /// The batches, each with its places in `src`.
    fn parts(&self) -> impl Iterator<Item = (&Batch, Range<usize>)> {
        self.batches.iter().flatten().map(|batch| {
            let first = self.range.index_of(batch.range.start());
            (batch, first..first + batch.range.pages())
        })
    }
}

impl fmt::Debug for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Migration({:?})", self.range)
    }
}
