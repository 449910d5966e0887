//! Private file mappings on a device. The file itself never changes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, child_of, is_child, on_device};
use hmm_core::{AddrRange, Mm, PAGE_SIZE, Residency, VirtAddr};
use hmm_tests::{Region, mm_or_skip, needs};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const WORDS: usize = PAGE_SIZE / 8;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A word of a file, as it was written.
fn pattern(word: usize) -> u64 {
    0x5eed_0000_0000 + word as u64
}

/// A file in memory with so many bytes of the pattern.
fn memory_file(bytes: usize) -> File {
    // SAFETY: the name is a C string; the new descriptor belongs to the file alone.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"hmm-files".as_ptr(), libc::MFD_CLOEXEC);
        assert!(descriptor >= 0);
        File::from_raw_fd(descriptor)
    };
    fill(&file, bytes);
    file
}

/// As [`memory_file`], in the folder for temporary files; without a name.
fn disk_file(bytes: usize) -> File {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("hmm-files-{}-{number}", std::process::id()));
    let options = File::options().read(true).write(true).create_new(true).clone();
    let file = options.open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    fill(&file, bytes);
    file
}

fn fill(file: &File, bytes: usize) {
    let words = (0..bytes.div_ceil(8)).flat_map(|word| pattern(word).to_ne_bytes());
    file.write_all_at(&words.take(bytes).collect::<Vec<_>>(), 0).unwrap();
}

/// Whether a file still is as it was written.
fn is_untouched(file: &File) -> bool {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes.chunks_exact(8).enumerate().all(|(word, bytes)| bytes == pattern(word).to_ne_bytes())
}

/// A mapping of a file from its start on; unmapped when dropped.
struct Mapped {
    addr: usize,
    pages: usize,
}

impl Mapped {
    fn with(file: &File, pages: usize, protection: i32, flags: i32, addr: u64) -> Self {
        let hint = std::ptr::with_exposed_provenance_mut(addr as usize);
        let (len, fd) = (pages * PAGE_SIZE, file.as_raw_fd());
        // SAFETY: a new mapping, in the place of nothing but what the caller owns.
        let start = unsafe { libc::mmap(hint, len, protection, flags, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { addr: start.expose_provenance(), pages }
    }

    fn private(file: &File, pages: usize) -> Self {
        Self::with(file, pages, READ_WRITE, libc::MAP_PRIVATE, 0)
    }

    fn part(&self, first: usize, count: usize) -> AddrRange {
        let start = (self.addr + first * PAGE_SIZE) as u64;
        AddrRange::new(start, start + (count * PAGE_SIZE) as u64).unwrap()
    }

    fn range(&self) -> AddrRange {
        self.part(0, self.pages)
    }

    fn start(&self) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(self.addr)
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.pages * WORDS);
        // SAFETY: the word lies in the mapping, which is private, and is only reached as an atomic.
        unsafe { AtomicU64::from_ptr(self.start().cast::<u64>().add(index)) }
    }

    fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Relaxed)
    }

    fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Relaxed);
    }

    fn is_as_file(&self, pages: std::ops::Range<usize>) -> bool {
        (pages.start * WORDS..pages.end * WORDS).all(|word| self.get(word) == pattern(word))
    }

    fn advise(&self, advice: i32) {
        // SAFETY: nothing refers to the contents.
        let done = unsafe { libc::madvise(self.start(), self.pages * PAGE_SIZE, advice) };
        assert_eq!(done, 0);
    }

    /// Lets the device add to the first word of a page that it has.
    fn change_on_device(&self, card: &Card, page: usize, sum: u64) {
        let mut place = [Residency::None];
        card.mm.residency(self.part(page, 1), &mut place).unwrap();
        let Residency::Device(pfn) = place[0] else { panic!("page {page}: {place:?}") };
        let word = card.driver.frame(pfn).cast::<u64>();
        // SAFETY: a page of the device's memory, which nobody uses now.
        unsafe { *word = (*word).wrapping_add(sum) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.start(), self.pages * PAGE_SIZE) };
    }
}

