//! Looking at a range for a device: snapshot, and fault in what is missing (hmm.txt section 4, `hmm_range_fault`).
//!
//! The caller follows the range with a [`crate::RangeTracker`] or a [`crate::Notifier`]: number, look, own lock, number
//! again. The result means nothing if the number changed.

mod fault;

pub use fault::{HmmPfn, RangeFault};

use crate::addr::{AddrRange, Pfn, VirtAddr};
use crate::devmem::Devmem;
use crate::engine::{Present, VmaKind, Watch};
use crate::error::{Error, Result};
use crate::flags::{PfnEntry, PfnFlags, Protection};
use crate::limits::RANGE_DEADLINE;
use crate::mm::page_table::{Entry, Place};
use crate::mm::{Mm, Vma};
use crate::ops::OwnerId;
use std::time::{Duration, Instant};

/// What to look at.
#[derive(Debug, Clone, Copy)]
pub struct RangeRequest {
    /// Pages, all in one vma.
    pub range: AddrRange,
    /// `Some`: only this device's own pages are reported; pages of others count as absent, and a fault brings them
    /// home. `None`: pages of every device are reported (Gen A).
    pub owner: Option<OwnerId>,
}

/// Why pages could not be had.
struct Failure {
    /// The page, from the start of the range.
    index: usize,
    /// It is this page that cannot be had.
    is_page: bool,
    error: Error,
}

/// How the device wants to use the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    Write,
}

impl Mm {
    /// Reports what is present, without changing anything (`hmm_vma_get_pfns`, promise 26).
    ///
    /// # Errors
    /// `Invalid` for a wrong array length, a range that leaves its vma, or a special vma (every entry is `SPECIAL`
    /// then); `Fault` when nothing is mapped; `Permission` when the vma is not readable (entries 0).
    pub fn snapshot(&self, request: &RangeRequest, pfns: &mut [PfnEntry]) -> Result<()> {
        let vma = self.prepare_look(request, pfns)?;
        self.look_at_range(request, &vma, pfns)
    }

    /// As [`Mm::snapshot`], but makes what is missing present first, through the ordinary fault path (promises 27, 28).
    /// Own device pages are accepted as they are. Must not be called from callbacks or under a lock that they take.
    ///
    /// # Errors
    /// As for `snapshot`; `Permission` for a write to a vma that is not writable (promise 29); `Fault` when a page
    /// cannot be had (its entry is `ERROR`); `Busy` when the range kept changing for a second.
    pub fn range_fault(
        &self,
        request: &RangeRequest,
        access: Access,
        pfns: &mut [PfnEntry],
    ) -> Result<()> {
        let vma = self.prepare_look(request, pfns)?;
        let address = request.range.start();
        if access == Access::Write && !vma.protection.contains(Protection::WRITE) {
            pfns.fill(PfnEntry::default());
            return Err(Error::Permission { address, what: "the vma is not writable" });
        }
        let deadline = Instant::now() + RANGE_DEADLINE;
        let in_time = |address| match Instant::now() < deadline {
            true => Ok(()),
            false => Err(Error::Busy { address, what: "range keeps changing" }),
        };
        let faulted = self.fault_in(request, &vma, &|_| Some(access), pfns, &in_time);
        faulted.map_err(|failure| {
            if failure.is_page {
                pfns[failure.index] = PfnEntry::bare(PfnFlags::ERROR);
            }
            failure.error
        })
    }

    /// Looks, makes what is missing of what is wanted (by index) present, and looks again, until all is there.
    /// `may_go_on` is asked before each round.
    fn fault_in(
        &self,
        request: &RangeRequest,
        vma: &Vma,
        wanted: &dyn Fn(usize) -> Option<Access>,
        pfns: &mut [PfnEntry],
        may_go_on: &dyn Fn(VirtAddr) -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let range = request.range;
        let failed = |index, is_page| move |error| Failure { index, is_page, error };
        loop {
            self.look_at_range(request, vma, pfns).map_err(failed(0, false))?;
            let Some((missing, access)) = first_missing(range, wanted, pfns) else {
                return self.own_pages(range, vma, wanted, pfns).map_err(failed(0, false));
            };
            let index = range.index_of(missing.start());
            may_go_on(missing.start()).map_err(failed(index, false))?;
            self.make_usable(missing, access).map_err(failed(index, true))?;
        }
    }

    fn prepare_look(&self, request: &RangeRequest, pfns: &mut [PfnEntry]) -> Result<Vma> {
        let address = request.range.start();
        if self.notifiers.in_callback() {
            return Err(Error::Deadlock { what: "a look at a range from a notifier callback" });
        }
        if pfns.len() != request.range.pages() {
            return Err(Error::invalid(address.get(), "pfns needs one element per page"));
        }
        let vma = self.vma_covering(request.range)?;
        if matches!(vma.kind, VmaKind::Special | VmaKind::Huge) {
            pfns.fill(PfnEntry::bare(PfnFlags::SPECIAL));
            return Err(Error::invalid(address.get(), "special and hugetlb vmas are not mirrored"));
        }
        if !vma.protection.contains(Protection::READ) {
            pfns.fill(PfnEntry::default());
            return Err(Error::Permission { address, what: "the vma is not readable" });
        }
        self.engine.watch(vma.range, Watch::Changes)?;
        self.engine.refresh(request.range);
        Ok(vma)
    }

