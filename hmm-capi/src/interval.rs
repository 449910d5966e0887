//! Interval notifiers under the names of today's kernels: who is told of changes to a range, and the numbers by which a look
//! at it is validated.

use crate::error::{record, record_outcome};
use crate::handle::{Opaque, check_pointer, invalid};
use crate::hold;
use crate::mm::{self, MmHandle, mm_struct};
use crate::ret::IntoC;
use crate::subscription::{Subscription, Subscriptions};
use hmm_core::{
    AddrRange, Error, InvalidateEvent, Invalidation, NotifierOps, OwnerId, PAGE_SIZE, Result,
    USER_END, VirtAddr,
};
use std::ffi::{c_int, c_uint, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a range is invalidated. The values are the kernel's.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub enum mmu_notifier_event {
    /// munmap(), or the old place of an mremap().
    MMU_NOTIFY_UNMAP = 0,
    /// The contents are replaced or dropped, or the page is another one: madvise(), a page that
    /// comes home, a page that the CPU takes back from its exclusive user.
    MMU_NOTIFY_CLEAR = 1,
    /// The protection of the mapping changes. Only where the program announces that: see
    /// HMM_CAPABILITY_ORDERED.
    MMU_NOTIFY_PROTECTION_VMA = 2,
    /// The kernel's, for single pages; not used here.
    MMU_NOTIFY_PROTECTION_PAGE = 3,
    /// The kernel's, for its tracking of written pages; not used here.
    MMU_NOTIFY_SOFT_DIRTY = 4,
    /// The address space is being closed: start is 0, end ULONG_MAX, and the device must not use it
    /// any more.
    MMU_NOTIFY_RELEASE = 5,
    /// Pages migrate; owner is the pgmap_owner of who migrates them.
    MMU_NOTIFY_MIGRATE = 6,
    /// Pages become one device's alone; owner is who asked for that.
    MMU_NOTIFY_EXCLUSIVE = 7,
}

/// One change of the CPU page table, as invalidate() receives it.
#[derive(Debug)]
#[repr(C)]
pub struct mmu_notifier_range {
    /// The address space.
    pub mm: *mut mm_struct,
    /// First address that changes; may be below the subscription's first one.
    pub start: c_ulong,
    /// First address behind what changes; may be above the subscription's last one.
    pub end: c_ulong,
    /// MMU_NOTIFIER_RANGE_BLOCKABLE, always: callbacks may sleep.
    pub flags: c_uint,
    /// Why.
    pub event: mmu_notifier_event,
    /// For MMU_NOTIFY_MIGRATE and MMU_NOTIFY_EXCLUSIVE: on whose behalf, so that a driver knows its
    /// own changes; otherwise NULL.
    pub owner: *mut c_void,
}

/// A driver's side of an interval notifier. Copied by mmu_interval_notifier_insert().
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mmu_interval_notifier_ops {
    /// Mandatory. The CPU page table is about to change inside the subscription: take the driver's
    /// update lock, call mmu_interval_set_seq() with cur_seq, drop the device's translations of the
    /// range and wait until the device uses none of them, then return: the change waits for it.
    /// Calls for one subscription may come from several threads at once.
    ///
    /// Returns true. (False is for kernel ranges that are not blockable, which there are none of
    /// here; the change is made then all the same.)
    ///
    /// Called with no lock of the library held. It must not touch memory that may migrate
    /// (hmm_pin_range() what it needs), must not call malloc or free, must not call a function that
    /// this header does not mark "callbacks included", and must not leave by longjmp or an
    /// exception.
    pub invalidate: Option<
        unsafe extern "C" fn(
            interval_sub: *mut mmu_interval_notifier,
            range: *const mmu_notifier_range,
            cur_seq: c_ulong,
        ) -> bool,
    >,
}

/// First and last address of a subscription.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_interval {
    /// First address.
    pub start: c_ulong,
    /// Last address, inclusive.
    pub last: c_ulong,
}

/// A subscription to the changes of a range. The driver embeds it in a structure of its own, and
/// gets back to that with container_of(). It need not be cleared before.
///
/// Its pages are pinned while it is inserted. It must not move, and may be freed once
/// mmu_interval_notifier_remove() returned.
#[derive(Debug)]
#[repr(C)]
pub struct mmu_interval_notifier {
    /// The range, as given to mmu_interval_notifier_insert(); to be read only.
    pub interval_tree: hmm_interval,
    /// As given to mmu_interval_notifier_insert(); not looked at any more.
    pub ops: *const mmu_interval_notifier_ops,
    /// As given to mmu_interval_notifier_insert(), without a reference.
    pub mm: *mut mm_struct,
    /// What mmu_interval_set_seq() stored.
    pub invalidate_seq: c_ulong,
    /// The library's; room for later versions.
    pub reserved: [c_ulong; 4],
}

