//! Memory of the library's own mappings, which never migrate.
//!
//! A fault on a migrated page is answered by code of this library. If that code's data could itself be migrated, the
//! answer would wait for itself. So what the fault path needs lives here: page table, device page descriptors, lists
//! of a migration. The C and Python artefacts install [`Arena`] as their global allocator, so that all of Rust's
//! allocations in them live here too, and the process's `malloc` is never entered.
//!
//! One reserved region of address space is carved into power-of-two classes with free lists. Freed blocks stay with
//! their class; large ones give their memory back to the system.

use crate::addr::{AddrRange, VirtAddr};
use crate::inject::{self, Point};
use crate::sync::{Mutex, MutexGuard};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::alloc::{GlobalAlloc, Layout};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Address space reserved at first use; halved until the system grants it.
const RESERVATION: usize = 64 << 30;
const SMALLEST_RESERVATION: usize = 64 << 20;
const COMMIT_STEP: usize = 2 << 20;
const MIN_CLASS: u32 = 4;
const CLASSES: usize = 37;
/// Objects that [`keep_object`] has room for.
const OBJECTS: usize = 512;
/// The two counts of an `Arc`.
const ARC_HEADER: u64 = 16;
/// Blocks from this size on return their memory when freed.
const GIVE_BACK: usize = 128 << 10;

/// A global allocator over the library's own mappings.
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: hmm_core::arena::Arena = hmm_core::arena::Arena;
/// # fn main() {}
/// ```
#[derive(Debug, Default, Clone, Copy)]
pub struct Arena;

struct State {
    next: usize,
    committed: usize,
    end: usize,
    free: [*mut FreeBlock; CLASSES],
}

struct FreeBlock {
    next: *mut FreeBlock,
}

// SAFETY: the raw pointers lead only to free blocks of the arena, which the mutex around `State` guards.
unsafe impl Send for State {}

static STATE: Mutex<State> =
    Mutex::new(State { next: 0, committed: 0, end: 0, free: [ptr::null_mut(); CLASSES] });
static START: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);

/// Whether an address belongs to the arena.
pub fn contains(address: VirtAddr) -> bool {
    let address = address.get() as usize;
    START.load(Ordering::Acquire) <= address && address < END.load(Ordering::Acquire)
}

/// The arena's reserved addresses, if it was used at all.
fn bounds() -> Option<(u64, u64)> {
    let (start, end) = (START.load(Ordering::Acquire), END.load(Ordering::Acquire));
    (start != 0).then_some((start as u64, end as u64))
}

/// Reports the writable segments of the program or library that this code is a part of: its statics are needed on the
/// fault path too.
pub(crate) fn own_segments(report: &mut dyn FnMut(AddrRange)) {
    struct Visit<'a> {
        here: u64,
        report: &'a mut dyn FnMut(AddrRange),
    }
    unsafe extern "C" fn visit(
        object: *mut libc::dl_phdr_info,
        _: usize,
        visit: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: dl_iterate_phdr passes the pointer that it was given below.
        let visit = unsafe { &mut *visit.cast::<Visit<'_>>() };
        // SAFETY: it passes a valid object.
        let object = unsafe { &*object };
        let count = usize::from(object.dlpi_phnum);
        // SAFETY: the object has so many headers.
        let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, count) };
        let loaded = || headers.iter().filter(|header| header.p_type == libc::PT_LOAD);
        let start = |header: &libc::Elf64_Phdr| object.dlpi_addr + header.p_vaddr;
        let is_ours =
            loaded().any(|one| (start(one)..start(one) + one.p_memsz).contains(&visit.here));
        if is_ours {
            for header in loaded().filter(|header| header.p_flags & libc::PF_W != 0) {
                let range = AddrRange::covering(start(header), header.p_memsz);
                range.into_iter().for_each(&mut *visit.report);
            }
        }
        libc::c_int::from(is_ours)
    }
    let mut state = Visit { here: VirtAddr::from_ptr(&raw const STATE).get(), report };
    // SAFETY: `visit` matches the pointer that it gets, which lives during the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut state).cast()) };
}

