//! Emptying device memory: every page of a device comes home, wherever it is mapped.

use crate::addr::VirtAddr;
use crate::devmem::Devmem;
use crate::error::{Error, Result};
use crate::limits::DEADLINE;
use crate::mm::Mm;
use std::time::{Duration, Instant};

impl Devmem {
    /// Takes the memory away: nothing new is placed on it, every page comes home through the driver's `fault`, and
    /// the call returns when all pages are free (`hmm_devmem_remove`, promise 54). Blocks; not for callbacks.
    ///
    /// # Errors
    /// `Gone` in a forked child, whose parent has the device; `Invalid` when it was removed already; what bringing home says, or `Busy` when pages stay in use past the
    /// deadline: the memory is in service again then.
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
