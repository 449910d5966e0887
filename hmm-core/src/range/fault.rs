//! Range faults of today's kernels: each entry says what it wants, over any mappings (`hmm_range_fault`).

use super::{Access, RangeRequest};
use crate::addr::{AddrRange, LEAF_PAGES, Pfn, VirtAddr};
use crate::engine::{VmaKind, Watch};
use crate::error::{Error, Result};
use crate::flags::{PfnEntry, PfnFlags, Protection};
use crate::mm::{Mm, Vma};
use crate::ops::OwnerId;
use std::fmt;

/// One entry of a range, in and out: flags in the high bits, the pfn in the low ones (`hmm_pfns` of kernels since v6.16).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct HmmPfn(pub u64);

impl HmmPfn {
    /// In: make it present. Out: it is present and readable, and the entry holds a pfn.
    pub const VALID: u64 = 1 << 63;
    /// In, with `VALID`: make it writable. Out: it is.
    pub const WRITE: u64 = 1 << 62;
    /// Out: it can never be had.
    pub const ERROR: u64 = 1 << 61;
    /// The driver's; they stay as they are.
    pub const STICKY: u64 = 0b111 << 58;
    /// Where the order of the mapping stands, five bits.
    pub const ORDER_SHIFT: u32 = 53;
    /// Bits that are not the pfn's.
    pub const FLAGS: u64 = !0 << Self::ORDER_SHIFT;

    /// The pfn, if the entry is valid.
    pub const fn pfn(self) -> Option<Pfn> {
        if self.0 & Self::VALID == 0 { None } else { Some(Pfn::new(self.0 & !Self::FLAGS)) }
    }
    /// Whether the page can be written.
    pub const fn is_writable(self) -> bool {
        self.0 & Self::WRITE != 0
    }
    /// Whether the page can never be had.
    pub const fn is_error(self) -> bool {
        self.0 & Self::ERROR != 0
    }
    /// log2 of the pages that the CPU maps as one; the mapping is aligned to its size, and may reach beyond the range.
    pub const fn order(self) -> u32 {
        (self.0 >> Self::ORDER_SHIFT) as u32 & 0x1f
    }

    fn set(&mut self, found: PfnEntry, order: u64) {
        let flags = found.flags();
        let sticky = self.0 & Self::STICKY;
        self.0 = sticky
            | match found.pfn() {
                None if flags.contains(PfnFlags::ERROR) => Self::ERROR,
                None => 0,
                Some(pfn) => {
                    let write = if flags.contains(PfnFlags::WRITE) { Self::WRITE } else { 0 };
                    pfn.get() | Self::VALID | write | order << Self::ORDER_SHIFT
                }
            };
    }
}

impl fmt::Debug for HmmPfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:#x}", self.pfn(), self.0 & Self::FLAGS)
    }
}

/// What to look at, and what is wanted of it (`struct hmm_range`).
#[derive(Debug)]
pub struct RangeFault<'a> {
    /// Pages, in any mappings, or in none.
    pub range: AddrRange,
    /// Only this device's own pages are reported; pages of others count as absent, and a fault brings them home.
    pub owner: OwnerId,
    /// Wanted of every page: `HmmPfn::VALID`, `HmmPfn::WRITE`, or 0.
    pub default_flags: u64,
    /// What counts of each entry as it comes in.
    pub pfn_flags_mask: u64,
    /// One for each page.
    pub hmm_pfns: &'a mut [HmmPfn],
}

/// Order of a mapping of 2 MiB.
const HUGE_ORDER: u64 = 9;

impl RangeFault<'_> {
    /// What is wanted of page `index`.
    fn wanted(&self, index: usize) -> Option<Access> {
        let wanted = (self.hmm_pfns[index].0 & self.pfn_flags_mask) | self.default_flags;
        match wanted & (HmmPfn::VALID | HmmPfn::WRITE) {
            HmmPfn::VALID => Some(Access::Read),
            bits if bits & HmmPfn::VALID != 0 => Some(Access::Write),
            _ => None,
        }
    }

    fn wants(&self, part: AddrRange, fits: impl Fn(Access) -> bool) -> Option<VirtAddr> {
        let first = self.range.index_of(part.start());
        let page = (0..part.pages()).find(|page| self.wanted(first + page).is_some_and(&fits))?;
        Some(part.page_at(page))
    }
}

