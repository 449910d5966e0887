//! Everything the model's one lock protects, and who waits for which page.

use crate::addr::{AddrRange, VirtAddr};
use crate::engine::model::faults::Chaos;
use crate::engine::model::frames::Frames;
use crate::engine::model::pages::{PageCondition, Pages, Slot};
use crate::engine::model::space::Space;
use crate::engine::{FaultSink, VmaKind, Watch};
use crate::error::{Error, Result};
use crate::flags::Protection;
use std::sync::Arc;

/// A thread that sleeps, or is about to, until a page is touched.
#[derive(Debug)]
struct Waiter {
    ticket: u64,
    page: VirtAddr,
    woken: bool,
}

/// What the model holds.
pub(super) struct State {
    pub(super) space: Space,
    pub(super) pages: Pages,
    pub(super) frames: Frames,
    pub(super) chaos: Chaos,
    /// Where faults and layout changes are reported; none before `start` and after `stop`.
    pub(super) sink: Option<Arc<dyn FaultSink>>,
    /// Threads inside the sink: they play the part of service threads.
    pub(super) serving: Vec<usize>,
    waiters: Vec<Waiter>,
    tickets: u64,
}

/// What a touch of a page found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Touch {
    /// The page is there, and may be accessed in the way asked for.
    Present,
    /// It is not, and the sink must be told.
    Absent,
}

impl State {
    pub(super) fn new(chaos: Chaos) -> Self {
        Self {
            space: Space::default(),
            pages: Pages::new(),
            frames: Frames::default(),
            chaos,
            sink: None,
            serving: Vec::new(),
            waiters: Vec::new(),
            tickets: 0,
        }
    }

    /// What the processor and the kernel's fault handler do with a touch, short of asking user space.
    pub(super) fn touch(&mut self, page: VirtAddr, write: bool) -> Result<Touch> {
        let Some((_, region)) = self.space.at(page) else {
            return Err(Error::Fault { address: page, what: "nothing is mapped there" });
        };
        let (needed, what) = if write {
            (Protection::WRITE, "the mapping is not writable")
        } else {
            (Protection::READ, "the mapping is not readable")
        };
        if !region.protection.contains(needed) {
            return Err(Error::Permission { address: page, what });
        }
        match self.pages.get_mut(&page.get()) {
            Some(Slot::Poisoned) => {
                return Err(Error::Lost { address: page, what: "the page is poisoned (SIGBUS)" });
            }
            Some(Slot::Page(_, condition @ PageCondition::Swapped)) => {
                *condition = PageCondition::Ordinary;
            }
            Some(_) => {}
            None if region.watch == Some(Watch::Absence) && self.sink.is_some() => {
                return Ok(Touch::Absent);
            }
            None => {
                // File and shared mappings have no zero page.
                let page_of_its_own = write || region.kind != VmaKind::Anonymous;
                self.pages.insert(page.get(), Slot::zeroed(page_of_its_own));
            }
        }
        if write && let Some(slot) = self.pages.get_mut(&page.get()) {
            let _ = slot.bytes_mut();
        }
        Ok(Touch::Present)
    }

    /// Enters the calling thread as waiting for a page. Done before the fault is reported, so that no wake is lost.
    pub(super) fn enqueue(&mut self, page: VirtAddr) -> u64 {
        self.tickets += 1;
        self.waiters.push(Waiter { ticket: self.tickets, page, woken: false });
        self.tickets
    }

    /// Marks everyone who waits for a page of `range` as woken.
    pub(super) fn wake(&mut self, range: AddrRange) {
        for waiter in self.waiters.iter_mut().filter(|waiter| range.contains(waiter.page)) {
            waiter.woken = true;
        }
    }

    /// Wakes everyone.
    pub(super) fn wake_all(&mut self) {
        for waiter in &mut self.waiters {
            waiter.woken = true;
        }
    }

    pub(super) fn is_woken(&self, ticket: u64) -> bool {
        self.waiters.iter().all(|waiter| waiter.ticket != ticket || waiter.woken)
    }

    pub(super) fn dequeue(&mut self, ticket: u64) {
        self.waiters.retain(|waiter| waiter.ticket != ticket);
    }
}
