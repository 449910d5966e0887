//! Emptying device memory: every page of a device comes home, wherever it is mapped.

use crate::addr::{Pfn, VirtAddr};
use crate::devmem::Devmem;
use crate::error::{Error, Result};
use crate::limits::DEADLINE;
use crate::mm::Mm;
use std::time::{Duration, Instant};

impl Devmem {
    /// Brings home what some pages of this memory hold, wherever they are mapped, through the driver's `fault`
    /// (`migrate_device_range`): how a driver makes room when its memory is full. Its policy chooses the pages, the oldest
    /// ones perhaps. Returns how many held something. They are free afterwards, unless something else took them.
    ///
    /// To be called *before* a migration to the device, never in `alloc_and_copy`, which holds pages and must not wait for
    /// others. Looks at the page tables of all address spaces: evict many pages at once. Blocks; not for callbacks.
    ///
    /// # Errors
    /// `Invalid` when the pages are not all of this memory; `Deadlock` from a callback; `Lost` when the device cannot
    /// return one (the others came home), `Busy` when one does not come home in time.
    pub fn evict(&self, first: Pfn, count: usize) -> Result<usize> {
        let end = Pfn::new(first.get().saturating_add(count as u64));
        if first < self.pfn_first() || end > self.pfn_last() {
            return Err(Error::invalid(0, "these pages are not of this device memory"));
        }
        let mut evicted = 0;
        for mm in Mm::all_open() {
            if mm.is_in_callback() {
                let what =
                    "device pages are evicted from inside a callback: do it before migrating";
                return Err(Error::Deadlock { what });
            }
            evicted += mm.bring_pages_home(&|page| first <= page && page < end)?;
        }
        Ok(evicted)
    }

    /// Takes the memory away: nothing new is placed on it, every page comes home through the driver's `fault`, and
    /// the call returns when all pages are free (`hmm_devmem_remove`, promise 54). Blocks; not for callbacks.
    ///
    /// # Errors
    /// `Gone` in a forked child, whose parent has the device; `Invalid` when it was removed already; what bringing home
    /// says, or `Busy` when pages stay in use past the deadline: the memory is in service again then.
    pub fn remove(&self) -> Result<()> {
        if self.is_inherited() {
            return Err(Error::Gone { what: "this device memory belongs to the parent process" });
        }
        if !self.start_removing() {
            return Err(Error::invalid(0, "this device memory was removed already"));
        }
        match self.empty() {
            Ok(()) => {
                self.unlink();
                Ok(())
            }
            Err(error) => {
                self.stop_removing();
                Err(error)
            }
        }
    }

    fn empty(&self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            for mm in Mm::all_open() {
                mm.bring_all_home(Some(self))?;
            }
            if self.wait_until_free(Duration::from_millis(2)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let what = "device pages are still in use";
                return Err(Error::Busy { address: VirtAddr::new(0), what });
            }
        }
    }
}
