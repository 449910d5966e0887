//! Memory groups, resident memory by kind, and the check of the accounts.

use crate::handle::{Opaque, Table, invalid};
use crate::mm::{self, mm_struct};
use crate::ret::IntoC;
use crate::sized::{self, Sized32};
use hmm_core::{MemoryGroup, Result, Rss};
use std::ffi::{c_int, c_long};
use std::sync::Arc;

/// A memory group, in the words of cgroup v2: opaque.
///
/// hmm_group_create() makes one, hmm_group_put() gives the handle back.
#[expect(missing_debug_implementations, reason = "opaque to C")]
pub struct hmm_group {
    _opaque: [u8; 0],
}

/// No limit (`HMM_GROUP_NO_LIMIT`).
const NO_LIMIT: u64 = u64::MAX;

/// What is charged to a group, and what happened to it; bytes, with the groups below it.
///
/// Set size to sizeof(struct hmm_group_state) before the call; later versions may add members at
/// the end.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct hmm_group_state {
    /// In: sizeof(struct hmm_group_state).
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// The group's own limit (memory.max), HMM_GROUP_NO_LIMIT without one.
    pub max: u64,
    /// Charged now (memory.current).
    pub current: u64,
    /// The most that was ever charged (memory.peak).
    pub peak: u64,
    /// Anonymous memory (memory.stat): all that is charged, since what can leave is anonymous.
    pub stat_anon: u64,
    /// Of this: in the memory of devices now.
    pub stat_device: u64,
    /// Times that a charge went above the limit of the group or of one below it, or was refused for
    /// that (memory.events).
    pub events_max: u64,
}

// SAFETY: repr(C), u32 first, integers only, two u32 before the u64s leave no padding.
unsafe impl Sized32 for hmm_group_state {}

/// Resident memory by kind, in bytes, with what is on devices counted in.
///
/// Set size to sizeof(struct hmm_mm_rss) before the call; later versions may add members at the
/// end.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct hmm_mm_rss {
    /// In: sizeof(struct hmm_mm_rss).
    pub size: u32,
    /// Zero.
    pub reserved: u32,
    /// Anonymous memory (rss_anon).
    pub anon: u64,
    /// Pages of files (rss_file).
    pub file: u64,
    /// Shared anonymous memory, memfd, tmpfs (rss_shmem).
    pub shmem: u64,
}

// SAFETY: as above.
unsafe impl Sized32 for hmm_mm_rss {}

static GROUPS: Table<Opaque, MemoryGroup, 256> =
    Table::new("not a live hmm_group of this library", "hmm_group handles (256)");

/// The group of a handle; NULL is the root group.
fn get(group: *const hmm_group) -> Result<Arc<MemoryGroup>> {
    if group.is_null() { Ok(Arc::new(MemoryGroup::root())) } else { GROUPS.get(group.cast()) }
}

fn state(group: &MemoryGroup) -> hmm_group_state {
    let stat = group.stat();
    hmm_group_state {
        size: 0,
        reserved: 0,
        max: group.max().unwrap_or(NO_LIMIT),
        current: group.current(),
        peak: group.peak(),
        stat_anon: stat.anon,
        stat_device: stat.device,
        events_max: group.events().max,
    }
}

/// Makes a memory group without a limit of its own.
///
/// @param parent  The group above, whose limit holds for the new one, too; NULL: the root group,
/// which has no limit and counts everything.
/// @return The group, to be given back with hmm_group_put(). On failure ERR_PTR():
///  - -EINVAL: parent is no live handle;
///  - -ENOMEM: 256 groups.
///
/// Context: any thread; does not block for long.
/// Source: ours; cgroup v2's mkdir.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_group_create(parent: *mut hmm_group) -> *mut hmm_group {
    let made = get(parent).and_then(|parent| MemoryGroup::create(&parent));
    made.and_then(|group| GROUPS.insert(Arc::new(group))).map(|handle| handle.cast()).into_c()
}

/// Gives a handle back. The group itself lives as long as an address space is in it, a group below
/// it lives, or something is charged to it.
///
/// @param group  What hmm_group_create() returned.
/// @return 0, or:
///  - -EINVAL: group is no live handle.
///
/// Context: any thread; does not block for long.
/// Source: ours; cgroup v2's rmdir, which never fails here.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_group_put(group: *mut hmm_group) -> c_int {
    let removed = GROUPS.remove(group.cast()).map(drop);
    removed.ok_or_else(|| invalid(group.addr() as u64, "not a live hmm_group")).into_c()
}