impl State {
    fn reserve(&mut self) -> bool {
        let mut size = RESERVATION;
        while size >= SMALLEST_RESERVATION {
            // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
            let mapped = unsafe {
                rustix::mm::mmap_anonymous(
                    ptr::null_mut(),
                    size,
                    ProtFlags::empty(),
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            };
            if let Ok(start) = mapped {
                let start = start.expose_provenance();
                // Nothing is in there yet, but `gcore` would write all of it as zeros. Failing is harmless.
                let _ = advise(start, size, Advice::LinuxDontDump);
                // The first page stays without access, so that the kernel never joins the arena to a neighbour: a
                // watch on that neighbour would reach into memory that the fault path needs.
                let first = start + COMMIT_STEP;
                (self.next, self.committed, self.end) = (first, first, start + size);
                END.store(self.end, Ordering::Release);
                START.store(start, Ordering::Release);
                return true;
            }
            size /= 2;
        }
        false
    }

    fn carve(&mut self, size: usize) -> *mut u8 {
        if self.end == 0 && !self.reserve() {
            return ptr::null_mut();
        }
        // Blocks are aligned to their own size up to a page; a page suffices for everything larger.
        let align = size.min(4096);
        let Some(end) =
            self.next.checked_next_multiple_of(align).and_then(|start| start.checked_add(size))
        else {
            return ptr::null_mut();
        };
        if end > self.end || !self.commit(end) {
            return ptr::null_mut();
        }
        self.next = end;
        ptr::with_exposed_provenance_mut(end - size)
    }

    fn commit(&mut self, end: usize) -> bool {
        if end <= self.committed {
            return true;
        }
        let target = end.next_multiple_of(COMMIT_STEP).min(self.end);
        // SAFETY: the range lies inside the arena's own reservation, above everything handed out so far.
        let done = unsafe {
            rustix::mm::mprotect(
                ptr::with_exposed_provenance_mut(self.committed),
                target - self.committed,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        };
        if done.is_ok() {
            let _ = advise(self.committed, target - self.committed, Advice::LinuxDoDump);
            self.committed = target;
        }
        done.is_ok()
    }
}

/// Says of addresses of the arena whether they belong into core dumps.
fn advise(start: usize, length: usize, advice: Advice) -> rustix::io::Result<()> {
    // SAFETY: the range lies inside the arena's own reservation, and neither advice changes what is in it.
    unsafe { rustix::mm::madvise(ptr::with_exposed_provenance_mut(start), length, advice) }
}

struct HeldForFork {
    _state: MutexGuard<'static, State>,
    _outside: MutexGuard<'static, Outside>,
}

// SAFETY: the thread that forks puts the guard away and takes it back; in the child that thread is the only one.
unsafe impl Send for HeldForFork {}

static FORK: Mutex<Option<HeldForFork>> = Mutex::new(None);

/// Takes the arena's locks across a fork, so that the child does not inherit them locked by a thread that it lacks.
pub(crate) fn lock_for_fork() {
    let outside = OUTSIDE.lock();
    *FORK.lock() = Some(HeldForFork { _state: STATE.lock(), _outside: outside });
}

/// Releases them, in parent and child.
pub(crate) fn unlock_after_fork() {
    let held = FORK.lock().take();
    drop(held);
}

/// Class index and block size for a layout, or `None` when it is too large or too strictly aligned.
fn class_of(layout: Layout) -> Option<(usize, usize)> {
    if layout.align() > 4096 {
        return None;
    }
    let size = layout.size().max(layout.align()).checked_next_power_of_two()?.max(1 << MIN_CLASS);
    let class = (size.trailing_zeros() - MIN_CLASS) as usize;
    (class < CLASSES).then_some((class, size))
}

fn allocate(layout: Layout) -> *mut u8 {
    let Some((class, size)) = class_of(layout) else { return ptr::null_mut() };
    let mut state = STATE.lock();
    let head = state.free[class];
    if head.is_null() {
        return state.carve(size);
    }
    // SAFETY: `head` is a free block of this class; its first bytes hold the link written by `release`.
    state.free[class] = unsafe { (*head).next };
    head.cast()
}

/// As [`allocate`], for callers that go on without: failures can be asked for. (Rust's own collections could not go on.)
fn allocate_if_possible(layout: Layout) -> *mut u8 {
    inject::fails(Point::Arena).map_or_else(|| allocate(layout), |_| ptr::null_mut())
}

/// # Safety
/// `block` came from [`allocate`] with the same layout and is not used any more.
unsafe fn release(block: *mut u8, layout: Layout) {
    let Some((class, size)) = class_of(layout) else { return };
    if size >= GIVE_BACK {
        // The first page stays: it holds the link.
        // SAFETY: the block is page aligned (carve), unused, and in a mapping of the arena's own.
        let _ = unsafe {
            rustix::mm::madvise(block.add(4096).cast(), size - 4096, Advice::LinuxDontNeed)
        };
    }
    let block: *mut FreeBlock = block.cast();
    let mut state = STATE.lock();
    // SAFETY: the block is unused, and at least 16 bytes large and aligned (MIN_CLASS).
    unsafe { (*block).next = state.free[class] };
    state.free[class] = block;
}

// SAFETY: blocks are disjoint, at least as large and aligned as asked, and live until `dealloc`.
unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        allocate(layout)
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is the one `release` asks for.
        unsafe { release(block, layout) }
    }
}

