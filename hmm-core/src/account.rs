//! Memory groups, in the words of cgroup v2's memory controller: who pays for the pages that leave for devices.
//!
//! The kernel charges system memory to the process's cgroup and knows nothing of devices. The groups here are the
//! library's own: a page is charged to one when it first leaves for a device, and stays charged to the same one, on
//! whichever side it is, until it is dropped (promises 75 to 79). Groups nest; a charge counts in all groups above.
//!
//! A fixed table of plain atomics: charging takes no lock and no memory, and may happen while a fault is answered.

use crate::addr::PAGE_SIZE;
use crate::error::{Error, Result};
use crate::limits::MEMORY_GROUPS;
use crate::sync::{Mutex, MutexGuard};
use std::fmt;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const FREE: u32 = u32::MAX;
const NO_PARENT: u32 = u32::MAX - 1;
const ROOT: GroupId = GroupId(NonZeroU16::MIN);

/// Held while groups are made.
static MAKING: Mutex<()> = Mutex::new(());
static SLOTS: [Slot; MEMORY_GROUPS] = {
    let mut slots = [const { Slot::new(FREE) }; MEMORY_GROUPS];
    slots[0] = Slot::new(NO_PARENT);
    slots
};

/// One group; numbers are pages.
struct Slot {
    /// Place of the parent in the table, `NO_PARENT` or `FREE`.
    parent: AtomicU32,
    /// Handles, address spaces, children, and migrations that charge just now.
    references: AtomicU32,
    /// Charged to this very group.
    own: AtomicU64,
    /// Charged to it and the groups below.
    usage: AtomicU64,
    /// Of these: on a device.
    device: AtomicU64,
    peak: AtomicU64,
    max: AtomicU64,
    /// Times that the limit, or one of a group below, was hit.
    hits: AtomicU64,
}

impl Slot {
    const fn new(parent: u32) -> Self {
        Self {
            parent: AtomicU32::new(parent),
            references: AtomicU32::new(0),
            own: AtomicU64::new(0),
            usage: AtomicU64::new(0),
            device: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            max: AtomicU64::new(u64::MAX),
            hits: AtomicU64::new(0),
        }
    }

    fn clear(&self) {
        for number in [&self.own, &self.usage, &self.device, &self.peak, &self.hits] {
            number.store(0, Ordering::SeqCst);
        }
    }
}

fn add(number: &AtomicU64, count: u64) -> u64 {
    number.fetch_add(count, Ordering::SeqCst) + count
}

fn subtract(number: &AtomicU64, count: u64) {
    number.fetch_sub(count, Ordering::SeqCst);
}

fn bytes(pages: u64) -> u64 {
    pages * PAGE_SIZE as u64
}

/// A group's place in the table, as a page-table entry keeps it. Valid while anything is charged to the group, or
/// refers to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GroupId(NonZeroU16);

impl GroupId {
    pub(crate) fn from_bits(bits: u16) -> Option<Self> {
        NonZeroU16::new(bits).map(Self)
    }
    pub(crate) fn bits(self) -> u16 {
        self.0.get()
    }
    /// Place in lists with one element for each possible group.
    pub(crate) fn index(self) -> usize {
        usize::from(self.0.get() - 1)
    }

    fn of_index(index: usize) -> Option<Self> {
        u16::try_from(index + 1).ok().and_then(Self::from_bits)
    }

