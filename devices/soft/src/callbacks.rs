//! The driver's callbacks. They run on service threads and on callers' threads, take at most the table's or the free
//! list's lock, allocate nothing and touch no process memory.

use crate::config::WINDOW_PAGES;
use crate::copy::ToSystem;
use crate::counters::add;
use crate::state::{State, index_of};
use hmm_core::{
    AddrRange, CpuFault, Devmem, DevmemOps, FaultError, FaultFlags, Invalidation, MigratePfn,
    MigrateRequest, NotifierOps, PAGE_SHIFT, Pfn, Select,
};
use std::sync::atomic::Ordering;

/// Windows of up to so many pages use short lists: clearing the long ones would cost more than the fault.
const SMALL_WINDOW: usize = 16;

impl NotifierOps for State {
    /// Once this returns, no kernel uses an old translation: kernels hold the lock while they use one.
    fn invalidate(&self, update: &Invalidation) {
        self.table.write().clear(update.range);
        add(&self.stats.invalidations, 1);
    }

    fn release(&self) {
        self.stopping.store(true, Ordering::Release);
        self.table.write().clear_all();
    }
}

impl DevmemOps for State {
    fn free(&self, devmem: &Devmem, page: Pfn) {
        if let Some(index) = index_of(devmem, page) {
            // The word says where the page is mapped; eviction must not find it any more.
            devmem.set_drvdata(page, 0);
            self.memory.free(index);
        }
    }

    fn fault(&self, devmem: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        let limit = u64::from(self.fault_around);
        let pages = if fault.flags.contains(FaultFlags::REMOTE) {
            limit
        } else {
            add(&self.stats.cpu_faults, 1);
            self.streams.window(fault.addr.get() >> PAGE_SHIFT, limit)
        };
        let start = fault.addr.page().get();
        let end = (start + (pages << PAGE_SHIFT)).min(fault.vma.range.end().get());
        let range = AddrRange::new(start, end).map_err(|_| FaultError::OutOfMemory)?;
        if range.pages() <= SMALL_WINDOW {
            self.bring::<SMALL_WINDOW>(devmem, fault, range)
        } else {
            self.bring::<WINDOW_PAGES>(devmem, fault, range)
        }
    }

    /// See above: what these callbacks take, nobody holds while it touches the process's memory.
    fn is_signal_safe(&self) -> bool {
        true
    }
}

impl State {
    /// Brings a window of at most `N` pages home, the faulting page first.
    fn bring<const N: usize>(
        &self,
        devmem: &Devmem,
        fault: &CpuFault<'_>,
        range: AddrRange,
    ) -> Result<(), FaultError> {
        let (mut src, mut dst) = ([MigratePfn::default(); N], [MigratePfn::default(); N]);
        let pages = range.pages().min(N);
        let request = MigrateRequest {
            range: range.sub(0, pages),
            select: Select::DEVICE,
            owner: Some(self.owner),
            fault_page: Some(fault.page),
        };
        let mut ops = ToSystem::new(self, devmem);
        // A page that is still away is asked for again by the core, until its deadline; the data is never lost.
        fault
            .mm
            .migrate(&request, &mut ops, &mut src[..pages], &mut dst[..pages])
            .map_err(|_| FaultError::OutOfMemory)?;
        if ops.out_of_memory { Err(FaultError::OutOfMemory) } else { Ok(()) }
    }
}
