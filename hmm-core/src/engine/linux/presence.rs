//! Which pages are there, told without touching them: by `PAGEMAP_SCAN` (Linux 6.7), else by reading
//! `/proc/self/pagemap`, else by `mincore`.

use super::abi::{self, ScanRegion, ScanRequest};
use crate::addr::{AddrRange, PAGE_SHIFT, VirtAddr};
use crate::engine::Present;
use crate::error::{Error, Result};
use crate::inject::{self, Point};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// Regions asked for at once.
const REGIONS: usize = 64;
/// Pages looked at by one call of the older ways.
const PAGES: usize = 512;
/// Bits of an entry of `/proc/self/pagemap`.
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_FILE: u64 = 1 << 61;
const PAGEMAP_SWAPPED: u64 = 1 << 62;

/// The ways to ask.
#[derive(Debug)]
pub(in crate::engine) struct Presence {
    /// `None`: `/proc/self/pagemap` cannot be opened.
    pagemap: Option<OwnedFd>,
    /// `PAGEMAP_SCAN` is missing.
    no_scan: AtomicBool,
}

/// Puts pages together that are alike, and reports them as runs.
struct Runs<'a> {
    report: &'a mut dyn FnMut(AddrRange, Present),
    start: u64,
    state: Present,
}

impl Runs<'_> {
    fn next(&mut self, address: u64, state: Present) {
        if state != self.state {
            self.end(address);
            (self.start, self.state) = (address, state);
        }
    }

    fn end(&mut self, address: u64) {
        if self.start < address {
            (self.report)(AddrRange::from_bounds(self.start, address), self.state);
        }
    }
}

impl Presence {
    pub(in crate::engine) fn open() -> Self {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let pagemap = rustix::fs::open("/proc/self/pagemap", flags, Mode::empty()).ok();
        Self { pagemap, no_scan: AtomicBool::new(false) }
    }

    /// How it asks, for people.
    pub(in crate::engine) fn way(&self) -> &'static str {
        match (&self.pagemap, self.no_scan.load(Ordering::Relaxed)) {
            (None, _) => "mincore",
            (Some(_), true) => "/proc/self/pagemap",
            (Some(_), false) => "PAGEMAP_SCAN",
        }
    }

    /// Whether pages in swap are told from holes. Without `/proc/self/pagemap`: there is no swap.
    pub(in crate::engine) fn tells_swap(&self) -> bool {
        self.pagemap.is_some() || rustix::system::sysinfo().totalswap == 0
    }

    /// Whether a range is all of one huge page, or of several. Only `PAGEMAP_SCAN` tells.
    pub(in crate::engine) fn is_huge(&self, range: AddrRange) -> bool {
        let Some(pagemap) = self.pagemap.as_ref().filter(|_| !self.no_scan.load(Ordering::Relaxed))
        else {
            return false;
        };
        let mut request = ScanRequest {
            start: range.start().get(),
            end: range.end().get(),
            category_mask: abi::PAGE_IS_HUGE,
            return_mask: abi::PAGE_IS_HUGE,
            ..ScanRequest::default()
        };
        let mut regions = [ScanRegion::default(); 1];
        let found = abi::pagemap_scan(pagemap, &mut request, &mut regions);
        let [region] = regions;
        found == Ok(1) && (region.start, region.end) == (range.start().get(), range.end().get())
    }

    /// Runs of equal state that together cover the range. The older ways cannot tell the zero page from others.
    pub(in crate::engine) fn scan(
        &self,
        range: AddrRange,
        report: &mut dyn FnMut(AddrRange, Present),
    ) -> Result<()> {
        inject::checked(Point::Scan).map_err(|errno| failed("scan", range, errno))?;
        let Some(pagemap) = &self.pagemap else { return ask_mincore(range, report) };
        if !self.no_scan.load(Ordering::Relaxed) {
            match scan_pagemap(pagemap, range, report) {
                // Nothing was reported yet: the kernel does not know the call.
                Err(Errno::NOTTY | Errno::NOSYS) => self.no_scan.store(true, Ordering::Relaxed),
                done => return done.map_err(|errno| failed("PAGEMAP_SCAN", range, errno)),
            }
        }
        read_pagemap(pagemap, range, report)
            .map_err(|errno| failed("/proc/self/pagemap", range, errno))
    }
}

fn failed(call: &'static str, range: AddrRange, errno: Errno) -> Error {
    Error::os(call, range.start(), errno)
}

fn scan_pagemap(
    pagemap: &OwnedFd,
    range: AddrRange,
    report: &mut dyn FnMut(AddrRange, Present),
) -> std::result::Result<(), Errno> {
    let mut regions = [ScanRegion::default(); REGIONS];
    let mut next = range.start().get();
    while next < range.end().get() {
        let mut request = ScanRequest {
            start: next,
            end: range.end().get(),
            category_any_of: abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED,
            return_mask: abi::PAGE_IS_PRESENT
                | abi::PAGE_IS_SWAPPED
                | abi::PAGE_IS_PFNZERO
                | abi::PAGE_IS_FILE,
            ..ScanRequest::default()
        };
        let count = abi::pagemap_scan(pagemap, &mut request, &mut regions)?;
        for region in regions.iter().take(count) {
            if next < region.start {
                report(AddrRange::from_bounds(next, region.start), Present::None);
            }
            report(AddrRange::from_bounds(region.start, region.end), state_of(region));
            next = region.end;
        }
        let walked = if count < REGIONS { range.end().get() } else { request.walk_end };
        if next < walked {
            report(AddrRange::from_bounds(next, walked), Present::None);
            next = walked;
        }
    }
    Ok(())
}

