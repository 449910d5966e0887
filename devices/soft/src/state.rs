//! What the callbacks and the device threads share: the hardware, so to speak. It knows no mm, so that nothing holds
//! itself alive: the core holds this object for as long as the mirror and the device memory are registered.

use crate::config::{Settings, SoftConfig};
use crate::counters::Stats;
use crate::memory::Memory;
use crate::streams::Streams;
use crate::table::Table;
use hmm_core::{Devmem, OwnerId, Pfn, Result};
use std::sync::atomic::AtomicBool;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) owner: OwnerId,
    pub(crate) memory: Memory,
    pub(crate) table: Table,
    pub(crate) settings: Settings,
    pub(crate) stats: Stats,
    pub(crate) streams: Streams,
    pub(crate) fault_around: u32,
    /// Kernels end at their next fault: the device closes, or the mm is gone.
    pub(crate) stopping: AtomicBool,
}

impl State {
    /// # Errors
    /// `NoMemory` when device memory or tables cannot be mapped.
    pub(crate) fn new(config: &SoftConfig) -> Result<Self> {
        Ok(Self {
            owner: OwnerId::unique(),
            memory: Memory::new(config.pages())?,
            table: Table::new()?,
            settings: Settings::new(config),
            stats: Stats::default(),
            streams: Streams::default(),
            fault_around: config.fault_around,
            stopping: AtomicBool::new(false),
        })
    }
}

/// Index of one of our device pages, by its place in our pfn window.
pub(crate) fn index_of(devmem: &Devmem, page: Pfn) -> Option<u32> {
    let index = page.get().checked_sub(devmem.pfn_first().get())?;
    if page.get() < devmem.pfn_last().get() { u32::try_from(index).ok() } else { None }
}

/// The pfn of a device page.
pub(crate) fn pfn_of(devmem: &Devmem, index: u32) -> Pfn {
    Pfn::new(devmem.pfn_first().get() + u64::from(index))
}
