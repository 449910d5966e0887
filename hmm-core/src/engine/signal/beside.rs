//! The signal engine beside another one, which has the rest of the memory and reports layout changes.

use super::{Common, SignalEngine, writable_memory};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::engine::{LayoutLock, MapEvent, Progress, Stop};
use crate::error::Result;

/// Follows what the other engine reports.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Follower(Shared<Common>);

impl Follower {
    /// The layout lock is held for writing.
    pub(in crate::engine) fn apply(&self, event: &MapEvent) {
        self.0.protector.apply(event);
    }
}

impl SignalEngine {
    /// One that shares another engine's layout lock; `None` where it could not serve files.
    ///
    /// # Errors
    /// As [`SignalEngine::open`]; when the program ignores SIGSEGV.
    pub(in crate::engine) fn beside(layout: Shared<LayoutLock>) -> Result<Option<Self>> {
        let memory = writable_memory();
        memory.map(|memory| Self::with_memory(Some(memory), layout)).transpose()
    }

    /// For reports of the other engine.
    pub(in crate::engine) fn follower(&self) -> Follower {
        Follower(self.common.clone())
    }

    /// Whether the engine made a page inaccessible.
    pub(in crate::engine) fn has(&self, page: VirtAddr) -> bool {
        self.common.protector.hidden.contains(page)
    }

    /// Whether the engine made a page of a range inaccessible.
    pub(in crate::engine) fn has_any(&self, range: AddrRange) -> bool {
        self.any_hidden(range)
    }

    /// Touches what the engine made inaccessible, as the program would.
    ///
    /// # Errors
    /// `Fault` when a page cannot be had.
    pub(in crate::engine) fn touch(&self, range: AddrRange) -> Result<()> {
        self.touch_hidden(range)
    }

    /// The pages from the start on that the file of a mapping has.
    pub(in crate::engine) fn within_file(&self, range: AddrRange) -> Option<AddrRange> {
        let protector = &self.common.protector;
        let mut pages = 0;
        for part in range.by_leaf() {
            let leaf = protector.hidden.leaf_or_new(part.start())?;
            let within = protector.within_file(&leaf.lock(), part);
            pages += within.map_or(0, |within| within.pages());
            if within != Some(part) {
                break;
            }
        }
        (pages > 0).then(|| range.sub(0, pages))
    }

    /// Undoes a take of which nothing was withdrawn.
    pub(in crate::engine) fn put_back(&self, range: AddrRange) {
        self.common.protector.put_back(range);
    }

    /// As [`crate::engine::Engine::withdraw`], with the other engine's way to drop pages.
    pub(in crate::engine) fn withdraw_by(
        &self,
        range: AddrRange,
        drop: &dyn Fn(AddrRange) -> std::result::Result<(), Stop>,
    ) -> Progress {
        self.common.protector.withdraw(range, drop)
    }

    /// Runs something on the parts of some bytes while no page of them can leave; false when one is away.
    pub(in crate::engine) fn while_present(
        &self,
        addr: VirtAddr,
        len: usize,
        access: impl FnMut(VirtAddr, std::ops::Range<usize>) -> bool,
    ) -> bool {
        self.common.protector.while_present(addr, len, access)
    }
}
