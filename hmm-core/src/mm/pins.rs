//! Pinned ranges: memory that never migrates because the fault path, or a driver's callback, needs it.

use crate::addr::AddrRange;
use crate::arena::{self, List};
use crate::error::{Error, Result};
use crate::limits::PINS;
use crate::sync::Mutex;

/// The pins of one mm. Counted: a range pinned twice must be unpinned twice.
#[derive(Debug)]
pub(crate) struct Pins(Mutex<List<AddrRange>>);

impl Pins {
    pub(crate) fn new() -> Option<Self> {
        Some(Self(Mutex::new(List::new(PINS)?)))
    }

    pub(crate) fn insert(&self, range: AddrRange) -> Result<()> {
        let full = |_| Error::NoMemory { what: "pinned ranges (4096)" };
        self.0.lock().push(range).map_err(full)
    }

    pub(crate) fn remove(&self, range: AddrRange) -> Result<()> {
        if self.0.lock().remove_first(|pin| *pin == range) {
            return Ok(());
        }
        Err(Error::invalid(range.start().get(), "this exact range is not pinned"))
    }

    /// Reports every part of `range` that must stay where it is.
    pub(crate) fn within(&self, range: AddrRange, mut report: impl FnMut(AddrRange)) {
        let mut common = |pin: AddrRange| pin.intersect(range).into_iter().for_each(&mut report);
        self.0.lock().iter().for_each(|pin| common(*pin));
        arena::each_own(common);
    }
}
