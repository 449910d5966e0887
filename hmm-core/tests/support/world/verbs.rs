//! The devices, and the verbs of the library.

use super::{Check, World, data_of, parts};
use crate::support::steps::{Bytes, DEVICES, PAGES, Span};
use hmm_core::{Access, OwnerId, PAGE_SIZE, PfnEntry, PfnFlags, RangeRequest, Residency};

impl World {
    pub(super) fn device_load(&mut self, device: usize, bytes: Bytes) -> Check {
        for (page, at, _, len) in parts(bytes) {
            let possible = self.expected.contains_key(&page);
            let mut out = vec![0; len];
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.devices[device].load(addr, &mut out);
            if self.judge("device load", result, possible)?.is_some() {
                self.compare(page, at, &out, "a device load")?;
            }
        }
        Ok(())
    }

    pub(super) fn device_store(&mut self, device: usize, bytes: Bytes) -> Check {
        let data = data_of(bytes);
        for (page, at, from, len) in parts(bytes) {
            let possible = self.is_writable(Span { first: page, count: 1 });
            let addr = self.addr(page * PAGE_SIZE + at);
            let result = self.devices[device].store(addr, &data[from..from + len]);
            if self.judge("device store", result, possible)?.is_some() {
                let part = Bytes { at: page * PAGE_SIZE + at, len, seed: data[from] };
                self.note_store(part);
            }
        }
        Ok(())
    }

    pub(super) fn is_pinned(&self, page: usize) -> bool {
        self.pins.iter().any(|pin| pin.contains(self.area.page_at(page)))
    }

    pub(super) fn migrate(&mut self, device: usize, span: Span, leave: usize) -> Check {
        let before = self.residency()?;
        let room = PAGES.min(if device == 0 { PAGES } else { 24 });
        let room = room - self.devices[device].pages_in_use();
        let result = self.devices[device].migrate(self.range(span), leave);
        let result = self.judge("migrate", result, self.is_one_vma(span))?;
        let after = self.residency()?;
        for page in span.pages().filter(|page| self.is_pinned(*page)) {
            let went = before[page] != after[page] && matches!(after[page], Residency::Device(_));
            ensure!(!went, "page {page} is pinned, and went to a device");
        }
        let Some(moved) = result else { return Ok(()) };
        if !self.is_writable(span) {
            ensure!(moved == 0, "{moved} pages of read-only memory went to a device");
        } else if !self.troubled && !self.unmovable && leave == 0 {
            let wanted = span.pages().filter(|page| {
                !self.is_pinned(*page) && !matches!(before[*page], Residency::Device(_))
            });
            let wanted = wanted.count().min(room);
            ensure!(moved == wanted, "{moved} pages went to a device, and {wanted} could");
        }
        Ok(())
    }

    pub(super) fn home(&mut self, device: usize, span: Span) -> Check {
        let result = self.devices[device].bring_home(self.range(span));
        let result = self.judge("bring home", result, self.is_one_vma(span))?;
        if result.is_some() && !self.troubled {
            let left = self.on_device(device, span)?;
            ensure!(left == 0, "{left} pages did not come home");
        }
        Ok(())
    }

    pub(super) fn on_device(&self, device: usize, span: Span) -> Result<usize, String> {
        let residency = self.residency()?;
        let driver = &self.devices[device].driver;
        Ok(span
            .pages()
            .filter(|page| match residency[*page] {
                Residency::Device(pfn) => driver.contents(pfn).is_some(),
                _ => false,
            })
            .count())
    }

    pub(super) fn pull(&mut self, device: usize, span: Span) -> Check {
        let other = (device + 1) % DEVICES;
        let result = self.devices[device].pull_from(&self.devices[other], self.range(span));
        self.judge("pull", result, self.is_one_vma(span)).map(|_| ())
    }

    pub(super) fn owner(&self, device: Option<usize>) -> Option<OwnerId> {
        device.map(|device| self.devices[device].owner())
    }

