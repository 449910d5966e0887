//! The driver of the model's other tests.
#![allow(dead_code, reason = "the schedules use a part")]

#[path = "../../../../hmm-core/tests/support/device.rs"]
pub(crate) mod device;

pub(crate) mod memory {
    /// The bytes of one page.
    pub(crate) type Bytes = [u8; hmm_core::PAGE_SIZE];
}
