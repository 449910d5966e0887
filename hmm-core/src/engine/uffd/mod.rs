//! The userfaultfd engine (default on Linux).
//!
//! Contents move by `UFFDIO_MOVE` between the process's vmas and the frame area, single pages by `UFFDIO_COPY`
//! ([`pages`]); kernels without MOVE copy ([`copying`]). Ranges are watched by write-protect registration, in asynchronous
//! mode where there is one: nothing is ever write-protected then, ordinary faults cost nothing, and every kind of mapping
//! may be watched; the kernel reports munmap, mremap and madvise.
//!
//! Faults come in one of two modes. *Blocking*: service threads read and answer them, and system calls on absent pages
//! wait as loads do; needs a privilege. *Inline*: the toucher answers in a handler of SIGBUS ([`super::trap`]); system
//! calls on absent pages fail with `EFAULT`.

mod abi;
mod copying;
mod open;
mod pages;
mod service;

pub use open::{Feature, features};

use super::linux::memory::{self, Memory, Reserved};
use super::linux::{Mappings, Presence};
use super::trap::{Access, Claim, Owner, Signal, Trap, copy};
use super::{
    Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, Stop, VmaKind, Watch,
};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::DEADLINE;
use crate::sync::Mutex;
use abi::{Register, feature};
use open::Mode;
use pages::{Pages, raw};
use rustix::fd::AsRawFd;
use rustix::io::Errno;
use service::Service;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

/// Userfaultfd with events.
#[derive(Debug)]
pub struct UffdEngine {
    pages: Pages,
    features: u64,
    can_move: bool,
    presence: Presence,
    memory: Option<Memory>,
    layout: Shared<LayoutLock>,
    service: Service,
    /// The handler of SIGBUS, in inline mode.
    inline: Option<Inline>,
    frame_areas: Mutex<Vec<Reserved>>,
}

/// What inline mode adds.
#[derive(Debug)]
struct Inline {
    trap: Shared<Trap>,
    /// Behind the trap.
    _owner: Shared<Toucher>,
}

/// Tells whose a SIGBUS is.
struct Toucher {
    mappings: Mappings,
    service: Service,
}

impl Owner for Toucher {
    /// Only userfaultfd makes an access to private anonymous memory end so.
    fn claim(&self, access: &Access) -> Claim {
        let page = access.addr.page();
        match self.mappings.at(page) {
            _ if access.signal == Signal::Segv => Claim::Stranger,
            Ok(Some(mapping))
                if mapping.kind == VmaKind::Anonymous && mapping.range.contains(page) =>
            {
                Claim::Mine
            }
            _ => Claim::Stranger,
        }
    }

    fn drain(&self) {
        self.service.drain();
    }
}

impl UffdEngine {
    /// Opens a descriptor that serves the kernel's own accesses too.
    ///
    /// # Errors
    /// `Unsupported` with the reason and what would help.
    pub fn open() -> Result<Self> {
        Self::with_mode(Mode::Blocking)
    }

    /// Opens a descriptor for faults of user code, which the toucher itself answers. Needs no privilege.
    ///
    /// # Errors
    /// `Unsupported` with the reason and what would help.
    pub fn open_inline() -> Result<Self> {
        Self::with_mode(Mode::Inline)
    }

    fn with_mode(mode: Mode) -> Result<Self> {
        let opened = open::open(mode)?;
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let descriptor = Shared::new(opened.descriptor).ok_or_else(no_memory)?;
        let layout = Shared::new(LayoutLock::default()).ok_or_else(no_memory)?;
        let sends_signals = opened.features & feature::POISON == 0;
        let service = Service::new(descriptor.clone(), layout.clone(), sends_signals)?;
        let can_move = opened.features & feature::MOVE != 0;
        let memory = Memory::open();
        if mode == Mode::Blocking || !can_move {
            // Only it reads what is there without waiting for what is not.
            memory.as_ref().map_err(|error| Error::Unsupported {
                what: format!(
                    "userfaultfd is there, but the library needs /proc/self/mem: {error}"
                ),
            })?;
        }
        let inline = match mode {
            Mode::Blocking => None,
            Mode::Inline => Some(Inline::new(service.clone())?),
        };
        Ok(Self {
            pages: Pages { descriptor, mappings: Mappings::open()? },
            features: opened.features,
            can_move,
            presence: Presence::open(),
            memory: memory.ok(),
            layout,
            service,
            inline,
            frame_areas: Mutex::new(Vec::new()),
        })
    }

