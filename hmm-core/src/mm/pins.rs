//! Pinned ranges: memory that never migrates because the fault path, or a driver's callback, needs it.

use crate::addr::AddrRange;
use crate::arena;
use crate::error::{Error, Result};
use crate::limits::PINS;
use crate::sync::Mutex;

/// The pins of one mm. Counted: a range pinned twice must be unpinned twice.
#[derive(Debug)]
pub(crate) struct Pins(Mutex<Vec<AddrRange>>);

impl Pins {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Vec::with_capacity(PINS)))
    }

    pub(crate) fn insert(&self, range: AddrRange) -> Result<()> {
        let mut pins = self.0.lock();
        if pins.len() >= PINS {
            return Err(Error::NoMemory { what: "pinned ranges (4096)" });
        }
        pins.push(range);
        Ok(())
    }

    pub(crate) fn remove(&self, range: AddrRange) -> Result<()> {
        let mut pins = self.0.lock();
        let at = pins
            .iter()
            .position(|pin| *pin == range)
            .ok_or_else(|| Error::invalid(range.start().get(), "this exact range is not pinned"))?;
        pins.swap_remove(at);
        Ok(())
    }

    /// Reports every part of `range` that must stay where it is.
    pub(crate) fn within(&self, range: AddrRange, mut report: impl FnMut(AddrRange)) {
        for pin in self.0.lock().iter() {
            pin.intersect(range).into_iter().for_each(&mut report);
        }
        if let Some((start, end)) = arena::bounds() {
            AddrRange::from_bounds(start, end).intersect(range).into_iter().for_each(report);
        }
    }
}
