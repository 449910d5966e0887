//! A set of pages of one leaf, or of slots of one block of frames.

use crate::addr::{AddrRange, LEAF_PAGES};

const WORDS: usize = LEAF_PAGES / 64;

/// The set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PageSet([u64; WORDS]);

impl PageSet {
    pub(crate) fn insert(&mut self, slot: usize) {
        self.0[slot / 64] |= 1 << (slot % 64);
    }
    /// The slots of the pages of a range inside one leaf.
    pub(crate) fn insert_pages(&mut self, range: AddrRange) {
        (0..range.pages()).for_each(|page| self.insert(range.page_at(page).index_in_leaf()));
    }
    pub(crate) fn remove(&mut self, slot: usize) {
        self.0[slot / 64] &= !(1 << (slot % 64));
    }
    pub(crate) fn contains(&self, slot: usize) -> bool {
        self.0[slot / 64] & (1 << (slot % 64)) != 0
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
    pub(crate) fn is_full(&self) -> bool {
        self.0.iter().all(|word| *word == u64::MAX)
    }
    /// How many slots are in it.
    pub(crate) fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }
    /// How many of `wanted` are missing here.
    pub(crate) fn missing(&self, wanted: &Self) -> u32 {
        self.0.iter().zip(&wanted.0).map(|(have, want)| (want & !have).count_ones()).sum()
    }
    /// What is here, and not there.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = *self;
        left.0.iter_mut().zip(&other.0).for_each(|(word, gone)| *word &= !gone);
        left
    }
    /// The run of slots from `slot` on that are all in the set, or all not: its end, and which of the two.
    pub(crate) fn run_at(&self, slot: usize) -> (usize, bool) {
        let inside = self.contains(slot);
        let mut word = slot / 64;
        let mut others = self.others(word, inside) & (u64::MAX << (slot % 64));
        while others == 0 && word + 1 < WORDS {
            word += 1;
            others = self.others(word, inside);
        }
        let end = word * 64 + others.trailing_zeros() as usize;
        (end.min(LEAF_PAGES), inside)
    }
    /// The first slot of the run that ends with `slot`.
    pub(crate) fn run_before(&self, slot: usize) -> usize {
        let inside = self.contains(slot);
        let mut word = slot / 64;
        let mut others = self.others(word, inside) & (u64::MAX >> (63 - slot % 64));
        while others == 0 && word > 0 {
            word -= 1;
            others = self.others(word, inside);
        }
        (word * 64 + 64) - others.leading_zeros() as usize
    }
    /// The slots of a word that are not in the set, if `inside`; else those that are.
    fn others(&self, word: usize, inside: bool) -> u64 {
        if inside { !self.0[word] } else { self.0[word] }
    }
    /// How many runs of its slots there are.
    pub(crate) fn runs(&self) -> usize {
        let mut before = 0;
        let mut count = 0;
        for word in self.0 {
            count += (word & !(word << 1 | before)).count_ones() as usize;
            before = word >> 63;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(slots: std::ops::Range<usize>) -> PageSet {
        let mut set = PageSet::default();
        slots.for_each(|slot| set.insert(slot));
        set
    }

    #[test]
    fn slot_sets_count_what_is_missing() {
        let have = set(10..100);
        assert_eq!(have.missing(&set(90..110)), 10);
        assert!(have.overlaps(&set(99..300)));
        assert!(!have.overlaps(&set(100..300)));
    }

    #[test]
    fn runs_are_found_across_words() {
        let mut set = set(60..70);
        (200..201).chain(511..512).for_each(|slot| set.insert(slot));
        assert_eq!(set.runs(), 3);
        assert_eq!(set.run_at(0), (60, false));
        assert_eq!(set.run_at(60), (70, true));
        assert_eq!(set.run_at(300), (511, false));
        assert_eq!(set.run_at(511), (512, true));
        assert_eq!([set.run_before(59), set.run_before(69)], [0, 60]);
        assert_eq!([set.run_before(510), set.run_before(511)], [201, 511]);
    }
}
