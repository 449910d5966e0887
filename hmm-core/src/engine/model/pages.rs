//! The CPU page table: which pages are there, with which bytes, and the changes that the mm may ask for.

use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::engine::model::faults::{Verb, Verdict};
use crate::engine::model::state::State;
use crate::engine::{Give, Present, Progress, Rss, Stop, VmaKind};
use crate::flags::Protection;
use std::collections::BTreeMap;

/// The bytes of one page.
pub(super) type Bytes = [u8; PAGE_SIZE];

/// What the shared zero page holds.
static ZEROS: Bytes = [0; PAGE_SIZE];

/// In which way a present page is special.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageCondition {
    /// In no way.
    #[default]
    Ordinary,
    /// Shared copy-on-write, as after a fork: not taken until a write has broken the sharing.
    Shared,
    /// Held by someone else (direct I/O and the like): not taken at all.
    Pinned,
    /// Swapped out; any touch brings it in.
    Swapped,
}

/// A page table entry that is not empty.
#[derive(Debug)]
pub(super) enum Slot {
    Zero,
    Page(Box<Bytes>, PageCondition),
    Poisoned,
}

impl Slot {
    pub(super) fn zeroed(write: bool) -> Self {
        if write { Self::Page(Box::new(ZEROS), PageCondition::Ordinary) } else { Self::Zero }
    }

    pub(super) fn present(&self) -> Present {
        match self {
            Self::Zero => Present::Zero,
            // A poison marker is a swap entry to whoever reads pagemap.
            Self::Page(_, PageCondition::Swapped) | Self::Poisoned => Present::Swapped,
            Self::Page(..) => Present::Page,
        }
    }

    /// The bytes, if they can be read without waiting for anything.
    pub(super) fn bytes(&self) -> Option<&Bytes> {
        match self {
            Self::Zero => Some(&ZEROS),
            Self::Page(_, PageCondition::Swapped) | Self::Poisoned => None,
            Self::Page(bytes, _) => Some(bytes),
        }
    }

    /// The bytes, to be written: the zero page is replaced and sharing is broken first.
    pub(super) fn bytes_mut(&mut self) -> Option<&mut Bytes> {
        match self {
            Self::Zero => *self = Self::zeroed(true),
            Self::Page(_, condition @ PageCondition::Shared) => {
                *condition = PageCondition::Ordinary
            }
            _ => {}
        }
        match self {
            Self::Page(_, PageCondition::Swapped) | Self::Zero | Self::Poisoned => None,
            Self::Page(bytes, _) => Some(bytes),
        }
    }
}

/// The page table; keys are page addresses.
pub(super) type Pages = BTreeMap<u64, Slot>;

impl State {
    /// See [`crate::engine::Engine::take`].
    pub(super) fn take(&mut self, range: AddrRange, frame: VirtAddr) -> Progress {
        let verdict = self.chaos.judge(Verb::Take, range.pages());
        each_page(verdict, range, frame, |page, frame| self.take_page(page, frame))
    }

    fn take_page(&mut self, page: VirtAddr, frame: VirtAddr) -> Stop {
        if !self.may_move(page) {
            return Stop::Refused;
        }
        match self.frames.present(frame) {
            Some(Present::None) => {}
            Some(_) => return Stop::Exists,
            None => return Stop::Refused,
        }
        let slot = self.pages.get(&page.get());
        let bytes = match slot {
            None => return Stop::Done,
            Some(Slot::Poisoned) => return Stop::Refused,
            Some(Slot::Page(_, PageCondition::Shared | PageCondition::Pinned)) => {
                return Stop::Busy;
            }
            Some(Slot::Page(bytes, _)) => bytes,
            Some(Slot::Zero) => &ZEROS,
        };
        let zero = matches!(slot, Some(Slot::Zero));
        self.frames.fill(frame, bytes, if zero { Present::Zero } else { Present::Page });
        self.pages.remove(&page.get());
        Stop::Done
    }

    /// See [`crate::engine::Engine::give`].
    pub(super) fn give(&mut self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        let verb = if how == Give::Move { Verb::Move } else { Verb::Fill };
        let verdict = self.chaos.judge(verb, range.pages());
        each_page(verdict, range, frame, |page, frame| self.give_page(page, frame, how))
    }

