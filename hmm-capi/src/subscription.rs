//! What mirrors and interval notifiers have in common: a structure of the driver's that is found by its address, is pinned
//! while it is subscribed, and is switched off before the core lets go of it.

use crate::handle::{Opaque, Table, invalid, lock};
use crate::mm::MmHandle;
use hmm_core::{AddrRange, Error, Notifier, Result, VirtAddr};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// One structure that is subscribed, with the driver's callbacks.
pub(crate) struct Subscription<O> {
    object: usize,
    pub(crate) ops: O,
    pub(crate) mm: Arc<MmHandle>,
    pages: AddrRange,
    /// No callback begins any more.
    switched_off: AtomicBool,
    /// Held while the core makes it, so that a callback that comes at once finds it.
    notifier: Mutex<Option<Arc<Notifier>>>,
}

impl<O> Subscription<O> {
    /// The driver's structure, for a callback; `None` once that must not be called any more.
    pub(crate) fn object<S>(&self) -> Option<*mut S> {
        let on = !self.switched_off.load(Ordering::Acquire);
        on.then(|| ptr::with_exposed_provenance_mut(self.object))
    }

    /// The core's side of it.
    pub(crate) fn notifier(&self) -> Result<Arc<Notifier>> {
        let notifier = lock(&self.notifier).clone();
        notifier.ok_or_else(|| invalid(self.object as u64, "it is being removed"))
    }

    /// No callback begins any more; true the first time.
    pub(crate) fn switch_off(&self) -> bool {
        !self.switched_off.swap(true, Ordering::AcqRel)
    }
}

/// All structures of one kind that are subscribed.
pub(crate) struct Subscriptions<O: 'static, const N: usize> {
    table: Table<Opaque, Subscription<O>, N>,
    /// Held for the moment in which a structure gets its place.
    inserting: Mutex<()>,
}

impl<O: Send + Sync, const N: usize> Subscriptions<O, N> {
    /// None yet; the texts are for errors: what a structure is not, and what there are too many of.
    pub(crate) const fn new(stale: &'static str, full: &'static str) -> Self {
        Self { table: Table::new(stale, full), inserting: Mutex::new(()) }
    }

    /// The pages that hold the table, for pinning: callbacks use it while they run.
    pub(crate) fn pages(&'static self) -> Result<AddrRange> {
        self.table.pages()
    }

    /// Finds a structure by its address; nothing is read through the pointer. What was subscribed before a fork is the
    /// parent's, and not found in the child.
    pub(crate) fn find<S>(&self, object: *const S) -> Option<(*mut Opaque, Arc<Subscription<O>>)> {
        self.table.find(|one| one.object == object.addr() && !one.mm.core.is_inherited())
    }

    /// Finds a structure by the handle that it got when it was inserted, which may be anything.
    pub(crate) fn get<S>(
        &self,
        handle: *const Opaque,
        object: *const S,
    ) -> Result<Arc<Subscription<O>>> {
        let found = self.table.get(handle)?;
        if found.object != object.addr() {
            return Err(invalid(object.addr() as u64, "a copy of what was inserted"));
        }
        if found.mm.core.is_inherited() {
            return Err(Error::Gone { what: "it was inserted by the parent of this process" });
        }
        Ok(found)
    }

    /// A place in the table, unless the structure has one already.
    fn reserve<S>(
        &self,
        object: *mut S,
        ops: O,
        mm: &Arc<MmHandle>,
    ) -> Result<(*mut Opaque, Arc<Subscription<O>>)> {
        let pages = AddrRange::covering(object.expose_provenance() as u64, size_of::<S>() as u64)?;
        let subscription = Arc::new(Subscription {
            object: object.addr(),
            ops,
            mm: Arc::clone(mm),
            pages,
            switched_off: AtomicBool::new(false),
            notifier: Mutex::new(None),
        });
        let _guard = lock(&self.inserting);
        if self.find(object).is_some() {
            let address = VirtAddr::from_ptr(object);
            return Err(Error::Busy { address, what: "it is registered already" });
        }
        Ok((self.table.insert(Arc::clone(&subscription))?, subscription))
    }

    /// Pins a structure and subscribes it: `subscribe` gets its handle, and asks the core.
    ///
    /// # Errors
    /// `Busy` when it is subscribed already; `NoMemory`; what `subscribe` says. Nothing is left behind then.
    pub(crate) fn insert<S>(
        &self,
        object: *mut S,
        ops: O,
        mm: &Arc<MmHandle>,
        subscribe: impl FnOnce(*mut Opaque, &Arc<Subscription<O>>) -> Result<Arc<Notifier>>,
    ) -> Result<*mut Opaque> {
        let (handle, subscription) = self.reserve(object, ops, mm)?;
        let inserted = mm.core.pin_range(subscription.pages).and_then(|()| {
            let mut place = lock(&subscription.notifier);
            *place = Some(subscribe(handle, &subscription).inspect_err(|_| {
                // It was pinned a moment ago; nothing better can be done if that cannot be undone.
                let _ = mm.core.unpin_range(subscription.pages);
            })?);
            Ok(())
        });
        inserted.map(|()| handle).inspect_err(|_| {
            self.table.remove(handle);
        })
    }

    /// Ends a subscription, once it is switched off: no callback of it runs afterwards.
    ///
    /// # Errors
    /// What the core says; it can be tried again then.
    pub(crate) fn remove(
        &self,
        handle: *const Opaque,
        subscription: &Subscription<O>,
    ) -> Result<()> {
        let notifier = lock(&subscription.notifier).clone();
        if let Some(notifier) = notifier {
            notifier.remove()?;
        }
        // The notifier leads back to the subscription: let go of it here.
        *lock(&subscription.notifier) = None;
        if self.table.remove(handle).is_some() {
            // Fails only when the mm is closed, and then there is nothing to unpin.
            let _ = subscription.mm.core.unpin_range(subscription.pages);
        }
        Ok(())
    }
}
