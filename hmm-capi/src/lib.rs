//! The C face of libhmm: handles and conversions around `hmm-core`, no logic of its own.
//!
//! The documentation of each exported item is written for C readers: it becomes `include/hmm.h`
//! (`cargo run -p xtask -- gen-header`). Hand-written parts of the header are in `header/`.

#![expect(non_camel_case_types, reason = "types have their C names")]
#![expect(
    clippy::missing_safety_doc,
    reason = "what C callers must keep to is each function's documentation"
)]

mod arrays;
mod counters;
mod devices;
mod devmem;
mod error;
mod exclusive;
mod groups;
mod handle;
mod hold;
mod inject;
mod interval;
mod migrate;
mod migrate_phases;
mod mirror;
mod mm;
mod pagemap;
mod pages;
mod phase;
mod range;
mod range_4_17;
mod range_fault;
mod ret;
mod sized;
mod soft;
mod soft_kernels;
mod stay;
mod subscription;
mod tracking;
mod version;
mod vma;

pub use counters::*;
pub use devices::*;
pub use devmem::*;
pub use error::*;
pub use exclusive::*;
pub use groups::*;
pub use inject::*;
pub use interval::*;
pub use migrate::*;
pub use migrate_phases::*;
pub use mirror::*;
pub use mm::*;
pub use pagemap::*;
pub use pages::*;
pub use range::*;
pub use range_4_17::*;
pub use range_fault::*;
pub use soft::*;
pub use soft_kernels::*;
pub use stay::*;
pub use version::*;
pub use vma::*;

/// All of Rust's allocations in this library live in its own mappings, which never migrate.
#[global_allocator]
static ALLOCATOR: hmm_core::arena::Arena = hmm_core::arena::Arena;