fn state_of(region: &ScanRegion) -> Present {
    if region.categories & abi::PAGE_IS_PFNZERO != 0 {
        Present::Zero
    } else if region.categories & abi::PAGE_IS_PRESENT == 0 {
        Present::Swapped
    } else if region.categories & abi::PAGE_IS_FILE != 0 {
        Present::File
    } else {
        Present::Page
    }
}

fn read_pagemap(
    pagemap: &OwnedFd,
    range: AddrRange,
    report: &mut dyn FnMut(AddrRange, Present),
) -> std::result::Result<(), Errno> {
    let start = range.start().get();
    let mut runs = Runs { report, start, state: Present::None };
    let mut entries = [[0_u8; 8]; PAGES];
    let mut page = 0;
    while page < range.pages() {
        let count = (range.pages() - page).min(PAGES);
        let offset = (range.page_at(page).get() >> PAGE_SHIFT) * 8;
        let read = rustix::io::pread(pagemap, entries[..count].as_flattened_mut(), offset)? / 8;
        if read == 0 {
            break;
        }
        for entry in &entries[..read] {
            let state = match u64::from_ne_bytes(*entry) {
                bits if bits & PAGEMAP_PRESENT == 0 && bits & PAGEMAP_SWAPPED == 0 => Present::None,
                bits if bits & PAGEMAP_PRESENT == 0 => Present::Swapped,
                bits if bits & PAGEMAP_FILE != 0 => Present::File,
                _ => Present::Page,
            };
            runs.next(range.page_at(page).get(), state);
            page += 1;
        }
    }
    if page < range.pages() {
        runs.next(range.page_at(page).get(), Present::None);
    }
    runs.end(range.end().get());
    Ok(())
}

/// Pages in swap look absent to it; so everything that this way calls absent may be in swap. Unmapped parts are absent.
fn ask_mincore(range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
    let mut runs = Runs { report, start: range.start().get(), state: Present::None };
    let mut resident = [0_u8; PAGES];
    let mut page = 0;
    while page < range.pages() {
        let part = range.sub(page, (range.pages() - page).min(PAGES));
        mincore(part, &mut resident)?;
        for (offset, byte) in resident[..part.pages()].iter().enumerate() {
            let state = if byte & 1 != 0 { Present::Page } else { Present::None };
            runs.next(part.page_at(offset).get(), state);
        }
        page += part.pages();
    }
    runs.end(range.end().get());
    Ok(())
}

fn mincore(part: AddrRange, resident: &mut [u8; PAGES]) -> Result<()> {
    let start: *mut libc::c_void = part.start().as_ptr().cast();
    // SAFETY: the array has a byte for each page of the part; the kernel only looks at the pages.
    if unsafe { libc::mincore(start, part.len() as usize, resident.as_mut_ptr()) } == 0 {
        return Ok(());
    }
    match std::io::Error::last_os_error().raw_os_error() {
        // A part is not mapped: page by page then.
        Some(libc::ENOMEM) if part.pages() > 1 => {
            let mut one = [0_u8; PAGES];
            for (page, byte) in resident.iter_mut().enumerate().take(part.pages()) {
                mincore(part.sub(page, 1), &mut one)?;
                *byte = one[0];
            }
            Ok(())
        }
        Some(libc::ENOMEM) => {
            resident[0] = 0;
            Ok(())
        }
        errno => {
            let errno = errno.unwrap_or(libc::EIO);
            Err(Error::Os { call: "mincore", address: VirtAddr::new(part.start().get()), errno })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(way: impl Fn(&mut dyn FnMut(AddrRange, Present))) -> Vec<(usize, Present)> {
        let mut runs = Vec::new();
        way(&mut |range, state| runs.push((range.pages(), state)));
        runs
    }

    #[test]
    fn all_ways_agree_about_touched_pages() {
        let mut memory = memmap2::MmapMut::map_anon(16 * 4096).unwrap();
        memory[5 * 4096] = 1;
        memory[6 * 4096] = 1;
        let start = VirtAddr::from_ptr(memory.as_ptr()).get();
        let range = AddrRange::new(start, start + 16 * 4096).unwrap();
        let presence = Presence::open();
        let expected = [(5, Present::None), (2, Present::Page), (9, Present::None)];
        assert_eq!(look(|report| presence.scan(range, report).unwrap()), expected);
        for pagemap in presence.pagemap.iter() {
            assert_eq!(look(|report| read_pagemap(pagemap, range, report).unwrap()), expected);
        }
        assert_eq!(look(|report| ask_mincore(range, report).unwrap()), expected);
    }
}
