//! Memory of every kind, with a pattern, and what a migration says about each page of it.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use super::driver::{Card, on_device};
use hmm_core::{AddrRange, MigratePfn, PAGE_SIZE, Select, Stay};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const WORDS: usize = PAGE_SIZE / 8;
pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
pub(crate) const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// A mapping of any kind; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    addr: u64,
    pages: usize,
    is_owned: bool,
}

impl Memory {
    /// `None`: the system has none of this kind.
    pub(crate) fn try_map(pages: usize, protection: i32, flags: i32, file: RawFd) -> Option<Self> {
        let len = pages * PAGE_SIZE;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
        let addr = start.expose_provenance() as u64;
        (start != libc::MAP_FAILED).then_some(Self { addr, pages, is_owned: true })
    }

    pub(crate) fn map(pages: usize, protection: i32, flags: i32, file: RawFd) -> Self {
        Self::try_map(pages, protection, flags, file).unwrap()
    }

    /// Private anonymous memory with the pattern.
    pub(crate) fn filled(pages: usize) -> Self {
        let memory = Self::map(pages, READ_WRITE, PRIVATE, -1);
        memory.fill();
        memory
    }

    /// Memory that somebody else unmaps.
    pub(crate) fn lent(addr: u64, pages: usize) -> Self {
        Self { addr, pages, is_owned: false }
    }

