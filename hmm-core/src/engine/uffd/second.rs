//! Ranges whose faults the toucher answers, beside a blocking descriptor.
//!
//! They are registered with a second descriptor, which has `UFFD_FEATURE_SIGBUS`. A vma belongs to one descriptor; layout
//! changes of a vma are reported by its own, and make only calls on its own say `Retry`. So each call is made on the
//! descriptor of the vma that it changes. A move out of a vma is made on that of the frames, since the kernel asks that
//! the destination be its own: a block of frames is registered anew when the kind of vma changes that uses it.
//!
//! [`Ranges`] says which addresses are the second one's. It changes with the layout lock held for writing. Memory that
//! `mremap` added to a vma has the vma's descriptor without being in it; nothing is known of such memory until it is
//! watched, and then it is found out.

use super::abi::{self, Register};
use super::pages::{Pages, raw};
use super::ranges::Ranges;
use crate::addr::{AddrRange, LEAF_SIZE, VirtAddr};
use crate::arena::Shared;
use crate::engine::trap::Trap;
use crate::engine::{Progress, Stop};
use crate::error::{Error, Result};
use crate::limits::FRAME_BLOCKS;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

/// The second descriptor, and what belongs to it.
pub(super) struct Second {
    pub(super) pages: Pages,
    pub(super) ranges: Ranges,
    pub(super) trap: Shared<Trap>,
    /// Takes the place of the service's own stop event, which called the service threads to look at this descriptor.
    pub(super) stop: OwnedFd,
    /// The frames of the engine.
    frames: AddrRange,
    /// Blocks of frames that are registered here.
    blocks: [AtomicBool; FRAME_BLOCKS],
}

impl std::fmt::Debug for Second {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Second({:?})", self.ranges)
    }
}

type Done = std::result::Result<(), Errno>;

impl Pages {
    pub(super) fn register(&self, range: AddrRange, mode: u64) -> Done {
        let mut request = Register { range: raw(range), mode, ioctls: 0 };
        abi::register(&*self.descriptor, &mut request)
    }

    /// Ends a registration with this descriptor, and wakes who waits there.
    pub(super) fn unregister(&self, range: AddrRange) -> Done {
        abi::unregister(&*self.descriptor, &mut raw(range))
    }
}

impl Second {
    pub(super) fn new(
        pages: Pages,
        trap: Shared<Trap>,
        stop: OwnedFd,
        frames: AddrRange,
    ) -> Result<Shared<Self>> {
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let ranges = Ranges::new().ok_or_else(no_memory)?;
        let blocks = [const { AtomicBool::new(false) }; FRAME_BLOCKS];
        let second = Self { pages, ranges, trap, stop, frames, blocks };
        Shared::new(second).ok_or_else(no_memory)
    }

    /// Hands a range over, from one descriptor to the other. Held: the layout lock, for writing; no change is unread, no
    /// page of the range is away. Layout changes are reported afterwards, touches of holes not before the next watch.
    pub(super) fn hand_over(
        &self,
        first: &Pages,
        range: AddrRange,
        mode: u64,
        inline: bool,
    ) -> Result<()> {
        for piece in self.pages.pieces(range) {
            if inline {
                if !self.ranges.insert(piece) {
                    return Err(Error::NoMemory { what: "ranges that are answered inline (4096)" });
                }
                change_hands(first, &self.pages, piece, mode)
                    .inspect_err(|_| self.ranges.remove(piece))?;
            } else {
                change_hands(&self.pages, first, piece, mode)?;
                self.ranges.remove(piece);
            }
        }
        Ok(())
    }

    /// Registers each part of a range with its descriptor.
    pub(super) fn register(&self, first: &Pages, range: AddrRange, mode: u64) -> Done {
        for (part, inline) in self.ranges.parts(range) {
            let pages = if inline { &self.pages } else { first };
            match pages.register(part, mode) {
                Err(Errno::BUSY) => self.register_pieces(first, part, mode)?,
                done => done?,
            }
        }
        Ok(())
    }

