//! The ioctls that change pages.

use super::abi::{self, Fill, Protect, Range, Transfer};
use crate::addr::{AddrRange, PAGE_SHIFT, PAGE_SIZE, VirtAddr};
use crate::arena::Shared;
use crate::engine::linux::Mappings;
use crate::engine::{Give, Progress, Stop};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;

const ZERO_PAGES: usize = 16;

/// Pages of zeros to copy from.
#[repr(C, align(4096))]
struct ZeroPages([u8; ZERO_PAGES * PAGE_SIZE]);
static ZEROS: ZeroPages = ZeroPages([0; ZERO_PAGES * PAGE_SIZE]);

/// One descriptor, and what is needed to use it well.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) descriptor: Shared<OwnedFd>,
    pub(super) mappings: Mappings,
}

pub(super) fn raw(range: AddrRange) -> Range {
    Range { start: range.start().get(), len: range.len() }
}

/// Only positive counts are progress; the field may hold `-errno`, or nothing new.
fn progress(result: std::result::Result<(), Errno>, done: i64, wanted: usize) -> Progress {
    let pages = usize::try_from(done.max(0)).unwrap_or(0) >> PAGE_SHIFT;
    match result {
        Ok(()) => Progress { pages: wanted, stop: Stop::Done },
        Err(errno) => Progress { pages: pages.min(wanted), stop: stop_of(errno) },
    }
}

fn stop_of(errno: Errno) -> Stop {
    match errno {
        Errno::AGAIN => Stop::Retry,
        Errno::BUSY => Stop::Busy,
        Errno::EXIST => Stop::Exists,
        Errno::NOMEM => Stop::NoMemory,
        _ => Stop::Refused,
    }
}

impl Pages {
    /// Ends every registration at once. The number stays taken (by the stop event), so that a late call on it fails
    /// instead of reaching a stranger's descriptor; and it needs no new descriptor, of which there may be none left.
    pub(super) fn close(&self, stop: &OwnedFd) {
        if !self.close_in_this_process(stop) {
            // Its number is above a limit that was lowered meanwhile.
            self.unregister_everything();
        }
    }

    /// What other processes have of it stays open.
    pub(super) fn close_in_this_process(&self, stop: &OwnedFd) -> bool {
        let (other, mine) = (stop.as_raw_fd(), self.descriptor.as_raw_fd());
        // SAFETY: both numbers are open descriptors of this engine.
        unsafe { libc::dup3(other, mine, libc::O_CLOEXEC) >= 0 }
    }

    fn unregister_everything(&self) {
        let mut next = VirtAddr::new(0);
        while let Ok(Some(mapping)) = self.mappings.at(next) {
            // Mappings that were never registered refuse.
            let _ = self.unregister(mapping.range);
            next = mapping.range.end();
        }
    }

    /// Moves pages, holes included; wakes nobody.
    fn move_pages(&self, to: VirtAddr, from: VirtAddr, pages: usize) -> Progress {
        let mut request = Transfer {
            destination: to.get(),
            source: from.get(),
            len: (pages as u64) << PAGE_SHIFT,
            mode: abi::MOVE_ALLOW_SRC_HOLES | abi::DONT_WAKE,
            done: 0,
        };
        let result = abi::move_pages(&*self.descriptor, &mut request);
        progress(result, request.done, pages)
    }

    fn copy(&self, to: VirtAddr, from: VirtAddr, pages: usize, mode: u64) -> Progress {
        let mut request = Transfer {
            destination: to.get(),
            source: from.get(),
            len: (pages as u64) << PAGE_SHIFT,
            mode,
            done: 0,
        };
        let result = abi::copy(&*self.descriptor, &mut request);
        progress(result, request.done, pages)
    }

    /// One call works on one kernel vma, and what the process mapped as one may be several. When a call over several
    /// pages was refused: the pages before the first border, if there is one.
    fn first_piece(&self, range: AddrRange, progress: &Progress) -> Option<usize> {
        if progress.stop != Stop::Refused || progress.pages > 0 || range.pages() == 1 {
            return None;
        }
        let mapping = self.mappings.at(range.start()).ok()??;
        let piece =
            mapping.range.intersect(range).filter(|piece| piece.start() == range.start())?;
        (piece.pages() < range.pages()).then(|| piece.pages())
    }

