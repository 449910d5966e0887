//! Flag types and the packed entries that travel in `pfns[]`, `src[]` and `dst[]` arrays.
//! Bit values are those of the kernel's headers v4.14 (hmm.h, migrate.h), so that C arrays pass through unchanged.

use crate::addr::Pfn;
use bitflags::bitflags;

bitflags! {
    /// Flags of one entry of a range snapshot (`hmm_pfn_t`, hmm.h v4.14).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PfnFlags: u64 {
        /// The entry holds a pfn.
        const VALID = 1 << 0;
        /// The mapping is readable.
        const READ = 1 << 1;
        /// The page can be written now.
        const WRITE = 1 << 2;
        /// Poisoned or otherwise unusable.
        const ERROR = 1 << 3;
        /// Nothing is there yet.
        const EMPTY = 1 << 4;
        /// Special mapping; never mirror it, the pfn means nothing.
        const SPECIAL = 1 << 5;
        /// The page is device memory (`HMM_PFN_DEVICE_UNADDRESSABLE`).
        const DEVICE = 1 << 6;
    }

    /// Flags of one entry of `src[]` and `dst[]` (migrate.h v4.14).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct MigrateFlags: u64 {
        /// The entry holds a pfn.
        const VALID = 1 << 0;
        /// The core will migrate (in `alloc_and_copy`) or did migrate (in `finalize_and_map`) this page.
        const MIGRATE = 1 << 1;
        /// The page is locked by the migration.
        const LOCKED = 1 << 2;
        /// The page was writable.
        const WRITE = 1 << 3;
        /// The page is device memory.
        const DEVICE = 1 << 4;
        /// In dst: the driver lost the data; the CPU gets SIGBUS at that page.
        const ERROR = 1 << 5;
    }

    /// What `migrate` collects.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Select: u32 {
        /// System pages and holes (`MIGRATE_VMA_SELECT_SYSTEM`).
        const SYSTEM = 1 << 0;
        /// Device pages that the CPU cannot reach (`MIGRATE_VMA_SELECT_DEVICE_PRIVATE`).
        const DEVICE = 1 << 1;
        /// Device pages that the CPU reaches (`MIGRATE_VMA_SELECT_DEVICE_COHERENT`).
        const COHERENT = 1 << 2;
    }

    /// How the CPU faulted (`FAULT_FLAG_*`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct FaultFlags: u32 {
        /// A write.
        const WRITE = 1 << 0;
        /// Not a CPU access but a request of the library (eviction, make present, close).
        const REMOTE = 1 << 7;
    }

    /// Protection of a vma.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Protection: u32 {
        /// Readable.
        const READ = 1 << 0;
        /// Writable.
        const WRITE = 1 << 1;
        /// Executable.
        const EXEC = 1 << 2;
    }

    /// What an engine can do. Policies ask for capabilities, never for an engine's name.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Capabilities: u32 {
        /// CPU faults on absent pages are answered (every engine that migrates).
        const MISSING_FAULTS = 1 << 0;
        /// Contents move without a copy, each page in one step: what the program unmaps or moves at the same time comes
        /// out right. Without it, nothing may be unmapped, moved or replaced while it migrates, unless that is announced
        /// (`ORDERED`).
        const MOVE = 1 << 1;
        /// System calls on absent pages wait for the page instead of failing with `EFAULT`.
        const KERNEL_FAULTS = 1 << 2;
        /// Pages can be poisoned (SIGBUS at the touch).
        const POISON = 1 << 3;
        /// Layout changes are reported as they are made (events).
        const EVENTS = 1 << 4;
        /// Private file mappings migrate, too (system calls on their absent pages fail with `EFAULT`).
        const PRIVATE_FILES = 1 << 5;
        /// The program announces changes of its layout, by way of `libhmm_preload.so`: callbacks have returned before
        /// `munmap`, `mremap`, `mprotect`, `madvise` and the like change anything, nothing migrates meanwhile, and all of
        /// them may be called while their memory migrates, also without `MOVE`.
        const ORDERED = 1 << 6;
    }
}

/// One entry of a range snapshot: flags in the low 7 bits, pfn above (`hmm_pfn_t`).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct PfnEntry(pub u64);

impl PfnEntry {
    /// Position of the pfn (`HMM_PFN_SHIFT` of v4.14).
    pub const SHIFT: u32 = 7;

    /// An entry from its parts.
    pub const fn new(pfn: Pfn, flags: PfnFlags) -> Self {
        Self((pfn.get() << Self::SHIFT) | flags.bits())
    }
    /// An entry without a pfn.
    pub const fn bare(flags: PfnFlags) -> Self {
        Self(flags.bits())
    }
    /// The flags.
    pub const fn flags(self) -> PfnFlags {
        PfnFlags::from_bits_truncate(self.0)
    }
    /// The pfn, if the entry is valid.
    pub const fn pfn(self) -> Option<Pfn> {
        if self.flags().contains(PfnFlags::VALID) {
            Some(Pfn::new(self.0 >> Self::SHIFT))
        } else {
            None
        }
    }
}

impl std::fmt::Debug for PfnEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?}", self.pfn(), self.flags())
    }
}

/// One entry of `src[]` or `dst[]`: flags in the low 6 bits, pfn above. What does not migrate says why above that
/// ([`crate::Stay`]).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct MigratePfn(pub u64);

impl MigratePfn {
    /// Position of the pfn (`MIGRATE_PFN_SHIFT`).
    pub const SHIFT: u32 = 6;

    /// An entry from its parts; `VALID` is set.
    pub const fn new(pfn: Pfn, flags: MigrateFlags) -> Self {
        Self((pfn.get() << Self::SHIFT) | flags.bits() | MigrateFlags::VALID.bits())
    }
    /// An entry without a pfn.
    pub const fn bare(flags: MigrateFlags) -> Self {
        Self(flags.bits())
    }
    /// The flags.
    pub const fn flags(self) -> MigrateFlags {
        MigrateFlags::from_bits_truncate(self.0)
    }
    /// True when the core will migrate, or did migrate, this page.
    pub const fn migrates(self) -> bool {
        self.flags().contains(MigrateFlags::MIGRATE)
    }
    /// The pfn, if the entry is valid.
    pub const fn pfn(self) -> Option<Pfn> {
        if self.flags().contains(MigrateFlags::VALID) {
            Some(Pfn::new((self.0 & Self::BELOW_REASON) >> Self::SHIFT))
        } else {
            None
        }
    }
}

impl std::fmt::Debug for MigratePfn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.reason() {
            Some(why) => write!(f, "{:?} {:?} {why:?}", self.pfn(), self.flags()),
            None => write!(f, "{:?} {:?}", self.pfn(), self.flags()),
        }
    }
}