/// `MMU_NOTIFIER_RANGE_BLOCKABLE`.
const BLOCKABLE: c_uint = 1;
/// What `mmu_interval_read_begin` returns when it failed: never the number of a subscription.
const NEVER: c_ulong = c_ulong::MAX;

/// Interval notifiers that are inserted.
pub(crate) static INTERVALS: Subscriptions<mmu_interval_notifier_ops, 4096> =
    Subscriptions::new("not an inserted mmu_interval_notifier", "interval notifiers (4096)");

type Interval = Subscription<mmu_interval_notifier_ops>;

/// Carries callbacks from the core to the driver.
struct Calls(Arc<Interval>);

fn event_of(event: InvalidateEvent) -> mmu_notifier_event {
    use mmu_notifier_event as c;
    match event {
        InvalidateEvent::Unmap => c::MMU_NOTIFY_UNMAP,
        InvalidateEvent::Clear => c::MMU_NOTIFY_CLEAR,
        InvalidateEvent::Protection => c::MMU_NOTIFY_PROTECTION_VMA,
        InvalidateEvent::Release => c::MMU_NOTIFY_RELEASE,
        InvalidateEvent::Migrate => c::MMU_NOTIFY_MIGRATE,
        InvalidateEvent::Exclusive => c::MMU_NOTIFY_EXCLUSIVE,
    }
}

/// The owner that C code named by a pointer.
pub(crate) fn owner_from(owner: *const c_void) -> OwnerId {
    OwnerId::from_word(owner.expose_provenance() as u64)
}

fn range_of(mm: &Arc<MmHandle>, update: &Invalidation) -> mmu_notifier_range {
    let (start, end) = match update.event {
        InvalidateEvent::Release => (0, c_ulong::MAX),
        _ => (update.range.start().get(), update.range.end().get()),
    };
    let owner = update.owner.map_or(0, |owner| owner.word() as usize);
    mmu_notifier_range {
        mm: mm::pointer_to(mm),
        start,
        end,
        flags: BLOCKABLE,
        event: event_of(update.event),
        owner: ptr::with_exposed_provenance_mut(owner),
    }
}

impl NotifierOps for Calls {
    fn invalidate(&self, update: &Invalidation) {
        if let (Some(interval), Some(call)) = (self.0.object(), self.0.ops.invalidate)
            && let Ok(notifier) = self.0.notifier()
        {
            let range = range_of(&self.0.mm, update);
            // SAFETY: the subscription is inserted, so by the driver's promise it is alive and the function callable.
            unsafe { call(interval, &raw const range, notifier.sequence()) };
        }
    }
}

