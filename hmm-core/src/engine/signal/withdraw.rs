//! Second half of a take: inaccessible pages lose what they still have.

use super::hidden::State;
use super::protect::{Protector, stopped};
use crate::addr::{AddrRange, VirtAddr};
use crate::engine::linux::{Memory, memory};
use crate::engine::{Progress, Stop, VmaKind};
use rustix::io::Errno;
use rustix::mm::{MprotectFlags, MremapFlags};

/// So often a mark is tried: without memory the kernel may have none to give.
const TRIES: usize = 16;

/// Drops pages of a file mapping; called with no lock held.
pub(super) type DropFile<'a> = dyn Fn(AddrRange) -> std::result::Result<(), Stop> + 'a;

impl Protector {
    /// As [`crate::engine::Engine::withdraw`].
    pub(super) fn withdraw(&self, range: AddrRange, drop_file: &DropFile<'_>) -> Progress {
        let mut done = 0;
        for part in range.by_leaf() {
            let Some(leaf) = self.hidden.leaf(part.start()) else { break };
            let mut state = leaf.lock();
            // The program may have unmapped the pages since, and mapped others.
            let Some(kind) = self.kind_of_ours(part) else {
                self.suspect(part);
                return stopped(done, Stop::Retry);
            };
            let dropped = if kind == VmaKind::PrivateFile {
                // It may wait for somebody who wants this lock.
                drop(state);
                drop_file(part)
            } else {
                self.drop_and_mark(&mut state, part).map_err(|_| Stop::Refused)
            };
            if let Err(stop) = dropped {
                return stopped(done, stop);
            }
            done += part.pages();
        }
        stopped(done, if done == range.pages() { Stop::Done } else { Stop::Refused })
    }

    fn drop_and_mark(&self, state: &mut State, part: AddrRange) -> std::result::Result<(), Errno> {
        match &self.memory {
            Some(memory) => memory::drop_pages(part).and_then(|()| mark(memory, state, part)),
            // A locked mapping refuses the drop, and would lose its lock when it is replaced.
            None => memory::drop_pages(part)
                .and_then(|()| replace_by_marks(part))
                .map(|()| state.marked.insert_pages(part)),
        }
    }
}

/// A page without a mark could be dropped by the program unseen: it must not stay away.
fn mark(memory: &Memory, state: &mut State, part: AddrRange) -> std::result::Result<(), Errno> {
    for addr in (0..part.pages()).map(|page| part.page_at(page)) {
        if !(0..TRIES).any(|_| memory.peek(addr, &mut [0])) {
            return Err(Errno::IO);
        }
        state.marked.insert(addr.index_in_leaf());
    }
    Ok(())
}

/// Moves inaccessible pages of zeros into the place of inaccessible pages, at once: what those had is dropped, and each
/// is marked.
fn replace_by_marks(part: AddrRange) -> std::result::Result<(), Errno> {
    let len = part.len() as usize;
    let (access, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::PRIVATE);
    // SAFETY: the new mapping replaces nothing, is only read, and then takes the place of pages that the engine owns.
    unsafe {
        let marks = rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, flags)?;
        let start = VirtAddr::from_ptr(marks.cast_const()).get();
        let range = AddrRange::from_bounds(start, start + part.len());
        Protector::keep_small(range);
        let moved = memory::populate(range, false)
            .map_err(|_| Errno::NOMEM)
            .and_then(|()| rustix::mm::mprotect(marks, len, MprotectFlags::empty()))
            .and_then(|()| {
                let target = part.start().as_ptr().cast();
                rustix::mm::mremap_fixed(marks, len, len, MremapFlags::MAYMOVE, target)
            });
        if moved.is_err() {
            let _ = rustix::mm::munmap(marks, len);
        }
        moved.map(drop)
    }
}