/// Moves a value into the arena; `None` when memory is short.
pub(crate) fn put<T>(value: T) -> Option<NonNull<T>> {
    let place = NonNull::new(allocate_if_possible(Layout::new::<T>()).cast::<T>())?;
    // SAFETY: the block is new, large enough for T and aligned for it.
    unsafe { place.as_ptr().write(value) };
    Some(place)
}

/// Drops a value that [`put`] placed.
///
/// # Safety
/// `place` came from [`put`], and nobody can reach it any more.
pub(crate) unsafe fn remove<T>(place: NonNull<T>) {
    // SAFETY: the value is initialised, and the caller has the only pointer.
    unsafe { ptr::drop_in_place(place.as_ptr()) };
    // SAFETY: `put` allocated the block with this layout.
    unsafe { release(place.as_ptr().cast(), Layout::new::<T>()) };
}

/// A shared value in the arena: an `Arc` that never migrates, whatever the program's global allocator is.
#[derive(Debug)]
pub(crate) struct Shared<T>(NonNull<Counted<T>>);

#[derive(Debug)]
struct Counted<T> {
    count: AtomicUsize,
    value: T,
}

// SAFETY: like Arc: the value is shared between threads, and dropped by whichever lets go last.
unsafe impl<T: Send + Sync> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Moves a value into the arena; `None` when memory is short.
    pub(crate) fn new(value: T) -> Option<Self> {
        put(Counted { count: AtomicUsize::new(1), value }).map(Self)
    }

    /// Whether both are the same value.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        // SAFETY: the value lives as long as this reference counts.
        unsafe { self.0.as_ref() }.count.fetch_add(1, Ordering::Relaxed);
        Self(self.0)
    }
}

impl<T> std::ops::Deref for Shared<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the value lives as long as this reference counts, and nobody has it exclusively.
        &unsafe { self.0.as_ref() }.value
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: this reference still counts.
        let last = unsafe { self.0.as_ref() }.count.fetch_sub(1, Ordering::AcqRel) == 1;
        if last {
            // SAFETY: it was the last one, and the value came from `put`.
            unsafe { remove(self.0) };
        }
    }
}

/// A fixed-size slice in the arena, dropped like a `Box<[T]>`.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: a buffer owns its elements, like a Box.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: shared access to the buffer is shared access to its elements.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T> Buffer<T> {
    /// `len` elements made by `make`, or `None` when memory is short.
    pub(crate) fn new(len: usize, mut make: impl FnMut(usize) -> T) -> Option<Self> {
        let start =
            NonNull::new(allocate_if_possible(Layout::array::<T>(len.max(1)).ok()?).cast::<T>())?;
        for index in 0..len {
            // SAFETY: the block has room for `len` elements of T.
            unsafe { start.as_ptr().add(index).write(make(index)) };
        }
        Some(Self { start, len })
    }
}

