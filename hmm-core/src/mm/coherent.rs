//! Pages of device memory that the CPU reaches: they are mapped like any other, and become system pages where they are.

use super::Mm;
use super::page_table::{Entry, Leaf, Place};
use crate::addr::{AddrRange, PAGE_SIZE, Pfn, VirtAddr};
use crate::devmem::DoomedPages;
use crate::ops::{InvalidateEvent, Invalidation};
use crate::stats::Stats;

impl Mm {
    /// The coherent pages of a leaf and a range that are wanted, and held by nobody, are system pages from now on. Their
    /// contents stay where they are. Mirrors are told before. No lock is held.
    pub(super) fn take_back(&self, leaf: &Leaf, range: AddrRange, wanted: &dyn Fn(Pfn) -> bool) {
        let is_wanted = |entry: Entry| match entry.place() {
            Place::Coherent(page) => !entry.is_locked() && wanted(page),
            _ => false,
        };
        let Some(hull) = hull_of(leaf, range, &is_wanted) else { return };
        let update = Invalidation { range: hull, event: InvalidateEvent::Clear, owner: None };
        let _invalid = self.notifiers.invalidate(update);
        let mut doomed = DoomedPages::default();
        let layout = self.engine.layout().hold();
        let mut entries = leaf.lock();
        for address in super::layout::pages_of(leaf, hull) {
            let entry = &mut entries[address.index_in_leaf()];
            if let Some(page) = entry.device_page()
                && is_wanted(*entry)
            {
                doomed.push(page);
                let group = entry.group();
                group.into_iter().for_each(|group| group.moved(true, false));
                *entry = Entry::SYSTEM.charged_to(group);
            }
        }
        drop((entries, layout));
        Stats::subtract(&self.stats.device_pages, doomed.count);
        Stats::add(&self.stats.migrated_to_system, doomed.count);
        doomed.put_all();
    }
}

/// From the first to the last page of a leaf that fits.
fn hull_of(leaf: &Leaf, range: AddrRange, fits: &dyn Fn(Entry) -> bool) -> Option<AddrRange> {
    let entries = leaf.lock();
    let is_there = |address: &VirtAddr| fits(entries[address.index_in_leaf()]);
    let mut there = super::layout::pages_of(leaf, range).filter(is_there);
    let first = there.next()?;
    let last = there.last().unwrap_or(first);
    Some(AddrRange::from_bounds(first.get(), last.get() + PAGE_SIZE as u64))
}
