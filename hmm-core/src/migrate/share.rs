//! Device pages with more than one place, as after a fork: untouched pages come to stand for device pages in use.

use super::{Job, MigrateBatch, batches};
use crate::addr::{AddrRange, Pfn};
use crate::arena::Buffer;
use crate::error::{Error, Result};
use crate::flags::{MigrateFlags, MigratePfn, Select};
use crate::migrate::MigrateRequest;
use crate::mm::Mm;
use crate::mm::page_table::Place;
use crate::ops::MigrateOps;
use std::sync::Arc;

/// Names the shared pages as destinations. Nothing is copied.
struct Sharing<'a> {
    range: AddrRange,
    pages: &'a [Pfn],
}

impl MigrateOps for Sharing<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let first = self.range.index_of(batch.range.start());
        let flags = MigrateFlags::LOCKED | MigrateFlags::DEVICE;
        for (index, dst) in batch.dst.iter_mut().enumerate() {
            if batch.src[index].migrates() {
                *dst = MigratePfn::new(self.pages[first + index], flags);
            }
        }
    }

    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

impl Mm {
    /// Lets the untouched pages of a new mapping stand for device pages that are in use elsewhere, while a fork is under
    /// way. The caller's reference of each page is handed over as far as `took` says so, page by page.
    ///
    /// # Errors
    /// As [`Mm::migrate`]; `Busy` when a page did not stay where it was put.
    pub(crate) fn share_pages(
        self: &Arc<Self>,
        range: AddrRange,
        pages: &[Pfn],
        took: &mut [bool],
    ) -> Result<()> {
        let vma = self.vma_covering(range)?;
        self.engine.check_ready(range)?;
        let request =
            MigrateRequest { range, select: Select::SYSTEM, owner: None, fault_page: None };
        let job = Job { mm: self, vma: &vma, request: &request, shares: true };
        let mut ops = Sharing { range, pages };
        let no_memory = || Error::NoMemory { what: "lists of a fork" };
        for part in batches(range) {
            let list =
                || Buffer::new(part.pages(), |_| MigratePfn::default()).ok_or_else(no_memory);
            let (mut src, mut dst) = (list()?, list()?);
            job.run_batch(part, &mut ops, &mut src, &mut dst)?;
            let first = range.index_of(part.start());
            for (index, src) in src.iter().enumerate() {
                took[first + index] = src.migrates();
            }
        }
        let is_there = |index: &usize| {
            self.table.entry(range.page_at(*index)).place() == Place::Device(pages[*index])
        };
        match (0..pages.len()).find(|index| took[*index] && !is_there(index)) {
            Some(index) => {
                let address = range.page_at(index);
                Err(Error::Busy { address, what: "the page lost its place" })
            }
            None => Ok(()),
        }
    }
}
