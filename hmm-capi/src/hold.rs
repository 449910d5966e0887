//! Which thread holds which address space's lock, and the vma handles that it was given while it does.
//!
//! A vma handle lives until the lock is released, or until the callback ends that it was made for; callbacks count as
//! holding the lock for reading. Kept by thread in fixed memory, because callbacks run on service threads.

use crate::error::this_thread;
use crate::handle::{invalid, lock, pages_of};
use crate::mm::MmHandle;
use crate::vma::VMAS;
use hmm_core::{AddrRange, Error, Result};
use std::ptr;
use std::sync::{Arc, Mutex};

/// Holds at once, of all threads together.
const HOLDS: usize = 1024;

/// How a thread came to hold the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    /// Inside a callback: as good as `Read`, but the library's own.
    Callback,
}

#[derive(Clone, Copy)]
struct Hold {
    thread: usize,
    mm: usize,
    kind: Kind,
    depth: usize,
    newest_vma: usize,
}

/// All holds, outer ones of a thread before its inner ones.
struct Holds {
    entries: [Hold; HOLDS],
    used: usize,
}

static TABLE: Mutex<Holds> = Mutex::new(Holds {
    entries: [Hold { thread: 0, mm: 0, kind: Kind::Read, depth: 0, newest_vma: 0 }; HOLDS],
    used: 0,
});

/// The pages that hold the table, for pinning.
pub(crate) fn pages() -> Result<AddrRange> {
    pages_of(&TABLE)
}

fn identity(mm: &Arc<MmHandle>) -> usize {
    Arc::as_ptr(mm).addr()
}

impl Holds {
    /// The calling thread's innermost hold of an mm.
    fn mine(&mut self, mm: &Arc<MmHandle>) -> Option<&mut Hold> {
        let (thread, mm) = (this_thread(), identity(mm));
        let used = &mut self.entries[..self.used];
        used.iter_mut().rfind(|hold| hold.thread == thread && hold.mm == mm)
    }

    fn push(&mut self, mm: &Arc<MmHandle>, kind: Kind) -> Result<()> {
        let Some(free) = self.entries.get_mut(self.used) else {
            return Err(Error::NoMemory {
                what: "threads that hold an address space's lock (1024)",
            });
        };
        *free = Hold { thread: this_thread(), mm: identity(mm), kind, depth: 1, newest_vma: 0 };
        self.used += 1;
        Ok(())
    }

    /// Ends the calling thread's innermost hold of an mm, if it is of this kind and depth 1; returns its newest vma.
    fn pop(&mut self, mm: &Arc<MmHandle>, kind: Kind) -> Option<usize> {
        let hold = *self.mine(mm).filter(|hold| hold.kind == kind && hold.depth == 1)?;
        let fits = |one: &Hold| one.thread == hold.thread && one.mm == hold.mm;
        let at = self.entries[..self.used].iter().rposition(fits)?;
        self.entries.copy_within(at + 1..self.used, at);
        self.used -= 1;
        Some(hold.newest_vma)
    }
}

/// Gives back a chain of vma handles.
fn free_vmas(mut newest: usize) {
    while newest != 0 {
        let freed = VMAS.remove(ptr::without_provenance(newest));
        newest = freed.map_or(0, |vma| vma.older);
    }
}

fn take_lock(mm: &Arc<MmHandle>, kind: Kind) -> Result<()> {
    let core = mm.core.mmap_lock();
    match kind {
        Kind::Read => core.read_lock()?,
        Kind::Write => core.write_lock()?,
        Kind::Callback => {}
    }
    let pushed = lock(&TABLE).push(mm, kind);
    if pushed.is_err() {
        release_lock(mm, kind)?;
    }
    pushed
}

fn release_lock(mm: &Arc<MmHandle>, kind: Kind) -> Result<()> {
    match kind {
        Kind::Read => mm.core.mmap_lock().read_unlock(),
        Kind::Write => mm.core.mmap_lock().write_unlock(),
        Kind::Callback => Ok(()),
    }
}

