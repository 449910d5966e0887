//! Changes of the layout: the program says before `munmap` and its kin that it is about to make one, and afterwards
//! what came of it.
//!
//! libc's own calls are not among them: `free`, `realloc`, the trimming of the heap and the stacks of threads reach the
//! kernel inside libc, by functions that cannot be replaced. So an engine that is told by the kernel goes on listening,
//! and one that is not goes on looking.

use super::{HandlersOff, NOTHING_TO_DO, held_for, hold_for, is_ours_to_serve};
use crate::addr::{AddrRange, PAGE_SIZE, USER_END, VirtAddr};
use crate::arena;
use crate::engine::VmaKind;
use crate::error::Error;
use crate::mm::Mm;
use crate::mm::changes::{Announced, Change};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// What `Announcement::kind` says.
const UNMAP: c_int = 1;
const DROP: c_int = 2;
const PROTECT: c_int = 3;
const MOVE: c_int = 4;
const DETACH: c_int = 5;

/// `struct hmm_preload_change`, as hmm-preload has it.
#[repr(C)]
struct Announcement {
    kind: c_int,
    address: *const c_void,
    length: usize,
    /// For [`MOVE`]: what is replaced at the new place; null: nothing.
    target: *const c_void,
    target_length: usize,
    /// Ours until the end.
    kept: [u64; KEPT],
}

const KEPT: usize = 64;

/// What lies in `Announcement::kept` between the beginning and the end.
struct Begun {
    mm: Arc<Mm>,
    announced: Announced,
    _off: HandlersOff,
}

const _: () = assert!(size_of::<Begun>() <= size_of::<[u64; KEPT]>() && align_of::<Begun>() <= 8);

/// `struct hmm_preload_layout`, as hmm-preload has it.
#[repr(C)]
struct Hooks {
    size: usize,
    begin: unsafe extern "C" fn(*mut Announcement) -> c_int,
    end: unsafe extern "C" fn(*mut Announcement, c_int),
}

type Attach = unsafe extern "C" fn(*const Hooks);

fn find() -> Option<Attach> {
    // SAFETY: the name is a C string.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"hmm_preload_attach_layout".as_ptr()) };
    // SAFETY: the function of this name has this form, and is never unloaded.
    (!found.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Attach>(found) })
}

/// Whether the program was started with `libhmm_preload.so`.
pub(crate) fn is_loaded() -> bool {
    find().is_some()
}

/// Lets the program announce changes of its layout to this mm. False without `libhmm_preload.so`.
pub(crate) fn attach(mm: &Arc<Mm>) -> bool {
    // Never freed: a call may be under way with older ones. An mm is opened rarely.
    let (Some(attach), Some(hooks)) =
        (find(), arena::put(Hooks { size: size_of::<Hooks>(), begin, end }))
    else {
        return false;
    };
    hold_for(mm);
    mm.set_ordered();
    // SAFETY: the hooks live for ever, and may be called from any thread.
    unsafe { attach(hooks.as_ptr()) };
    true
}

/// 0: begun, and `end` must be called; 1: nothing to do; `-errno`: the program must not make its call, which fails so.
unsafe extern "C" fn begin(announcement: *mut Announcement) -> c_int {
    let off = HandlersOff::begin();
    // SAFETY: the caller's own, valid until the end.
    let announcement = unsafe { &mut *announcement };
    let Some(mm) = held_for().filter(|mm| mm.is_ordered() && !is_ours_to_serve(mm)) else {
        return NOTHING_TO_DO;
    };
    let Some(change) = announcement.change(&mm).filter(|change| !change.concerns(own_frames()))
    else {
        return NOTHING_TO_DO;
    };
    match mm.begin_change(change) {
        Ok(announced) => {
            let begun = Begun { mm, announced, _off: off };
            // SAFETY: there is room, and it is aligned (asserted above); nothing of value lies there.
            unsafe { announcement.kept.as_mut_ptr().cast::<Begun>().write(begun) };
            0
        }
        Err(error) => -errno_of(change, &error),
    }
}

unsafe extern "C" fn end(announcement: *mut Announcement, made: c_int) {
    // SAFETY: `begin` has written it, said 0, and this is called once after it.
    let begun = unsafe { (&raw mut (*announcement).kept).cast::<Begun>().read() };
    begun.mm.end_change(&begun.announced, made != 0);
}

impl Announcement {
    /// `None`: the kernel shall say what is wrong with it.
    fn change(&self, mm: &Mm) -> Option<Change> {
        let range = range_of(self.address, self.length)?;
        match self.kind {
            UNMAP => Some(Change::Unmap(range)),
            DROP => Some(Change::Drop(range)),
            PROTECT => Some(Change::Protect(range)),
            MOVE => Some(Change::Move { from: range, over: self.target_range(range)? }),
            DETACH => segment_at(mm, range.start()).map(Change::Unmap),
            _ => None,
        }
    }

    fn target_range(&self, from: AddrRange) -> Option<Option<AddrRange>> {
        if self.target.is_null() {
            return Some(None);
        }
        let over = range_of(self.target, self.target_length)?;
        (!over.overlaps(from)).then_some(Some(over))
    }
}

