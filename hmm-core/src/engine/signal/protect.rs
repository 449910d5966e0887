//! Pages made inaccessible, emptied, filled and shown again.
//!
//! Where `/proc/self/mem` may be written, contents go through it: it reaches pages that nobody else can. Otherwise a page
//! is read while it is read-only for everybody, and filled by moving a filled one into its place (`mremap`).
//! What was dropped leaves a mark: a read maps the kernel's page of zeros. A page that is away and has no mark was
//! dropped or unmapped by the program meanwhile. Pages of files are a little different ([`super::files`]).

use super::hidden::{Hidden, Leaf, State};
use super::look::LOOKS;
use crate::addr::{AddrRange, LEAF_PAGES, PAGE_SIZE, VirtAddr};
use crate::engine::linux::{Mappings, Memory, Presence, memory};
use crate::engine::trap::copy;
use crate::engine::{Present, Progress, Stop, VmaKind};
use crate::error::{Error, Result};
use crate::flags::Protection;
use crate::inject::{self, Point};
use crate::page_set::PageSet;
use crate::sync::Mutex;
use rustix::io::Errno;
use rustix::mm::{Advice, MprotectFlags, MremapFlags};

/// Ranges that do not look as they should, waiting to be looked at with the layout lock.
const SUSPECTS: usize = 64;

/// What the engine does to pages.
#[derive(Debug)]
pub(super) struct Protector {
    pub(super) hidden: Hidden,
    pub(super) mappings: Mappings,
    pub(super) presence: Presence,
    pub(super) memory: Option<Memory>,
    /// So many runs of hidden pages may be: beyond, leaves are hidden as a whole.
    runs_limit: usize,
    pub(super) suspects: Mutex<[Option<AddrRange>; SUSPECTS]>,
}

/// Pages of one leaf that are taken together.
struct Taking {
    part: AddrRange,
    frame: VirtAddr,
    is_file: bool,
}

pub(super) fn stopped(pages: usize, stop: Stop) -> Progress {
    Progress { pages, stop }
}

pub(super) fn protect(range: AddrRange, access: MprotectFlags) -> std::result::Result<(), Stop> {
    let start = range.start().as_ptr().cast();
    // SAFETY: the pages are of a mapping whose pages the engine hides and shows; contents do not change.
    let protect = || unsafe { rustix::mm::mprotect(start, range.len() as usize, access) };
    match inject::checked(Point::Protect).and_then(|()| protect()) {
        Ok(()) => Ok(()),
        Err(Errno::NOMEM | Errno::AGAIN) => Err(Stop::NoMemory),
        Err(_) => Err(Stop::Refused),
    }
}

pub(super) const READ_WRITE: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::WRITE);

impl Protector {
    pub(super) fn new(memory: Option<Memory>) -> Result<Self> {
        let mappings = Mappings::open()?;
        let runs_limit = runs_limit();
        Ok(Self {
            hidden: Hidden::new().ok_or(Error::NoMemory { what: "the table of hidden pages" })?,
            mappings,
            presence: Presence::open(),
            memory,
            runs_limit,
            suspects: Mutex::new([None; SUSPECTS]),
        })
    }

    /// What may be taken in a range: one kind of memory, readable and writable, nothing of it hidden by the program.
    fn may_take(&self, range: AddrRange) -> Option<VmaKind> {
        let mut next = range.start();
        let mut kind = None;
        while next < range.end() {
            let mapping = self.mapping_at(next).ok()??;
            let fits = mapping.range.contains(next)
                && self.can_take(mapping.kind)
                && kind.is_none_or(|kind| kind == mapping.kind)
                && mapping.protection == Protection::READ | Protection::WRITE;
            if !fits {
                return None;
            }
            kind = Some(mapping.kind);
            next = mapping.range.end();
        }
        kind
    }

    /// As [`crate::engine::Engine::take`]; what the pages had is still there afterwards, out of reach.
    pub(super) fn take(
        &self,
        range: AddrRange,
        frame: VirtAddr,
        must_stay: &dyn Fn(AddrRange) -> bool,
    ) -> Progress {
        let Some(kind) = self.may_take(range) else { return stopped(0, Stop::Refused) };
        let is_file = kind == VmaKind::PrivateFile;
        let mut done = 0;
        for wanted in range.by_leaf() {
            let Some(leaf) = self.hidden.leaf_or_new(wanted.start()) else {
                return stopped(done, Stop::NoMemory);
            };
            let state = &mut *leaf.lock();
            let part = if is_file { self.within_file(state, wanted) } else { Some(wanted) };
            let Some(part) = part else { return stopped(done, Stop::Busy) };
            let mut target = part;
            if state.whole || self.hidden.runs() >= self.runs_limit {
                target = self.piece_of_leaf(leaf, part);
                state.whole = true;
            }
            let taking = Taking { part, frame: frame.plus_pages(done), is_file };
            let mut taken = self.take_part(leaf, state, &taking, target, must_stay);
            if taken == Err(Stop::WithLeaf) {
                taken = self.take_part(leaf, state, &taking, part, &|_| false);
            }
            if let Err(stop) = taken {
                return stopped(done, stop);
            }
            done += part.pages();
            if part != wanted {
                return stopped(done, Stop::Busy);
            }
        }
        stopped(done, Stop::Done)
    }