    fn give_page(&mut self, page: VirtAddr, frame: VirtAddr, how: Give) -> Stop {
        if !self.may_change(page) {
            return Stop::Refused;
        }
        if self.pages.contains_key(&page.get()) {
            return Stop::Exists;
        }
        let Some(present) = self.frames.present(frame) else { return Stop::Refused };
        if how == Give::Move && present == Present::None {
            return Stop::Done; // A hole, moved: still a hole.
        }
        let Some(bytes) = self.frames.copy_out(frame) else { return Stop::Refused };
        self.pages.insert(page.get(), Slot::Page(bytes, PageCondition::Ordinary));
        // What cannot be moved into any more (it became read-only) is copied into: the frame keeps its page.
        if how == Give::Move && self.may_move(page) {
            self.frames.moved_out(frame);
        }
        Stop::Done
    }

    /// See [`crate::engine::Engine::zero`]; the caller wakes whoever waits for the page.
    pub(super) fn zero(&mut self, page: VirtAddr, write: bool) -> Progress {
        let verdict = self.chaos.judge(Verb::Fill, 1);
        each_page(verdict, AddrRange::page_of(page), page, |page, _| {
            if !self.may_change(page) {
                return Stop::Refused;
            }
            if self.pages.contains_key(&page.get()) {
                return Stop::Exists;
            }
            self.pages.insert(page.get(), Slot::zeroed(write));
            Stop::Done
        })
    }

    /// A page that is not there is poison from now on. False when something is there, or nothing is mapped.
    pub(super) fn poison(&mut self, page: VirtAddr) -> bool {
        let possible = self.may_change(page) && !self.pages.contains_key(&page.get());
        if possible {
            self.pages.insert(page.get(), Slot::Poisoned);
        }
        possible
    }

    /// What is there, as runs that cover `range`; works on frames too.
    pub(super) fn scan(&self, range: AddrRange) -> Vec<(AddrRange, Present)> {
        let frames = self.frames.overlap(range);
        let mut runs: Vec<(AddrRange, Present)> = Vec::new();
        for page in (0..range.pages()).map(|index| range.page_at(index)) {
            let present = match self.pages.get(&page.get()) {
                Some(slot) => slot.present(),
                None if frames => self.frames.present(page).unwrap_or(Present::None),
                None => Present::None,
            };
            match runs.last_mut() {
                Some((run, same)) if *same == present => *run = run.hull(AddrRange::page_of(page)),
                _ => runs.push((AddrRange::page_of(page), present)),
            }
        }
        runs
    }

    /// What is resident, the frames among it.
    pub(super) fn rss(&self) -> Rss {
        let frames = self.frames.resident();
        let mut rss = Rss { anon: frames * PAGE_SIZE as u64, ..Rss::default() };
        for (page, slot) in self.pages.iter().filter(|(_, slot)| slot.present() == Present::Page) {
            let kind = self.space.at(VirtAddr::new(*page)).map(|(_, region)| region.kind);
            let of_kind = match kind {
                Some(VmaKind::Shared) => &mut rss.shmem,
                Some(VmaKind::PrivateFile | VmaKind::SharedFile) => &mut rss.file,
                _ => &mut rss.anon,
            };
            *of_kind += slot.bytes().map_or(0, |bytes| bytes.len() as u64);
        }
        rss
    }

    /// The bytes of a page, swapped out or not.
    pub(super) fn contents(&self, page: VirtAddr) -> Option<&Bytes> {
        match self.pages.get(&page.get())? {
            Slot::Page(bytes, _) => Some(bytes),
            other => other.bytes(),
        }
    }

    /// Forgets the contents of `range`; returns what was there.
    pub(super) fn drop_pages(&mut self, range: AddrRange) -> Pages {
        let mut dropped = self.pages.split_off(&range.start().get());
        self.pages.append(&mut dropped.split_off(&range.end().get()));
        dropped
    }

    /// Moving wants what it wants in the kernel: private anonymous memory with the access flags of the frames.
    fn may_move(&self, page: VirtAddr) -> bool {
        let flags = Protection::READ | Protection::WRITE;
        self.may_change(page)
            && self.space.at(page).is_some_and(|(_, region)| region.protection == flags)
    }

    /// Copying does not look at the protection.
    fn may_change(&self, page: VirtAddr) -> bool {
        self.space.at(page).is_some_and(|(_, region)| region.kind == VmaKind::Anonymous)
    }
}

/// Does page after page, up to the verdict or the first that does not go.
fn each_page(
    verdict: Verdict,
    range: AddrRange,
    frame: VirtAddr,
    mut one: impl FnMut(VirtAddr, VirtAddr) -> Stop,
) -> Progress {
    for index in 0..verdict.pages {
        let stop = one(range.page_at(index), frame.plus_pages(index));
        if stop != Stop::Done {
            return Progress { pages: index, stop };
        }
    }
    Progress { pages: verdict.pages, stop: verdict.stop }
}
