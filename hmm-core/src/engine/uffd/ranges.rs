//! Which addresses belong to the second descriptor ([`super::second`]): disjoint ranges, sorted.

use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Buffer;
use crate::limits::INLINE_RANGES;
use crate::sync::RwLock;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// A set of addresses.
pub(super) struct Ranges {
    sorted: RwLock<Sorted>,
    /// False once a moved range found no room: what is not in the set may belong to the second descriptor, too.
    complete: AtomicBool,
}

/// The first `len` places are in use, in rising order; no two of them touch.
struct Sorted {
    places: Buffer<(u64, u64)>,
    len: usize,
}

impl Sorted {
    fn used(&self) -> &[(u64, u64)] {
        &self.places[..self.len]
    }

    /// Puts `pieces` in the place of those from `first` to before `end`. False, and nothing done, without room.
    fn replace(&mut self, first: usize, end: usize, pieces: &[(u64, u64)]) -> bool {
        let len = self.len - (end - first) + pieces.len();
        if len > self.places.len() {
            return false;
        }
        let old = self.len;
        self.places.copy_within(end..old, first + pieces.len());
        self.places[first..first + pieces.len()].copy_from_slice(pieces);
        self.len = len;
        true
    }

    fn insert(&mut self, start: u64, end: u64) -> bool {
        let first = self.used().partition_point(|one| one.1 < start);
        let last = self.used().partition_point(|one| one.0 <= end);
        let joined = self.used()[first..last.max(first)]
            .iter()
            .fold((start, end), |hull, one| (hull.0.min(one.0), hull.1.max(one.1)));
        self.replace(first, last.max(first), &[joined])
    }

    fn remove(&mut self, start: u64, end: u64) -> bool {
        let first = self.used().partition_point(|one| one.1 <= start);
        let last = self.used().partition_point(|one| one.0 < end).max(first);
        let hit = &self.used()[first..last];
        let (Some(lowest), Some(highest)) = (hit.first(), hit.last()) else { return true };
        let (below, above) = ((lowest.0, start), (end, highest.1));
        match (below.0 < below.1, above.0 < above.1) {
            (true, true) => self.replace(first, last, &[below, above]),
            (true, false) => self.replace(first, last, &[below]),
            (false, true) => self.replace(first, last, &[above]),
            (false, false) => self.replace(first, last, &[]),
        }
    }
}

impl Ranges {
    /// The empty set; `None` when memory is short.
    pub(super) fn new() -> Option<Self> {
        let places = Buffer::new(INLINE_RANGES, |_| (0, 0))?;
        let sorted = RwLock::new(Sorted { places, len: 0 });
        Some(Self { sorted, complete: AtomicBool::new(true) })
    }

    pub(super) fn contains(&self, addr: VirtAddr) -> bool {
        self.first_part(AddrRange::page_of(addr)).1
    }

    pub(super) fn overlaps(&self, range: AddrRange) -> bool {
        let (first, inside) = self.first_part(range);
        inside || first != range
    }

    /// The longest part of a range, from its start on, that is all inside or all outside; and which.
    pub(super) fn first_part(&self, range: AddrRange) -> (AddrRange, bool) {
        let (start, end) = (range.start().get(), range.end().get());
        let sorted = self.sorted.read();
        let next = sorted.used().partition_point(|one| one.1 <= start);
        let (border, inside) = match sorted.used().get(next) {
            Some(one) if one.0 <= start => (one.1, true),
            Some(one) => (one.0, false),
            None => (end, false),
        };
        (AddrRange::from_bounds(start, border.min(end)), inside)
    }

    /// Parts of a range that are all inside or all outside, in rising order.
    pub(super) fn parts(&self, range: AddrRange) -> impl Iterator<Item = (AddrRange, bool)> + '_ {
        let mut rest = Some(range);
        std::iter::from_fn(move || {
            let (part, inside) = self.first_part(rest?);
            rest = AddrRange::new(part.end().get(), range.end().get()).ok();
            Some((part, inside))
        })
    }

    /// False, and nothing done, without room.
    pub(super) fn insert(&self, range: AddrRange) -> bool {
        self.sorted.write().insert(range.start().get(), range.end().get())
    }

    /// Without room for the piece that would be cut off, the set stays as it is: new memory there would be watched by
    /// the second descriptor.
    pub(super) fn remove(&self, range: AddrRange) {
        let _ = self.sorted.write().remove(range.start().get(), range.end().get());
    }

    /// What was at one place is at another.
    pub(super) fn follow(&self, from: AddrRange, to: AddrRange) {
        self.remove(from);
        if !self.insert(to) {
            self.complete.store(false, Ordering::Release);
        }
    }

    /// Whether what is outside surely belongs to the first descriptor.
    pub(super) fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sorted.read().used()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, end: u64) -> AddrRange {
        AddrRange::from_bounds(first * 4096, end * 4096)
    }

    fn pages(ranges: &Ranges) -> Vec<(u64, u64)> {
        let sorted = ranges.sorted.read();
        sorted.used().iter().map(|one| (one.0 / 4096, one.1 / 4096)).collect()
    }

    #[test]
    fn ranges_join_and_part() {
        let ranges = Ranges::new().unwrap();
        assert!(!ranges.overlaps(range(1, 1000)));
        for (first, end) in [(10, 20), (30, 40), (50, 60)] {
            assert!(ranges.insert(range(first, end)));
        }
        assert!(ranges.insert(range(20, 30)));
        assert_eq!(pages(&ranges), [(10, 40), (50, 60)]);
        assert!(ranges.insert(range(15, 16)));
        ranges.remove(range(12, 14));
        assert_eq!(pages(&ranges), [(10, 12), (14, 40), (50, 60)]);
        ranges.remove(range(11, 55));
        assert_eq!(pages(&ranges), [(10, 11), (55, 60)]);
        ranges.remove(range(20, 30));
        ranges.remove(range(10, 11));
        assert_eq!(pages(&ranges), [(55, 60)]);
        assert!(ranges.insert(range(1, 100)));
        assert_eq!(pages(&ranges), [(1, 100)]);
        ranges.follow(range(90, 100), range(200, 210));
        assert_eq!(pages(&ranges), [(1, 90), (200, 210)]);
    }

    #[test]
    fn parts_are_uniform_and_cover_the_range() {
        let ranges = Ranges::new().unwrap();
        assert!(ranges.insert(range(10, 20)) && ranges.insert(range(30, 40)));
        let parts: Vec<_> = ranges.parts(range(5, 35)).collect();
        let expected = [(5, 10, false), (10, 20, true), (20, 30, false), (30, 35, true)];
        assert_eq!(parts, expected.map(|(first, end, inside)| (range(first, end), inside)));
        assert!(ranges.overlaps(range(5, 11)) && ranges.overlaps(range(12, 13)));
        assert!(!ranges.overlaps(range(20, 30)));
        assert!(ranges.contains(VirtAddr::new(39 * 4096)) && !ranges.contains(VirtAddr::new(0)));
    }

    #[test]
    fn a_full_set_stays_as_it_is() {
        let ranges = Ranges::new().unwrap();
        let count = INLINE_RANGES as u64;
        assert!((0..count).all(|one| ranges.insert(range(4 * one + 1, 4 * one + 4))));
        assert!(!ranges.insert(range(4 * count + 1, 4 * count + 2)));
        ranges.remove(range(2, 3));
        assert!(ranges.contains(VirtAddr::new(2 * 4096)));
        assert!(ranges.is_complete());
        ranges.follow(range(2, 3), range(4 * count + 1, 4 * count + 2));
        assert!(!ranges.is_complete());
    }
}