impl<T> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: all `len` elements were written by `new`, and the buffer owns them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        let elements: *mut [T] = &mut **self;
        // SAFETY: the elements are initialised, and nobody can reach them any more.
        unsafe { ptr::drop_in_place(elements) };
        if let Ok(layout) = Layout::array::<T>(self.len.max(1)) {
            // SAFETY: the block came from `allocate` with this layout.
            unsafe { release(self.start.as_ptr().cast(), layout) };
        }
    }
}

/// A list in the arena with a fixed room.
#[derive(Debug)]
pub(crate) struct List<T> {
    room: Buffer<Option<T>>,
    len: usize,
}

impl<T> List<T> {
    /// An empty list; `None` when memory is short.
    pub(crate) fn new(room: usize) -> Option<Self> {
        Some(Self { room: Buffer::new(room, |_| None)?, len: 0 })
    }

    /// Appends a value, or gives it back when there is no room.
    pub(crate) fn push(&mut self, value: T) -> Result<(), T> {
        match self.room.get_mut(self.len) {
            Some(place) => {
                *place = Some(value);
                self.len += 1;
                Ok(())
            }
            None => Err(value),
        }
    }

    /// Removes the first value that fits; the others keep their order.
    pub(crate) fn remove_first(&mut self, fits: impl Fn(&T) -> bool) -> bool {
        let Some(at) = self.iter().position(fits) else { return false };
        self.room[at..self.len].rotate_left(1);
        self.len -= 1;
        self.room[self.len] = None;
        true
    }

    /// Takes the last value out.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        self.room[self.len].take()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.room[..self.len].iter().flatten()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.room[..self.len].iter_mut().flatten()
    }
}

/// Bounds of objects.
type Outside = [(u64, u64); OBJECTS];

/// Long-lived objects of the library that lie in the program's heap, because the program holds them by `Arc`.
static OUTSIDE: Mutex<Outside> = Mutex::new([(0, 0); OBJECTS]);

/// Keeps an object (and the counts in front of it) from migrating, in every mm. False when there are too many.
pub(crate) fn keep_object<T: ?Sized>(object: &Arc<T>) -> bool {
    let start = VirtAddr::from_ptr(Arc::as_ptr(object)).get();
    let end = start + size_of_val(&**object) as u64;
    let mut outside = OUTSIDE.lock();
    let place = outside.iter_mut().find(|place| place.0 == 0);
    place.map(|place| *place = (start - ARC_HEADER, end)).is_some()
}

/// Undoes [`keep_object`]; called when the object is dropped.
pub(crate) fn forget_object<T: ?Sized>(object: &T) {
    let start = VirtAddr::from_ptr(object).get();
    for place in OUTSIDE.lock().iter_mut().filter(|place| place.0 + ARC_HEADER == start) {
        *place = (0, 0);
    }
}

/// Reports the memory of the library that is needed on the fault path.
pub(crate) fn each_own(mut report: impl FnMut(AddrRange)) {
    bounds().into_iter().for_each(|(start, end)| report(AddrRange::from_bounds(start, end)));
    for (start, end) in OUTSIDE.lock().iter().filter(|place| place.0 != 0) {
        AddrRange::covering(*start, end - start).into_iter().for_each(&mut report);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_disjoint_aligned_and_recycled() {
        let layout = Layout::from_size_align(100, 64).unwrap();
        let (first, second) = (allocate(layout), allocate(layout));
        assert_eq!(first.addr() % 64, 0);
        assert!(first.addr().abs_diff(second.addr()) >= 128);
        // SAFETY: `first` is live and 100 bytes large.
        unsafe { first.write_bytes(7, 100) };
        assert!(contains(VirtAddr::from_ptr(first)));
        // SAFETY: allocated above with this layout, used no more.
        unsafe { release(first, layout) };
        assert_eq!(allocate(layout).addr(), first.addr());
    }

    #[test]
    fn large_buffers_are_zero_where_asked() {
        let buffer = Buffer::new(1 << 20, |index| index as u64).unwrap();
        assert_eq!(buffer[(1 << 20) - 1], (1 << 20) - 1);
    }
}