    /// Ends every registration at once. The number stays taken (by the stop event), so that a late call on it fails
    /// instead of reaching a stranger's descriptor; and it needs no new descriptor, of which there may be none left.
    fn close_descriptor(&self) {
        let other = self.service.stop_descriptor().as_raw_fd();
        let mine = self.pages.descriptor.as_raw_fd();
        // SAFETY: both numbers are open descriptors of this engine.
        if unsafe { libc::dup3(other, mine, libc::O_CLOEXEC) } < 0 {
            // Its number is above a limit that was lowered meanwhile.
            self.unregister_everything();
        }
    }

    fn unregister_everything(&self) {
        let mut next = VirtAddr::new(0);
        while let Ok(Some(mapping)) = self.pages.mappings.at(next) {
            // Mappings that were never registered refuse.
            let _ = abi::unregister(&*self.pages.descriptor, &mut raw(mapping.range));
            next = mapping.range.end();
        }
    }

    fn register(&self, range: AddrRange, mode: u64) -> std::result::Result<(), Errno> {
        let mut request = Register { range: raw(range), mode, ioctls: 0 };
        abi::register(&*self.pages.descriptor, &mut request)
    }

    /// Touches what is absent, so that the toucher's handler brings it: the kernel would only fail.
    fn touch_absent(&self, range: AddrRange) -> Result<()> {
        let mut failed = None;
        self.presence.scan(range, &mut |run, present| {
            let pages = (0..run.pages()).map(|page| run.page_at(page));
            for page in pages.filter(|_| present == Present::None) {
                let mut byte = 0_u8;
                // SAFETY: one byte is read, into a variable of this function.
                if unsafe { copy::faulting(&raw mut byte, page.as_ptr(), 1) } == 0 {
                    failed.get_or_insert(page);
                }
            }
        })?;
        match failed {
            Some(address) => Err(Error::Fault { address, what: "the page cannot be had" }),
            None => Ok(()),
        }
    }
}

impl Inline {
    fn new(service: Service) -> Result<Self> {
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let toucher = Toucher { mappings: Mappings::open()?, service };
        let owner = Shared::new(toucher).ok_or_else(no_memory)?;
        let behind: NonNull<dyn Owner> = NonNull::from(&*owner);
        // SAFETY: the owner lies in the arena, and lives as long as this value, which outlives the trap's stop.
        let trap = unsafe { Trap::new(behind, &[Signal::Bus, Signal::Segv])? };
        Ok(Self { trap, _owner: owner })
    }
}

impl std::fmt::Debug for Toucher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Toucher")
    }
}