fn end(mm: &Arc<MmHandle>, kind: Kind) -> Result<()> {
    let newest = lock(&TABLE).pop(mm, kind);
    free_vmas(newest.ok_or_else(|| invalid(0, "this thread does not hold the lock in that way"))?);
    release_lock(mm, kind)
}

/// Takes the lock shared; nests inside itself and inside callbacks.
pub(crate) fn read_lock(mm: &Arc<MmHandle>) -> Result<()> {
    if let Some(hold) = lock(&TABLE).mine(mm) {
        if hold.kind == Kind::Write {
            return Err(Error::Deadlock { what: "this thread holds the lock for writing" });
        }
        hold.depth += 1;
        return Ok(());
    }
    take_lock(mm, Kind::Read)
}

/// Releases it; the outermost release ends the thread's vma handles.
pub(crate) fn read_unlock(mm: &Arc<MmHandle>) -> Result<()> {
    if let Some(hold) = lock(&TABLE).mine(mm)
        && hold.kind != Kind::Write
        && hold.depth > 1
    {
        hold.depth -= 1;
        return Ok(());
    }
    end(mm, Kind::Read)
}

/// Takes the lock alone; does not nest.
pub(crate) fn write_lock(mm: &Arc<MmHandle>) -> Result<()> {
    if lock(&TABLE).mine(mm).is_some() {
        return Err(Error::Deadlock { what: "this thread holds the lock, or is in a callback" });
    }
    take_lock(mm, Kind::Write)
}

/// Releases it, and ends the thread's vma handles.
pub(crate) fn write_unlock(mm: &Arc<MmHandle>) -> Result<()> {
    end(mm, Kind::Write)
}

/// Whether the calling thread holds the lock for writing.
pub(crate) fn holds_write(mm: &Arc<MmHandle>) -> bool {
    lock(&TABLE).mine(mm).is_some_and(|hold| hold.kind == Kind::Write)
}

/// Whether the calling thread holds the lock, in any way, or is inside a callback.
pub(crate) fn holds(mm: &Arc<MmHandle>) -> bool {
    lock(&TABLE).mine(mm).is_some()
}

/// Whether the calling thread is inside a callback that got a vma: of device memory, or of a migration.
pub(crate) fn in_callback() -> bool {
    let thread = this_thread();
    let table = lock(&TABLE);
    let mut holds = table.entries[..table.used].iter();
    holds.any(|hold| hold.thread == thread && hold.kind == Kind::Callback)
}

/// Releases a plain read lock on behalf of a call that reports "the lock was dropped". False when it must stay held:
/// inside a callback, when it is held twice, or for writing.
pub(crate) fn drop_read_lock(mm: &Arc<MmHandle>) -> bool {
    end(mm, Kind::Read).is_ok()
}

/// The calling thread is inside a callback for an mm, until this is dropped.
pub(crate) struct InCallback(Arc<MmHandle>);

impl InCallback {
    /// Begins.
    pub(crate) fn enter(mm: Arc<MmHandle>) -> Result<Self> {
        take_lock(&mm, Kind::Callback)?;
        Ok(Self(mm))
    }
}

impl Drop for InCallback {
    fn drop(&mut self) {
        // Read locks that the callback forgot to release end here too.
        if let Some(hold) = lock(&TABLE).mine(&self.0) {
            hold.depth = 1;
        }
        // It was pushed by `enter`, and only this removes a hold of kind Callback.
        let _ = end(&self.0, Kind::Callback);
    }
}

/// The newest vma handle of the calling thread's innermost hold (0: none yet).
///
/// # Errors
/// `Invalid` when the thread does not hold the lock.
pub(crate) fn newest_vma(mm: &Arc<MmHandle>) -> Result<usize> {
    let newest = lock(&TABLE).mine(mm).map(|hold| hold.newest_vma);
    newest.ok_or_else(|| invalid(0, "take hmm_mm_read_lock before looking for a vma"))
}

/// Makes a vma handle the newest of the calling thread's innermost hold.
pub(crate) fn set_newest_vma(mm: &Arc<MmHandle>, vma: usize) {
    if let Some(hold) = lock(&TABLE).mine(mm) {
        hold.newest_vma = vma;
    }
}