/// Sets the limit of a group.
///
/// A limit keeps holes from being filled on a device: they stay holes, and are counted in
/// events_max. It never keeps a page with contents from leaving or from coming home, since that is
/// memory which the process has already. A limit below what is charged drops nothing.
///
/// @param group  The group; not the root group.
/// @param max    Bytes, rounded down to whole pages; HMM_GROUP_NO_LIMIT for none.
/// @return 0, or:
///  - -EINVAL: group is NULL or no live handle.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; cgroup v2's memory.max.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_group_set_max(group: *mut hmm_group, max: u64) -> c_int {
    let max = (max != NO_LIMIT).then_some(max);
    get(group).and_then(|group| group.set_max(max)).into_c()
}

/// Reads what is charged to a group, and what happened to it.
///
/// @param group  The group; NULL: the root group.
/// @param state  Its size member says how much the caller knows; the rest is filled in.
/// @return 0, or:
///  - -EINVAL: group is no live handle, state is NULL or misaligned, or its size is below 4.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours; cgroup v2's memory.current, .peak, .max, .stat and .events.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_group_read(
    group: *const hmm_group,
    state: *mut hmm_group_state,
) -> c_int {
    let now = get(group).map(|group| self::state(&group));
    // SAFETY: the caller promises a struct whose size member says how large it is.
    now.and_then(|now| unsafe { sized::write(state, &now) }).into_c()
}

/// Moves an address space into a group: pages that leave for a device for the first time from now
/// on are charged there, and stay charged there on both sides until they are dropped.
///
/// What is charged already stays where it is; hmm_mm_move_charges() moves it.
///
/// @param mm     The address space; in the root group at first.
/// @param group  The group; NULL: the root group.
/// @return 0, or:
///  - -EINVAL: mm or group is no live handle;
///  - -ENODEV: closed.
///
/// Context: any thread; does not block for long.
/// Source: ours; cgroup v2's cgroup.procs; promises 76 to 79.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_set_group(mm: *mut mm_struct, group: *mut hmm_group) -> c_int {
    mm::get(mm).and_then(|mm| mm.core.set_group(&*get(group)?)).into_c()
}

/// Charges what is charged for an address space to the group that it is in now, as far as that
/// group has room.
///
/// @param mm  The address space.
/// @return Pages that changed groups, or:
///  - -EINVAL: mm is no live handle;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours; memory.move_charge_at_immigrate of cgroup v1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_move_charges(mm: *mut mm_struct) -> c_long {
    mm::get(mm).and_then(|mm| mm.core.move_charges()).into_c()
}

/// Ends the charges of pages at home that the program dropped or unmapped, where nobody reports
/// that: on engines without HMM_CAPABILITY_EVENTS. Elsewhere it does nothing.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EINVAL: mm is no live handle;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_settle_charges(mm: *mut mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| mm.core.settle_charges()).into_c()
}

/// Reads how much memory a process uses, whichever side it is on: what the kernel counts, without
/// the frames that the library holds, and with what is on devices counted as anonymous. It does not
/// change by migration.
///
/// A page of a private file mapping that migrates is anonymous from then on. The memory in which a
/// simulated device keeps its pages is memory of the process, too. Walks page tables: milliseconds
/// for each GiB.
///
/// @param mm   The address space.
/// @param rss  Its size member says how much the caller knows; the rest is filled in.
/// @return 0, or:
///  - -EINVAL: mm is no live handle, rss is NULL or misaligned, or its size is below 4;
///  - -EOPNOTSUPP, or another errno: /proc does not tell;
///  - -ENODEV: closed.
///
/// Context: any thread; may block.
/// Source: hmm.txt section 7; the kernel's rss_anon, rss_file, rss_shmem; promises 75 and 82.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_rss(mm: *const mm_struct, rss: *mut hmm_mm_rss) -> c_int {
    let now = mm::get(mm).and_then(|mm| mm.core.rss());
    let now =
        now.map(|Rss { anon, file, shmem }| hmm_mm_rss { size: 0, reserved: 0, anon, file, shmem });
    // SAFETY: the caller promises a struct whose size member says how large it is.
    now.and_then(|now| unsafe { sized::write(rss, &now) }).into_c()
}

/// Compares what the library counts with its page table: the counters, the pages that each device
/// has in use, the charges of each group. For tests, and for whoever wonders. Only meaningful while
/// nothing is under way; waits a moment for what is about to end.
///
/// @param mm  The address space.
/// @return 0, or:
///  - -EUCLEAN: something differs, and hmm_last_error() says what;
///  - -EINVAL: mm is no live handle;
///  - -ENODEV: closed.
///
/// Context: any thread, but not inside a callback; may block for a second.
/// Source: ours.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn hmm_mm_check_accounts(mm: *const mm_struct) -> c_int {
    mm::get(mm).and_then(|mm| mm.core.check_accounts()).into_c()
}