    fn look_at_range(
        &self,
        request: &RangeRequest,
        vma: &Vma,
        pfns: &mut [PfnEntry],
    ) -> Result<()> {
        let range = request.range;
        let write = vma.protection.contains(Protection::WRITE);
        self.engine.scan(range, &mut |run, present| {
            let first = range.index_of(run.start());
            for (offset, out) in pfns[first..first + run.pages()].iter_mut().enumerate() {
                *out = system_entry(run.page_at(offset), present, vma);
            }
        })?;
        for leaf in self.table.leaves(range) {
            let Some(part) = leaf.range().intersect(range) else { continue };
            // Copied out first: `pfns` is the caller's memory, and touching it may fault.
            let entries = *leaf.lock();
            for offset in 0..part.pages() {
                let address = part.page_at(offset);
                let entry = entries[address.index_in_leaf()];
                if !entry.is_ordinary() {
                    let out = &mut pfns[range.index_of(address)];
                    *out = device_entry(entry, *out, request.owner, write);
                }
            }
        }
        Ok(())
    }

    /// After a fork the kernel lets parent and child share private pages, and does not tell which. For a write each is
    /// made this process's own (promise 28); one that is already is left as it is.
    fn own_pages(
        &self,
        range: AddrRange,
        vma: &Vma,
        wanted: &dyn Fn(usize) -> Option<Access>,
        pfns: &[PfnEntry],
    ) -> Result<()> {
        let is_private = matches!(vma.kind, VmaKind::Anonymous | VmaKind::PrivateFile);
        if !is_private || !self.may_share_pages() {
            return Ok(());
        }
        let is_to_own = |index: &usize| {
            let is_system = !pfns[*index].flags().contains(PfnFlags::DEVICE);
            is_system && wanted(*index) == Some(Access::Write)
        };
        let mut first = 0;
        while first < pfns.len() {
            let count = (first..pfns.len()).take_while(is_to_own).count();
            if count > 0 {
                self.engine.populate(range.sub(first, count), true)?;
            }
            first += count + 1;
        }
        Ok(())
    }

    /// Makes pages present and, if asked, writable; waits for migrations that hold them.
    fn make_usable(&self, run: AddrRange, access: Access) -> Result<()> {
        let address = run.start();
        self.is_poisoned(address)
            .map_err(|_| Error::Fault { address, what: "the page is poisoned" })?;
        if let Some(leaf) = self.table.leaf(address) {
            let entries = leaf.lock();
            if entries[address.index_in_leaf()].is_locked() {
                if self.engine.is_service_thread() {
                    return Err(Error::Deadlock { what: "range fault on a service thread" });
                }
                drop(leaf.wait(entries, Duration::from_millis(10)));
                return Ok(());
            }
        }
        self.bring_home(run)?;
        self.engine.populate(run, access == Access::Write)
    }
}

fn system_entry(address: VirtAddr, present: Present, vma: &Vma) -> PfnEntry {
    let valid = PfnFlags::VALID | PfnFlags::READ;
    let is_writable = vma.protection.contains(Protection::WRITE);
    let flags = match present {
        Present::None => return PfnEntry::bare(PfnFlags::EMPTY),
        Present::Swapped => return PfnEntry::default(),
        // The page is the file's; a write gets a copy.
        Present::File if vma.kind == VmaKind::PrivateFile => valid,
        Present::Page | Present::File if is_writable => valid | PfnFlags::WRITE,
        Present::Page | Present::File | Present::Zero => valid,
    };
    PfnEntry::new(Pfn::of_addr(address), flags)
}

/// What a page is that the library knows something of; `mapped` is what the kernel says of it.
fn device_entry(
    entry: Entry,
    mapped: PfnEntry,
    owner: Option<OwnerId>,
    vma_writable: bool,
) -> PfnEntry {
    match entry.place() {
        _ if entry.is_locked() => PfnEntry::default(),
        Place::Poisoned => PfnEntry::bare(PfnFlags::ERROR),
        Place::System => PfnEntry::default(),
        // Mapped like any other, whoever its owner is.
        Place::Coherent(page) if mapped.pfn().is_some() => PfnEntry::new(page, mapped.flags()),
        Place::Coherent(_) => mapped,
        Place::Device(page) => {
            let foreign = owner.is_some_and(|owner| {
                Devmem::find(page).is_none_or(|devmem| devmem.owner() != owner)
            });
            if foreign {
                return PfnEntry::default();
            }
            let mut flags = PfnFlags::VALID | PfnFlags::READ | PfnFlags::DEVICE;
            // The vma may have become read-only while the page was away.
            flags.set(PfnFlags::WRITE, vma_writable && entry.is_writable());
            PfnEntry::new(page, flags)
        }
    }
}

/// The first run of pages that do not fulfil what is wanted of them, and the access that is.
fn first_missing(
    range: AddrRange,
    wanted: &dyn Fn(usize) -> Option<Access>,
    pfns: &[PfnEntry],
) -> Option<(AddrRange, Access)> {
    let missing = |index: usize| {
        let access = wanted(index)?;
        let needed = match access {
            Access::Read => PfnFlags::VALID,
            Access::Write => PfnFlags::VALID | PfnFlags::WRITE,
        };
        (!pfns[index].flags().contains(needed)).then_some(access)
    };
    let (first, access) = (0..pfns.len()).find_map(|at| Some((at, missing(at)?)))?;
    let count = (first..pfns.len()).take_while(|at| missing(*at) == Some(access)).count();
    Some((range.sub(first, count), access))
}
