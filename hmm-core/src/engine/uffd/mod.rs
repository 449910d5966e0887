//! The userfaultfd engine (default on Linux).
//!
//! One blocking descriptor, so that system calls on absent pages wait as loads do. Contents move by `UFFDIO_MOVE`
//! between the process's vmas and the frame area, single pages by `UFFDIO_COPY`. Ranges are watched by write-protect
//! registration in asynchronous mode: nothing is ever write-protected, ordinary faults cost nothing, and every kind of
//! mapping may be watched; the kernel then reports munmap, mremap and madvise.

mod abi;
mod kernel_view;
mod open;
mod service;
mod watch;

use super::{Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, Stop, Watch};
use crate::addr::{AddrRange, LEAF_SIZE, PAGE_SHIFT, PAGE_SIZE, VirtAddr};
use crate::arena::Shared;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::DEADLINE;
use crate::sync::Mutex;
use abi::{Fill, Range, Register, Transfer, feature};
use kernel_view::KernelView;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use service::Service;
use std::sync::Arc;
use std::time::Instant;

const ZERO_PAGES: usize = 16;

/// Pages of zeros to copy from.
#[repr(C, align(4096))]
struct ZeroPages([u8; ZERO_PAGES * PAGE_SIZE]);
static ZEROS: ZeroPages = ZeroPages([0; ZERO_PAGES * PAGE_SIZE]);

impl ZeroPages {
    fn address(&self) -> VirtAddr {
        VirtAddr::from_ptr(self.0.as_ptr())
    }
}

/// Userfaultfd with MOVE and events.
#[derive(Debug)]
pub struct UffdEngine {
    descriptor: Shared<OwnedFd>,
    features: u64,
    view: KernelView,
    layout: Shared<LayoutLock>,
    service: Service,
    frame_areas: Mutex<Vec<AddrRange>>,
}

impl UffdEngine {
    /// Opens a descriptor and probes the kernel.
    ///
    /// # Errors
    /// `Unsupported` with the reason and what would help.
    pub fn open() -> Result<Self> {
        let (descriptor, features) = open::open()?;
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let descriptor = Shared::new(descriptor).ok_or_else(no_memory)?;
        let layout = Shared::new(LayoutLock::default()).ok_or_else(no_memory)?;
        let service = Service::new(descriptor.clone(), layout.clone())?;
        let (view, frame_areas) = (KernelView::open()?, Mutex::new(Vec::new()));
        Ok(Self { descriptor, features, view, layout, service, frame_areas })
    }

    /// Ends every registration at once. The number stays taken (by the stop event), so that a late call on it fails
    /// instead of reaching a stranger's descriptor; and it needs no new descriptor, of which there may be none left.
    fn close_descriptor(&self) {
        let other = self.service.stop_descriptor().as_raw_fd();
        let mine = self.descriptor.as_raw_fd();
        // SAFETY: both numbers are open descriptors of this engine.
        if unsafe { libc::dup3(other, mine, libc::O_CLOEXEC) } < 0 {
            // Its number is above a limit that was lowered meanwhile.
            self.unregister_everything();
        }
    }

    fn unregister_everything(&self) {
        let mut next = VirtAddr::new(0);
        while let Ok(Some(mapping)) = self.view.mapping_at(next) {
            // Mappings that were never registered refuse.
            let _ = abi::unregister(&*self.descriptor, &mut raw(mapping.range));
            next = mapping.range.end();
        }
    }

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

    /// At most [`ZERO_PAGES`] pages of zeros; wakes who waits for them.
    fn fill_holes(&self, run: AddrRange, write: bool) -> Progress {
        if write {
            // Pages of their own at once; the shared zero page would fault a second time.
            return self.copy_pages(run.start(), ZEROS.address(), run.pages(), 0);
        }
        let mut request = Fill { range: raw(run), mode: 0, done: 0 };
        let result = abi::zero_page(&*self.descriptor, &mut request);
        progress(result, request.done, run.pages())
    }

