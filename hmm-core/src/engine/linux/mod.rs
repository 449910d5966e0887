//! What the kernel says about this process, and how its memory is reached without touching it: shared by the engines
//! that work on real memory.

mod abi;
pub(super) mod children;
mod mappings;
pub(super) mod memory;
mod presence;
mod rss;
pub(super) mod strangers;

pub(super) use mappings::Mappings;
pub(super) use memory::Memory;
pub(super) use presence::Presence;
pub(super) use rss::rss;
