//! The traits that a driver implements, and the plain data that its callbacks receive.
//!
//! Every callback runs with **no lock of the library held**, on whichever thread caused it: a service thread for CPU
//! faults and layout changes, the caller's own thread for explicit requests. A callback must not touch memory that
//! may be migrated, and must not allocate from the process's heap (`docs` of [`crate::Mm::pin_range`] say why).

use crate::addr::{AddrRange, Pfn, VirtAddr};
use crate::devmem::Devmem;
use crate::flags::FaultFlags;
use crate::migrate::MigrateBatch;
use crate::mm::{Mm, Vma};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Identity of a device: device pages have owners, and a driver never touches the pages of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerId(u64);

impl OwnerId {
    /// A new identity, unique in this process.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1 << 63);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The identity that a word of the driver's stands for, such as the address of its device; 0 is nobody's. Addresses
    /// are never those of [`OwnerId::unique`].
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// The word of [`OwnerId::from_word`].
    pub const fn word(self) -> u64 {
        self.0
    }
}

/// Why a range is invalidated (`enum mmu_notifier_event`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InvalidateEvent {
    /// munmap, or the old place of an mremap.
    Unmap,
    /// Contents replaced or dropped (madvise, a page brought home).
    Clear,
    /// The access that the program allows changes (`MMU_NOTIFY_PROTECTION_VMA`). Only where it announces such changes
    /// ([`crate::Capabilities::ORDERED`]): the kernel reports nothing of them.
    Protection,
    /// Pages are about to migrate.
    Migrate,
    /// Pages are about to become one device's alone (`MMU_NOTIFY_EXCLUSIVE`).
    Exclusive,
    /// The mm is going away; the range is the whole address space.
    Release,
}

/// One change of the CPU page table.
#[derive(Debug, Clone, Copy)]
pub struct Invalidation {
    /// What changes; may be larger than the change, never smaller (promise 22).
    pub range: AddrRange,
    /// Why.
    pub event: InvalidateEvent,
    /// The device on whose behalf it happens (`mmu_notifier_range.owner`), for `Migrate` and `Exclusive`.
    pub owner: Option<OwnerId>,
}

/// Told of changes to a range (`struct mmu_interval_notifier_ops`).
pub trait NotifierOps: Send + Sync {
    /// The range changes: the device must not use old translations of it once this returns (promises 23 to 25).
    /// Takes the driver's own update lock; must not fault memory nor call migration.
    fn invalidate(&self, update: &Invalidation);
    /// The mm is closed; called once (promise 43).
    fn release(&self) {}
}

/// Why a CPU fault on a device page could not be served (`VM_FAULT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultError {
    /// The data cannot be recovered: SIGBUS at the touch, never zeros.
    SigBus,
    /// No memory for the page; the fault is tried again until its deadline.
    OutOfMemory,
}

/// A CPU access (or a request of the library) to a page that is on a device.
#[derive(Debug)]
pub struct CpuFault<'a> {
    /// The address space.
    pub mm: &'a Arc<Mm>,
    /// The mapping around the address.
    pub vma: Vma,
    /// The faulting page's address.
    pub addr: VirtAddr,
    /// The device page; a reference is held during the call.
    pub page: Pfn,
    /// How.
    pub flags: FaultFlags,
}

/// A driver's side of device memory (`struct hmm_devmem_ops`).
pub trait DevmemOps: Send + Sync {
    /// The last reference to the page is gone; the driver owns it alone and may reuse it at once (promises 48, 56).
    fn free(&self, devmem: &Devmem, page: Pfn);
    /// Bring the page at `fault.addr` home, usually by [`Mm::migrate`] on a range that holds it (promises 49, 50).
    ///
    /// # Errors
    /// [`FaultError`] when that is impossible.
    fn fault(&self, devmem: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError>;
    /// Whether `fault`, and the migration callbacks that it uses, may run in the thread that touched the page, inside a
    /// signal handler: they take no lock that this thread may hold when it touches memory, and do not use the heap.
    /// Such a device answers without a change of threads where the engine works with signals; for the others a service
    /// thread calls `fault`.
    fn is_signal_safe(&self) -> bool {
        false
    }
}

/// A driver's side of one migration (`struct migrate_vma_ops`).
pub trait MigrateOps {
    /// For each `src` entry with `MIGRATE`: name a destination in `dst` and copy (or clear, when src has no pfn).
    /// An entry left 0 stays where it is.
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>);
    /// The outcome is final: entries of `src` that still have `MIGRATE` moved, and only those. Device tables may be
    /// updated here; the pages are still locked.
    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>);
}
