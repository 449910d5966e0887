//! Pages of private file mappings, and what another engine reports about them.
//!
//! Every page of a file has contents, also those that the CPU's page table lacks; so there are no holes, and no marks: the
//! kernel may take a clean page out of the table whenever it likes. What the program drops is found out only where somebody
//! reports it. The file itself never changes: what comes home is written into pages of the process's own.

use super::hidden::{Leaf, State};
use super::protect::Protector;
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::linux::memory;
use crate::engine::{MapEvent, VmaKind};

impl Protector {
    /// A page moved into the place of a file's would be a hole in its mapping: files need `/proc/self/mem`.
    pub(super) fn can_take(&self, kind: VmaKind) -> bool {
        match kind {
            VmaKind::Anonymous => true,
            VmaKind::PrivateFile => self.memory.is_some(),
            _ => false,
        }
    }

    /// Whether a page lies in a private file mapping.
    pub(super) fn is_of_file(&self, page: VirtAddr) -> bool {
        matches!(
            self.mappings.at(page),
            Ok(Some(mapping))
                if mapping.kind == VmaKind::PrivateFile && mapping.range.contains(page)
        )
    }

    /// The pages of a part from its start on that the file has; `None` where it ends already.
    pub(super) fn within_file(&self, state: &State, part: AddrRange) -> Option<AddrRange> {
        if memory::populate(part, false).is_ok() {
            return Some(part);
        }
        // Pages in the file come before those that are beyond its end.
        let (mut good, mut bad) = (0, part.pages() + 1);
        while bad - good > 1 {
            let middle = good.midpoint(bad);
            let page = part.sub(middle - 1, 1);
            *(if self.can_read(state, page) { &mut good } else { &mut bad }) = middle;
        }
        (good > 0).then(|| part.sub(0, good))
    }

    fn can_read(&self, state: &State, page: AddrRange) -> bool {
        if state.hidden.contains(page.start().index_in_leaf()) {
            return self.is_in_file(page);
        }
        memory::populate(page, false).is_ok()
    }

    fn is_in_file(&self, page: AddrRange) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.peek(page.start(), &mut [0]))
    }

    /// A file that became shorter takes the private copies of its last pages along: what is away of them goes, too, and a
    /// touch gets what the kernel has for it. Returns the first page, when it is done with.
    pub(super) fn give_short_file(&self, part: AddrRange, frame: VirtAddr) -> Option<AddrRange> {
        let memory = self.memory.as_ref()?;
        if self.kind_of_ours(part) != Some(VmaKind::PrivateFile) {
            return None;
        }
        let first = part.sub(0, 1);
        (!self.is_in_file(first) || memory.copy_out(frame, first)).then_some(first)
    }

    /// Undoes a take whose contents are still in place.
    pub(super) fn put_back(&self, range: AddrRange) {
        for part in range.by_leaf() {
            let Some(leaf) = self.hidden.leaf(part.start()) else { continue };
            let state = &mut *leaf.lock();
            for page in (0..part.pages()).map(|page| part.sub(page, 1)) {
                state.away.remove(page.start().index_in_leaf());
                if self.is_ours(page) {
                    self.show(leaf, state, page);
                } else {
                    self.forget(state, page);
                }
            }
        }
    }

    /// What the program did, as it was reported. The layout lock is held for writing.
    pub(super) fn apply(&self, event: &MapEvent) {
        match *event {
            MapEvent::Unmap(range) => self.each_part(range, &mut |leaf, part| {
                self.forget_unmapped(&mut leaf.lock(), part);
            }),
            MapEvent::Remove(range) => self.each_part(range, &mut |leaf, part| {
                let state = &mut *leaf.lock();
                // Still inaccessible: shown at the next touch, when the drop is over.
                for slot in (0..part.pages()).map(|page| part.page_at(page).index_in_leaf()) {
                    state.away.remove(slot);
                    state.poisoned.remove(slot);
                }
            }),
            MapEvent::Remap { from, to } => self.follow(from, to),
        }
    }

    fn each_part(&self, range: AddrRange, apply: &mut dyn FnMut(&Leaf, AddrRange)) {
        for leaf in self.hidden.leaves(range) {
            leaf.range().intersect(range).into_iter().for_each(|part| apply(leaf, part));
        }
    }

    fn forget_unmapped(&self, state: &mut State, part: AddrRange) {
        self.forget(state, part);
        state.whole &= !state.hidden.is_empty();
    }

    /// Inaccessible pages moved with their mapping.
    fn follow(&self, from: AddrRange, to: VirtAddr) {
        let target = AddrRange::from_bounds(to.get(), to.get() + from.len());
        self.apply(&MapEvent::Unmap(target));
        self.each_part(from, &mut |leaf, part| {
            let before = *leaf.lock();
            for page in (0..part.pages()).map(|page| part.page_at(page)) {
                let slot = page.index_in_leaf();
                let place = target.page_at(from.index_of(page));
                // Without memory for a leaf the page stays out of reach, and the program learns of it by SIGSEGV.
                if before.hidden.contains(slot)
                    && let Some(leaf) = self.hidden.leaf_or_new(place)
                {
                    self.arrive(&mut leaf.lock(), &before, slot, place.index_in_leaf());
                }
            }
            self.forget_unmapped(&mut leaf.lock(), part);
        });
    }

    fn arrive(&self, state: &mut State, before: &State, from: usize, to: usize) {
        let mut hidden = state.hidden;
        hidden.insert(to);
        self.hidden.set(state, hidden);
        if before.away.contains(from) {
            state.away.insert(to);
        }
        if before.poisoned.contains(from) {
            state.poisoned.insert(to);
        }
        if before.of_file.contains(from) {
            state.of_file.insert(to);
        }
        state.whole |= before.whole;
    }
}