    fn slot(self) -> &'static Slot {
        &SLOTS[self.index()]
    }

    fn parent(self) -> Option<Self> {
        // What is no place does not fit into 16 bits.
        Self::of_index(self.slot().parent.load(Ordering::SeqCst) as usize)
    }

    /// This group and those above it, up to the root.
    fn and_above(self) -> impl Iterator<Item = Self> {
        std::iter::successors(Some(self), |group| group.parent())
    }

    /// The group and those above it that are not above `other`, too.
    fn not_shared_with(self, other: Option<Self>) -> impl Iterator<Item = Self> {
        let is_shared = move |group: &Self| {
            other.is_some_and(|other| other.and_above().any(|above| above == *group))
        };
        self.and_above().take_while(move |group| !is_shared(group))
    }

    /// Charges a page whose memory is spent already: never refused, and may go above the limit.
    pub(crate) fn charge(self) {
        add(&self.slot().own, 1);
        let mut over = None;
        for group in self.and_above() {
            let slot = group.slot();
            let usage = add(&slot.usage, 1);
            slot.peak.fetch_max(usage, Ordering::SeqCst);
            if over.is_none() && usage > slot.max.load(Ordering::SeqCst) {
                over = Some(group);
            }
        }
        over.into_iter().for_each(Self::note_hit);
    }

    /// Charges a page that would be new memory; false when that would go above the limit of the group, or of one above.
    pub(crate) fn try_charge(self) -> bool {
        self.try_charge_instead(None)
    }

    /// As [`GroupId::try_charge`] for a page that is charged to another group now: what is above both stays as it is.
    fn try_charge_instead(self, old: Option<Self>) -> bool {
        for group in self.not_shared_with(old) {
            let slot = group.slot();
            if add(&slot.usage, 1) > slot.max.load(Ordering::SeqCst) {
                subtract(&slot.usage, 1);
                let below = self.and_above().take_while(|below| *below != group);
                below.for_each(|below| subtract(&below.slot().usage, 1));
                group.note_hit();
                return false;
            }
        }
        for slot in self.not_shared_with(old).map(Self::slot) {
            slot.peak.fetch_max(slot.usage.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        add(&self.slot().own, 1);
        true
    }

    /// The charge of a page goes over to another group; false when that one's limit does not allow it.
    pub(crate) fn hand_over(self, to: Self, on_device: bool) -> bool {
        if !to.try_charge_instead(Some(self)) {
            return false;
        }
        let on_device = u64::from(on_device);
        for slot in to.not_shared_with(Some(self)).map(Self::slot) {
            add(&slot.device, on_device);
        }
        for slot in self.not_shared_with(Some(to)).map(Self::slot) {
            subtract(&slot.usage, 1);
            subtract(&slot.device, on_device);
        }
        subtract(&self.slot().own, 1);
        true
    }

    /// The page is gone.
    pub(crate) fn uncharge(self, was_on_device: bool) {
        self.moved(was_on_device, false);
        self.and_above().for_each(|group| subtract(&group.slot().usage, 1));
        subtract(&self.slot().own, 1);
    }

    /// The page is elsewhere, and charged as before.
    pub(crate) fn moved(self, was_on_device: bool, is_on_device: bool) {
        match (was_on_device, is_on_device) {
            (false, true) => self.and_above().for_each(|group| _ = add(&group.slot().device, 1)),
            (true, false) => self.and_above().for_each(|group| subtract(&group.slot().device, 1)),
            _ => {}
        }
    }

    fn note_hit(self) {
        self.and_above().for_each(|group| _ = add(&group.slot().hits, 1));
    }
}

/// Keeps a group in the table.
#[derive(PartialEq, Eq)]
pub(crate) struct GroupRef(GroupId);

impl GroupRef {
    pub(crate) fn root() -> Self {
        Self::of(ROOT)
    }

    fn of(group: GroupId) -> Self {
        group.slot().references.fetch_add(1, Ordering::SeqCst);
        Self(group)
    }

    pub(crate) fn id(&self) -> GroupId {
        self.0
    }
}

impl Clone for GroupRef {
    fn clone(&self) -> Self {
        Self::of(self.0)
    }
}

impl Drop for GroupRef {
    fn drop(&mut self) {
        self.0.slot().references.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a group's charges are, in bytes (`memory.stat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupStat {
    /// Anonymous memory: all that is charged, since what can leave for a device is anonymous.
    pub anon: u64,
    /// Of this: in the memory of devices now.
    pub device: u64,
}

/// What happened to a group (`memory.events`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupEvents {
    /// Times that a charge went above the limit of the group or of one below it, or was refused for that.
    pub max: u64,
}

/// A memory group (a cgroup with the memory controller), for the pages of address spaces that are put into it by
/// [`crate::Mm::set_group`]. Cheap to clone: clones are the same group.
///
/// Charged is what left for a device once, from then on, wherever it is: a page that never left is the kernel's business
/// alone. A limit keeps holes from being filled on a device; it never keeps a page from leaving or from coming home,
/// since that is memory which the process has already. The root group has no limit, and counts everything.
///
/// A group lives as long as a handle, an address space in it, a group below it, or a charge. After a fork the child has
/// the same groups, without charges: its pages are copies of its own.
#[derive(Clone, PartialEq, Eq)]
pub struct MemoryGroup(GroupRef);

impl MemoryGroup {
    /// The group above all others.
    pub fn root() -> Self {
        Self(GroupRef::root())
    }

    /// A new group without a limit of its own, below a parent whose limits hold for it, too.
    ///
    /// # Errors
    /// `NoMemory` when there are 256.
    pub fn create(parent: &Self) -> Result<Self> {
        let _one = MAKING.lock();
        loop {
            let is_free = |slot: &Slot| slot.parent.load(Ordering::SeqCst) == FREE;
            if let Some(id) = SLOTS.iter().position(is_free).and_then(GroupId::of_index) {
                let slot = id.slot();
                slot.clear();
                slot.max.store(u64::MAX, Ordering::SeqCst);
                // The child's reference of its parent: `free_abandoned` drops it.
                parent.0.id().slot().references.fetch_add(1, Ordering::SeqCst);
                slot.parent.store(parent.0.id().index() as u32, Ordering::SeqCst);
                return Ok(Self(GroupRef::of(id)));
            }
            if !free_abandoned() {
                return Err(Error::NoMemory { what: "memory groups (256)" });
            }
        }
    }

    /// Sets the limit in bytes, rounded down to whole pages (`memory.max`); `None` is no limit. A limit below what is
    /// charged already drops nothing: it only refuses what is new.
    ///
    /// # Errors
    /// `Invalid` for the root group.
    pub fn set_max(&self, max: Option<u64>) -> Result<()> {
        if self.0.id() == ROOT {
            return Err(Error::invalid(0, "the root group has no limit: make a group below it"));
        }
        let pages = max.map_or(u64::MAX, |bytes| bytes / PAGE_SIZE as u64);
        self.0.id().slot().max.store(pages, Ordering::SeqCst);
        Ok(())
    }

    /// The limit in bytes; `None`: no limit of its own.
    pub fn max(&self) -> Option<u64> {
        match self.0.id().slot().max.load(Ordering::SeqCst) {
            u64::MAX => None,
            pages => Some(bytes(pages)),
        }
    }

    /// Bytes charged to it and to the groups below (`memory.current`).
    pub fn current(&self) -> u64 {
        bytes(self.0.id().slot().usage.load(Ordering::SeqCst))
    }

    /// The most that it ever was (`memory.peak`).
    pub fn peak(&self) -> u64 {
        bytes(self.0.id().slot().peak.load(Ordering::SeqCst))
    }

    /// What the charges are (`memory.stat`).
    pub fn stat(&self) -> GroupStat {
        let slot = self.0.id().slot();
        let (all, device) = (&slot.usage, &slot.device);
        GroupStat {
            anon: bytes(all.load(Ordering::SeqCst)),
            device: bytes(device.load(Ordering::SeqCst)),
        }
    }

    /// What happened (`memory.events`).
    pub fn events(&self) -> GroupEvents {
        GroupEvents { max: self.0.id().slot().hits.load(Ordering::SeqCst) }
    }

    /// The group above; `None` for the root.
    pub fn parent(&self) -> Option<Self> {
        self.0.id().parent().map(|parent| Self(GroupRef::of(parent)))
    }

    pub(crate) fn reference(&self) -> &GroupRef {
        &self.0
    }

    pub(crate) fn of_reference(group: GroupRef) -> Self {
        Self(group)
    }
}

impl fmt::Debug for MemoryGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, current) = (self.0.id().index(), self.current());
        write!(f, "MemoryGroup({number}, {current} bytes of {:?})", self.max())
    }
}

