//! The device's page table: page number to place, four levels of 512 entries like a CPU's.
//!
//! The nodes come from one fixed pool in a mapping of the device's own, so neither filling nor invalidating allocates.
//! The table is a cache of what the core knows: when the pool is used up it is simply emptied, and device faults fill
//! it again.

use crate::mapped::Mapped;
use hmm_core::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use hmm_core::{AddrRange, PAGE_SHIFT, Result, VirtAddr};

const SLOT_SHIFT: u32 = 9;
const SLOTS: usize = 1 << SLOT_SHIFT;
/// Level of the root; leaves have level 0.
const ROOT_LEVEL: u32 = 3;
/// Nodes in the pool: 32 MiB of address space, entries for 16 GiB of dense memory.
const NODES: usize = 8192;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In system memory, at its own address.
    System,
    /// In device memory, at this page index.
    Device(u32),
}

/// What the table says of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Translation {
    pub(crate) place: Place,
    /// Whether kernels may write it.
    pub(crate) write: bool,
}

const VALID: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const DEVICE: u64 = 1 << 2;
const INDEX_SHIFT: u32 = 3;

impl Translation {
    fn pack(self) -> u64 {
        let write = if self.write { WRITE } else { 0 };
        match self.place {
            Place::System => VALID | write,
            Place::Device(page) => VALID | DEVICE | write | (u64::from(page) << INDEX_SHIFT),
        }
    }

    fn unpack(word: u64) -> Option<Self> {
        if word & VALID == 0 {
            return None;
        }
        let place = if word & DEVICE == 0 {
            Place::System
        } else {
            Place::Device(u32::try_from(word >> INDEX_SHIFT).ok()?)
        };
        Some(Self { place, write: word & WRITE != 0 })
    }
}

/// The table and its lock.
#[derive(Debug)]
pub(crate) struct Table(RwLock<Radix>);

/// The nodes. Node 0 is the root; a slot of an inner node holds a node's number, or 0.
#[derive(Debug)]
pub(crate) struct Radix {
    words: Mapped<u64>,
    used: usize,
}

impl Table {
    /// # Errors
    /// `NoMemory` when the pool cannot be mapped.
    pub(crate) fn new() -> Result<Self> {
        Self::with_nodes(NODES)
    }

    fn with_nodes(nodes: usize) -> Result<Self> {
        Ok(Self(RwLock::new(Radix { words: Mapped::new(nodes * SLOTS)?, used: 1 })))
    }

    /// For using translations: they stay valid until the guard is dropped.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Radix> {
        self.0.read()
    }

    /// For changing them: no kernel uses one meanwhile.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Radix> {
        self.0.write()
    }
}

impl Radix {
    /// The translation of the page that holds `addr`.
    pub(crate) fn get(&self, addr: VirtAddr) -> Option<Translation> {
        let page = addr.get() >> PAGE_SHIFT;
        let mut node = 0;
        for level in (1..=ROOT_LEVEL).rev() {
            node = self.words[word_of(node, slot_of(page, level))] as usize;
            if node == 0 {
                return None;
            }
        }
        Translation::unpack(self.words[word_of(node, slot_of(page, 0))])
    }

    /// Enters the page at `addr`, an address of the user address space.
    pub(crate) fn set(&mut self, addr: VirtAddr, translation: Translation) {
        let page = addr.get() >> PAGE_SHIFT;
        if self.used + ROOT_LEVEL as usize > self.words.len() / SLOTS {
            self.clear_all();
        }
        let mut node = 0;
        for level in (1..=ROOT_LEVEL).rev() {
            let slot = word_of(node, slot_of(page, level));
            if self.words[slot] == 0 {
                self.words[slot] = self.new_node() as u64;
            }
            node = self.words[slot] as usize;
        }
        self.words[word_of(node, slot_of(page, 0))] = translation.pack();
    }

