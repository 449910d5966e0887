//! Finding out what the program did to hidden pages: nobody tells.

use super::hidden::State;
use super::protect::{Protector, READ_WRITE, protect};
use crate::addr::{AddrRange, USER_END, VirtAddr};
use crate::engine::{Mapping, Present, VmaKind};
use crate::error::Result;
use crate::flags::Protection;

/// So often the kernel is asked until it says something.
pub(super) const LOOKS: usize = 64;

impl Protector {
    /// As [`crate::engine::Engine::hides_pages_at_home`].
    pub(super) fn hides_pages_at_home(&self, leaf: AddrRange) -> bool {
        let state = self.hidden.leaf(leaf.start()).map(|leaf| *leaf.lock());
        state.is_some_and(|state| {
            !state.hidden.without(&state.away).without(&state.poisoned).is_empty()
        })
    }

    /// The mapping as the program made it: hidden pages show the access that they had.
    pub(super) fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        let (mut found, mut hidden) = (self.mappings.at(addr)?, self.hidden.contains(addr));
        let is_mapped = found.is_some_and(|mapping| mapping.range.contains(addr));
        if (!is_mapped || hidden != self.looks_hidden(addr, found.as_ref()))
            && let Some(leaf) = self.hidden.leaf(addr)
        {
            // Perhaps between two questions: while the leaf is locked, both have the same answer.
            let state = leaf.lock();
            (found, hidden) =
                (self.mappings.at(addr)?, state.hidden.contains(addr.index_in_leaf()));
        }
        let intact = !hidden || self.looks_hidden(addr, found.as_ref());
        let above = found.map_or(USER_END, |mapping| mapping.range.start().get());
        let Some(mut mapping) = found else {
            self.suspect_run(hidden, addr, above);
            return Ok(None);
        };
        if !intact {
            // Changed by the program.
            self.suspect_run(hidden, addr, above.max(mapping.range.end().get()));
            return Ok(Some(mapping));
        }
        let first = addr.max(mapping.range.start());
        // What happens to the page from here on changes where the run ends, not what the program's access is.
        let (run, hidden_now) = self.hidden.run_around(first, mapping.range);
        mapping.range = run;
        if hidden || (hidden_now && first > addr && self.is_closed(mapping.protection)) {
            mapping.protection = Protection::READ | Protection::WRITE;
        }
        Ok(Some(mapping))
    }

    fn looks_hidden(&self, addr: VirtAddr, mapping: Option<&Mapping>) -> bool {
        mapping.is_some_and(|mapping| {
            mapping.range.contains(addr) && self.is_closed(mapping.protection)
        })
    }

    fn suspect_run(&self, hidden: bool, addr: VirtAddr, end: u64) {
        if let (true, Ok(within)) = (hidden, AddrRange::new(addr.page().get(), end)) {
            self.suspect(self.hidden.run_around(addr, within).0);
        }
    }

    /// Whether pages with this access are as the engine leaves them: inaccessible, or being read for the last time.
    fn is_closed(&self, protection: Protection) -> bool {
        protection.is_empty() || (self.memory.is_none() && protection == Protection::READ)
    }

    /// Whether the kernel has a range as we left it: inaccessible.
    pub(super) fn is_ours(&self, range: AddrRange) -> bool {
        self.kind_of_ours(range).is_some()
    }

    /// The kind of memory of a range that the kernel has as we left it.
    pub(super) fn kind_of_ours(&self, range: AddrRange) -> Option<VmaKind> {
        let mut next = range.start();
        let mut kind = None;
        while next < range.end() {
            let mapping = self.mappings.at(next).ok()??;
            if !mapping.range.contains(next) || !mapping.protection.is_empty() {
                return None;
            }
            kind = Some(mapping.kind);
            next = mapping.range.end();
        }
        kind
    }

    /// Whether hidden pages are still inaccessible, and of the kind that they were.
    fn is_same_kind(&self, state: &State, run: AddrRange) -> Result<bool> {
        let mut next = run.start();
        while next < run.end() {
            let Some(mapping) = self.mappings.at(next)? else { return Ok(false) };
            let piece = mapping.range.intersect(run).filter(|piece| piece.start() == next);
            let Some(piece) = piece.filter(|_| mapping.protection.is_empty()) else {
                return Ok(false);
            };
            let is_file = mapping.kind == VmaKind::PrivateFile;
            let mut slots = (0..piece.pages()).map(|page| piece.page_at(page).index_in_leaf());
            if slots.any(|slot| state.of_file.contains(slot) != is_file) {
                return Ok(false);
            }
            next = piece.end();
        }
        Ok(true)
    }

    /// Whether nothing happened to a run of pages behind our back: they are inaccessible, and what was marked still is.
    /// A kernel that does not say is asked again: contents are given up only by who knows that the program did.
    pub(super) fn is_intact(&self, state: &State, run: AddrRange) -> Result<bool> {
        let mut answer = self.look_once(state, run);
        for _ in 1..LOOKS {
            if answer.is_ok() {
                break;
            }
            answer = self.look_once(state, run);
        }
        answer
    }

    fn look_once(&self, state: &State, run: AddrRange) -> Result<bool> {
        if !self.is_same_kind(state, run)? {
            return Ok(false);
        }
        let mut intact = true;
        self.presence.scan(run, &mut |part, present| {
            if present == Present::None {
                let mut slots = (0..part.pages()).map(|page| part.page_at(page).index_in_leaf());
                intact &= !slots.any(|slot| state.marked.contains(slot));
            }
        })?;
        Ok(intact)
    }

    fn is_changed(&self, state: &State, run: AddrRange) -> bool {
        matches!(self.is_intact(state, run), Ok(false))
    }

    /// Notes the hidden pages of a range that are not as they were left.
    pub(super) fn refresh(&self, range: AddrRange) {
        self.hidden.each_run(range, &mut |run| {
            if let Some(leaf) = self.hidden.leaf(run.start()) {
                let state = leaf.lock();
                if self.is_changed(&state, run) {
                    self.suspect(run);
                }
            }
        });
    }

    /// Notes a hidden page that does not look as it was left.
    pub(super) fn note_if_changed(&self, page: VirtAddr) -> bool {
        let range = AddrRange::page_of(page);
        let Some(leaf) = self.hidden.leaf(page) else { return false };
        let state = leaf.lock();
        let changed = state.hidden.contains(page.index_in_leaf()) && self.is_changed(&state, range);
        drop(state);
        if changed {
            self.suspect(range);
        }
        changed
    }

    /// Notes a range that does not look as it should. A full list drops it; the next look finds it again.
    pub(super) fn suspect(&self, range: AddrRange) {
        let mut suspects = self.suspects.lock();
        if !suspects.contains(&Some(range))
            && let Some(place) = suspects.iter_mut().find(|place| place.is_none())
        {
            *place = Some(range);
        }
    }

    /// The next range of the list.
    pub(super) fn next_suspect(&self) -> Option<AddrRange> {
        self.suspects.lock().iter_mut().find_map(Option::take)
    }

    /// Looks at a range closely, with the layout lock held for writing: the first run of pages that were away, and that
    /// the program unmapped or dropped. They are not hidden any more.
    pub(super) fn examine(&self, range: AddrRange) -> Option<AddrRange> {
        for leaf in self.hidden.leaves(range) {
            let Some(part) = leaf.range().intersect(range) else { continue };
            let state = &mut *leaf.lock();
            let mut gone: Option<AddrRange> = None;
            for page in 0..part.pages() {
                let page = AddrRange::page_of(part.page_at(page));
                let was_away = self.put_right(state, page);
                gone = match gone {
                    Some(run) if was_away => Some(run.hull(page)),
                    Some(run) => return Some(run),
                    None => was_away.then_some(page),
                };
            }
            if gone.is_some() {
                return gone;
            }
        }
        None
    }

    /// What a range had is dropped, and the table follows: it is accessible again. The layout lock is held for writing.
    pub(super) fn show_dropped(&self, range: AddrRange) {
        for leaf in self.hidden.leaves(range) {
            let Some(part) = leaf.range().intersect(range) else { continue };
            let state = &mut *leaf.lock();
            let (mut slot, end) =
                (part.start().index_in_leaf(), part.start().index_in_leaf() + part.pages());
            while slot < end {
                let (run_end, inside) = state.hidden.run_at(slot);
                let run = leaf.pages(slot, run_end.min(end));
                slot = run_end;
                if inside {
                    (0..run.pages())
                        .for_each(|page| state.marked.remove(run.page_at(page).index_in_leaf()));
                    // The program may have put something else there.
                    if self.is_ours(run) {
                        self.show(leaf, state, run)
                    } else {
                        self.forget(state, run)
                    }
                }
            }
        }
    }

    /// A page that is not as it was left is not hidden any more. True if it was away.
    fn put_right(&self, state: &mut State, page: AddrRange) -> bool {
        let slot = page.start().index_in_leaf();
        if !state.hidden.contains(slot) || !self.is_changed(state, page) {
            return false;
        }
        let was_away = state.away.contains(slot) || state.poisoned.contains(slot);
        // Where that is not known, the page stays hidden until somebody touches it.
        let dropped = self.is_same_kind(state, page).unwrap_or(true);
        self.forget(state, page);
        if dropped && protect(page, READ_WRITE).is_err() {
            // Mappings are short: it is shown with the others of its leaf.
            let mut hidden = state.hidden;
            hidden.insert(slot);
            self.hidden.set(state, hidden);
            state.whole = true;
        }
        was_away
    }
}
