//! Heterogeneous memory management in user space, on the real memory of a real process.
//!
//! A driver mirrors a process's address space into its device's page table, keeps the two in step, and migrates
//! ordinary pages to device memory and back; when the CPU touches a migrated page, it comes home. The names and the
//! semantics are those of Linux HMM (hmm.txt, hmm.h, migrate.h, mmu_notifier.h).
//!
//! Start at [`Mm`]: [`Mm::current`], [`Mm::mirror_register`], [`Mm::range_fault`], [`Devmem::add`], [`Mm::migrate`].
//! ARCHITECTURE.md in the repository has the picture, the lock order and the threads.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("libhmm needs 64-bit Linux");

mod account;
mod addr;
pub mod arena;
mod context;
mod devmem;
pub mod engine;
mod error;
mod evict;
mod flags;
mod fork;
pub mod inject;
pub mod limits;
mod migrate;
mod mirror;
mod mm;
mod notifier;
mod ops;
mod page_set;
mod preload;
mod range;
mod sparse;
mod stats;
mod stay;
pub mod sync;

pub use account::{GroupEvents, GroupStat, MemoryGroup};
pub use addr::{AddrRange, LEAF_PAGES, LEAF_SIZE, PAGE_SHIFT, PAGE_SIZE, Pfn, USER_END, VirtAddr};
pub use context::{Choice, EngineKind, open_engine};
pub use devmem::Devmem;
pub use engine::{Rss, VmaKind};
pub use error::{Error, Result};
pub use flags::{
    Capabilities, FaultFlags, MigrateFlags, MigratePfn, PfnEntry, PfnFlags, Protection, Select,
};
pub use migrate::{DeviceMigration, MigrateBatch, MigrateRequest, Migration, unlock_exclusive};
pub use mm::{ForkMode, Mm, MmapLock, Notifier, PresentGuard, RangeTracker, Residency, Vma};
pub use ops::{
    CpuFault, DevmemOps, FaultError, InvalidateEvent, Invalidation, MigrateOps, NotifierOps,
    OwnerId,
};
pub use range::{Access, HmmPfn, RangeFault, RangeRequest};
pub use stats::Counters;
pub use stay::Stay;