    fn take_part(
        &self,
        leaf: &Leaf,
        state: &mut State,
        taking: &Taking,
        target: AddrRange,
        must_stay: &dyn Fn(AddrRange) -> bool,
    ) -> std::result::Result<(), Stop> {
        let (before, part) = (*state, taking.part);
        let mut hidden = state.hidden;
        hidden.insert_pages(target);
        // Before anything is inaccessible: whoever faults finds the page in the table, and waits.
        self.hidden.set(state, hidden);
        // Who pins a page of it from now on finds it in the table, too.
        if target != part && must_stay(target) {
            self.hidden.set(state, before.hidden);
            return Err(Stop::WithLeaf);
        }
        state.away.insert_pages(part);
        if taking.is_file {
            state.of_file.insert_pages(target);
        }
        let copied = self.hide_and_copy(target, taking);
        if copied.is_err() {
            (state.away, state.whole) = (before.away, before.whole);
            state.of_file = before.of_file;
            self.show_again(leaf, state, target, before.hidden);
        }
        copied
    }

    /// Pages that were hidden for nothing, but for those of `kept`. What cannot be shown now, since mappings are short, is
    /// shown at a touch, or with the others of its leaf.
    fn show_again(&self, leaf: &Leaf, state: &mut State, target: AddrRange, kept: PageSet) {
        let wanted = state.hidden.without(&kept);
        let (mut left, mut slot) = (kept, 0);
        while slot < LEAF_PAGES {
            let (end, inside) = wanted.run_at(slot);
            if let Some(run) = leaf.pages(slot, end).intersect(target).filter(|_| inside)
                && !self.show_or_hide(run)
            {
                left.insert_pages(run);
                state.whole = true;
            }
            slot = end;
        }
        self.hidden.set(state, left);
    }

    /// Makes a run accessible, or at least wholly inaccessible: where the copy was read as everybody reads, it may be
    /// neither, and would be taken for changed by the program. False when it is not accessible.
    fn show_or_hide(&self, run: AddrRange) -> bool {
        if self.memory.is_some() {
            return protect(run, READ_WRITE).is_ok();
        }
        let shown = || protect(run, READ_WRITE).ok().map(|()| true);
        let hidden = || protect(run, MprotectFlags::empty()).ok().map(|()| false);
        (0..LOOKS).find_map(|_| shown().or_else(hidden)).unwrap_or(false)
    }

    /// The part of a leaf around some pages of it that lies in the same mapping.
    fn piece_of_leaf(&self, leaf: &Leaf, part: AddrRange) -> AddrRange {
        let (mut start, mut end) = (part.start(), part.end());
        let accessible = Protection::READ | Protection::WRITE;
        if let Ok(Some(mapping)) = self.mappings.at(part.start())
            && mapping.protection == accessible
        {
            start = start.min(mapping.range.start().max(leaf.range().start()));
            end = end.max(mapping.range.end().min(leaf.range().end()));
        }
        AddrRange::from_bounds(start.get(), end.get())
    }

    fn hide_and_copy(&self, target: AddrRange, taking: &Taking) -> std::result::Result<(), Stop> {
        let Some(memory) = &self.memory else {
            // Stores wait from here on, and the copy is read as everybody reads.
            protect(target, MprotectFlags::READ)?;
            // SAFETY: `to` is a run of frames of the caller's, `from` a part of the process that can still be read.
            self.copy_contents(taking, &|from, to| unsafe {
                let count = from.len() as usize;
                copy::present(to.as_ptr(), from.start().as_ptr(), count) == count
            })?;
            return protect(target, MprotectFlags::empty());
        };
        protect(target, MprotectFlags::empty())?;
        self.copy_contents(taking, &|from, to| memory.copy_in(from, to))
    }

