//! The promises of hmm.txt, each shown by a test of its own on real memory; the number is in the test's name.
//! `cargo xtask promises` runs them on every engine and writes docs/PROMISES.md.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod account;
mod basics;
mod common;
mod devmem;
mod gpu;
mod locked;
mod migrate;
mod mirror;
mod ordered;
mod range;

#[path = "../driver/mod.rs"]
mod driver;
