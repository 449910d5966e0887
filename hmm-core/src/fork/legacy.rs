//! Lazy forks, in the child: the pages that were away at the fork are on a device again, whose memory is the parent's.
//! So everything that is true of pages on devices is true of them: touches wait for them, layout changes are followed,
//! they come home before a further fork, and the child's own devices can have them.

use super::wire::{self, Answer};
use crate::addr::{AddrRange, PAGE_SIZE, Pfn};
use crate::arena;
use crate::devmem::Devmem;
use crate::engine::Present;
use crate::error::{Error, Result};
use crate::flags::{MigrateFlags, MigratePfn, Select};
use crate::migrate::{MigrateBatch, MigrateRequest};
use crate::mm::Mm;
use crate::ops::{CpuFault, DevmemOps, FaultError, MigrateOps, OwnerId};
use crate::sync::Mutex;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use std::sync::Arc;

/// The parent's memory as a device: page `i` is the page with that number at the fork.
#[derive(Debug)]
struct ParentMemory {
    owner: OwnerId,
    pages: usize,
    /// None once the parent is gone.
    socket: Mutex<Option<OwnedFd>>,
    store: OwnedFd,
}

impl ParentMemory {
    fn fetch(&self, index: usize, out: &mut [u8; PAGE_SIZE]) -> Answer {
        let mut socket = self.socket.lock();
        if let Some(open) = &*socket {
            if let Some(answer) = wire::ask(open, index, out) {
                return answer;
            }
            *socket = None;
        }
        wire::look(&self.store, index, self.pages, out)
    }
}

impl DevmemOps for ParentMemory {
    fn free(&self, _: &Devmem, _: Pfn) {}

    fn fault(&self, devmem: &Devmem, fault: &CpuFault<'_>) -> std::result::Result<(), FaultError> {
        let (mut src, mut dst) = ([MigratePfn::default()], [MigratePfn::default()]);
        let request = MigrateRequest {
            range: AddrRange::page_of(fault.addr),
            select: Select::DEVICE,
            owner: Some(self.owner),
            fault_page: Some(fault.page),
        };
        let mut home = Home { memory: self, first: devmem.pfn_first(), is_late: false };
        let done = fault.mm.migrate(&request, &mut home, &mut src, &mut dst);
        if done.is_err() || home.is_late { Err(FaultError::OutOfMemory) } else { Ok(()) }
    }
}

/// Pages that come from the parent.
struct Home<'a> {
    memory: &'a ParentMemory,
    first: Pfn,
    is_late: bool,
}

impl MigrateOps for Home<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        for index in 0..batch.src.len() {
            let Some(page) = batch.src[index].pfn().filter(|_| batch.src[index].migrates()) else {
                continue;
            };
            let mut contents = [0; PAGE_SIZE];
            match self.memory.fetch((page.get() - self.first.get()) as usize, &mut contents) {
                Answer::Later => self.is_late = true,
                Answer::Lost => batch.dst[index] = MigratePfn::bare(MigrateFlags::ERROR),
                Answer::Page => {
                    let Some(frame) = batch.alloc_system_page(batch.range.page_at(index)) else {
                        continue;
                    };
                    let Some(to) = frame.to_addr() else { continue };
                    // SAFETY: the frame is this batch's own until the callbacks are over, and writable.
                    unsafe { to.as_ptr().copy_from_nonoverlapping(contents.as_ptr(), PAGE_SIZE) };
                    batch.dst[index] = MigratePfn::new(frame, MigrateFlags::LOCKED);
                }
            }
        }
    }

    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

/// Untouched pages that come to stand for pages of the parent's.
struct Away {
    next: Pfn,
    start: AddrRange,
}

impl MigrateOps for Away {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        let first = self.start.index_of(batch.range.start());
        for index in 0..batch.src.len() {
            if batch.src[index].migrates() {
                let page = Pfn::new(self.next.get() + (first + index) as u64);
                batch.dst[index] =
                    MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE);
            }
        }
    }

    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