    /// Copies what is there; the frames of holes stay empty.
    fn copy_contents(
        &self,
        taking: &Taking,
        copy: &dyn Fn(AddrRange, VirtAddr) -> bool,
    ) -> std::result::Result<(), Stop> {
        let Taking { part, frame, is_file } = *taking;
        let to = |from: AddrRange| frame.plus_pages(part.index_of(from.start()));
        if is_file || !self.presence.tells_swap() {
            return if copy(part, frame) { Ok(()) } else { Err(Stop::Busy) };
        }
        let mut whole = true;
        let scanned = self.presence.scan(part, &mut |run, present| {
            if matches!(present, Present::Page | Present::File | Present::Swapped) {
                whole &= copy(run, to(run));
            }
        });
        if whole && scanned.is_ok() { Ok(()) } else { Err(Stop::Busy) }
    }

    /// As [`crate::engine::Engine::give`].
    pub(super) fn give(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        let mut done = 0;
        for part in range.by_leaf() {
            let Some(leaf) = self.hidden.leaf(part.start()) else {
                return stopped(done, Stop::Exists);
            };
            let state = &mut *leaf.lock();
            let first = part.start().index_in_leaf();
            let away = (first..first + part.pages()).take_while(|slot| state.away.contains(*slot));
            let part = part.sub(0, away.count().max(1));
            if !state.away.contains(first) {
                return stopped(done, Stop::Exists);
            }
            match self.give_part(leaf, state, part, frame.plus_pages(done)) {
                Ok(given) if given == part.pages() => done += given,
                Ok(given) => return stopped(done + given, Stop::Retry),
                Err(stop) => return stopped(done, stop),
            }
            if part.end() < range.end() && part.end().index_in_leaf() != 0 {
                return stopped(done, Stop::Exists);
            }
        }
        stopped(done, Stop::Done)
    }

    /// Returns how many pages from the start of the part are home.
    fn give_part(
        &self,
        leaf: &Leaf,
        state: &mut State,
        mut part: AddrRange,
        frame: VirtAddr,
    ) -> std::result::Result<usize, Stop> {
        match self.is_intact(state, part) {
            Ok(true) => {}
            Ok(false) => {
                self.suspect(part);
                return Err(Stop::Retry);
            }
            Err(_) => return Err(Stop::NoMemory),
        }
        let in_place = match &self.memory {
            Some(memory) => memory.copy_out(frame, part),
            None => replace(part, frame).is_ok(),
        };
        if !in_place {
            part = self.give_short_file(part, frame).ok_or(Stop::NoMemory)?;
        }
        for page in 0..part.pages() {
            let slot = part.page_at(page).index_in_leaf();
            state.away.remove(slot);
            state.marked.remove(slot);
        }
        if self.memory.is_none() {
            // It came with its access.
            self.forget(state, part);
        }
        self.show(leaf, state, part);
        Ok(part.pages())
    }

    /// Makes pages accessible that are all at home. When mappings are short, they wait for the others of their leaf.
    pub(super) fn show(&self, leaf: &Leaf, state: &mut State, part: AddrRange) {
        if !state.whole {
            if protect(part, READ_WRITE).is_ok() {
                return self.forget(state, part);
            }
            state.whole = true;
        }
        if !state.away.is_empty() {
            return;
        }
        self.show_all(leaf, state);
    }

    fn show_all(&self, leaf: &Leaf, state: &mut State) {
        let mut slot = 0;
        let mut left = state.poisoned;
        let wanted = state.hidden.without(&state.poisoned);
        while slot < LEAF_PAGES {
            let (end, inside) = wanted.run_at(slot);
            if inside && protect(leaf.pages(slot, end), READ_WRITE).is_err() {
                left.insert_pages(leaf.pages(slot, end));
            }
            slot = end;
        }
        state.whole = left != state.poisoned;
        self.hidden.set(state, left);
    }

    /// The pages are not hidden any more.
    pub(super) fn forget(&self, state: &mut State, part: AddrRange) {
        let mut hidden = state.hidden;
        for page in 0..part.pages() {
            let slot = part.page_at(page).index_in_leaf();
            hidden.remove(slot);
            [&mut state.away, &mut state.marked, &mut state.poisoned, &mut state.of_file]
                .into_iter()
                .for_each(|set| set.remove(slot));
        }
        self.hidden.set(state, hidden);
    }

    /// A page without contents anywhere else becomes accessible.
    pub(super) fn show_page(&self, page: VirtAddr) -> Stop {
        let Some(leaf) = self.hidden.leaf(page) else { return Stop::Exists };
        let state = &mut *leaf.lock();
        let slot = page.index_in_leaf();
        if !state.hidden.contains(slot) {
            return Stop::Exists;
        }
        state.away.remove(slot);
        state.marked.remove(slot);
        self.show(leaf, state, AddrRange::page_of(page));
        if state.hidden.contains(slot) { Stop::WithLeaf } else { Stop::Done }
    }