/// The kernel takes whole pages from an address that begins one.
fn range_of(address: *const c_void, length: usize) -> Option<AddrRange> {
    let start = VirtAddr::from_ptr(address).get();
    let length = (length as u64).checked_next_multiple_of(PAGE_SIZE as u64)?;
    let end = start.checked_add(length)?;
    AddrRange::new(start, end.min(USER_END)).ok().filter(|_| end <= USER_END)
}

/// The segment of shared memory at an address. Where two of the same lie side by side it is both: what they have is in
/// no migration, so that nothing but mirrors hears of it.
fn segment_at(mm: &Mm, start: VirtAddr) -> Option<AddrRange> {
    let vma = mm.find_vma(start).ok().flatten()?;
    let is_shared = matches!(vma.kind, VmaKind::Shared | VmaKind::Huge);
    let range = AddrRange::new(start.get(), vma.range.end().get()).ok()?;
    (is_shared && vma.range.contains(start)).then_some(range)
}

/// The stack from here on downwards: who drops or unmaps what lies below its own frames must not find ours there.
fn own_frames() -> AddrRange {
    const BELOW: u64 = 256 << 10;
    let marker = 0_u8;
    let here = VirtAddr::from_ptr(&raw const marker).page().get();
    AddrRange::from_bounds(here.saturating_sub(BELOW), here + 2 * PAGE_SIZE as u64)
}

/// As the calls themselves would say it.
fn errno_of(change: Change, error: &Error) -> c_int {
    match (change, error) {
        (Change::Protect(_), Error::Lost { .. } | Error::Fault { .. }) => libc::EACCES,
        (Change::Move { .. }, Error::Lost { .. } | Error::Fault { .. }) => libc::EFAULT,
        _ => libc::ENOMEM,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::model::{ModelConfig, ModelEngine};
    use crate::flags::{Capabilities, Protection};
    use crate::mm::changes::Still;

    fn announce(kind: c_int, at: u64, length: usize, target: u64) -> Option<Change> {
        let mm = Mm::with_engine(ModelEngine::new(ModelConfig::default())).unwrap();
        let (address, target) = (at as *const c_void, target as *const c_void);
        let target_length = length;
        let one = Announcement { kind, address, length, target, target_length, kept: [0; KEPT] };
        one.change(&mm)
    }

    #[test]
    fn whole_pages_are_announced_and_what_is_wrong_is_left_to_the_kernel() {
        let range = |start, end| AddrRange::new(start, end).unwrap();
        assert_eq!(announce(UNMAP, 0x5000, 1, 0), Some(Change::Unmap(range(0x5000, 0x6000))));
        assert_eq!(announce(DROP, 0x5000, 4097, 0), Some(Change::Drop(range(0x5000, 0x7000))));
        let moved = Change::Move { from: range(0x5000, 0x6000), over: Some(range(0x9000, 0xa000)) };
        assert_eq!(announce(MOVE, 0x5000, 4096, 0x9000), Some(moved));
        let (from, over) = (range(0x5000, 0x6000), None);
        assert_eq!(announce(MOVE, 0x5000, 4096, 0), Some(Change::Move { from, over }));
        for (kind, at, length, target) in [
            (UNMAP, 0x5001, 4096, 0),
            (UNMAP, 0x5000, 0, 0),
            (DROP, 0x5000, usize::MAX, 0),
            (PROTECT, USER_END, 4096, 0),
            (MOVE, 0x5000, 8192, 0x6000),
            (MOVE, 0x5000, 4096, 0x9001),
            (9, 0x5000, 4096, 0),
        ] {
            assert_eq!(announce(kind, at, length, target), None, "{kind} {at:#x} {length}");
        }
    }

    #[test]
    fn what_is_announced_begins_and_ends_while_the_mm_is_open() {
        let model = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(model.clone()).unwrap();
        let both = Protection::READ | Protection::WRITE;
        let range = model.mmap(4, both, VmaKind::Anonymous).unwrap();
        let (address, length) = (range.start().as_ptr().cast_const().cast(), range.len() as usize);
        let (target, target_length) = (std::ptr::null(), 0);
        let mut one =
            Announcement { kind: UNMAP, address, length, target, target_length, kept: [0; KEPT] };
        let still = || {
            let mut pages = 0;
            mm.changes.within(range, Still::Stay, |part| pages += part.pages());
            pages
        };
        hold_for(&mm);
        // SAFETY: the announcement is this frame's; addresses of the model's memory are only compared.
        let mut begins = || unsafe { begin(&raw mut one) };
        assert_eq!(begins(), NOTHING_TO_DO);
        mm.set_ordered();
        assert!(mm.capabilities().contains(Capabilities::ORDERED));
        assert_eq!((begins(), still()), (0, 4));
        // SAFETY: it has begun.
        unsafe { end(&raw mut one, 0) };
        assert_eq!(still(), 0);
        mm.close().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { begin(&raw mut one) }, NOTHING_TO_DO);
    }
}