    /// One call works on one kernel vma, and what the process mapped as one may be several. When a call over several
    /// pages was refused: the pages before the first border, if there is one.
    fn first_piece(&self, range: AddrRange, progress: &Progress) -> Option<usize> {
        if progress.stop != Stop::Refused || progress.pages > 0 || range.pages() == 1 {
            return None;
        }
        let mapping = self.view.mapping_at(range.start()).ok()??;
        let piece =
            mapping.range.intersect(range).filter(|piece| piece.start() == range.start())?;
        (piece.pages() < range.pages()).then(|| piece.pages())
    }

    fn copy_pages(&self, to: VirtAddr, from: VirtAddr, pages: usize, mode: u64) -> Progress {
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
}

/// Only positive counts are progress; the field may hold `-errno`, or nothing new.
fn progress(result: std::result::Result<(), Errno>, done: i64, wanted: usize) -> Progress {
    let pages = usize::try_from(done.max(0)).unwrap_or(0) >> PAGE_SHIFT;
    let stop = match result {
        Ok(()) => return Progress { pages: wanted, stop: Stop::Done },
        Err(Errno::AGAIN) => Stop::Retry,
        Err(Errno::BUSY) => Stop::Busy,
        Err(Errno::EXIST) => Stop::Exists,
        Err(Errno::NOMEM) => Stop::NoMemory,
        Err(_) => Stop::Refused,
    };
    Progress { pages: pages.min(wanted), stop }
}

impl Engine for UffdEngine {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::MISSING_FAULTS
            | Capabilities::MOVE
            | Capabilities::KERNEL_FAULTS
            | Capabilities::EVENTS;
        capabilities.set(Capabilities::POISON, self.features & feature::POISON != 0);
        capabilities
    }

