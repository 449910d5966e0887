//! The kernel's own view of this process, read from `/proc/self`.

use hmm_core::PAGE_SIZE;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

/// Bit of a pagemap entry that says that the page is in memory (`PM_PRESENT`).
const PRESENT: u64 = 1 << 63;
/// Bits that say that it is mapped here alone, or of a file: the kernel's shared page of zeros has none of them.
const OWN: u64 = 1 << 56 | 1 << 61;
/// Pagemap entries read at once.
const ENTRIES: usize = 512;

/// True when the CPU's page table maps a page with contents at `addr`, as `/proc/self/pagemap` tells. The shared page of
/// zeros does not count: an engine may leave it where a page went away.
///
/// # Panics
/// When the pagemap cannot be read.
pub fn present(addr: u64) -> bool {
    count_present(addr, 1) == 1
}

/// How many of `pages` pages from `addr` on are [`present`]. Where the kernel's view cannot be had, the test that asks
/// is over, and counts as skipped.
///
/// # Panics
/// When the pagemap is there but cannot be read.
pub fn count_present(addr: u64, pages: usize) -> usize {
    let Ok(pagemap) = File::open("/proc/self/pagemap") else {
        // Past what the test harness keeps back.
        let _ =
            std::io::stderr().write_all(b"skipped: there is no /proc/self/pagemap to look at\n");
        std::process::exit(0);
    };
    let first = addr / PAGE_SIZE as u64;
    let mut buffer = [0u8; ENTRIES * 8];
    let mut count = 0;
    for done in (0..pages).step_by(ENTRIES) {
        let bytes = &mut buffer[..ENTRIES.min(pages - done) * 8];
        let offset = (first + done as u64) * 8;
        pagemap.read_exact_at(bytes, offset).expect("the pagemap has an entry for each page");
        let (entries, _) = bytes.as_chunks::<8>();
        let entries = entries.iter().map(|entry| u64::from_ne_bytes(*entry));
        count += entries.filter(|entry| entry & PRESENT != 0 && entry & OWN != 0).count();
    }
    count
}

/// Resident memory of this process in bytes (the sum over all pages, not the kernel's batched counter).
///
/// # Panics
/// When the kernel's report cannot be read.
pub fn resident_bytes() -> u64 {
    let report = std::fs::read_to_string("/proc/self/smaps_rollup").expect("smaps_rollup opens");
    let line = report.lines().find(|line| line.starts_with("Rss:")).expect("there is an Rss line");
    let kilobytes = line.split_whitespace().nth(1).expect("the line has a number");
    kilobytes.parse::<u64>().expect("the number is one") * 1024
}
