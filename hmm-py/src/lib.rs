//! `hmm._native`: the Python face of libhmm. Handles and conversions, nothing else.
//!
//! A thread that holds the GIL may fault on migrated memory, so nothing that answers a fault may need Python: the
//! engine's service threads and the soft device are native code, and no thread of the library ever attaches to
//! the interpreter. In return every method here that waits, takes a lock of the library or touches managed memory
//! detaches first.
#![forbid(unsafe_code)]

mod counters;
mod doctor;
mod error;
mod group;
mod guard;
mod kernel;
mod memory;
mod mm;
mod pin;
mod registry;
mod soft;
mod stay;

/// Rust allocations of this module come from mappings that never migrate: a migration must not wait for itself.
#[global_allocator]
static ALLOCATOR: hmm_core::arena::Arena = hmm_core::arena::Arena;

/// The native part of the package `hmm`.
#[pyo3::pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use crate::doctor::run_command;
    #[pymodule_export]
    use crate::error::Error;
    #[pymodule_export]
    use crate::group::MemoryGroup;
    #[pymodule_export]
    use crate::guard::Guard;
    #[pymodule_export]
    use crate::mm::{Mm, current};
    #[pymodule_export]
    use crate::pin::Pin;
    #[pymodule_export]
    use crate::registry::close_all;
    #[pymodule_export]
    use crate::soft::SoftDevice;
    #[pymodule_export]
    use crate::stay::stay_reasons;

    #[pymodule_export]
    const PAGE_SIZE: usize = hmm_core::PAGE_SIZE;
    #[pymodule_export]
    const RESIDENCY_NONE: u8 = crate::mm::RESIDENCY_NONE;
    #[pymodule_export]
    const RESIDENCY_SYSTEM: u8 = crate::mm::RESIDENCY_SYSTEM;
    #[pymodule_export]
    const RESIDENCY_DEVICE: u8 = crate::mm::RESIDENCY_DEVICE;
    #[pymodule_export]
    const RESIDENCY_MIGRATING: u8 = crate::mm::RESIDENCY_MIGRATING;
    #[pymodule_export]
    const RESIDENCY_POISONED: u8 = crate::mm::RESIDENCY_POISONED;
    #[pymodule_export]
    const RESIDENCY_UNMAPPED: u8 = crate::mm::RESIDENCY_UNMAPPED;
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");
}
