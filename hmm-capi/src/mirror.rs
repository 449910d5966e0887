//! Mirrors: a notifier over the whole address space, under the names and with the callbacks of hmm.txt, section 4.

use crate::error::record_outcome;
use crate::handle::{check_pointer, invalid};
use crate::hold;
use crate::mm::{self, MmHandle, mm_struct};
use crate::ret::IntoC;
use crate::subscription::{Subscription, Subscriptions};
use hmm_core::{Invalidation, NotifierOps, Result};
use std::ffi::{c_int, c_ulong, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The library's side of a mirror: opaque.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct hmm {
    _opaque: [u8; 0],
}

/// Two words for the library's use, where kernel structs have a `struct list_head`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_list {
    /// The library's.
    pub next: *mut c_void,
    /// The library's.
    pub prev: *mut c_void,
}

/// What happened to the CPU page table. There is one kind: forget what you know of the range.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub enum hmm_update_type {
    /// The device must not use its translations of the range any more.
    HMM_UPDATE_INVALIDATE,
}

/// A driver's side of mirroring. Copied at registration, so it may live on the stack.
///
/// Both are called with no lock of the library held. They must not touch memory that may migrate
/// (hmm_pin_range() what they need), must not call malloc or free, must not call a function that
/// this header does not mark "callbacks included", and must not leave by longjmp or an exception.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct hmm_mirror_ops {
    /// Optional. The address space is being closed: the driver must not use the mirror for new
    /// device mappings. Called once for each registered mirror (promise 43).
    /// hmm_mirror_unregister() is still the driver's to call, later and elsewhere.
    pub release: Option<unsafe extern "C" fn(mirror: *mut hmm_mirror)>,
    /// Mandatory. The CPU page table changes between start (inclusive) and end (exclusive), which
    /// may be more than what changes, and never less (promise 22). Take the driver's update lock,
    /// drop the device's translations of the range and wait until the device uses none of them,
    /// then return: the CPU side waits for it (promises 23 to 25). Calls for one mirror may come
    /// from several threads at once.
    pub sync_cpu_device_pagetables: Option<
        unsafe extern "C" fn(
            mirror: *mut hmm_mirror,
            update_type: hmm_update_type,
            start: c_ulong,
            end: c_ulong,
        ),
    >,
}

/// A mirror of an address space. The driver embeds it in a structure of its own, sets ops,
/// registers it, and gets back to its structure with container_of(). It need not be cleared before.
///
/// Its pages are pinned while it is registered. It must not move, and may be freed once
/// hmm_mirror_unregister() returned.
#[derive(Debug)]
#[repr(C)]
pub struct hmm_mirror {
    /// The library's.
    pub hmm: *mut hmm,
    /// Set by the driver before registration.
    pub ops: *const hmm_mirror_ops,
    /// The library's.
    pub list: hmm_list,
    /// The library's; room for later versions.
    pub reserved: [c_ulong; 4],
}

/// Registered mirrors.
pub(crate) static MIRRORS: Subscriptions<hmm_mirror_ops, 1024> =
    Subscriptions::new("not a registered mirror", "registered mirrors (1024)");

/// Carries callbacks from the core to the driver.
struct Calls(Arc<Subscription<hmm_mirror_ops>>);

impl NotifierOps for Calls {
    fn invalidate(&self, update: &Invalidation) {
        if let (Some(mirror), Some(call)) = (self.0.object(), self.0.ops.sync_cpu_device_pagetables)
        {
            let (start, end) = (update.range.start().get(), update.range.end().get());
            // SAFETY: the mirror is registered, so by the driver's promise it is alive and the function callable.
            unsafe { call(mirror, hmm_update_type::HMM_UPDATE_INVALIDATE, start, end) };
        }
    }

    fn release(&self) {
        if let (Some(mirror), Some(call)) = (self.0.object(), self.0.ops.release) {
            // SAFETY: the mirror is registered, so by the driver's promise it is alive and the function callable.
            unsafe { call(mirror) };
        }
    }
}

