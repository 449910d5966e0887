//! Taking pages on kernels without `UFFDIO_MOVE` (before Linux 6.8): write-protect, copy, drop.
//!
//! Stores wait from the write-protection on. What is dropped is reported like a drop of the program's own; the engine
//! knows its own by the range. The kernel has no drop that looks first, and lets go of its lock until the event was read:
//! what the program puts in the place of the page in that time is dropped ([`crate::Capabilities::MOVE`]).

use super::UffdEngine;
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::linux::memory;
use crate::engine::{Present, Progress, Stop};

impl UffdEngine {
    /// Copies contents into frames while stores wait.
    pub(super) fn take_by_copy(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        let Some(range) = self.pages.pieces(range).next() else {
            return Progress { pages: 0, stop: Stop::Refused };
        };
        if let Err(stop) = self.pages_at(range.start()).write_protect(range) {
            return Progress { pages: 0, stop };
        }
        let mut whole = true;
        let scanned = self.presence.scan(range, &mut |run, present| {
            if matches!(present, Present::Page | Present::File | Present::Swapped) {
                let to = frame.plus_pages(range.index_of(run.start()));
                whole &= self.memory.as_ref().is_some_and(|memory| memory.copy_in(run, to));
            }
        });
        if whole && scanned.is_ok() {
            return Progress { pages: range.pages(), stop: Stop::Done };
        }
        self.pages_at(range.start()).unprotect(range);
        Progress { pages: 0, stop: Stop::Busy }
    }

    /// Drops what was copied.
    pub(super) fn drop_copied(&self, range: AddrRange) -> Progress {
        let mut done = 0;
        if self.service.is_own_thread() {
            // A drop waits until its event was read, and this is who reads.
            return Progress { pages: 0, stop: Stop::Refused };
        }
        for piece in self.pages.pieces(range) {
            let expected = self.service.expect_drop(piece);
            // The look: fails where a layout change waits to be read, and where nothing is registered.
            let looked = self.pages_at(piece.start()).write_protect(piece);
            let dropped = looked.map(|()| memory::drop_pages(piece).is_ok());
            self.service.forget_drop(expected, dropped == Ok(true));
            match dropped {
                Ok(true) => done += piece.pages(),
                Ok(false) => return Progress { pages: done, stop: Stop::Refused },
                Err(stop) => return Progress { pages: done, stop },
            }
        }
        let stop = if done == range.pages() { Stop::Done } else { Stop::Refused };
        Progress { pages: done, stop }
    }

    /// Pages that are there already may still be write-protected by an unfinished take.
    pub(super) fn after_exists(&self, range: AddrRange, progress: Progress) -> Progress {
        if !self.can_move && progress.stop == Stop::Exists && progress.pages < range.pages() {
            let page = range.sub(progress.pages, 1);
            self.pages_at(page.start()).unprotect(page);
        }
        progress
    }
}
