//! Which group pays for the pages of an address space, and whether the library's accounts agree with one another.

use super::Mm;
use super::page_table::{Entry, Leaf};
use crate::account::{self, Charges, GroupRef, MemoryGroup};
use crate::addr::{AddrRange, USER_END};
use crate::devmem::Devmem;
use crate::engine::Present;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::{DEVICES, MEMORY_GROUPS, RANGE_DEADLINE};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What the entries of a page table add up to.
struct Sum {
    locked: u64,
    on_devices: u64,
    /// By the number of the device's window.
    windows: [u64; DEVICES],
    charges: Charges,
}

impl Sum {
    fn new() -> Self {
        Self { locked: 0, on_devices: 0, windows: [0; DEVICES], charges: [(0, 0); MEMORY_GROUPS] }
    }

    fn add(&mut self, mm: &Mm) {
        mm.each_leaf(|leaf| leaf.lock().iter().for_each(|entry| self.add_entry(*entry)));
    }

    fn add_entry(&mut self, entry: Entry) {
        self.locked += u64::from(entry.is_locked());
        if let Some(page) = entry.device_page() {
            self.on_devices += 1;
            if let Some(count) = self.windows.get_mut(Devmem::window_of(page)) {
                *count += 1;
            }
        }
        if let Some(group) = entry.group() {
            let (own, device) = &mut self.charges[group.index()];
            *own += 1;
            *device += u64::from(entry.is_on_device());
        }
    }

    /// Each device knows at least the pages that are in the page tables; those and no others, if these are all.
    fn compare_devices(&self, are_all: bool) -> Result<()> {
        let mut difference = Ok(());
        Devmem::each(|window, devmem| {
            let (found, in_use) = (self.windows[window], devmem.in_use() as u64);
            if in_use < found || (are_all && in_use > found) {
                difference = inconsistent(format!(
                    "device memory {:?}: {in_use} pages in use, {found} pages mapped",
                    devmem.pfn_first()
                ));
            }
        });
        difference
    }
}

fn inconsistent(what: String) -> Result<()> {
    Err(Error::Inconsistent { what })
}

impl Mm {
    fn each_leaf(&self, look: impl FnMut(&Leaf)) {
        let everything = AddrRange::from_bounds(0, USER_END);
        self.table.leaves(everything).for_each(look);
    }

    /// Keeps the group in the table while something is charged to it.
    pub(crate) fn group_reference(&self) -> GroupRef {
        self.group.lock().clone()
    }

    /// The group that pays for what leaves from now on.
    pub fn group(&self) -> MemoryGroup {
        MemoryGroup::of_reference(self.group_reference())
    }

    /// Moves the address space into a group: what leaves for a device for the first time from now on is charged there.
    /// What is charged already stays where it is, as in cgroup v2 ([`Mm::move_charges`] moves it). Address spaces begin
    /// in the root group.
    ///
    /// # Errors
    /// `Gone`.
    pub fn set_group(&self, group: &MemoryGroup) -> Result<()> {
        self.check_not_closing()?;
        let before = std::mem::replace(&mut *self.group.lock(), group.reference().clone());
        drop(before);
        Ok(())
    }

    /// Charges the pages of this address space to the group that it is in now. Returns how many changed groups. Not all or
    /// nothing: a page for which that group has no room stays charged as it was (`max` in its events counts them), and so
    /// does one that a migration holds just now.
    ///
    /// # Errors
    /// `Gone`.
    pub fn move_charges(&self) -> Result<usize> {
        self.check_open()?;
        self.settle_charges()?;
        let (target, mut moved) = (self.group_reference(), 0);
        self.each_leaf(|leaf| {
            for entry in leaf.lock().iter_mut().filter(|entry| !entry.is_locked()) {
                if let Some(group) = entry.group().filter(|group| *group != target.id())
                    && group.hand_over(target.id(), entry.is_on_device())
                {
                    *entry = entry.charged_to(Some(target.id()));
                    moved += 1;
                }
            }
        });
        Ok(moved)
    }

    /// Ends the charges of pages at home that the program dropped or unmapped. Does nothing where the engine reports that
    /// ([`Capabilities::EVENTS`]): it happened already. Elsewhere nobody tells, and a group looks fuller than it is until
    /// this is called (a page that was dropped and touched again since then cannot be told from one that stayed).
    ///
    /// # Errors
    /// When the system cannot be asked; `Gone`.
    pub fn settle_charges(&self) -> Result<()> {
        self.check_open()?;
        let mut result = Ok(());
        if !self.capabilities().contains(Capabilities::EVENTS) {
            self.sync();
            self.each_leaf(|leaf| result = result.clone().and(self.settle_leaf(leaf)));
        }
        result
    }

    fn settle_leaf(&self, leaf: &Leaf) -> Result<()> {
        let is_home = |entry: &Entry| entry.is_ordinary() && entry.group().is_some();
        let mut entries = leaf.lock();
        if !entries.iter().any(is_home) {
            return Ok(());
        }
        // Under the leaf's lock: nothing comes home meanwhile.
        self.engine.scan(leaf.range(), &mut |run, present| {
            if !matches!(present, Present::None | Present::Zero) {
                return;
            }
            let first = run.start().index_in_leaf();
            for entry in entries[first..first + run.pages()].iter_mut().filter(|one| is_home(one)) {
                if let Some(group) = std::mem::take(entry).group() {
                    group.uncharge(false);
                }
            }
        })
    }

    /// The address space ends, and so do its charges.
    pub(super) fn drop_charges(&self) {
        self.each_leaf(|leaf| {
            for entry in leaf.lock().iter_mut() {
                if let Some(group) = entry.group() {
                    group.uncharge(entry.is_on_device());
                    *entry = entry.charged_to(None);
                }
            }
        });
    }

    /// Compares the page table with everything that is counted beside it: the counters, the pages that each device has in
    /// use, the charges of each memory group. For tests, and for whoever wonders. Only meaningful while nothing is under
    /// way; waits a moment (1 s) for what is about to end. Devices and groups belong to the process: they are compared in
    /// full when this is the only open mm, else only as far as they must know of this one's pages.
    ///
    /// # Errors
    /// `Inconsistent`, with what differs; `Gone`.
    pub fn check_accounts(&self) -> Result<()> {
        self.check_open()?;
        self.sync();
        let deadline = Instant::now() + RANGE_DEADLINE;
        loop {
            let checked = self.compare_accounts();
            if checked.is_ok() || Instant::now() >= deadline {
                return checked;
            }
            crate::sync::sleep(Duration::from_millis(1));
        }
    }

    fn compare_accounts(&self) -> Result<()> {
        let is_alone = || Self::all_open().len() == 1;
        let was_alone = is_alone();
        let mut sum = Sum::new();
        sum.add(self);
        let counted = self.stats.device_pages.load(Ordering::Relaxed);
        let (locked, found) = (sum.locked, sum.on_devices);
        if locked > 0 || !self.inflight.is_empty() {
            return inconsistent(format!("{locked} pages are held by migrations under way"));
        }
        if counted != found {
            return inconsistent(format!("{counted} device pages counted, {found} mapped"));
        }
        let groups = account::compare(&sum.charges);
        let devices = sum.compare_devices(was_alone);
        // What another mm does meanwhile is no mistake of this one.
        if was_alone && is_alone() { groups.and(devices) } else { sum.compare_devices(false) }
    }
}
