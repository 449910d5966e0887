//! How much memory the process uses, whichever side it is on.

use super::Mm;
use super::page_table::{Entry, Place};
use crate::addr::{AddrRange, PAGE_SIZE, USER_END};
use crate::devmem::Devmem;
use crate::engine::Rss;
use crate::error::Result;
use std::sync::atomic::Ordering;

/// How often frames may change while the process is looked at.
const LOOKS: usize = 16;

impl Mm {
    /// Resident memory by kind, in bytes, with what is on devices counted as anonymous: what the kernel says of the
    /// process, without the frames that the library holds. So it does not change by migration, in either direction
    /// (promise 75), nor by where a device has its pages (promise 82).
    ///
    /// Three things to know. A page of a private file mapping that migrates is anonymous from then on, as one that was
    /// written to. Memory in which a simulated device keeps its pages is memory of the process, too, and counted as such.
    /// And the sum is of several looks: exact while nothing migrates and nobody allocates. Walks the page tables of the
    /// process (milliseconds for each GiB).
    ///
    /// # Errors
    /// `Os` or `Unsupported` where `/proc` does not tell; `Gone`.
    pub fn rss(&self) -> Result<Rss> {
        self.check_open()?;
        let (mut frames, mut rss) = (self.frames.resident(&*self.engine)?, self.engine.rss()?);
        // Idle frames are freed now and then, perhaps between the two looks.
        for _ in 0..LOOKS {
            let again = self.frames.resident(&*self.engine)?;
            if again == frames {
                break;
            }
            (frames, rss) = (again, self.engine.rss()?);
        }
        let away = self.stats.device_pages.load(Ordering::Relaxed).saturating_sub(self.coherent());
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        rss.anon = (rss.anon + bytes(away)).saturating_sub(bytes(frames));
        Ok(rss)
    }

    /// Pages of devices that the CPU reaches: the kernel counts them, too.
    fn coherent(&self) -> u64 {
        let mut some = false;
        Devmem::each(|_, devmem| some |= devmem.is_coherent());
        if !some {
            return 0;
        }
        let everything = AddrRange::from_bounds(0, USER_END);
        let is_coherent = |entry: &&Entry| matches!(entry.place(), Place::Coherent(_));
        let leaves = self.table.leaves(everything);
        leaves.map(|leaf| leaf.lock().iter().filter(is_coherent).count() as u64).sum()
    }
}
