//! The mappings: what is mapped where, with which protection, and how it is watched.

use crate::addr::{AddrRange, USER_END, VirtAddr};
use crate::engine::{Mapping, VmaKind, Watch};
use crate::flags::Protection;
use std::collections::BTreeMap;

/// Where the model places its first mapping: far below where Linux maps anything of the real process, so that the
/// addresses of model memory and of frames (which are real) never meet.
const BASE: u64 = 1 << 44;

/// What a piece of address space is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) protection: Protection,
    pub(super) kind: VmaKind,
    pub(super) identity: u64,
    pub(super) watch: Option<Watch>,
}

/// A region and where it lies.
pub(super) type Piece = (AddrRange, Region);

/// All mappings. Neighbours that are alike are one mapping, as in the kernel.
#[derive(Debug, Default)]
pub(super) struct Space {
    regions: BTreeMap<u64, Piece>,
    identities: u64,
}

impl Space {
    /// The first mapping that ends above `addr`.
    pub(super) fn next(&self, addr: VirtAddr) -> Option<Piece> {
        self.at(addr).or_else(|| self.regions.range(addr.get()..).next().map(|(_, piece)| *piece))
    }

    /// The mapping that holds `addr`.
    pub(super) fn at(&self, addr: VirtAddr) -> Option<Piece> {
        let (_, piece) = self.regions.range(..=addr.get()).next_back()?;
        piece.0.contains(addr).then_some(*piece)
    }

    /// What is mapped in `range`, cut to it, in rising order.
    pub(super) fn pieces(&self, range: AddrRange) -> Vec<Piece> {
        let first = self.at(range.start()).map_or(range.start().get(), |(at, _)| at.start().get());
        self.regions
            .range(first..range.end().get())
            .filter_map(|(_, (at, region))| Some((at.intersect(range)?, *region)))
            .collect()
    }

    /// Whether every page of `range` is mapped.
    pub(super) fn is_mapped(&self, range: AddrRange) -> bool {
        self.pieces(range).iter().map(|(at, _)| at.len()).sum::<u64>() == range.len()
    }

    /// Whether some page of `range` is watched.
    pub(super) fn is_watched(&self, range: AddrRange) -> bool {
        self.pieces(range).iter().any(|(_, region)| region.watch.is_some())
    }

    /// Maps `range`, which is free.
    pub(super) fn insert(&mut self, range: AddrRange, region: Region) {
        let mut merged = range;
        let left = self.regions.range(..range.start().get()).next_back().map(|(_, piece)| *piece);
        let right = self.regions.get(&range.end().get()).copied();
        for (at, other) in [left, right].into_iter().flatten() {
            let touches = at.end() == range.start() || at.start() == range.end();
            if touches && other == region {
                merged = merged.hull(at);
                self.regions.remove(&at.start().get());
            }
        }
        self.regions.insert(merged.start().get(), (merged, region));
    }

    /// Unmaps `range`; returns what was there.
    pub(super) fn remove(&mut self, range: AddrRange) -> Vec<Piece> {
        let removed = self.pieces(range);
        for edge in [range.start(), range.end()] {
            self.split(edge);
        }
        for (at, _) in &removed {
            self.regions.remove(&at.start().get());
        }
        removed
    }

    /// Changes the attributes of what is mapped in `range`.
    pub(super) fn update(&mut self, range: AddrRange, mut change: impl FnMut(&mut Region)) {
        for (at, mut region) in self.remove(range) {
            change(&mut region);
            self.insert(at, region);
        }
    }

    /// The lowest free place for `bytes`: what was unmapped last is soon mapped again, which finds stale state.
    pub(super) fn find_free(&self, bytes: u64) -> Option<AddrRange> {
        let mut start = BASE;
        for (at, _) in self.regions.range(BASE..).map(|(_, piece)| piece) {
            if at.start().get() - start >= bytes {
                break;
            }
            start = at.end().get();
        }
        let end = start.checked_add(bytes)?;
        (end <= USER_END).then(|| AddrRange::from_bounds(start, end))
    }

    /// The region of a new mapping. Anonymous memory has no identity, so that its neighbours join.
    pub(super) fn new_region(&mut self, protection: Protection, kind: VmaKind) -> Region {
        let identity = if kind == VmaKind::Anonymous {
            0
        } else {
            self.identities += 1;
            self.identities
        };
        Region { protection, kind, identity, watch: None }
    }

    /// Nothing is watched any more.
    pub(super) fn unwatch_all(&mut self) {
        let everything: Vec<Piece> = self.regions.values().copied().collect();
        for (at, _) in everything {
            self.update(at, |region| region.watch = None);
        }
    }

    /// Makes `edge` a boundary between mappings if it lies inside one.
    fn split(&mut self, edge: VirtAddr) {
        let Some((at, region)) = self.at(edge) else { return };
        if at.start() == edge {
            return;
        }
        for (start, end) in [(at.start(), edge), (edge, at.end())] {
            let part = AddrRange::from_bounds(start.get(), end.get());
            self.regions.insert(start.get(), (part, region));
        }
    }
}

/// As the mm sees it.
pub(super) fn mapping_of((range, region): Piece) -> Mapping {
    Mapping { range, protection: region.protection, kind: region.kind, identity: region.identity }
}
