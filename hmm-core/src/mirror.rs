//! Mirrors (Gen A): a notifier over the whole address space (hmm.txt section 4).

use crate::addr::{AddrRange, PAGE_SIZE, USER_END};
use crate::error::Result;
use crate::mm::{Mm, Notifier};
use crate::ops::NotifierOps;
use std::sync::Arc;

impl Mm {
    /// Registers a mirror: `ops` hears of every change to pages that some range call has looked at
    /// (`hmm_mirror_register`; promises 18, 20). [`Notifier::remove`] unregisters it.
    ///
    /// # Errors
    /// `NoMemory`, `Gone`.
    pub fn mirror_register(self: &Arc<Self>, ops: Arc<dyn NotifierOps>) -> Result<Arc<Notifier>> {
        self.notifier_insert(AddrRange::new(PAGE_SIZE as u64, USER_END)?, ops)
    }
}