    /// Drops the entries of a range.
    pub(crate) fn clear(&mut self, range: AddrRange) {
        let first = range.start().get() >> PAGE_SHIFT;
        let last = (range.end().get() - 1) >> PAGE_SHIFT;
        self.clear_below(0, ROOT_LEVEL, first, last);
    }

    /// Drops everything, in constant time: nodes are emptied when they are used again.
    pub(crate) fn clear_all(&mut self) {
        self.words[..SLOTS].fill(0);
        self.used = 1;
    }

    /// The pages `first..=last` in the subtree of a node; both lie in what the node covers.
    fn clear_below(&mut self, node: usize, level: u32, first: u64, last: u64) {
        let (from, to) = (slot_of(first, level), slot_of(last, level));
        if level == 0 {
            return self.words[word_of(node, from)..=word_of(node, to)].fill(0);
        }
        let shift = SLOT_SHIFT * level;
        for slot in from..=to {
            let child = self.words[word_of(node, slot)] as usize;
            if child == 0 {
                continue;
            }
            let low = if slot == from { first } else { 0 };
            let high = if slot == to { last } else { (1 << shift) - 1 };
            self.clear_below(child, level - 1, low, high);
        }
    }

    fn new_node(&mut self) -> usize {
        let node = self.used;
        self.used += 1;
        self.words[word_of(node, 0)..word_of(node + 1, 0)].fill(0);
        node
    }
}

fn word_of(node: usize, slot: usize) -> usize {
    node * SLOTS + slot
}

fn slot_of(page: u64, level: u32) -> usize {
    (page >> (SLOT_SHIFT * level)) as usize & (SLOTS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_core::{PAGE_SIZE, USER_END};

    const ENTRY: Translation = Translation { place: Place::Device(5), write: true };

    fn page(number: u64) -> VirtAddr {
        VirtAddr::new(number << PAGE_SHIFT)
    }

    fn pages(first: u64, last: u64) -> AddrRange {
        AddrRange::new(first << PAGE_SHIFT, (last + 1) << PAGE_SHIFT).unwrap()
    }

    #[test]
    fn entries_are_kept_apart() {
        let table = Table::new().unwrap();
        let mut radix = table.write();
        let system = Translation { place: Place::System, write: false };
        let last = (USER_END >> PAGE_SHIFT) - 1;
        radix.set(page(1), ENTRY);
        radix.set(page(2), system);
        radix.set(page(last), ENTRY);
        assert_eq!(radix.get(page(1)), Some(ENTRY));
        assert_eq!(radix.get(page(2)), Some(system));
        assert_eq!(radix.get(page(last)), Some(ENTRY));
        assert_eq!(radix.get(page(3)), None);
        assert_eq!(radix.get(page(1 << 20)), None);
    }

    #[test]
    fn clearing_takes_the_range_and_nothing_else() {
        let table = Table::new().unwrap();
        let mut radix = table.write();
        let all = [511, 512, 1023, 1024, (1 << 18) - 1, 1 << 18, (3 << 27) + 7];
        for bounds in [(512, 1023), (511, 1 << 18), (1, (1 << 35) - 1), (512, 512)] {
            for one in all {
                radix.set(page(one), ENTRY);
            }
            radix.clear(pages(bounds.0, bounds.1));
            for one in all {
                let inside = bounds.0 <= one && one <= bounds.1;
                assert_eq!(radix.get(page(one)).is_none(), inside, "{bounds:?} {one}");
            }
        }
    }

    #[test]
    fn an_exhausted_pool_empties_the_table() {
        let table = Table::with_nodes(8).unwrap();
        let mut radix = table.write();
        for leaf in 0..100 {
            radix.set(page(leaf * 512 + 3), ENTRY);
            assert_eq!(radix.get(page(leaf * 512 + 3)), Some(ENTRY));
            assert_eq!(radix.get(page(leaf * 512 + 4)), None);
        }
        assert_eq!(radix.get(page(3)), None);
        assert_eq!(PAGE_SIZE, 4096);
    }
}