/// Gives back the places of groups that nothing refers to any more; false when there are none. `MAKING` is held.
fn free_abandoned() -> bool {
    let mut any = false;
    for slot in &SLOTS[1..] {
        let parent = slot.parent.load(Ordering::SeqCst);
        // Nothing can be charged to a group without a reference, so the order of the two looks matters.
        if parent != FREE
            && slot.references.load(Ordering::SeqCst) == 0
            && slot.own.load(Ordering::SeqCst) == 0
        {
            slot.parent.store(FREE, Ordering::SeqCst);
            SLOTS[parent as usize].references.fetch_sub(1, Ordering::SeqCst);
            any = true;
        }
    }
    any
}

/// Held across a fork, so that the child can make groups.
pub(crate) fn lock_for_fork() -> MutexGuard<'static, ()> {
    MAKING.lock()
}

/// This process is a child: nothing of its own is charged yet.
pub(crate) fn forget_after_fork() {
    SLOTS.iter().for_each(Slot::clear);
}

/// Pages, by group: charged to this very group, and of these on a device.
pub(crate) type Charges = [(u64, u64); MEMORY_GROUPS];

/// Compares the table with what the entries of every page table add up to, in lists with one element for each group.
///
/// # Errors
/// `Inconsistent`, naming the group and the numbers.
pub(crate) fn compare(found: &Charges) -> Result<()> {
    let mut sums = [(0, 0); MEMORY_GROUPS];
    let in_use = |slot: &Slot| slot.parent.load(Ordering::SeqCst) != FREE;
    for (index, (own, device)) in
        found.iter().enumerate().filter(|(index, _)| in_use(&SLOTS[*index]))
    {
        for group in GroupId::of_index(index).into_iter().flat_map(GroupId::and_above) {
            let sum: &mut (u64, u64) = &mut sums[group.index()];
            *sum = (sum.0 + own, sum.1 + device);
        }
    }
    for (index, slot) in SLOTS.iter().enumerate() {
        let charged = |number: &AtomicU64| number.load(Ordering::SeqCst);
        let table = (charged(&slot.own), charged(&slot.usage), charged(&slot.device));
        let expected = (found[index].0, sums[index].0, sums[index].1);
        if in_use(slot) && table != expected {
            let what = format!(
                "memory group {index}: its own pages, with those below, on devices: {table:?} charged, {expected:?} found"
            );
            return Err(Error::Inconsistent { what });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_counts(group: &MemoryGroup) -> (u64, u64, u64) {
        (group.current() / 4096, group.stat().device / 4096, group.peak() / 4096)
    }

    #[test]
    fn charges_count_in_every_group_above_and_limits_hold_for_all_below() {
        let parent = MemoryGroup::create(&MemoryGroup::root()).unwrap();
        let (one, two) =
            (MemoryGroup::create(&parent).unwrap(), MemoryGroup::create(&parent).unwrap());
        parent.set_max(Some(3 * 4096 + 77)).unwrap();
        assert_eq!(parent.max(), Some(3 * 4096));
        let (a, b) = (one.0.id(), two.0.id());
        assert!(a.try_charge() && a.try_charge() && b.try_charge());
        assert!(!b.try_charge());
        assert_eq!((one.events().max, two.events().max, parent.events().max), (0, 0, 1));
        // What cannot be refused goes above.
        b.charge();
        assert_eq!(parent.events().max, 2);
        b.moved(false, true);
        assert_eq!((page_counts(&parent), page_counts(&two)), ((4, 1, 4), (2, 1, 2)));
        // Between children nothing changes for the parent, whatever its limit.
        assert!(b.hand_over(a, true));
        assert_eq!((page_counts(&parent), page_counts(&one)), ((4, 1, 4), (3, 1, 3)));
        one.set_max(Some(3 * 4096)).unwrap();
        assert!(!b.hand_over(a, false));
        assert_eq!((one.events().max, page_counts(&two)), (1, (1, 0, 2)));
        a.uncharge(true);
        (0..2).for_each(|_| a.uncharge(false));
        b.uncharge(false);
        assert_eq!((page_counts(&parent), page_counts(&one)), ((0, 0, 4), (0, 0, 3)));
        assert_eq!(one.parent(), Some(parent));
        assert!(MemoryGroup::root().set_max(Some(0)).is_err());
    }

    #[test]
    fn groups_that_nobody_knows_any_more_make_room() {
        let root = MemoryGroup::root();
        for _ in 0..3 * MEMORY_GROUPS {
            let parent = MemoryGroup::create(&root).unwrap();
            let child = MemoryGroup::create(&parent).unwrap();
            drop(parent);
            assert_eq!(child.parent().and_then(|parent| parent.parent()), Some(root.clone()));
        }
        let kept = MemoryGroup::create(&root).unwrap();
        let id = kept.0.id();
        id.charge();
        drop(kept);
        let mut others = Vec::new();
        while let Ok(group) = MemoryGroup::create(&root) {
            assert_ne!(group.0.id(), id);
            others.push(group);
        }
        id.uncharge(false);
        assert_eq!(MemoryGroup::create(&root).unwrap().0.id(), id);
    }
}