fn contents_survive(mm: &Arc<Mm>, file: &File, pages: usize) {
    let (card, mapped) = (Card::new(mm, pages), Mapped::private(file, pages));
    let third = pages / 3;
    // The first third is never touched, the second one read, the last one written.
    assert!(mapped.is_as_file(third..2 * third));
    (2 * third * WORDS..pages * WORDS).for_each(|word| mapped.set(word, !pattern(word)));
    for round in 1..=2 {
        assert_eq!(card.all_to_device(mapped.range()), pages);
        for page in [0, third, pages - 1] {
            mapped.change_on_device(&card, page, 1 << 60);
        }
        for word in 0..pages * WORDS {
            let was_written = word >= 2 * third * WORDS;
            let mut expected = if was_written { !pattern(word) } else { pattern(word) };
            if [0, third, pages - 1].contains(&(word / WORDS)) && word % WORDS == 0 {
                expected = expected.wrapping_add(round << 60);
            }
            assert_eq!(mapped.get(word), expected, "word {word} in round {round}");
        }
        assert!(card.settles_at(0));
    }
    assert!(is_untouched(file));
}

#[test]
fn contents_of_every_page_of_a_file_survive() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    contents_survive(&mm, &memory_file(24 * PAGE_SIZE), 24);
    contents_survive(&mm, &disk_file(24 * PAGE_SIZE), 24);
    contents_survive(&mm, &disk_file(1500 * PAGE_SIZE), 1500);
}

#[test]
fn pages_beyond_the_end_of_the_file_stay() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    for file in [memory_file(6 * PAGE_SIZE + 100), disk_file(6 * PAGE_SIZE + 100)] {
        let (card, mapped) = (Card::new(&mm, 1000), Mapped::private(&file, 900));
        mapped.set(2 * WORDS, 7);
        assert_eq!(card.to_device(mapped.range()).unwrap(), 7);
        assert_eq!(on_device(&mm, mapped.range()), 7);
        assert_eq!(card.to_device(mapped.part(7, 200)).unwrap(), 0);
        assert_eq!(mapped.get(2 * WORDS), 7);
        assert_eq!(mapped.get(6 * WORDS + 20), 0, "behind the end is nothing");
        assert!(mapped.is_as_file(3..6));
        let beyond = VirtAddr::new(mapped.part(8, 1).start().get());
        assert!(!mm.peek(beyond, &mut [0; 8]));
        card.to_system(mapped.range()).unwrap();
        assert!(card.settles_at(0) && is_untouched(&file));
    }
}

#[test]
fn other_mappings_of_files_stay() {
    let mm = mm_or_skip!();
    let (card, file) = (Card::new(&mm, 8), memory_file(4 * PAGE_SIZE));
    let executable = READ_WRITE | libc::PROT_EXEC;
    for (protection, flags) in [
        (READ_WRITE, libc::MAP_SHARED),
        (libc::PROT_READ, libc::MAP_PRIVATE),
        (executable, libc::MAP_PRIVATE),
    ] {
        let mapped = Mapped::with(&file, 4, protection, flags, 0);
        assert_eq!(card.to_device(mapped.range()).unwrap(), 0);
        let vma = mm.vma_covering(mapped.range()).unwrap();
        assert!(!vma.can_migrate());
        assert!(mapped.is_as_file(0..4));
    }
    let mapped = Mapped::private(&file, 4);
    let migrates = mm.capabilities().contains(hmm_core::Capabilities::PRIVATE_FILES);
    assert_eq!(mm.vma_covering(mapped.range()).unwrap().can_migrate(), migrates);
    assert_eq!(card.to_device(mapped.range()).unwrap(), if migrates { 4 } else { 0 });
    assert!(mapped.is_as_file(0..4));
}