/// The driver's callback, checked and copied.
fn copy_ops(ops: *const mmu_interval_notifier_ops) -> Result<mmu_interval_notifier_ops> {
    check_pointer(ops, "ops is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct mmu_interval_notifier_ops.
    let copy = unsafe { ptr::read(ops) };
    if copy.invalidate.is_none() {
        return Err(invalid(ops.addr() as u64, "ops->invalidate is NULL"));
    }
    Ok(copy)
}

/// The pages of a subscription, and its last address. What lies above the user address space never changes.
fn pages_of(start: u64, length: u64) -> Result<(AddrRange, u64)> {
    let last = length.checked_sub(1).and_then(|above| start.checked_add(above));
    let Some(last) = last else {
        let call = "mmu_interval_notifier_insert (length is 0, or the range overflows)";
        return Err(Error::Os { call, address: VirtAddr::new(start), errno: libc::EOVERFLOW });
    };
    let end = VirtAddr::new(last.min(USER_END - 1)).page().get() + PAGE_SIZE as u64;
    Ok((AddrRange::new(VirtAddr::new(start).page().get(), end)?, last))
}

/// Fills the driver's structure, before a first callback can read it.
fn fill_in(interval: *mut mmu_interval_notifier, contents: mmu_interval_notifier) {
    // SAFETY: `insert` found the pointer good, and the caller promises a struct mmu_interval_notifier.
    unsafe { interval.write(contents) };
}

/// Where the driver's structure keeps its handle.
fn handle_place(interval: *const mmu_interval_notifier) -> *mut *const Opaque {
    // SAFETY: callers checked the pointer, and C code promises a struct mmu_interval_notifier; nothing is read here.
    unsafe { (&raw const (*interval).reserved).cast_mut().cast() }
}

fn insert(
    interval: *mut mmu_interval_notifier,
    mm: &Arc<MmHandle>,
    bounds: (u64, u64),
    ops: *const mmu_interval_notifier_ops,
) -> Result<()> {
    check_pointer(interval, "interval_sub is NULL or misaligned")?;
    let copy = copy_ops(ops)?;
    let (start, length) = bounds;
    let (pages, last) = pages_of(start, length)?;
    if hold::in_callback() {
        return Err(Error::Deadlock { what: "a notifier is inserted from inside a callback" });
    }
    INTERVALS.insert(interval, copy, mm, |handle, subscription| {
        let interval_tree = hmm_interval { start, last };
        let reserved = [handle.expose_provenance() as u64, 0, 0, 0];
        let (mm_pointer, invalidate_seq) = (mm::pointer_to(mm), 0);
        let contents =
            mmu_interval_notifier { interval_tree, ops, mm: mm_pointer, invalidate_seq, reserved };
        fill_in(interval, contents);
        mm.core.notifier_insert(pages, Arc::new(Calls(Arc::clone(subscription))))
    })?;
    Ok(())
}

fn insert_locked(
    interval: *mut mmu_interval_notifier,
    mm: *mut mm_struct,
    bounds: (u64, u64),
    ops: *const mmu_interval_notifier_ops,
) -> Result<()> {
    let mm = mm::get(mm)?;
    if !hold::holds_write(&mm) {
        return Err(invalid(interval.addr() as u64, "the caller does not hold hmm_mm_write_lock"));
    }
    insert(interval, &mm, bounds, ops)
}

/// The subscription of a structure that is inserted.
pub(crate) fn get(interval: *const mmu_interval_notifier) -> Result<Arc<Interval>> {
    check_pointer(interval, "the mmu_interval_notifier is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct mmu_interval_notifier. The handle may be anything.
    let handle = unsafe { handle_place(interval).read() };
    INTERVALS.get(handle, interval)
}

fn remove(interval: *mut mmu_interval_notifier) -> Result<()> {
    let Ok(subscription) = get(interval) else { return Ok(()) };
    subscription.switch_off();
    // SAFETY: it is inserted, so by the driver's promise it is alive.
    let handle = unsafe { handle_place(interval).read() };
    INTERVALS.remove(handle, &subscription)
}

/// Whether a number is out of date; a structure that is not inserted has no number that is not.
fn is_over(interval: *const mmu_interval_notifier, seq: u64) -> bool {
    let asked = get(interval).and_then(|one| Ok(one.notifier()?.read_retry(seq)));
    asked.inspect_err(record).unwrap_or(true)
}

fn set_seq(interval: *mut mmu_interval_notifier, seq: u64) -> Result<()> {
    get(interval)?;
    // SAFETY: it is inserted, so by the driver's promise it is alive.
    let place = unsafe { AtomicU64::from_ptr(&raw mut (*interval).invalidate_seq) };
    place.store(seq, Ordering::Release);
    Ok(())
}

/// Subscribes to the changes of a range: from its return on, ops->invalidate is called before the
/// CPU page table changes in it, in every part that a call of the library has looked at or migrated.
///
/// Any number of subscriptions may overlap. 0 and ULONG_MAX & PAGE_MASK stand for the whole address
/// space. Unlike the kernel's, it does not take the lock of the address space.
///
/// @param interval_sub  The driver's structure; filled in.
/// @param mm            The address space. No reference is taken: remove the subscription before
///                      the last hmm_mm_put(), or after it; it hears of MMU_NOTIFY_RELEASE then.
/// @param start         First address; what changes in its page is told.
/// @param length        Bytes.
/// @param ops           The driver's callback; copied.
/// @return 0, or:
///  - -EOVERFLOW: length is 0, or start + length - 1 is above ULONG_MAX;
///  - -EINVAL: interval_sub, ops or ops->invalidate is NULL, a pointer is misaligned, mm is no live
///    handle, or the range begins above the user address space;
///  - -EBUSY: it is inserted already;
///  - -EDEADLK: inside a callback;
///  - -ENOMEM: more than 4096 subscriptions, mirrors and active ranges;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: mmu_interval_notifier_insert() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_notifier_insert(
    interval_sub: *mut mmu_interval_notifier,
    mm: *mut mm_struct,
    start: c_ulong,
    length: c_ulong,
    ops: *const mmu_interval_notifier_ops,
) -> c_int {
    mm::get(mm).and_then(|mm| insert(interval_sub, &mm, (start, length), ops)).into_c()
}

/// mmu_interval_notifier_insert(), for callers that hold the lock of the address space for writing.
///
/// @param interval_sub  As for mmu_interval_notifier_insert().
/// @param mm            The address space, locked by hmm_mm_write_lock() on this thread.
/// @param start         As for mmu_interval_notifier_insert().
/// @param length        As for mmu_interval_notifier_insert().
/// @param ops           As for mmu_interval_notifier_insert().
/// @return As mmu_interval_notifier_insert(), and -EINVAL when the lock is not held for writing by
/// this thread.
///
/// Context: the thread that holds the lock; may block.
/// Source: mmu_interval_notifier_insert_locked() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_notifier_insert_locked(
    interval_sub: *mut mmu_interval_notifier,
    mm: *mut mm_struct,
    start: c_ulong,
    length: c_ulong,
    ops: *const mmu_interval_notifier_ops,
) -> c_int {
    insert_locked(interval_sub, mm, (start, length), ops).into_c()
}