    pub(super) fn snapshot(&mut self, span: Span, owner: Option<usize>) -> Check {
        let request = RangeRequest { range: self.range(span), owner: self.owner(owner) };
        let mut entries = vec![PfnEntry::default(); span.count];
        let result = self.mm.snapshot(&request, &mut entries);
        if self.judge("snapshot", result, self.is_one_vma(span))?.is_some() {
            self.check_entries(span, owner, &entries)?;
        }
        Ok(())
    }

    pub(super) fn range_fault(&mut self, span: Span, owner: Option<usize>, write: bool) -> Check {
        let request = RangeRequest { range: self.range(span), owner: self.owner(owner) };
        let access = if write { Access::Write } else { Access::Read };
        let possible = self.is_one_vma(span) && (!write || self.is_writable(span));
        let mut entries = vec![PfnEntry::default(); span.count];
        let result = self.mm.range_fault(&request, access, &mut entries);
        if self.judge("range_fault", result, possible)?.is_some() {
            self.check_entries(span, owner, &entries)?;
            for (page, entry) in span.pages().zip(&entries) {
                ensure!(entry.pfn().is_some(), "range_fault left page {page} as {entry:?}");
                let writable = entry.flags().contains(PfnFlags::WRITE);
                ensure!(writable || !write, "range_fault to write left page {page} as {entry:?}");
            }
        }
        Ok(())
    }

    /// Entries tell the truth about where pages are.
    pub(super) fn check_entries(
        &self,
        span: Span,
        owner: Option<usize>,
        entries: &[PfnEntry],
    ) -> Check {
        let residency = self.residency()?;
        for (page, entry) in span.pages().zip(entries) {
            let place = residency[page];
            let foreign =
                |pfn| owner.is_some_and(|one| self.devices[one].driver.contents(pfn).is_none());
            let right = match (place, entry.pfn()) {
                (Residency::Device(pfn), None) => foreign(pfn),
                (Residency::Device(pfn), Some(told)) => {
                    told == pfn && !foreign(pfn) && entry.flags().contains(PfnFlags::DEVICE)
                }
                (Residency::System, Some(told)) => told.to_addr() == Some(self.area.page_at(page)),
                (Residency::System, None) => self.swapped || self.is_zero(page),
                (Residency::None, told) => told.is_none(),
                _ => false,
            };
            ensure!(right, "page {page} is {place:?}, and its entry says {entry:?}");
            let writable = self.is_writable(Span { first: page, count: 1 });
            let write = entry.flags().contains(PfnFlags::WRITE);
            ensure!(writable || !write, "page {page} is read-only, and its entry says {entry:?}");
        }
        Ok(())
    }

    pub(super) fn is_zero(&self, page: usize) -> bool {
        self.expected.get(&page).is_none_or(|one| one.bytes == [0; PAGE_SIZE])
    }

    pub(super) fn make_present(&mut self, span: Span, write: bool) -> Check {
        let possible = self.is_mapped(span) && (!write || self.is_writable(span));
        let result = self.mm.make_present(self.range(span), write);
        if self.judge("make_present", result, possible)?.is_some() {
            let residency = self.residency()?;
            for page in span.pages() {
                let place = residency[page];
                ensure!(
                    place == Residency::System,
                    "page {page} was made present, and is {place:?}"
                );
            }
        }
        Ok(())
    }

    pub(super) fn pin(&mut self, span: Span) -> Check {
        let range = self.range(span);
        if self.judge("pin_range", self.mm.pin_range(range), true)?.is_some() {
            self.pins.push(range);
            let residency = self.residency()?;
            let away = span.pages().find(|page| matches!(residency[*page], Residency::Device(_)));
            ensure!(away.is_none(), "page {away:?} was pinned, and is on a device");
        }
        Ok(())
    }

    pub(super) fn unpin(&mut self) -> Check {
        let Some(pin) = self.pins.pop() else { return Ok(()) };
        self.mm.unpin_range(pin).map_err(|error| format!("unpin_range: {error}"))
    }
}
