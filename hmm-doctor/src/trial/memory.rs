//! Memory as a program has it, with contents that are known.

use hmm_core::{AddrRange, PAGE_SIZE, VirtAddr};
use memmap2::MmapMut;
use std::collections::BTreeMap;

const WORD: usize = 8;
const WORDS_OF_PAGE: usize = PAGE_SIZE / WORD;

/// A mapping of its own: pages that leave share nothing with the rest of the process.
#[derive(Debug)]
pub(super) struct Memory {
    map: MmapMut,
    /// Words that do not hold what they were filled with.
    changed: BTreeMap<usize, u64>,
}

/// What a word is filled with: every one is different.
fn pattern(word: usize) -> u64 {
    (word as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

impl Memory {
    /// New memory, every page of it filled.
    pub(super) fn filled(pages: usize) -> Result<Self, String> {
        let map = MmapMut::map_anon(pages * PAGE_SIZE);
        let mut map = map.map_err(|error| format!("no memory for the test: {error}"))?;
        for (number, word) in map.chunks_exact_mut(WORD).enumerate() {
            word.copy_from_slice(&pattern(number).to_ne_bytes());
        }
        Ok(Self { map, changed: BTreeMap::new() })
    }

    pub(super) fn pages(&self) -> usize {
        self.map.len() / PAGE_SIZE
    }

    pub(super) fn range(&self) -> Result<AddrRange, String> {
        let start = VirtAddr::from_ptr(self.map.as_ptr()).get();
        AddrRange::covering(start, self.map.len() as u64).map_err(|error| error.to_string())
    }

    /// The number of a word in the middle of a page.
    pub(super) fn word_of(page: usize) -> usize {
        page * WORDS_OF_PAGE + WORDS_OF_PAGE / 2
    }

    /// Its address, for the device.
    pub(super) fn address(&self, word: usize) -> u64 {
        VirtAddr::from_ptr(self.map.as_ptr()).get() + (word * WORD) as u64
    }

    /// The bytes of a page, wherever they are now: reading them is what brings it home.
    pub(super) fn page(&self, page: usize) -> &[u8] {
        // The device changes this memory behind the compiler's back.
        let map = std::hint::black_box(&self.map);
        &map[page * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// One load.
    pub(super) fn load(&self, word: usize) -> u64 {
        let bytes = &std::hint::black_box(&self.map)[word * WORD..][..WORD];
        bytes.try_into().map_or(0, u64::from_ne_bytes)
    }

    /// One store, that is expected from now on.
    pub(super) fn store(&mut self, word: usize, value: u64) {
        self.map[word * WORD..][..WORD].copy_from_slice(&value.to_ne_bytes());
        self.expect(word, value);
        std::hint::black_box(&mut self.map);
    }

    /// What a word is to hold from now on.
    pub(super) fn expect(&mut self, word: usize, value: u64) {
        self.changed.insert(word, value);
    }

    pub(super) fn expected(&self, word: usize) -> u64 {
        self.changed.get(&word).copied().unwrap_or_else(|| pattern(word))
    }

    /// # Errors
    /// Where a page does not hold what it should.
    pub(super) fn check_page(&self, page: usize) -> Result<(), String> {
        self.check_bytes(page, self.page(page))
    }

    /// The same, for a copy of a page.
    pub(super) fn check_bytes(&self, page: usize, bytes: &[u8]) -> Result<(), String> {
        let words = bytes.chunks_exact(WORD).enumerate();
        let wrong = words
            .map(|(at, bytes)| (page * WORDS_OF_PAGE + at, bytes))
            .find(|(word, bytes)| **bytes != self.expected(*word).to_ne_bytes());
        match wrong {
            None if bytes.len() == PAGE_SIZE => Ok(()),
            None => Err(format!("{} bytes of page {page} instead of all", bytes.len())),
            Some((word, bytes)) => Err(format!(
                "page {page} has other contents than it should: {bytes:02x?} in word {word} instead of {:02x?}",
                self.expected(word).to_ne_bytes()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_known_and_differences_are_found() {
        let mut memory = Memory::filled(3).unwrap();
        assert_eq!((memory.pages(), memory.range().unwrap().pages()), (3, 3));
        (0..3).for_each(|page| memory.check_page(page).unwrap());
        let word = Memory::word_of(1);
        memory.store(word, 7);
        assert_eq!((memory.load(word), memory.expected(word)), (7, 7));
        memory.check_page(1).unwrap();
        memory.expect(word, 8);
        assert!(memory.check_page(1).unwrap_err().contains("page 1 has other contents"));
        assert!(memory.check_bytes(0, &[]).is_err());
    }
}