/// Takes over what a parent shares. Where that fails the child has no mapping, and never zeros.
pub(super) fn take_over(socket: OwnedFd, store: OwnedFd, runs: &[AddrRange]) {
    // First of all: what the mm maps for itself must not lie there.
    let are_mapped: Vec<_> = runs.iter().map(|run| fill_gaps(*run)).collect();
    let pages = runs.iter().map(|run| run.pages()).sum();
    let begun = Mm::current().and_then(|mm| Ok((mm, begin(socket, store, pages)?)));
    let mut next = 0;
    for (run, is_mapped) in runs.iter().zip(are_mapped) {
        let done = match &begun {
            Ok((mm, devmem)) if is_mapped => {
                take_over_run(mm, *run, Pfn::new(devmem.pfn_first().get() + next)).is_ok()
            }
            _ => false,
        };
        if !done {
            unmap(*run);
        }
        next += run.pages() as u64;
    }
}

/// Maps what the child did not get of a run.
fn fill_gaps(run: AddrRange) -> bool {
    match map(run, MapFlags::FIXED_NOREPLACE) {
        Err(Errno::EXIST) if run.pages() > 1 => {
            (0..run.pages()).all(|page| fill_gaps(run.sub(page, 1)))
        }
        // It came home in the moment of the fork.
        Err(Errno::EXIST) => true,
        done => done.is_ok(),
    }
}

fn begin(socket: OwnedFd, store: OwnedFd, pages: usize) -> Result<Arc<Devmem>> {
    wire::prepare(&socket)?;
    let owner = OwnerId::unique();
    let memory = ParentMemory { owner, pages, socket: Mutex::new(Some(socket)), store };
    let memory = Arc::new(memory);
    if !arena::keep_object(&memory) {
        return Err(Error::NoMemory { what: "places for objects of the library (512)" });
    }
    Devmem::add(memory, owner, pages)
}

/// Pages that came home in the moment of the fork are there, and newer than what the parent keeps.
fn take_over_run(mm: &Arc<Mm>, run: AddrRange, first: Pfn) -> Result<()> {
    for piece in mm.pieces(run) {
        let mapping = mm.engine.mapping_at(piece.start())?;
        if mapping.is_some_and(|mapping| mapping.protection.is_empty()) {
            // An engine of the parent's hid it: it was still away.
            map(piece, MapFlags::FIXED).map_err(|errno| Error::os("mmap", piece.start(), errno))?;
        }
    }
    let mut is_away = vec![true; run.pages()];
    mm.engine.scan(run, &mut |part, present| {
        let first = run.index_of(part.start());
        is_away[first..first + part.pages()].fill(present == Present::None);
    })?;
    let mut page = 0;
    while page < run.pages() {
        let count = is_away[page..].iter().take_while(|away| **away == is_away[page]).count();
        if is_away[page] {
            let first = Pfn::new(first.get() + page as u64);
            stand_for(mm, run.sub(page, count), first);
        }
        page += count;
    }
    Ok(())
}

/// Untouched pages come to stand for pages of the parent's.
fn stand_for(mm: &Arc<Mm>, run: AddrRange, first: Pfn) {
    let mut src = vec![MigratePfn::default(); run.pages()];
    let mut dst = src.clone();
    let request =
        MigrateRequest { range: run, select: Select::SYSTEM, owner: None, fault_page: None };
    let done = mm.migrate(&request, &mut Away { next: first, start: run }, &mut src, &mut dst);
    for index in (0..run.pages()).filter(|index| done.is_err() || !src[*index].migrates()) {
        unmap(run.sub(index, 1));
    }
}

fn map(range: AddrRange, fixed: MapFlags) -> std::result::Result<(), Errno> {
    let start = range.start().as_ptr().cast();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
    // SAFETY: either nothing is replaced, or pages that nobody reaches; no other thread of the program is here yet.
    let mapped = unsafe { rustix::mm::mmap_anonymous(start, range.len() as usize, access, flags) }?;
    if mapped == start {
        return Ok(());
    }
    // An old kernel took the address for a wish.
    // SAFETY: mapped a moment ago, for nobody.
    let _ = unsafe { rustix::mm::munmap(mapped, range.len() as usize) };
    Err(Errno::BUSY)
}

/// Rather no mapping than zeros.
fn unmap(range: AddrRange) {
    // SAFETY: the parent had its data there, which this process does not get.
    let _ = unsafe { rustix::mm::munmap(range.start().as_ptr().cast(), range.len() as usize) };
}
