//! Lazy forks, in the parent: the pages that a child shares have a second place in the parent, out of everybody's sight,
//! where they stay as they were at the fork. A thread for each child reads them there when the child asks, over a socket;
//! the driver's `fault` brings them as it brings any page.
//!
//! The socket tells either side of the other's end. A parent that exits leaves what is still asked for in a file that
//! both have.

use super::wire::{self, Reply};
use crate::addr::{AddrRange, PAGE_SIZE, Pfn, VirtAddr};
use crate::error::{Error, Result};
use crate::mm::{Mm, put};
use crate::sync::{Mutex, MutexGuard};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Children that may still ask.
static HEIRS: Mutex<Vec<Arc<Heir>>> = Mutex::new(Vec::new());
static AT_EXIT: AtomicBool = AtomicBool::new(false);
/// Where the parent keeps the pages of one fork.
#[derive(Debug)]
struct Shadow {
    mm: Arc<Mm>,
    range: AddrRange,
}

impl Drop for Shadow {
    /// The pages lose this place: whoever drops the last reference of one frees it.
    fn drop(&mut self) {
        if self.mm.is_inherited() {
            // This process never had it.
            return;
        }
        let start = self.range.start().as_ptr().cast();
        // SAFETY: the mapping is this value's own.
        let _ = unsafe { rustix::mm::munmap(start, self.range.len() as usize) };
        if self.mm.check_open().is_ok() {
            // Some engines find out when they look.
            self.mm.sync();
        }
    }
}

/// A child that shares pages.
#[derive(Debug)]
pub(super) struct Heir {
    shadow: Shadow,
    socket: OwnedFd,
    store: OwnedFd,
}

/// What a fork under way hands to its child.
#[derive(Debug)]
pub(super) struct Bequest {
    heir: Heir,
    /// The child's end.
    pub(super) socket: OwnedFd,
    /// Where the child had the pages, in the order in which they lie in the shadow.
    pub(super) runs: Vec<AddrRange>,
}

/// The children of this process, held across a fork.
pub(super) type Heirs = MutexGuard<'static, Vec<Arc<Heir>>>;

pub(super) fn lock() -> Heirs {
    HEIRS.lock()
}

impl Bequest {
    /// Shares every device page of an mm. Nothing, when there is none.
    ///
    /// # Errors
    /// When the pages cannot be shared: they are all where they were.
    pub(super) fn make(mm: &Arc<Mm>, heirs: &Heirs) -> Result<Option<Self>> {
        let besides: Vec<_> = heirs.iter().map(|heir| heir.shadow.range).collect();
        let (mut runs, mut pages) = (Vec::new(), Vec::new());
        mm.each_to_share(&besides, &mut |run, shared| {
            runs.push(run);
            pages.extend_from_slice(shared);
        });
        if pages.is_empty() {
            return Ok(None);
        }
        let heir = Heir::new(mm, &pages);
        let (heir, socket) = heir.inspect_err(|_| pages.iter().for_each(|page| put(*page)))?;
        let mut took = vec![false; pages.len()];
        let shared = mm.share_pages(heir.shadow.range, &pages, &mut took);
        let left = pages.iter().zip(&took).filter(|(_, took)| !**took);
        left.for_each(|(page, _)| put(*page));
        shared?;
        if took.contains(&false) {
            return Err(Error::NoMemory { what: "frames" });
        }
        Ok(Some(Self { heir, socket, runs }))
    }

    /// In the parent, after the fork: the child may ask.
    pub(super) fn hand_over(self, heirs: &mut Heirs) {
        let heir = Arc::new(self.heir);
        let mine = Arc::clone(&heir);
        let thread = std::thread::Builder::new().name("hmm-child".into());
        if thread.spawn(move || mine.serve()).is_err() {
            // Nobody answers: the child finds everything in the store.
            heir.leave();
            return;
        }
        heirs.push(heir);
        if !AT_EXIT.swap(true, Ordering::AcqRel) {
            // SAFETY: the function is of this library, which is never unloaded.
            unsafe { libc::atexit(leave_everything) };
        }
    }

    /// In the child: its end of the socket, the store, and where the pages belong.
    pub(super) fn accept(self) -> (OwnedFd, OwnedFd, Vec<AddrRange>) {
        (self.socket, self.heir.store, self.runs)
    }
}

/// In the child: the parent's children are none of its own.
pub(super) fn disown(heirs: &mut Heirs) {
    for heir in heirs.drain(..) {
        // The threads that serve them do not exist here, and never let go of theirs.
        for descriptor in [&heir.socket, &heir.store] {
            // SAFETY: nobody in this process uses it again.
            unsafe { libc::close(descriptor.as_raw_fd()) };
        }
        let _ = Arc::into_raw(heir);
    }
}

impl Heir {
    fn new(mm: &Arc<Mm>, pages: &[Pfn]) -> Result<(Self, OwnedFd)> {
        let failed = |call| move |errno| Error::os(call, VirtAddr::new(0), errno);
        let flags = SocketFlags::CLOEXEC;
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (socket, childs) = pair.map_err(failed("socketpair"))?;
        let store = rustix::fs::memfd_create("hmm-fork", MemfdFlags::CLOEXEC);
        let store = store.map_err(failed("memfd_create"))?;
        let len = pages.len() * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let start = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, flags)
        };
        let start = start.map_err(failed("mmap"))?.expose_provenance() as u64;
        let range = AddrRange::new(start, start + len as u64)?;
        let shadow = Shadow { mm: Arc::clone(mm), range };
        // Nor do other children see it; and no neighbour is joined to it.
        mm.engine.leave_out_of_children(range, true)?;
        Ok((Self { shadow, socket, store }, childs))
    }

    /// The life of the thread that answers the child.
    fn serve(self: Arc<Self>) {
        while let Some(index) = wire::next_question(&self.socket) {
            let mut page = [0; PAGE_SIZE];
            let is_page = index < self.shadow.range.pages();
            let answer = match is_page.then(|| self.read(index, &mut page)).flatten() {
                Some(true) => Reply::Page(&page),
                Some(false) => Reply::Lost,
                // It asks again.
                None => continue,
            };
            if !wire::reply(&self.socket, index, answer) {
                break;
            }
        }
        HEIRS.lock().retain(|known| !Arc::ptr_eq(known, &self));
    }

    /// Reads a page as it was at the fork. False when its device lost it; `None` when it cannot be had now.
    fn read(&self, index: usize, out: &mut [u8; PAGE_SIZE]) -> Option<bool> {
        let (mm, page) = (&self.shadow.mm, self.shadow.range.page_at(index));
        match mm.engine.read(page, out) {
            Ok(PAGE_SIZE) => Some(true),
            _ => mm.is_poisoned(page).is_err().then_some(false),
        }
    }

    /// Puts everything where the child finds it without this process.
    fn leave(&self) {
        let mut page = [0; PAGE_SIZE];
        for index in 0..self.shadow.range.pages() {
            if self.read(index, &mut page) == Some(true) {
                wire::store(&self.store, index, self.shadow.range.pages(), &page);
            }
        }
    }
}

/// The process exits by itself.
extern "C" fn leave_everything() {
    let heirs: Vec<_> = HEIRS.lock().iter().map(Arc::clone).collect();
    heirs.iter().filter(|heir| wire::is_connected(&heir.socket)).for_each(|heir| heir.leave());
}