#[test]
fn an_unmapped_file_frees_its_device_pages() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let (card, file) = (Card::new(&mm, 16), disk_file(16 * PAGE_SIZE));
    let mapped = Mapped::private(&file, 16);
    assert_eq!(card.all_to_device(mapped.range()), 16);
    // SAFETY: four pages of the mapping, which nothing refers to.
    unsafe { libc::munmap(mapped.start(), 4 * PAGE_SIZE) };
    mm.sync();
    assert!(card.settles_at(12));
    let at = mapped.addr as u64;
    drop(mapped);
    mm.sync();
    assert!(card.settles_at(0));
    // What is mapped there next has nothing to do with it.
    let again = Mapped::with(&file, 16, READ_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED, at);
    assert!(again.is_as_file(0..16));
    assert_eq!(card.all_to_device(again.range()), 16);
    assert!(again.is_as_file(0..16));
}

#[test]
fn dropped_pages_are_as_the_file_again() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    needs!(mm, EVENTS);
    for file in [memory_file(16 * PAGE_SIZE), disk_file(16 * PAGE_SIZE)] {
        let (card, mapped) = (Card::new(&mm, 16), Mapped::private(&file, 16));
        for round in 0..3 {
            (0..16).for_each(|page| mapped.set(page * WORDS, round));
            assert_eq!(card.all_to_device(mapped.range()), 16);
            mapped.advise(libc::MADV_DONTNEED);
            assert!(mapped.is_as_file(0..16), "round {round}");
            assert!(card.settles_at(0));
        }
    }
}

#[test]
fn pages_on_a_device_move_with_their_mapping() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    needs!(mm, EVENTS);
    let (card, file) = (Card::new(&mm, 600), disk_file(600 * PAGE_SIZE));
    let mut mapped = Mapped::private(&file, 600);
    (0..600).for_each(|page| mapped.set(page * WORDS + 1, page as u64));
    assert_eq!(card.all_to_device(mapped.range()), 600);
    // Where its pages were, the mapping is unmapped in its place.
    let elsewhere = ManuallyDrop::new(Region::new(600));
    let (len, to) = (600 * PAGE_SIZE, elsewhere.as_ptr().cast::<libc::c_void>());
    // SAFETY: the mapping takes the place of the region, which is not used any more.
    let moved = unsafe {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        libc::mremap(mapped.start(), len, len, flags, to)
    };
    assert_eq!(moved, to);
    mapped.addr = moved.expose_provenance();
    assert_eq!(on_device(&mm, mapped.range()), 600);
    mapped.change_on_device(&card, 300, 5);
    for page in 0..600 {
        let plus = if page == 300 { 5 } else { 0 };
        assert_eq!(mapped.get(page * WORDS), pattern(page * WORDS) + plus);
        assert_eq!(mapped.get(page * WORDS + 1), page as u64);
    }
    assert!(card.settles_at(0) && is_untouched(&file));
}

#[test]
fn a_child_sees_what_a_device_has_of_a_file() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let (card, file) = (Card::new(&mm, 8), memory_file(8 * PAGE_SIZE));
    let mapped = Mapped::private(&file, 8);
    mapped.set(WORDS, 11);
    assert_eq!(card.all_to_device(mapped.range()), 8);
    mapped.change_on_device(&card, 0, 3);
    // SAFETY: the child only reads memory, and ends without anybody's handlers.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let good =
            mapped.get(0) == pattern(0) + 3 && mapped.get(WORDS) == 11 && mapped.is_as_file(2..8);
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!good)) };
    }
    let mut status = 0;
    // SAFETY: the child is this process's own.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0);
    assert_eq!(card.all_to_device(mapped.range()), 8);
    assert_eq!((mapped.get(0), mapped.get(WORDS)), (pattern(0) + 3, 11));
}

