//! What must hold after every step.

use super::{Check, World};
use crate::support::device::Device;
use crate::support::steps::PAGES;
use hmm_core::{PAGE_SIZE, Residency, VirtAddr};
use std::time::{Duration, Instant};

/// How long threads of the engine may tidy up.
const SETTLING: Duration = Duration::from_millis(500);

/// Where a page is, on any engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whereabouts {
    Unmapped,
    Home,
    /// On this device.
    Device(Option<usize>),
}

impl World {
    pub(super) fn residency(&self) -> Result<Vec<Residency>, String> {
        let mut residency = vec![Residency::Unmapped; PAGES];
        self.mm
            .residency(self.area, &mut residency)
            .map_err(|error| format!("residency: {error}"))?;
        Ok(residency)
    }

    /// Where each page is, without what differs from engine to engine.
    pub(crate) fn whereabouts(&self) -> Result<Vec<Whereabouts>, String> {
        let whose = |pfn| self.devices.iter().position(|one| one.driver.contents(pfn).is_some());
        let residency = self.residency()?;
        Ok(residency
            .into_iter()
            .map(|place| match place {
                Residency::Unmapped => Whereabouts::Unmapped,
                Residency::Device(pfn) => Whereabouts::Device(whose(pfn)),
                // A hole that was read may be one still, or a page of zeros.
                _ => Whereabouts::Home,
            })
            .collect())
    }

    pub(super) fn compare(&self, page: usize, at: usize, found: &[u8], by: &str) -> Check {
        let Some(expected) = self.expected.get(&page) else {
            return Err(format!("page {page} is not mapped, and {by} found something"));
        };
        let expected = &expected.bytes[at..at + found.len()];
        if found == expected {
            return Ok(());
        }
        let wrong = found.iter().zip(expected).take_while(|(is, must)| is == must).count();
        let (is, must) = (found[wrong], expected[wrong]);
        Err(format!("page {page} byte {}: {by} found {is:#x} instead of {must:#x}", at + wrong))
    }

    /// Every byte, where it is now, without moving anything; mirrors and counters agree.
    pub(super) fn check(&self) -> Check {
        let deadline = Instant::now() + SETTLING;
        loop {
            let checked = self.check_now();
            if checked.is_ok() || !self.memory.settles_later() || Instant::now() >= deadline {
                return checked;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn check_now(&self) -> Check {
        let residency = self.residency()?;
        for (page, place) in residency.iter().enumerate() {
            self.check_page(page, *place)?;
        }
        let on_devices =
            residency.iter().filter(|place| matches!(place, Residency::Device(_))).count();
        let in_use: usize = self.devices.iter().map(Device::pages_in_use).sum();
        ensure!(
            in_use == on_devices,
            "{in_use} device pages in use, {on_devices} pages on devices"
        );
        let counted = self.mm.counters().device_pages;
        ensure!(counted == on_devices as u64, "{counted} device pages counted, {on_devices} there");
        self.check_mirrors(&residency)
    }

    /// What is counted beside the page table agrees with it. It looks at the whole of the table, so not at every step.
    pub(super) fn check_accounts(&self) -> Check {
        self.mm.check_accounts().map_err(|error| error.to_string())
    }

    pub(super) fn check_page(&self, page: usize, place: Residency) -> Check {
        let mapped = self.expected.contains_key(&page);
        let mut bytes = Box::new([0; PAGE_SIZE]);
        match place {
            Residency::Unmapped => {
                ensure!(!mapped, "page {page} is mapped, and residency says it is not");
                return Ok(());
            }
            Residency::None => {}
            Residency::System => {
                let there = self.memory.inspect(&self.mm, self.area.page_at(page), &mut bytes);
                ensure!(there, "page {page} is said to be in system memory, and is not there");
            }
            Residency::Device(pfn) => {
                let found = self.devices.iter().find_map(|device| device.driver.contents(pfn));
                bytes = found.ok_or_else(|| format!("page {page} is on {pfn:?}, which is free"))?;
            }
            other => return Err(format!("page {page} is {other:?}")),
        }
        self.compare(page, 0, &*bytes, "the check").map_err(|wrong| format!("{wrong} ({place:?})"))
    }

    /// What a device's page table maps is where it says.
    pub(super) fn check_mirrors(&self, residency: &[Residency]) -> Check {
        let drops_late = self.memory.settles_later() || self.faults.late_drop > 0;
        for (number, device) in self.devices.iter().enumerate() {
            for (address, mapped) in device.mirrored() {
                let page = self.area.index_of(VirtAddr::new(address));
                let place = residency[page];
                let is_system = mapped.page.to_addr() == Some(VirtAddr::new(address));
                let right = match place {
                    Residency::Device(pfn) => pfn == mapped.page,
                    Residency::System => is_system,
                    // Dropped after the mirror was told of it: the device's next access finds nothing there.
                    Residency::None => is_system && drops_late,
                    // Nobody is told; such an entry names the address, so it is right again or of no use.
                    Residency::Unmapped => is_system && !self.memory.reports_changes(),
                    _ => false,
                };
                ensure!(right, "device {number} maps page {page} as {mapped:?}: it is {place:?}");
            }
            let breaches = device.breaches();
            ensure!(breaches.is_empty(), "device {number}: {}", breaches.join("; "));
        }
        Ok(())
    }
}