/// The driver's callbacks, checked and copied.
fn copy_ops(mirror: *const hmm_mirror) -> Result<hmm_mirror_ops> {
    check_pointer(mirror, "mirror is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct hmm_mirror whose ops member is set.
    let ops = unsafe { ptr::read(&raw const (*mirror).ops) };
    check_pointer(ops, "mirror->ops is NULL or misaligned")?;
    // SAFETY: not NULL and aligned; the caller promises a struct hmm_mirror_ops.
    let ops = unsafe { ptr::read(ops) };
    if ops.sync_cpu_device_pagetables.is_none() {
        return Err(invalid(mirror.addr() as u64, "ops->sync_cpu_device_pagetables is NULL"));
    }
    Ok(ops)
}

fn register(mirror: *mut hmm_mirror, mm: &Arc<MmHandle>) -> Result<()> {
    let ops = copy_ops(mirror)?;
    let handle = MIRRORS.insert(mirror, ops, mm, |_, registration| {
        mm.core.mirror_register(Arc::new(Calls(Arc::clone(registration))))
    })?;
    mm.mirrors.fetch_add(1, Ordering::Release);
    let list = hmm_list { next: ptr::null_mut(), prev: ptr::null_mut() };
    // SAFETY: copy_ops found the pointer good, and the caller promises a struct hmm_mirror.
    unsafe {
        (&raw mut (*mirror).hmm).write(handle.cast());
        (&raw mut (*mirror).list).write(list);
    }
    Ok(())
}

fn register_unlocked(mirror: *mut hmm_mirror, mm: *mut mm_struct) -> Result<()> {
    copy_ops(mirror)?;
    let mm = mm::get(mm)?;
    hold::write_lock(&mm)?;
    let registered = register(mirror, &mm);
    hold::write_unlock(&mm)?;
    registered
}

fn register_locked(mirror: *mut hmm_mirror, mm: *mut mm_struct) -> Result<()> {
    copy_ops(mirror)?;
    let mm = mm::get(mm)?;
    if !hold::holds_write(&mm) {
        return Err(invalid(mirror.addr() as u64, "the caller does not hold hmm_mm_write_lock"));
    }
    register(mirror, &mm)
}

fn unregister(mirror: *mut hmm_mirror) -> Result<()> {
    let Some((handle, registration)) = MIRRORS.find(mirror) else { return Ok(()) };
    if registration.switch_off() {
        registration.mm.mirrors.fetch_sub(1, Ordering::Release);
    }
    MIRRORS.remove(handle, &registration)
}

/// Registers a mirror of an address space: from its return on, the mirror's callback is called for
/// every change of the CPU page table, in every range that a call of the library has looked at or
/// migrated.
///
/// Takes the lock of the address space for writing itself, as hmm.txt tells it. (The merged kernels
/// want it held; with HMM_API_4_17 the name stands for hmm_mirror_register_locked().) Any number of
/// mirrors may be registered on one address space, and each gets every update.
///
/// @param mirror  The driver's structure; mirror->ops is set, and ops->sync_cpu_device_pagetables
///                with it.
/// @param mm      The address space.
/// @return 0, or:
///  - -EINVAL: mirror, its ops or the callback is NULL, a pointer is misaligned, or mm is no live
///    handle;
///  - -EBUSY: the mirror is registered already, or the lock was not free for 10 seconds;
///  - -EDEADLK: this thread holds the lock, or is inside a callback;
///  - -ENOMEM: more than 1024 mirrors;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback, and without the lock; may block.
/// Source: hmm.txt section 4; promises 18 to 20.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mirror_register(mirror: *mut hmm_mirror, mm: *mut mm_struct) -> c_int {
    register_unlocked(mirror, mm).into_c()
}

/// Registers a mirror; for callers that hold the lock of the address space for writing.
///
/// @param mirror  As for hmm_mirror_register().
/// @param mm      The address space, locked by hmm_mm_write_lock() on this thread.
/// @return As hmm_mirror_register(), but -EINVAL when the lock is not held for writing by this
/// thread.
///
/// Context: the thread that holds the lock; may block.
/// Source: hmm.txt section 4; promise 19; hmm_mirror_register() of kernels v4.14 to v4.17.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mirror_register_locked(
    mirror: *mut hmm_mirror,
    mm: *mut mm_struct,
) -> c_int {
    register_locked(mirror, mm).into_c()
}

/// Unregisters a mirror: once it returned, no callback of the mirror runs or will run, and the
/// structure may be freed.
///
/// Waits for callbacks that are running, at most 10 seconds. The driver's update lock must not be
/// held: a callback may be waiting for it. A mirror that is not registered is left alone.
///
/// From inside a callback of the same address space it cannot wait for itself. Then the mirror is
/// switched off at once (no further callback begins), hmm_last_errno() says -EDEADLK, and the
/// structure must stay until a second call, from outside, finished the work. The same holds for
/// -EBUSY, when a callback did not return in time.
///
/// @param mirror  The mirror.
///
/// Returns nothing, as in the kernel. hmm_last_errno(): 0; -EDEADLK inside a callback; -EBUSY a
/// callback did not return.
///
/// Context: any thread; blocks while callbacks run.
/// Source: hmm.txt section 4; promise 42; the kernel's hmm_mirror_unregister().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mirror_unregister(mirror: *mut hmm_mirror) {
    record_outcome(unregister(mirror));
}
