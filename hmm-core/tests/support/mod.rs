//! What the tests of several engines share: the program's memory ([`memory`]), a driver with memory of its own
//! ([`device`]), an engine that can be interrupted ([`interrupted`]), a world of all that which is compared with a
//! plain map after each random step ([`world`], [`steps`]), and threads that do everything at once ([`stress`]).

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

pub(crate) mod device;
pub(crate) mod interrupted;
pub(crate) mod memory;
pub(crate) mod steps;
pub(crate) mod stress;
pub(crate) mod world;