impl Mm {
    /// Reports what is present in a range, and makes present what its entries ask for (`hmm_range_fault`). `is_still`
    /// tells whether the notifier's number is what it was before the call: it is asked before each page is faulted in.
    ///
    /// Entries before a page that fails are final; from that one on they are as they came in. What cannot be had and is
    /// not asked for (no mapping, no right to read, driver memory) is an `ERROR` entry, not an error.
    ///
    /// # Errors
    /// `Busy` when the number changed: begin again. `Fault` when a page that is asked for cannot be had; `Permission`
    /// for a write to a mapping that is not writable; `Deadlock` from a notifier callback; `Gone`.
    pub fn hmm_range_fault(
        &self,
        fault: &mut RangeFault<'_>,
        is_still: &dyn Fn() -> bool,
    ) -> Result<()> {
        let address = fault.range.start();
        if fault.hmm_pfns.len() != fault.range.pages() {
            return Err(Error::invalid(address.get(), "hmm_pfns needs one element per page"));
        }
        if self.notifiers.in_callback() {
            return Err(Error::Deadlock { what: "a look at a range from a notifier callback" });
        }
        self.check_open()?;
        self.engine.refresh(fault.range);
        let mut next = address;
        while next < fault.range.end() {
            let rest = AddrRange::from_bounds(next.get(), fault.range.end().get());
            let vma = self.find_vma(next)?;
            let mapped = vma.and_then(|vma| Some((vma, vma.range.intersect(rest)?)));
            let hole_end = mapped.map_or(rest.end(), |(_, part)| part.start());
            if next < hole_end {
                let hole = AddrRange::from_bounds(next.get(), hole_end.get());
                fault.cannot_be_had(hole, "nothing is mapped there")?;
            }
            let Some((vma, part)) = mapped else { break };
            self.fault_in_vma(fault, &vma, part, is_still)?;
            next = part.end();
        }
        Ok(())
    }

    fn fault_in_vma(
        &self,
        fault: &mut RangeFault<'_>,
        vma: &Vma,
        part: AddrRange,
        is_still: &dyn Fn() -> bool,
    ) -> Result<()> {
        if vma.kind == VmaKind::Special {
            return fault.cannot_be_had(part, "driver memory and the like is not mirrored");
        }
        if !vma.protection.contains(Protection::READ) {
            return fault.cannot_be_had(part, "the vma is not readable");
        }
        if !vma.protection.contains(Protection::WRITE)
            && let Some(address) = fault.wants(part, |access| access == Access::Write)
        {
            return Err(Error::Permission { address, what: "the vma is not writable" });
        }
        self.engine.watch(vma.range, Watch::Changes)?;
        part.by_leaf().try_for_each(|piece| self.fault_in_piece(fault, vma, piece, is_still))
    }

    /// One leaf, or a part of it.
    fn fault_in_piece(
        &self,
        fault: &mut RangeFault<'_>,
        vma: &Vma,
        piece: AddrRange,
        is_still: &dyn Fn() -> bool,
    ) -> Result<()> {
        let request = RangeRequest { range: piece, owner: Some(fault.owner) };
        let first = fault.range.index_of(piece.start());
        let mut entries = [PfnEntry::default(); LEAF_PAGES];
        let entries = &mut entries[..piece.pages()];
        let may_go_on = |address| match is_still() {
            true => Ok(()),
            false => Err(Error::Busy { address, what: "the range was invalidated: begin again" }),
        };
        let wanted = |index| fault.wanted(first + index);
        let done = self.fault_in(&request, vma, &wanted, entries, &may_go_on);
        let order = if self.is_mapped_huge(piece, entries) { HUGE_ORDER } else { 0 };
        let known = done.as_ref().map_or_else(|failure| failure.index, |()| entries.len());
        for (out, found) in fault.hmm_pfns[first..].iter_mut().zip(&entries[..known]) {
            out.set(*found, order);
        }
        done.map_err(|failure| failure.error)
    }

    fn is_mapped_huge(&self, piece: AddrRange, entries: &[PfnEntry]) -> bool {
        let is_mapped = |entry: &PfnEntry| {
            let flags = entry.flags();
            flags.contains(PfnFlags::VALID) && !flags.contains(PfnFlags::DEVICE)
        };
        let leaf = piece.start().leaf().get();
        let leaf = AddrRange::from_bounds(leaf, leaf + crate::addr::LEAF_SIZE);
        entries.iter().all(is_mapped) && self.engine.is_huge(leaf)
    }
}

impl RangeFault<'_> {
    /// Pages that nobody can have: entries say so, unless one is asked for.
    fn cannot_be_had(&mut self, part: AddrRange, what: &'static str) -> Result<()> {
        if let Some(address) = self.wants(part, |_| true) {
            return Err(Error::Fault { address, what });
        }
        let first = self.range.index_of(part.start());
        for out in &mut self.hmm_pfns[first..first + part.pages()] {
            out.set(PfnEntry::bare(PfnFlags::ERROR), 0);
        }
        Ok(())
    }
}
