//! Looking at the process's memory, and making it present.

use super::Mm;
use super::page_table::Place;
use crate::addr::{AddrRange, Pfn, USER_END, VirtAddr};
use crate::devmem::Devmem;
use crate::engine::Present;
use crate::error::{Error, Result};
use crate::flags::Protection;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// Mapped, but never touched (or dropped): reads as zeros.
    None,
    /// In system memory.
    System,
    /// On a device.
    Device(Pfn),
    /// On its way.
    Migrating,
    /// Lost by its device: a touch gets SIGBUS.
    Poisoned,
    /// Nothing is mapped there.
    Unmapped,
}

impl Mm {
    /// Reads as a system call would: waits for absent pages, stops at unmapped ones. Returns the bytes read.
    ///
    /// # Errors
    /// `Fault` when nothing can be read; `Invalid` above the user address space.
    pub fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        self.check_access(addr, out.len())?;
        let len = self.before_lost(addr, out.len())?;
        self.engine.read(addr, &mut out[..len])
    }

    /// Writes as a system call would: waits for absent pages, stops at unmapped or read-only ones.
    ///
    /// # Errors
    /// `Fault` when nothing can be written; `Invalid` above the user address space.
    pub fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        self.check_access(addr, data.len())?;
        let len = self.before_lost(addr, data.len())?;
        self.engine.write(addr, &data[..len])
    }

    /// How many of these bytes lie before the first page that its device lost. Not every kernel can be told of such a
    /// page, and one that was not waits for it without end.
    fn before_lost(&self, addr: VirtAddr, len: usize) -> Result<usize> {
        let range = AddrRange::covering(addr.get(), len as u64)?;
        for leaf in self.table.leaves(range) {
            let entries = leaf.lock();
            let is_lost =
                |page: &VirtAddr| matches!(entries[page.index_in_leaf()].place(), Place::Poisoned);
            if let Some(lost) = super::layout::pages_of(leaf, range).find(is_lost) {
                let before = lost.get().saturating_sub(addr.get()) as usize;
                let what = "its device lost the data";
                return if before > 0 {
                    Ok(before)
                } else {
                    Err(Error::Fault { address: lost, what })
                };
            }
        }
        Ok(len)
    }

    /// Reads bytes that are present, without waiting and without faulting. False when some page is not there: a
    /// device engine calls it under the lock of its page table, and takes a device fault when it says false.
    pub fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        self.check_access(addr, out.len()).is_ok() && self.engine.peek(addr, out)
    }

    /// Writes bytes to pages that are present and writable, without waiting and without faulting.
    pub fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        self.check_access(addr, data.len()).is_ok()
            && self.allows(addr, data.len(), Protection::WRITE)
            && self.engine.poke(addr, data)
    }

    /// Whether every mapping of these bytes has a protection. The engine's way to them ignores it.
    fn allows(&self, addr: VirtAddr, len: usize, protection: Protection) -> bool {
        let Some(end) = addr.checked_add(len as u64) else { return false };
        let mut next = addr.page();
        while next < end {
            match self.engine.mapping_at(next) {
                Ok(Some(mapping))
                    if mapping.range.contains(next) && mapping.protection.contains(protection) =>
                {
                    next = mapping.range.end();
                }
                _ => return false,
            }
        }
        true
    }

    fn check_access(&self, addr: VirtAddr, len: usize) -> Result<()> {
        self.check_open()?;
        match addr.checked_add(len as u64) {
            Some(end) if end.get() <= USER_END && len > 0 && addr.get() > 0 => Ok(()),
            _ => Err(Error::invalid(addr.get(), "not a range of user addresses")),
        }
    }

    /// Brings what is on devices home, then makes every page of the range present as a CPU access would. Returns how
    /// many pages came home. For system calls on engines that cannot wait inside the kernel, and for prefetching.
    ///
    /// # Errors
    /// `Fault` where nothing is mapped, `Permission` when the mapping forbids the access, `Lost`, `Busy`.
    pub fn make_present(&self, range: AddrRange, write: bool) -> Result<usize> {
        self.check_open()?;
        let is_out_of_reach = |page| Devmem::find(page).is_some_and(|one| !one.is_coherent());
        let home = self.bring_home_matching(range, &is_out_of_reach)?;
        self.engine.populate(range, write)?;
        Ok(home)
    }

    /// Tells for each page of a range where it is now. Changes nothing, faults nothing.
    ///
    /// # Errors
    /// `Invalid` when `out` has not one element per page.
    pub fn residency(&self, range: AddrRange, out: &mut [Residency]) -> Result<()> {
        self.check_open()?;
        if out.len() != range.pages() {
            let what = "residency needs one element per page";
            return Err(Error::invalid(range.start().get(), what));
        }
        self.sync();
        out.fill(Residency::Unmapped);
        let mut next = range.start();
        while next < range.end() {
            let Some(mapping) = self.engine.mapping_at(next)? else { break };
            let Some(part) = mapping.range.intersect(range) else { break };
            self.engine.scan(part, &mut |run, present| {
                let place =
                    if present == Present::None { Residency::None } else { Residency::System };
                let first = range.index_of(run.start());
                out[first..first + run.pages()].fill(place);
            })?;
            next = part.end();
        }
        for leaf in self.table.leaves(range) {
            for addr in super::layout::pages_of(leaf, range) {
                let entry = leaf.lock()[addr.index_in_leaf()];
                let place = &mut out[range.index_of(addr)];
                match entry.place() {
                    _ if entry.is_locked() => *place = Residency::Migrating,
                    Place::Device(page) | Place::Coherent(page) => {
                        *place = Residency::Device(page);
                    }
                    Place::Poisoned => *place = Residency::Poisoned,
                    Place::System => {}
                }
            }
        }
        Ok(())
    }

    pub(crate) fn is_poisoned(&self, addr: VirtAddr) -> Result<()> {
        match self.table.entry(addr).place() {
            Place::Poisoned => Err(Error::Lost { address: addr, what: "its device lost the data" }),
            _ => Ok(()),
        }
    }
}