    /// A page of a device that lost it: never accessible again.
    pub(super) fn poison(&self, page: VirtAddr) -> bool {
        let Some(leaf) = self.hidden.leaf_or_new(page) else { return false };
        let state = &mut *leaf.lock();
        let slot = page.index_in_leaf();
        state.poisoned.insert(slot);
        state.away.remove(slot);
        state.marked.remove(slot);
        if self.is_of_file(page) {
            state.of_file.insert(slot);
        }
        let mut hidden = state.hidden;
        hidden.insert(slot);
        self.hidden.set(state, hidden);
        protect(AddrRange::page_of(page), MprotectFlags::empty()).is_ok()
    }

    /// Runs something on the parts of some bytes, leaf by leaf, while no page of them can leave. False when one is away,
    /// or when `access` says so.
    pub(super) fn while_present(
        &self,
        addr: VirtAddr,
        len: usize,
        mut access: impl FnMut(VirtAddr, std::ops::Range<usize>) -> bool,
    ) -> bool {
        let mut done = 0;
        while done < len {
            let here = VirtAddr::new(addr.get() + done as u64);
            let Some(leaf) = self.hidden.leaf_or_new(here) else { return false };
            let state = leaf.lock();
            let end = len.min(done + (leaf.range().end().get() - here.get()) as usize);
            let last = VirtAddr::new(addr.get() + end as u64 - 1).index_in_leaf();
            let is_away = |slot| state.away.contains(slot) || state.poisoned.contains(slot);
            if (here.index_in_leaf()..=last).any(is_away) || !access(here, done..end) {
                return false;
            }
            done = end;
        }
        true
    }

    /// The watched mapping's pages stay small: a huge page made by the kernel would fill the marks of its neighbours.
    pub(super) fn keep_small(range: AddrRange) {
        let start = range.start().as_ptr().cast();
        // SAFETY: the advice changes no contents. A kernel without huge pages refuses it, and needs it not.
        let _ =
            unsafe { rustix::mm::madvise(start, range.len() as usize, Advice::LinuxNoHugepage) };
    }
}

/// Moves a copy of frames into the place of inaccessible pages, with access, at once. Pages that the program locked in
/// memory meanwhile are locked again, as far as its limit allows.
fn replace(part: AddrRange, frame: VirtAddr) -> std::result::Result<(), Errno> {
    inject::checked(Point::Remap)?;
    let len = part.len() as usize;
    let access = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
    // SAFETY: the new mapping replaces nothing; it is filled from frames of the caller's, and then takes the place of
    // pages that the engine owns (they are away).
    unsafe {
        let flags = rustix::mm::MapFlags::PRIVATE;
        let staging = rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, flags)?;
        std::ptr::copy_nonoverlapping(frame.as_ptr().cast_const(), staging.cast::<u8>(), len);
        let target = part.start().as_ptr().cast();
        let locked = locked_pages(part);
        let moved = rustix::mm::mremap_fixed(staging, len, len, MremapFlags::MAYMOVE, target);
        if moved.is_err() {
            let _ = rustix::mm::munmap(staging, len);
        }
        for page in locked.filter(|_| moved.is_ok()) {
            let _ = rustix::mm::mlock(page.as_ptr().cast(), PAGE_SIZE);
        }
        moved.map(drop)
    }
}

/// The pages of a part that are locked in memory, looked for at once.
fn locked_pages(part: AddrRange) -> impl Iterator<Item = VirtAddr> {
    let first = part.start().index_in_leaf();
    let mut locked = PageSet::default();
    if memory::is_locked(part) {
        let pages = (0..part.pages()).map(|page| part.page_at(page));
        let is_locked = |page: &VirtAddr| memory::is_locked(AddrRange::page_of(*page));
        pages.filter(is_locked).for_each(|page| locked.insert(page.index_in_leaf()));
    }
    let is_locked = move |page: &usize| locked.contains(first + page);
    (0..part.pages()).filter(is_locked).map(move |page| part.page_at(page))
}

/// A quarter of the mappings that the process may still have: each run of hidden pages costs two.
fn runs_limit() -> usize {
    let number = |path| {
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<usize>().ok())
    };
    let limit = number("/proc/sys/vm/max_map_count").unwrap_or(65_530);
    let used = std::fs::read_to_string("/proc/self/maps").map_or(0, |text| text.lines().count());
    (limit.saturating_sub(used) / 4).max(4)
}

const _: () = assert!(PAGE_SIZE == 4096);