    fn layout(&self) -> &LayoutLock {
        &self.layout
    }

    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        self.service.start(sink)
    }

    fn stop(&self) {
        self.service.stop();
        self.close_descriptor();
        for area in self.frame_areas.lock().drain(..) {
            // SAFETY: the area is a mapping of `reserve_frames`, and no migration is under way any more.
            let _ =
                unsafe { rustix::mm::munmap(area.start().as_ptr().cast(), area.len() as usize) };
        }
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.view.mapping_at(addr)
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        let mode = match watch {
            Watch::Changes => abi::REGISTER_WP,
            Watch::Absence => abi::REGISTER_WP | abi::REGISTER_MISSING,
        };
        let mut request = Register { range: raw(range), mode, ioctls: 0 };
        abi::register(&*self.descriptor, &mut request).map_err(|errno| match errno {
            Errno::BUSY => Error::Busy {
                address: range.start(),
                what: "another userfaultfd of this process has the range",
            },
            Errno::NOMEM => Error::NoMemory { what: "mappings (vm.max_map_count)" },
            errno => Error::os("UFFDIO_REGISTER", range.start(), errno),
        })
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.view.scan(range, report)
    }

    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        let deadline = Instant::now() + DEADLINE;
        loop {
            // SAFETY: populating changes no contents; the kernel checks the range.
            let done = unsafe {
                rustix::mm::madvise(range.start().as_ptr().cast(), range.len() as usize, advice)
            };
            let address = range.start();
            return match done {
                Ok(()) => Ok(()),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => continue,
                Err(Errno::NOMEM) => Err(Error::Fault { address, what: "a part is not mapped" }),
                Err(Errno::INVAL) => {
                    Err(Error::Permission { address, what: "the mapping forbids the access" })
                }
                Err(Errno::FAULT) => Err(Error::Fault { address, what: "the page cannot be had" }),
                Err(errno) => Err(Error::os("MADV_POPULATE", address, errno)),
            };
        }
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        let progress = self.move_pages(frame, range.start(), range.pages());
        match self.first_piece(range, &progress) {
            Some(pages) => self.move_pages(frame, range.start(), pages),
            None => progress,
        }
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        let to = range.start();
        let progress = match how {
            Give::Move => self.move_pages(to, frame, range.pages()),
            Give::Copy => self.copy_pages(to, frame, range.pages(), abi::DONT_WAKE),
        };
        match (self.first_piece(range, &progress), how) {
            (Some(pages), Give::Move) => self.move_pages(to, frame, pages),
            (Some(pages), Give::Copy) => self.copy_pages(to, frame, pages, abi::DONT_WAKE),
            // A vma that became read-only or locked cannot be moved into, but it can be copied into.
            (None, Give::Move) if progress.stop == Stop::Refused && progress.pages == 0 => {
                self.copy_pages(to, frame, range.pages(), abi::DONT_WAKE)
            }
            _ => progress,
        }
    }

    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.zero_run(AddrRange::page_of(page), write)
    }

    fn zero_run(&self, run: AddrRange, write: bool) -> Progress {
        let filled = self.fill_holes(run.sub(0, run.pages().min(ZERO_PAGES)), write);
        if filled.stop == Stop::Refused && filled.pages == 0 && run.pages() > 1 {
            // The run may reach beyond its mapping.
            return self.fill_holes(run.sub(0, 1), write);
        }
        filled
    }

    fn wake(&self, range: AddrRange) {
        // Fails only for bad ranges; then nobody waits there.
        let _ = abi::wake(&*self.descriptor, &mut raw(range));
    }

    fn poison(&self, page: VirtAddr) -> bool {
        let mut request = Fill { range: raw(AddrRange::page_of(page)), mode: 0, done: 0 };
        abi::poison(&*self.descriptor, &mut request).is_ok()
    }

    fn drain(&self) {
        self.service.drain();
    }

    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        rustix::io::pread(self.view.memory(), &mut *out, addr.get()) == Ok(out.len())
    }

    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        rustix::io::pwrite(self.view.memory(), data, addr.get()) == Ok(data.len())
    }

    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
        let remote = libc::iovec { iov_base: addr.as_ptr().cast(), iov_len: out.len() };
        // SAFETY: `local` is `out`, writable; the kernel checks `remote`, which is only read.
        let count = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
        transferred(count, addr, "nothing can be read there")
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let remote = libc::iovec { iov_base: addr.as_ptr().cast(), iov_len: data.len() };
        // SAFETY: `local` is `data`, only read; the kernel checks `remote`, memory that the caller asks to change.
        let count = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
        transferred(count, addr, "nothing can be written there")
    }

    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                (bytes + LEAF_SIZE) as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let no_memory = Error::NoMemory { what: "address space for frames" };
        let start = mapped.map_err(|_| no_memory)?.expose_provenance() as u64;
        let start = start.next_multiple_of(LEAF_SIZE);
        let area = AddrRange::new(start, start + bytes)?;
        self.watch(area, Watch::Absence)?;
        self.frame_areas.lock().push(area);
        Ok(area)
    }

    fn fill_frame(&self, frame: VirtAddr) -> bool {
        self.fill_frames(AddrRange::page_of(frame)) == 1
    }

    fn fill_frames(&self, frames: AddrRange) -> usize {
        let deadline = Instant::now() + DEADLINE;
        let mut done = 0;
        while done < frames.pages() {
            let count = (frames.pages() - done).min(ZERO_PAGES);
            let to = frames.page_at(done);
            let progress = self.copy_pages(to, ZEROS.address(), count, abi::DONT_WAKE);
            done += progress.pages;
            match progress.stop {
                Stop::Done => {}
                Stop::Exists => done += 1,
                Stop::Retry if Instant::now() < deadline => self.drain(),
                _ => break,
            }
        }
        done
    }

    fn empty_frames(&self, frames: AddrRange) {
        // SAFETY: frames belong to the library, and idle ones hold nothing that anybody needs.
        let _ = unsafe {
            rustix::mm::madvise(
                frames.start().as_ptr().cast(),
                frames.len() as usize,
                Advice::LinuxDontNeed,
            )
        };
    }

    fn is_service_thread(&self) -> bool {
        self.service.is_own_thread()
    }
}

fn raw(range: AddrRange) -> Range {
    Range { start: range.start().get(), len: range.len() }
}

fn transferred(count: isize, address: VirtAddr, what: &'static str) -> Result<usize> {
    match usize::try_from(count) {
        Ok(0) | Err(_) => Err(Error::Fault { address, what }),
        Ok(count) => Ok(count),
    }
}