/// Ends a subscription: once it returned, no callback of it runs or will run, and the structure may
/// be freed.
///
/// Waits for callbacks that are running, at most 10 seconds. The driver's update lock must not be
/// held: a callback may be waiting for it. A structure that is not inserted is left alone.
///
/// From inside a callback of the same address space it cannot wait for itself. Then it is switched
/// off at once (no further callback begins), hmm_last_errno() says -EDEADLK, and the structure must
/// stay until a second call, from outside, finished the work. The same holds for -EBUSY, when a
/// callback did not return in time.
///
/// @param interval_sub  The subscription.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EDEADLK inside a callback; -EBUSY a
/// callback did not return.
///
/// Context: any thread; blocks while callbacks run.
/// Source: mmu_interval_notifier_remove() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_notifier_remove(interval_sub: *mut mmu_interval_notifier) {
    record_outcome(remove(interval_sub));
}

/// Begins a look at the range: its number now, once no invalidation of it is in progress.
///
/// To be called before hmm_range_fault(), without the driver's update lock; the number goes into
/// range->notifier_seq, and mmu_interval_read_retry() tells later whether it still stands.
///
/// @param interval_sub  The subscription.
/// @return The number. After an error a number that never stands, so that
/// mmu_interval_read_retry() is true; hmm_last_errno() tells: -EINVAL it is not inserted, -EBUSY an
/// invalidation did not end in 10 seconds, -EDEADLK inside a callback.
///
/// Context: any thread, but not inside a callback, and without a lock that callbacks take; sleeps
/// while the range is being invalidated.
/// Source: mmu_interval_read_begin() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_read_begin(
    interval_sub: *mut mmu_interval_notifier,
) -> c_ulong {
    let begun = get(interval_sub).and_then(|one| one.notifier()?.read_begin());
    begun.inspect_err(record).unwrap_or(NEVER)
}

/// Ends a look at the range: whether it was invalidated since the number was read. Then what was
/// seen means nothing, and the driver starts over with mmu_interval_read_begin().
///
/// To be called under the driver's update lock, the one that ops->invalidate takes. Then either the
/// invalidation already came (the result is true), or its callback waits for the lock and removes
/// afterwards what the driver writes now. It is about the whole subscription, not about pages.
///
/// @param interval_sub  The subscription.
/// @param seq           What mmu_interval_read_begin() returned.
/// @return False when the look still stands. True when something was invalidated; also when it is
/// not inserted (hmm_last_errno() is -EINVAL then).
///
/// Context: any thread, callbacks included; does not block.
/// Source: mmu_interval_read_retry() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_read_retry(
    interval_sub: *mut mmu_interval_notifier,
    seq: c_ulong,
) -> bool {
    is_over(interval_sub, seq)
}

/// mmu_interval_read_retry() without the driver's lock: an early test between steps that cost time.
/// True can be relied on; false is a hint.
///
/// @param interval_sub  The subscription.
/// @param seq           What mmu_interval_read_begin() returned.
/// @return As mmu_interval_read_retry().
///
/// Context: any thread, callbacks included; does not block.
/// Source: mmu_interval_check_retry() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_check_retry(
    interval_sub: *mut mmu_interval_notifier,
    seq: c_ulong,
) -> bool {
    is_over(interval_sub, seq)
}

/// Notes the number of an invalidation in interval_sub->invalidate_seq, under the driver's update
/// lock. The library counts by itself and does not need it; drivers may read it.
///
/// @param interval_sub  The subscription.
/// @param cur_seq       What ops->invalidate received.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL it is not inserted (nothing is
/// changed).
///
/// Context: inside ops->invalidate; does not block.
/// Source: mmu_interval_set_seq() of kernels v5.5 to v7.3.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmu_interval_set_seq(
    interval_sub: *mut mmu_interval_notifier,
    cur_seq: c_ulong,
) {
    record_outcome(set_seq(interval_sub, cur_seq));
}
