//! A sparse table over the user address space: one node for each leaf (2 MiB) in which something was ever recorded.
//! Nodes are made on demand and live as long as the table, so that a look-up is two loads.

use crate::addr::{AddrRange, LEAF_SIZE, USER_END, VirtAddr};
use crate::arena::{self, Buffer};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

const FANOUT_SHIFT: u32 = 13;
const FANOUT: usize = 1 << FANOUT_SHIFT;
const LEAVES: u64 = USER_END / LEAF_SIZE;

type Directory<T> = Buffer<AtomicPtr<T>>;

/// Two levels of directories over nodes, in the arena.
pub(crate) struct SparseTable<T> {
    root: Buffer<AtomicPtr<Directory<T>>>,
}

fn empty_level<T>() -> Option<Buffer<AtomicPtr<T>>> {
    Buffer::new(FANOUT, |_| AtomicPtr::new(ptr::null_mut()))
}

/// Follows a slot, filling it with what `make` gives if it is empty. `None` when memory is short.
fn get_or_make<T>(slot: &AtomicPtr<T>, make: impl FnOnce() -> Option<T>) -> Option<&T> {
    let mut found = slot.load(Ordering::Acquire);
    if found.is_null() {
        let fresh = arena::put(make()?)?;
        let raw = fresh.as_ptr();
        match slot.compare_exchange(ptr::null_mut(), raw, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => found = raw,
            Err(other) => {
                // SAFETY: `fresh` lost the race: nobody else has seen it.
                unsafe { arena::remove(fresh) };
                found = other;
            }
        }
    }
    // SAFETY: non-null slots hold nodes that live until the table is dropped, which needs `&mut` to it.
    Some(unsafe { &*found })
}

fn remove_node<T>(slot: &mut AtomicPtr<T>) {
    if let Some(node) = NonNull::new(*slot.get_mut()) {
        *slot.get_mut() = ptr::null_mut();
        // SAFETY: `&mut` to the slot: nobody else looks at the table, and its nodes came from `put`.
        unsafe { arena::remove(node) };
    }
}

impl<T> SparseTable<T> {
    pub(crate) fn new() -> Option<Self> {
        Some(Self { root: empty_level()? })
    }

    fn leaf_number(address: VirtAddr) -> Option<usize> {
        let number = address.get() / LEAF_SIZE;
        (number < LEAVES).then_some(number as usize)
    }

    /// The node of the leaf that covers an address, if there is one.
    pub(crate) fn get(&self, address: VirtAddr) -> Option<&T> {
        let number = Self::leaf_number(address)?;
        let directory = self.root.get(number >> FANOUT_SHIFT)?.load(Ordering::Acquire);
        // SAFETY: non-null slots hold nodes that live until the table is dropped.
        let directory = unsafe { directory.as_ref() }?;
        let leaf = directory.get(number & (FANOUT - 1))?.load(Ordering::Acquire);
        // SAFETY: as above.
        unsafe { leaf.as_ref() }
    }

    /// The node of the leaf that covers an address, made if need be. `None` above the user address space or without
    /// memory.
    pub(crate) fn get_or_make(&self, address: VirtAddr, make: impl FnOnce() -> T) -> Option<&T> {
        let number = Self::leaf_number(address)?;
        let directory = get_or_make(self.root.get(number >> FANOUT_SHIFT)?, empty_level)?;
        get_or_make(directory.get(number & (FANOUT - 1))?, || Some(make()))
    }

    /// The nodes of every leaf that overlaps a range, in rising order.
    pub(crate) fn range(&self, range: AddrRange) -> impl Iterator<Item = &T> {
        let last = (range.end().get() - 1) / LEAF_SIZE;
        let mut number = range.start().get() / LEAF_SIZE;
        std::iter::from_fn(move || {
            while number <= last {
                let here = number as usize;
                let directory = self.root.get(here >> FANOUT_SHIFT)?.load(Ordering::Acquire);
                // SAFETY: non-null slots hold nodes that live until the table is dropped.
                let Some(directory) = (unsafe { directory.as_ref() }) else {
                    number = ((number >> FANOUT_SHIFT) + 1) << FANOUT_SHIFT;
                    continue;
                };
                number += 1;
                let leaf = directory.get(here & (FANOUT - 1))?.load(Ordering::Acquire);
                // SAFETY: as above.
                if let Some(leaf) = unsafe { leaf.as_ref() } {
                    return Some(leaf);
                }
            }
            None
        })
    }
}

impl<T> Drop for SparseTable<T> {
    fn drop(&mut self) {
        for slot in self.root.iter_mut() {
            // SAFETY: `&mut self`: nobody else looks at the table.
            if let Some(directory) = unsafe { slot.get_mut().as_mut() } {
                directory.iter_mut().for_each(remove_node);
            }
            remove_node(slot);
        }
    }
}

impl<T> fmt::Debug for SparseTable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SparseTable")
    }
}