#[test]
fn system_calls_need_a_guard_on_every_engine() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let (card, file) = (Card::new(&mm, 8), disk_file(8 * PAGE_SIZE));
    let (mapped, out) = (Mapped::private(&file, 8), memory_file(8));
    mapped.set(WORDS, 12);
    // SAFETY: writes to the file what is mapped, or fails.
    let write = || unsafe { libc::pwrite(out.as_raw_fd(), mapped.start(), 8 * PAGE_SIZE, 0) };
    assert_eq!(card.all_to_device(mapped.range()), 8);
    assert_eq!(write(), -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
    {
        let _here = mm.guard(mapped.range(), false).unwrap();
        assert_eq!(write(), 8 * PAGE_SIZE as isize);
        assert_eq!(card.to_device(mapped.range()).unwrap(), 0, "what is guarded stays");
    }
    let mut word = [0; 8];
    out.read_exact_at(&mut word, PAGE_SIZE as u64).unwrap();
    assert_eq!(u64::from_ne_bytes(word), 12);
    // The library's own accesses wait.
    assert_eq!(card.all_to_device(mapped.range()), 8);
    assert!(!mm.peek(mapped.range().start(), &mut word));
    assert!(!mm.poke(mapped.range().start(), &word));
    let mut bytes = vec![0; 8 * PAGE_SIZE];
    assert_eq!(mm.read(mapped.range().start(), &mut bytes).unwrap(), bytes.len());
    assert_eq!(bytes[PAGE_SIZE..PAGE_SIZE + 8], 12_u64.to_ne_bytes());
    assert_eq!(card.all_to_device(mapped.range()), 8);
    assert_eq!(mm.write(mapped.range().start(), &[9; 8]).unwrap(), 8);
    assert!(mm.peek(mapped.range().start(), &mut word) && word == [9; 8]);
}

#[test]
fn anonymous_neighbours_keep_to_themselves() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let (card, file) = (Card::new(&mm, 64), memory_file(16 * PAGE_SIZE));
    let region = Region::new(48);
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // It lies in the region, which is unmapped whole.
    let mapped = Mapped::with(&file, 16, READ_WRITE, flags, region.page_addr(16));
    let mapped = ManuallyDrop::new(mapped);
    assert_eq!(card.all_to_device(mapped.range()), 16);
    assert_eq!(card.all_to_device(region.part(0, 16)), 16);
    card.to_system(mapped.range()).unwrap();
    mapped.advise(libc::MADV_DONTNEED);
    assert_eq!(card.all_to_device(region.part(32, 16)), 16);
    // Holes are filled around a touch, and not beyond the border.
    for word in (0..16 * WORDS).chain(32 * WORDS..48 * WORDS) {
        region.word(word).store(1, Ordering::Relaxed);
    }
    assert!(mapped.is_as_file(0..16));
    let mut both = vec![0; 48 * PAGE_SIZE];
    assert_eq!(card.all_to_device(mapped.range()), 16);
    mm.guard(region.range(), false).map(drop).unwrap();
    assert!(mm.peek(region.range().start(), &mut both));
    assert_eq!(both[16 * PAGE_SIZE..][..8], pattern(0).to_ne_bytes());
}

#[test]
fn counters_in_a_file_lose_nothing_while_it_migrates() {
    const PAGES: usize = 64;
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let (card, file) = (Card::new(&mm, PAGES), disk_file(PAGES * PAGE_SIZE));
    let mapped = Mapped::private(&file, PAGES);
    let stop = AtomicBool::new(false);
    let sums: Vec<_> = std::thread::scope(|scope| {
        let adders: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut sums = vec![0_u64; PAGES];
                    let mut page = 0;
                    while !stop.load(Ordering::Relaxed) {
                        mapped.word(page * WORDS + 3).fetch_add(1, Ordering::Relaxed);
                        sums[page] += 1;
                        page = (page * 5 + 1) % PAGES;
                    }
                    sums
                })
            })
            .collect();
        let (started, mut moved) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_secs(2) {
            moved += card.to_device(mapped.range()).unwrap();
            card.to_system(mapped.part(PAGES / 2, PAGES / 4)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(moved > PAGES, "pages moved");
        adders.into_iter().map(|adder| adder.join().unwrap()).collect()
    });
    for page in 0..PAGES {
        let added: u64 = sums.iter().map(|sums| sums[page]).sum();
        let word = page * WORDS + 3;
        assert_eq!(mapped.get(word), pattern(word) + added, "page {page}");
        assert_eq!(mapped.get(word + 1), pattern(word + 1));
    }
    card.to_system(mapped.range()).unwrap();
    assert!(card.settles_at(0) && is_untouched(&file));
}