    /// Some piece belongs to the other descriptor: it grew, or was left behind, by `mremap`.
    fn register_pieces(&self, first: &Pages, part: AddrRange, mode: u64) -> Done {
        for piece in self.pages.pieces(part) {
            let inline = self.ranges.contains(piece.start());
            let (known, other) = if inline { (&self.pages, first) } else { (first, &self.pages) };
            match known.register(piece, mode) {
                Err(Errno::BUSY) => other.register(piece, mode)?,
                done => {
                    done?;
                    continue;
                }
            }
            if inline {
                self.ranges.remove(piece);
            } else if !self.ranges.insert(piece) {
                return Err(Errno::NOMEM);
            }
        }
        Ok(())
    }

    /// As [`Pages::take`]; `mode` is that of frames.
    pub(super) fn take(
        &self,
        first: &Pages,
        range: AddrRange,
        frame: VirtAddr,
        mode: u64,
    ) -> Progress {
        let (part, inline) = self.ranges.first_part(range);
        let (pages, other) = if inline { (&self.pages, first) } else { (first, &self.pages) };
        if self.block_of(frame).is_none_or(|(block, here)| {
            here.load(Ordering::Relaxed) == inline || {
                let done = move_block(other, pages, block, mode);
                here.store(inline == done, Ordering::Relaxed);
                done
            }
        }) {
            return pages.take(part, frame);
        }
        Progress { pages: 0, stop: Stop::Refused }
    }

    /// The block around a frame, and whether it is registered here. Whoever borrowed the block is alone with it.
    fn block_of(&self, frame: VirtAddr) -> Option<(AddrRange, &AtomicBool)> {
        let start = frame.leaf();
        let number = start.get().checked_sub(self.frames.start().get())? / LEAF_SIZE;
        let here = self.blocks.get(number as usize)?;
        Some((AddrRange::from_bounds(start.get(), start.get() + LEAF_SIZE), here))
    }

    /// Whether a frame is registered here.
    pub(super) fn has_frame(&self, frame: VirtAddr) -> bool {
        self.block_of(frame).is_some_and(|(_, here)| here.load(Ordering::Relaxed))
    }

    /// Lets everyone who waits for a page of the range try again.
    pub(super) fn wake(&self, first: &Pages, range: AddrRange) {
        let (part, inline) = self.ranges.first_part(range);
        if inline || part != range {
            self.trap.wake(range);
        }
        if !inline || part != range {
            first.wake(range);
        }
    }
}

/// Registers a block of frames with another descriptor; false, and all as before, when that fails.
fn move_block(from: &Pages, to: &Pages, block: AddrRange, mode: u64) -> bool {
    if from.unregister(block).is_ok() && to.register(block, mode).is_ok() {
        return true;
    }
    let _ = from.register(block, mode);
    false
}

/// Registers memory with another descriptor. The one that has it is asked first: old kernels would let us end the
/// registration of a stranger.
fn change_hands(from: &Pages, to: &Pages, piece: AddrRange, mode: u64) -> Result<()> {
    let done = match to.register(piece, mode) {
        Err(Errno::BUSY) => from
            .register(piece, mode)
            .and_then(|()| from.unregister(piece))
            .and_then(|()| to.register(piece, mode))
            .inspect_err(|_| _ = from.register(piece, mode)),
        done => done,
    };
    done.map_err(|errno| registration_failed(piece, errno))
}

/// What a refused registration means.
pub(super) fn registration_failed(range: AddrRange, errno: Errno) -> Error {
    let address = range.start();
    match errno {
        Errno::BUSY => {
            Error::Busy { address, what: "another userfaultfd of this process has the range" }
        }
        Errno::NOMEM => Error::NoMemory { what: "mappings (vm.max_map_count)" },
        errno => Error::os("UFFDIO_REGISTER", address, errno),
    }
}