    /// Out of the process, into frames.
    pub(super) fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        let progress = self.move_pages(frame, range.start(), range.pages());
        match self.first_piece(range, &progress) {
            Some(pages) => self.move_pages(frame, range.start(), pages),
            None => progress,
        }
    }

    /// Out of frames, into the process.
    pub(super) fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        let to = range.start();
        let progress = match how {
            Give::Move => self.move_pages(to, frame, range.pages()),
            Give::Copy => self.copy(to, frame, range.pages(), abi::DONT_WAKE),
        };
        match (self.first_piece(range, &progress), how) {
            (Some(pages), Give::Move) => self.move_pages(to, frame, pages),
            (Some(pages), Give::Copy) => self.copy(to, frame, pages, abi::DONT_WAKE),
            // A vma that became read-only or locked cannot be moved into, but it can be copied into.
            (None, Give::Move) if progress.stop == Stop::Refused && progress.pages == 0 => {
                self.copy(to, frame, range.pages(), abi::DONT_WAKE)
            }
            _ => progress,
        }
    }

    /// At most [`ZERO_PAGES`] pages of zeros; wakes who waits for them.
    fn fill_holes(&self, run: AddrRange, write: bool) -> Progress {
        if write {
            // Pages of their own at once; the shared zero page would fault a second time.
            return self.copy(run.start(), VirtAddr::from_ptr(ZEROS.0.as_ptr()), run.pages(), 0);
        }
        let mut request = Fill { range: raw(run), mode: 0, done: 0 };
        let result = abi::zero_page(&*self.descriptor, &mut request);
        progress(result, request.done, run.pages())
    }

    /// As [`crate::engine::Engine::zero_run`].
    pub(super) fn zero(&self, run: AddrRange, write: bool) -> Progress {
        let filled = self.fill_holes(run.sub(0, run.pages().min(ZERO_PAGES)), write);
        if filled.stop == Stop::Refused && filled.pages == 0 && run.pages() > 1 {
            // The run may reach beyond its mapping.
            return self.fill_holes(run.sub(0, 1), write);
        }
        filled
    }

    /// Fills the first empty frames of a range with zeros, and wakes nobody.
    pub(super) fn fill_frames(&self, frames: AddrRange) -> Progress {
        let (from, count) = (VirtAddr::from_ptr(ZEROS.0.as_ptr()), frames.pages().min(ZERO_PAGES));
        self.copy(frames.start(), from, count, abi::DONT_WAKE)
    }

    /// Makes stores to present pages wait, and wakes nobody.
    pub(super) fn write_protect(&self, range: AddrRange) -> std::result::Result<(), Stop> {
        let mut request = Protect { range: raw(range), mode: abi::WRITEPROTECT_WP };
        abi::write_protect(&*self.descriptor, &mut request).map_err(stop_of)
    }

    /// Lets stores through again; wakes who waits.
    pub(super) fn unprotect(&self, range: AddrRange) {
        let mut request = Protect { range: raw(range), mode: 0 };
        // Fails only where nothing is registered (any more); then nothing is protected either.
        let _ = abi::write_protect(&*self.descriptor, &mut request);
    }

    pub(super) fn wake(&self, range: AddrRange) {
        // Fails only for bad ranges; then nobody waits there.
        let _ = abi::wake(&*self.descriptor, &mut raw(range));
    }

    pub(super) fn poison(&self, page: VirtAddr) -> bool {
        let mut request = Fill { range: raw(AddrRange::page_of(page)), mode: 0, done: 0 };
        abi::poison(&*self.descriptor, &mut request).is_ok()
    }

    /// Whether a layout change of this descriptor's waits to be read.
    pub(super) fn is_changing(&self) -> bool {
        // Looked at first; a request of no length fails otherwise.
        abi::copy(&*self.descriptor, &mut Transfer::default()) == Err(Errno::AGAIN)
    }

    /// Parts of a range that lie in one kernel vma each.
    pub(super) fn pieces(&self, range: AddrRange) -> impl Iterator<Item = AddrRange> + '_ {
        let mut next = range.start();
        std::iter::from_fn(move || {
            let rest = AddrRange::new(next.get(), range.end().get()).ok()?;
            let mapping = self.mappings.at(next).ok()??;
            let piece = mapping.range.intersect(rest).filter(|piece| piece.start() == next)?;
            next = piece.end();
            Some(piece)
        })
    }
}