#[test]
fn pages_that_the_file_lost_meanwhile_are_gone() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    if !is_child() {
        let limit = Duration::from_secs(8);
        let ended = child_of("pages_that_the_file_lost_meanwhile_are_gone", limit);
        assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
        return;
    }
    let (card, file) = (Card::new(&mm, 16), memory_file(16 * PAGE_SIZE));
    let mapped = Mapped::private(&file, 16);
    (0..16).for_each(|page| mapped.set(page * WORDS, 1));
    assert_eq!(card.all_to_device(mapped.range()), 16);
    file.set_len(5 * PAGE_SIZE as u64).unwrap();
    card.to_system(mapped.range()).unwrap();
    assert!(card.settles_at(0));
    (0..5).for_each(|page| assert_eq!(mapped.get(page * WORDS), 1));
    file.set_len(6 * PAGE_SIZE as u64).unwrap();
    assert_eq!(mapped.get(5 * WORDS), 0);
    assert!(mm.read(mapped.part(7, 1).start(), &mut [0; 8]).is_err() || card.mm.serves_kernel());
    let _ = mapped.get(8 * WORDS);
    panic!("there is nothing to read");
}

#[test]
fn a_page_of_a_file_that_its_device_lost_gives_sigbus() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    if !is_child() {
        let limit = Duration::from_secs(8);
        let ended = child_of("a_page_of_a_file_that_its_device_lost_gives_sigbus", limit);
        assert_eq!(ended.signal(), Some(libc::SIGBUS), "{ended:?}");
        return;
    }
    let (card, file) = (Card::new(&mm, 4), memory_file(4 * PAGE_SIZE));
    let mapped = Mapped::private(&file, 4);
    assert_eq!(card.all_to_device(mapped.range()), 4);
    *card.driver.lost.lock().unwrap() = Some(mapped.part(2, 1).start().get());
    assert!(mapped.is_as_file(0..2));
    let _ = mapped.get(2 * WORDS);
    panic!("nothing of it is left");
}

#[test]
fn files_that_are_dropped_and_mapped_anew_while_they_migrate_are_never_stale() {
    const PAGES: usize = 32;
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    needs!(mm, EVENTS);
    let (card, file) = (Card::new(&mm, 2 * PAGES), memory_file(PAGES * PAGE_SIZE));
    let mapped = Mapped::private(&file, PAGES);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let changer = scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                round += 1;
                (0..PAGES).for_each(|page| mapped.set(page * WORDS + 5, round));
                assert!((0..PAGES).all(|page| mapped.get(page * WORDS + 5) == round));
                if round % 3 == 0 {
                    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
                    let at = mapped.addr as u64;
                    // The new mapping is unmapped by who made the old one.
                    let _ = ManuallyDrop::new(Mapped::with(&file, PAGES, READ_WRITE, flags, at));
                } else {
                    mapped.advise(libc::MADV_DONTNEED);
                }
                let stale = (0..PAGES * WORDS).find(|word| mapped.get(*word) != pattern(*word));
                assert_eq!(stale, None, "round {round}");
            }
            round
        });
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(2) && !changer.is_finished() {
            card.to_device(mapped.range()).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        assert!(changer.join().unwrap() > 3);
    });
    mm.sync();
    card.to_system(mapped.range()).unwrap();
    assert!(card.settles_at(0) && is_untouched(&file));
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}