    pub(crate) fn addr(&self) -> u64 {
        self.addr
    }

    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    pub(crate) fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    pub(crate) fn as_ptr(&self) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(self.addr as usize)
    }

    pub(crate) fn range(&self) -> AddrRange {
        self.part(0, self.pages)
    }

    pub(crate) fn part(&self, first: usize, count: usize) -> AddrRange {
        assert!(first + count <= self.pages);
        let start = self.addr + (first * PAGE_SIZE) as u64;
        AddrRange::new(start, start + (count * PAGE_SIZE) as u64).unwrap()
    }

    pub(crate) fn word(&self, page: usize, word: usize) -> &AtomicU64 {
        assert!(page < self.pages && word < WORDS);
        let addr = self.addr as usize + page * PAGE_SIZE + word * 8;
        // SAFETY: the word lies in the mapping, is aligned, and is only ever reached as an atomic.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(addr)) }
    }

    fn pattern(page: usize, word: usize) -> u64 {
        0x5eed_0000_0000_0000 | ((page as u64) << 16) | word as u64
    }

    pub(crate) fn fill_page(&self, page: usize) {
        for word in 0..WORDS {
            self.word(page, word).store(Self::pattern(page, word), Ordering::Relaxed);
        }
    }

    /// Writes the pattern, as the program itself would.
    pub(crate) fn fill(&self) {
        (0..self.pages).for_each(|page| self.fill_page(page));
    }

    pub(crate) fn has_pattern(&self, page: usize) -> bool {
        (0..WORDS)
            .all(|word| self.word(page, word).load(Ordering::Relaxed) == Self::pattern(page, word))
    }

    pub(crate) fn is_zero(&self, page: usize) -> bool {
        (0..WORDS).all(|word| self.word(page, word).load(Ordering::Relaxed) == 0)
    }

    /// How many pages do not have the pattern.
    pub(crate) fn wrong_pages(&self) -> usize {
        (0..self.pages).filter(|page| !self.has_pattern(*page)).count()
    }

    pub(crate) fn protect(&self, protection: i32) {
        self.protect_part(0, self.pages, protection);
    }

    pub(crate) fn protect_part(&self, first: usize, count: usize, protection: i32) {
        let part = self.part(first, count);
        let start = std::ptr::with_exposed_provenance_mut(part.start().get() as usize);
        // SAFETY: the pages belong to this mapping.
        let done = unsafe { libc::mprotect(start, part.len() as usize, protection) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// False when the kernel refuses the advice.
    pub(crate) fn advise(&self, advice: i32) -> bool {
        // SAFETY: the pages belong to this mapping.
        unsafe { libc::madvise(self.as_ptr(), self.len(), advice) == 0 }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.is_owned {
            // SAFETY: the mapping is this value's own.
            unsafe { libc::munmap(self.as_ptr(), self.len()) };
        }
    }
}

/// One migration to the device; why each page stayed (`None`: it left).
pub(crate) fn send(card: &Card, range: AddrRange) -> Vec<Option<Stay>> {
    send_from(card, range, Select::SYSTEM)
}

pub(crate) fn send_from(card: &Card, range: AddrRange, select: Select) -> Vec<Option<Stay>> {
    let mut src = vec![MigratePfn::default(); range.pages()];
    let mut dst = src.clone();
    card.migrate_with(range, select, &mut src, &mut dst).unwrap();
    for entry in &src {
        assert_ne!(entry.migrates(), entry.reason().is_some(), "{entry:?}");
    }
    src.into_iter().map(MigratePfn::reason).collect()
}

/// As [`send`], again and again until every page of the range stays for this reason: what something held for a moment
/// says so at first.
pub(crate) fn stay_because(card: &Card, range: AddrRange, why: Stay) -> Vec<Option<Stay>> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let said = send(card, range);
        if said.iter().all(|one| *one == Some(why)) || Instant::now() >= deadline {
            return said;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Memory of this kind stays, for this reason, and is the program's as before.
pub(crate) fn check_stays(card: &Card, memory: &Memory, why: Stay) {
    let said = stay_because(card, memory.range(), why);
    assert!(said.iter().all(|one| *one == Some(why)), "{said:?}");
    assert_eq!(on_device(&card.mm, memory.range()), 0);
    assert_eq!(card.devmem.in_use(), 0);
}

/// Memory of this kind leaves, comes home by touches and on request with its bytes, and loses no store that another
/// thread makes at any moment.
pub(crate) fn check_migrates(card: &Card, memory: &Memory) {
    memory.fill();
    assert_eq!(card.all_to_device(memory.range()), memory.pages());
    assert_eq!(memory.wrong_pages(), 0, "home by touches");
    assert!(card.settles_at(0));
    assert_eq!(card.all_to_device(memory.range()), memory.pages());
    card.to_system(memory.range()).unwrap();
    assert_eq!(memory.wrong_pages(), 0, "home on request");
    check_under_writes(card, memory);
}

/// Two threads count in every page while the pages leave and come home.
pub(crate) fn check_under_writes(card: &Card, memory: &Memory) {
    const SLOTS: [usize; 2] = [7, WORDS - 1];
    let stop = AtomicBool::new(false);
    for page in 0..memory.pages() {
        SLOTS.iter().for_each(|slot| memory.word(page, *slot).store(0, Ordering::Relaxed));
    }
    let rounds: Vec<u64> = std::thread::scope(|scope| {
        let count = |slot: usize| {
            let stop = &stop;
            scope.spawn(move || {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..memory.pages() {
                        // Not an atomic addition: each word is one thread's own, and a store that is lost shows.
                        let word = memory.word(page, slot);
                        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                    }
                    rounds += 1;
                }
                rounds
            })
        };
        let counting = SLOTS.map(count);
        for _ in 0..20 {
            card.to_device(memory.range()).unwrap();
            card.to_system(memory.range()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        counting.map(|thread| thread.join().unwrap()).to_vec()
    });
    for page in 0..memory.pages() {
        for (slot, rounds) in SLOTS.iter().zip(&rounds) {
            assert_eq!(memory.word(page, *slot).load(Ordering::Relaxed), *rounds, "page {page}");
        }
    }
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}

/// Whether a number in a file of the kernel's could be set.
pub(crate) fn set_number(path: &str, value: u64) -> bool {
    std::fs::write(path, value.to_string()).is_ok()
}

pub(crate) fn number_in(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A setting of the machine that is put back when this is dropped.
#[derive(Debug)]
pub(crate) struct Setting {
    path: String,
    before: u64,
}

impl Setting {
    /// `None` where it cannot be read or changed.
    pub(crate) fn change(path: &str, to: impl FnOnce(u64) -> u64) -> Option<Self> {
        let before = number_in(path)?;
        set_number(path, to(before)).then_some(Self { path: path.to_owned(), before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        set_number(&self.path, self.before);
    }
}
