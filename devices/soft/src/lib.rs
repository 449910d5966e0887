//! A software accelerator: a device for [`hmm_core`] that exists in every machine.
//!
//! [`SoftDevice`] has memory of its own that the CPU is never given an address of, a page table of its own that is
//! filled by device page faults and kept in step by a mirror of the whole address space, a copy engine that works on
//! batches, and threads that run [`Kernel`]s on the process's own pointers. It is a client of the core's public API
//! and of nothing else, so it is also the longest example of a driver.
//!
//! ```no_run
//! use hmm_core::{AddrRange, Mm, VirtAddr};
//! use hmm_soft::{Kernel, SoftConfig, SoftDevice};
//!
//! # fn main() -> hmm_core::Result<()> {
//! let mm = Mm::current()?;
//! let device = SoftDevice::new(&mm, SoftConfig::default())?;
//! let numbers = vec![1_u64; 1 << 20];
//! let address = VirtAddr::from_ptr(numbers.as_ptr()).get();
//! device.migrate(AddrRange::covering(address, 8 << 20)?)?;
//! let sum = device.run(Kernel::SumU64 { src: address, count: 1 << 20 })?;
//! assert_eq!(sum, numbers.iter().sum::<u64>()); // the CPU's touch brings the pages home
//! device.close()
//! # }
//! ```
//!
//! # Locks
//! In this order, and never across a call that may wait for a page (`range_fault`, `migrate`, `make_present`):
//!
//! 1. the page table's lock: shared for at most one page-sized piece of work, exclusive to fill or to invalidate;
//! 2. the free list's lock.
//!
//! The job queue's lock is taken alone. Service threads take only the two above, and no code holding one of them
//! touches memory that can migrate: process memory is reached by `peek` and `poke` alone.
//!
//! # Memory
//! Page table, device memory and migration lists live in mappings of the device's own, since the heap may migrate.

mod access;
mod callbacks;
mod config;
mod copy;
mod counters;
mod device;
mod fault;
mod jobs;
mod kernel;
mod kernels;
mod mapped;
mod memory;
mod migrate;
mod state;
mod stays;
mod streams;
mod table;

pub use config::{Policy, SoftConfig};
pub use counters::SoftCounters;
pub use device::SoftDevice;
pub use jobs::Job;
pub use kernel::Kernel;
pub use stays::Stays;
