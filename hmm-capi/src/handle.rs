//! Handles: how C sees the objects of the library.
//!
//! Each kind of object lives in a table of fixed size, and a handle is the address of a slot. So NULL, a foreign
//! pointer and a handle that was given back are recognised without reading through the pointer. Slots are reused as
//! late as possible, so that a stale handle stays recognisable for long. Tables are plain statics: no allocation.

use hmm_core::{AddrRange, Error, Result, VirtAddr};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What C code may see at the address of a handle.
pub(crate) trait Public: Copy + 'static {
    /// The contents while nobody uses the slot.
    const EMPTY: Self;
}

/// The public part of an opaque handle: a word that makes it recognisable in a debugger.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Opaque(u64);

impl Public for Opaque {
    const EMPTY: Self = Self(0x6c69_6268_6d6d_5f30);
}

#[repr(C, align(16))]
struct Slot<P, T> {
    public: UnsafeCell<P>,
    object: Mutex<Option<Arc<T>>>,
}

/// A fixed number of handles of one kind.
pub(crate) struct Table<P: 'static, T: 'static, const N: usize> {
    slots: [Slot<P, T>; N],
    cursor: AtomicUsize,
    stale: &'static str,
    full: &'static str,
}

// SAFETY: the objects are behind mutexes. The public part is written only by `insert`, `remove` and `edit` under the
// slot's mutex; C code reads it while it owns the handle, which is the C caller's side of the contract.
unsafe impl<P: Public, T: Send + Sync, const N: usize> Sync for Table<P, T, N> {}

/// Locks a mutex; no panic can leave one of ours in a bad state.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: Public, T: Send + Sync, const N: usize> Table<P, T, N> {
    /// An empty table; the texts are for errors: what a pointer is not, and what there are too many of.
    pub(crate) const fn new(stale: &'static str, full: &'static str) -> Self {
        let slots =
            [const { Slot { public: UnsafeCell::new(P::EMPTY), object: Mutex::new(None) } }; N];
        Self { slots, cursor: AtomicUsize::new(0), stale, full }
    }

    fn slot(&self, handle: *const P) -> Option<&Slot<P, T>> {
        let offset = handle.addr().checked_sub(self.slots.as_ptr().addr())?;
        let size = size_of::<Slot<P, T>>();
        if !offset.is_multiple_of(size) {
            return None;
        }
        self.slots.get(offset / size)
    }

    /// A handle for an object.
    ///
    /// # Errors
    /// `NoMemory` when all handles are in use.
    pub(crate) fn insert(&self, object: Arc<T>) -> Result<*mut P> {
        let start = self.cursor.fetch_add(1, Ordering::Relaxed);
        for slot in (0..N).map(|step| &self.slots[(start.wrapping_add(step)) % N]) {
            let mut place = lock(&slot.object);
            if place.is_none() {
                *place = Some(object);
                return Ok(slot.public.get());
            }
        }
        Err(Error::NoMemory { what: self.full })
    }

    /// The object of a handle.
    ///
    /// # Errors
    /// `Invalid` for NULL, a foreign pointer, or a handle that was given back.
    pub(crate) fn get(&self, handle: *const P) -> Result<Arc<T>> {
        let found = self.slot(handle).and_then(|slot| lock(&slot.object).clone());
        found.ok_or(Error::Invalid { address: VirtAddr::from_ptr(handle), what: self.stale })
    }

    /// Takes the handle back; from now on it is invalid.
    pub(crate) fn remove(&self, handle: *const P) -> Option<Arc<T>> {
        let slot = self.slot(handle)?;
        let mut place = lock(&slot.object);
        // SAFETY: the address is that of a slot of this static table, and its mutex is held.
        unsafe { ptr::write(slot.public.get(), P::EMPTY) };
        place.take()
    }

    /// Changes what C sees at the address of a handle that C does not know yet.
    pub(crate) fn edit(&self, handle: *mut P, public: P) {
        if let Some(slot) = self.slot(handle) {
            let _place = lock(&slot.object);
            // SAFETY: the address is that of a slot of this static table, and its mutex is held.
            unsafe { ptr::write(slot.public.get(), public) };
        }
    }

    /// The first object that fits, with its handle.
    pub(crate) fn find(&self, mut fits: impl FnMut(&T) -> bool) -> Option<(*mut P, Arc<T>)> {
        self.slots.iter().find_map(|slot| {
            let place = lock(&slot.object);
            let object = place.as_ref().filter(|object| fits(object))?;
            Some((slot.public.get(), Arc::clone(object)))
        })
    }

    /// The pages that hold the table, for pinning: callbacks use it while they run.
    pub(crate) fn pages(&'static self) -> Result<AddrRange> {
        pages_of(self)
    }
}

/// The pages that hold a static of the library.
pub(crate) fn pages_of<T>(object: &'static T) -> Result<AddrRange> {
    AddrRange::covering(VirtAddr::from_ptr(object).get(), size_of::<T>() as u64)
}

/// Refuses NULL and misaligned pointers of C callers. Whether the memory is there is the caller's promise.
///
/// # Errors
/// `Invalid`, naming `what`.
pub(crate) fn check_pointer<T>(pointer: *const T, what: &'static str) -> Result<()> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(Error::Invalid { address: VirtAddr::from_ptr(pointer), what });
    }
    Ok(())
}

/// An `Invalid` error about a number that is no address.
pub(crate) fn invalid(address: u64, what: &'static str) -> Error {
    Error::Invalid { address: VirtAddr::new(address), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    static TABLE: Table<Opaque, u32, 4> = Table::new("no handle", "too many");

    #[test]
    fn stale_foreign_and_null_handles_are_refused() {
        let handle = TABLE.insert(Arc::new(7)).unwrap();
        assert_eq!(*TABLE.get(handle).unwrap(), 7);
        assert!(TABLE.get(ptr::null()).is_err());
        assert!(TABLE.get(handle.cast::<u8>().wrapping_add(4).cast()).is_err());
        assert!(TABLE.get(ptr::without_provenance(0x1000)).is_err());
        assert_eq!(TABLE.remove(handle).as_deref(), Some(&7));
        assert!(TABLE.get(handle).is_err());
        assert!(TABLE.remove(handle).is_none());
    }

    #[test]
    fn slots_are_reused_late_and_run_out() {
        static FEW: Table<Opaque, u32, 3> = Table::new("no handle", "too many");
        let first = FEW.insert(Arc::new(1)).unwrap();
        assert!(FEW.remove(first).is_some());
        assert_ne!(FEW.insert(Arc::new(2)).unwrap(), first);
        FEW.insert(Arc::new(3)).unwrap();
        FEW.insert(Arc::new(4)).unwrap();
        assert_eq!(FEW.insert(Arc::new(5)).unwrap_err().errno(), libc::ENOMEM);
    }
}
