//! What the engine does for another one beside it, which moves pages of files ([`crate::engine::mixed`]).

use super::UffdEngine;
use super::abi::feature;
use super::pages::Pages;
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::engine::linux::memory;
use crate::engine::{LayoutLock, Stop};

impl UffdEngine {
    /// Whether layout changes of file mappings are reported: only asynchronous write-protection registers them.
    pub(in crate::engine) fn watches_files(&self) -> bool {
        let needed = feature::WP_ASYNC | feature::PAGEFAULT_FLAG_WP;
        self.features & needed == needed
    }

    pub(in crate::engine) fn shared_layout(&self) -> Shared<LayoutLock> {
        self.layout.clone()
    }

    /// Whether a layout change waits to be read.
    pub(in crate::engine) fn is_changing(&self, addr: VirtAddr) -> bool {
        self.pages_at(addr).is_changing()
    }

    fn pages_of_frame(&self, frame: VirtAddr) -> &Pages {
        match self.service.second() {
            Some(second) if second.has_frame(frame) => &second.pages,
            _ => &self.pages,
        }
    }

    /// Populates frames; some may be there already. The layout lock is held.
    pub(in crate::engine) fn fill_held(&self, frames: AddrRange) -> std::result::Result<(), Stop> {
        if !self.can_move {
            // Frames are ordinary memory.
            return Ok(());
        }
        let pages = self.pages_of_frame(frames.start());
        let mut done = 0;
        while done < frames.pages() {
            let progress = pages.fill_frames(frames.sub(done, frames.pages() - done));
            done += progress.pages;
            match progress.stop {
                Stop::Done => {}
                Stop::Exists => done += 1,
                stop => return Err(stop),
            }
        }
        Ok(())
    }

    /// Drops the pages of a watched range. No lock is held: that waits until its event was read.
    pub(in crate::engine) fn drop_watched(
        &self,
        range: AddrRange,
    ) -> std::result::Result<(), Stop> {
        for piece in self.pages.pieces(range) {
            if self.is_changing(piece.start()) {
                return Err(Stop::Retry);
            }
            let expected = self.service.expect_drop(piece);
            let dropped = memory::drop_pages(piece).is_ok();
            self.service.forget_drop(expected, dropped);
            if !dropped {
                return Err(Stop::Refused);
            }
        }
        Ok(())
    }
}