impl Engine for UffdEngine {
    fn name(&self) -> &'static str {
        if self.inline.is_some() { "uffd-inline" } else { "uffd" }
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities =
            Capabilities::MISSING_FAULTS | Capabilities::EVENTS | Capabilities::POISON;
        capabilities.set(Capabilities::MOVE, self.can_move);
        capabilities.set(Capabilities::KERNEL_FAULTS, self.inline.is_none());
        capabilities
    }

    fn layout(&self) -> &LayoutLock {
        &self.layout
    }

    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        if let Some(inline) = &self.inline {
            Trap::start(&inline.trap, &sink)?;
        }
        self.service.start(sink, self.inline.as_ref().map(|inline| inline.trap.clone()))
    }

    fn stop(&self) {
        self.service.stop();
        if let Some(inline) = &self.inline {
            inline.trap.stop();
        }
        self.close_descriptor();
        self.frame_areas.lock().clear();
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.pages.mappings.at(addr)
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        let protect = self.features & feature::PAGEFAULT_FLAG_WP != 0;
        let changes = if protect { abi::REGISTER_WP } else { abi::REGISTER_MISSING };
        let mode = match watch {
            Watch::Changes => changes,
            Watch::Absence => changes | abi::REGISTER_MISSING,
        };
        match self.register(range, mode) {
            Ok(()) => Ok(()),
            // Before Linux 6.7, files cannot be watched: mirrors of them are not told of changes.
            Err(Errno::INVAL)
                if watch == Watch::Changes && self.features & feature::WP_ASYNC == 0 =>
            {
                Ok(())
            }
            Err(Errno::BUSY) => Err(Error::Busy {
                address: range.start(),
                what: "another userfaultfd of this process has the range",
            }),
            Err(Errno::NOMEM) => Err(Error::NoMemory { what: "mappings (vm.max_map_count)" }),
            Err(errno) => Err(Error::os("UFFDIO_REGISTER", range.start(), errno)),
        }
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.presence.scan(range, report)
    }

    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match memory::populate(range, write) {
                Err(Error::Fault { .. }) if self.inline.is_some() && Instant::now() < deadline => {
                    self.touch_absent(range)?;
                }
                done => return done,
            }
        }
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        if self.can_move {
            return self.pages.take(range, frame);
        }
        self.take_by_copy(range, frame)
    }

    fn withdraw(&self, range: AddrRange) -> Progress {
        if self.can_move {
            return Progress { pages: range.pages(), stop: Stop::Done };
        }
        self.drop_copied(range)
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        let how = if self.can_move { how } else { Give::Copy };
        self.after_exists(range, self.pages.give(range, frame, how))
    }

    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.zero_run(AddrRange::page_of(page), write)
    }

    fn zero_run(&self, run: AddrRange, write: bool) -> Progress {
        self.after_exists(run, self.pages.zero(run, write))
    }

    fn wake(&self, range: AddrRange) {
        match &self.inline {
            Some(inline) => inline.trap.wake(range),
            None => self.pages.wake(range),
        }
    }

    fn poison(&self, page: VirtAddr) -> bool {
        // Without the ioctl, a signal is sent to whoever touches the page.
        self.features & feature::POISON == 0 || self.pages.poison(page)
    }

    fn drain(&self) {
        self.service.drain();
    }

    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        match &self.memory {
            Some(memory) => memory.peek(addr, out),
            // SAFETY: `out` is the caller's; the other side is a part of the process that was asked for. Inline mode:
            // what is absent ends the copy.
            None => unsafe {
                copy::present(out.as_mut_ptr(), addr.as_ptr(), out.len()) == out.len()
            },
        }
    }

    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        match &self.memory {
            Some(memory) => memory.poke(addr, data),
            // SAFETY: as in `peek`; the caller asks to change the other side.
            None => unsafe {
                copy::present(addr.as_ptr(), data.as_ptr(), data.len()) == data.len()
            },
        }
    }

    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        if self.inline.is_none() {
            return memory::read(addr, out);
        }
        // SAFETY: `out` is the caller's; the other side is a part of the process that was asked for.
        let count = unsafe { copy::faulting(out.as_mut_ptr(), addr.as_ptr(), out.len()) };
        memory::transferred(count as isize, addr, "nothing can be read there")
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        if self.inline.is_none() {
            return memory::write(addr, data);
        }
        // SAFETY: `data` is the caller's; the other side is a part of the process that it asks to change.
        let count = unsafe { copy::faulting(addr.as_ptr(), data.as_ptr(), data.len()) };
        memory::transferred(count as isize, addr, "nothing can be written there")
    }

    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        let reserved = Reserved::new(bytes)?;
        let area = reserved.area;
        if self.can_move {
            // Only what is registered can be moved into.
            self.watch(area, Watch::Absence)?;
        }
        self.frame_areas.lock().push(reserved);
        Ok(area)
    }

    fn fill_frame(&self, frame: VirtAddr) -> bool {
        self.fill_frames(AddrRange::page_of(frame)) == 1
    }

    fn fill_frames(&self, frames: AddrRange) -> usize {
        if !self.can_move {
            return if memory::populate(frames, true).is_ok() { frames.pages() } else { 0 };
        }
        let deadline = Instant::now() + DEADLINE;
        let mut done = 0;
        while done < frames.pages() {
            let progress = self.pages.fill_frames(frames.sub(done, frames.pages() - done));
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
        // Frames belong to the library; idle ones hold nothing that anybody needs.
        let _ = memory::drop_pages(frames);
    }

    fn check_ready(&self) -> Result<()> {
        self.inline.as_ref().map_or(Ok(()), |inline| inline.trap.renew())
    }

    fn is_service_thread(&self) -> bool {
        self.service.is_own_thread()
            || self.inline.as_ref().is_some_and(|inline| inline.trap.is_own_thread())
    }
}
