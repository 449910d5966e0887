//! What the tests of promises share.

use crate::driver::{Card, child_of};
use hmm_core::{
    AddrRange, MigrateBatch, MigrateOps, MigratePfn, MigrateRequest, PAGE_SIZE, Select,
};
use hmm_tests::Region;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Words of a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 8;

/// A region in which each word is its own index.
pub(crate) fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    (0..region.words()).for_each(|word| set(&region, word, word as u64));
    region
}

/// Whether each word still is its own index.
pub(crate) fn is_whole(region: &Region) -> bool {
    (0..region.words()).all(|word| get(region, word) == word as u64)
}

pub(crate) fn get(region: &Region, word: usize) -> u64 {
    region.word(word).load(Ordering::SeqCst)
}

pub(crate) fn set(region: &Region, word: usize, value: u64) {
    region.word(word).store(value, Ordering::SeqCst);
}

/// Drops the contents of pages, as a program does.
pub(crate) fn drop_contents(region: &Region, first: usize, count: usize) {
    let start = region.page_addr(first) as *mut libc::c_void;
    // SAFETY: the pages lie in the region, to which nothing holds references.
    assert_eq!(unsafe { libc::madvise(start, count * PAGE_SIZE, libc::MADV_DONTNEED) }, 0);
}

/// Changes the protection of pages.
pub(crate) fn protect(region: &Region, first: usize, count: usize, protection: i32) {
    let start = region.page_addr(first) as *mut libc::c_void;
    // SAFETY: the pages lie in the region, to which nothing holds references.
    assert_eq!(unsafe { libc::mprotect(start, count * PAGE_SIZE, protection) }, 0);
}

/// Unmaps pages, and puts an inaccessible mapping in their place, so that nobody else gets the addresses.
pub(crate) fn unmap(region: &Region, first: usize, count: usize) {
    let (start, len) = (region.page_addr(first) as *mut libc::c_void, count * PAGE_SIZE);
    // SAFETY: the pages lie in the region, to which nothing holds references.
    assert_eq!(unsafe { libc::munmap(start, len) }, 0);
}

/// Maps fresh memory in the place of pages.
pub(crate) fn map_again(region: &Region, first: usize, count: usize) {
    let (start, len) = (region.page_addr(first) as *mut libc::c_void, count * PAGE_SIZE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the pages lie in the region, to which nothing holds references.
    let mapped = unsafe { libc::mmap(start, len, protection, flags, -1, 0) };
    assert_eq!(mapped, start);
}

/// A file in memory of so many bytes.
pub(crate) fn memory_file(bytes: usize) -> std::fs::File {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string; the new descriptor belongs to the file alone.
    let file = unsafe {
        let descriptor = libc::memfd_create(c"promises".as_ptr(), libc::MFD_CLOEXEC);
        assert!(descriptor >= 0);
        std::fs::File::from_raw_fd(descriptor)
    };
    file.set_len(bytes as u64).unwrap();
    file
}

/// A mapping of the kernel's choice; it stays until the process ends.
pub(crate) fn map(pages: usize, protection: i32, flags: i32, file: i32) -> AddrRange {
    let len = pages * PAGE_SIZE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file, 0) };
    assert_ne!(start, libc::MAP_FAILED);
    let start = start.expose_provenance() as u64;
    AddrRange::new(start, start + len as u64).unwrap()
}

/// The kernel's own entries for pages, bit by bit.
pub(crate) fn pagemap(range: AddrRange) -> Vec<u64> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut bytes = vec![0; range.pages() * 8];
    file.read_exact_at(&mut bytes, range.start().get() / PAGE_SIZE as u64 * 8).unwrap();
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|entry| u64::from_ne_bytes(*entry)).collect()
}

/// Waits until something is true, at most some seconds.
pub(crate) fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "still waiting: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Runs `work` in a forked child; true when it says so. The child only looks at memory.
pub(crate) fn in_fork(work: impl FnOnce() -> bool) -> bool {
    end_of(fork(work))
}

/// Forks a child that does `work` and leaves; returns its number.
pub(crate) fn fork(work: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child does little and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let status = i32::from(!work());
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        child => child,
    }
}

/// Waits for a child; true when it ended well.
pub(crate) fn end_of(child: libc::pid_t) -> bool {
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
}

/// Runs the rest of a test in a child, which must end by itself and well, or by `signal`.
pub(crate) fn in_child(test: &str, signal: Option<i32>) {
    let ended = child_of(test, Duration::from_secs(20));
    match ended.skipped() {
        Some(reason) => eprintln!("skipped: {reason}"),
        None if signal.is_some() => assert_eq!(ended.signal(), signal, "{ended:?}"),
        None => assert!(ended.is_good(), "{ended:?}"),
    }
}

/// Migration callbacks of a test.
pub(crate) struct Steps<C, F> {
    copy: C,
    finish: F,
}

impl<C, F> MigrateOps for Steps<C, F>
where
    C: FnMut(&mut MigrateBatch<'_>),
    F: FnMut(&MigrateBatch<'_>),
{
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        (self.copy)(batch);
    }
    fn finalize_and_map(&mut self, batch: &MigrateBatch<'_>) {
        (self.finish)(batch);
    }
}

/// The lists of a migration, afterwards.
pub(crate) struct Lists {
    pub(crate) src: Vec<MigratePfn>,
    pub(crate) dst: Vec<MigratePfn>,
}

impl Lists {
    /// How many pages moved.
    pub(crate) fn moved(&self) -> usize {
        self.src.iter().filter(|src| src.migrates()).count()
    }
}

/// Migrates with callbacks of the test's.
pub(crate) fn migrate(
    card: &Card,
    range: AddrRange,
    select: Select,
    copy: impl FnMut(&mut MigrateBatch<'_>),
    finish: impl FnMut(&MigrateBatch<'_>),
) -> Lists {
    let mut src = vec![MigratePfn::default(); range.pages()];
    let mut dst = src.clone();
    let request =
        MigrateRequest { range, select, owner: Some(card.driver.owner), fault_page: None };
    card.mm.migrate(&request, &mut Steps { copy, finish }, &mut src, &mut dst).unwrap();
    Lists { src, dst }
}

/// What the card does in `alloc_and_copy`.
pub(crate) fn copy_all(card: &Card, batch: &mut MigrateBatch<'_>) {
    for index in 0..batch.src.len() {
        if batch.src[index].migrates() {
            batch.dst[index] = card.driver.destination(batch, index);
        }
    }
}
