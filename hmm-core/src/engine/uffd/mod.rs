//! The userfaultfd engine (default on Linux).
//!
//! Contents move by `UFFDIO_MOVE` between the process's vmas and the frame area, single pages by `UFFDIO_COPY`
//! (`pages`); kernels without MOVE copy (`copying`). Ranges are watched by write-protect registration, in asynchronous
//! mode where there is one: nothing is ever write-protected then, ordinary faults cost nothing, and every kind of mapping
//! may be watched; the kernel reports munmap, mremap and madvise.
//!
//! Faults come in one of two modes. *Blocking*: service threads read and answer them, and system calls on absent pages
//! wait as loads do; needs a privilege. *Inline*: the toucher answers in a handler of SIGBUS (`super::trap`); system
//! calls on absent pages fail with `EFAULT`. On a blocking descriptor, ranges may be made inline one by one (`second`).

mod abi;
mod copying;
mod files;
mod inline;
mod open;
mod pages;
mod ranges;
mod second;
mod service;

pub use open::{Feature, features};

use super::linux::memory::{self, Memory, Reserved};
use super::linux::{Mappings, Presence, children};
use super::trap::{Trap, copy};
use super::{
    Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, Rss, Stop, VmaKind, Watch,
};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::DEADLINE;
use crate::sync::Mutex;
use abi::feature;
use inline::{Inline, check_anonymous};
use once_cell::sync::OnceCell;
use open::Mode;
use pages::Pages;
use rustix::io::Errno;
use second::{Second, registration_failed};
use service::Service;
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
    /// The handler of SIGBUS for ranges beside a blocking descriptor.
    touchers: OnceCell<Inline>,
    frame_areas: Mutex<Vec<Reserved>>,
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
            touchers: OnceCell::new(),
            frame_areas: Mutex::new(Vec::new()),
        })
    }

    /// Bits of a registration.
    fn mode_of(&self, watch: Watch) -> u64 {
        let protect = self.features & feature::PAGEFAULT_FLAG_WP != 0;
        let changes = if protect { abi::REGISTER_WP } else { abi::REGISTER_MISSING };
        match watch {
            Watch::Changes => changes,
            Watch::Absence => changes | abi::REGISTER_MISSING,
        }
    }

    /// The descriptor to which an address belongs.
    fn pages_at(&self, addr: VirtAddr) -> &Pages {
        match self.service.second() {
            Some(second) if second.ranges.contains(addr) => &second.pages,
            _ => &self.pages,
        }
    }

    /// Whether some touches end in a signal handler, and system calls that do not wait.
    fn has_touchers(&self) -> bool {
        self.inline.is_some() || self.service.second().is_some()
    }

    /// The second descriptor; opened when it is asked for first.
    fn open_second(&self) -> Result<&Second> {
        self.touchers.get_or_try_init(|| {
            let gone = Error::Gone { what: "this engine was stopped" };
            let sink = self.service.sink().ok_or(gone)?;
            let opened = open::open(Mode::Inline)?;
            let no_memory = || Error::NoMemory { what: "the engine's state" };
            let descriptor = Shared::new(opened.descriptor).ok_or_else(no_memory)?;
            let pages = Pages { descriptor, mappings: Mappings::open()? };
            let stop = service::stop_event()?;
            let inline = Inline::new(self.service.clone())?;
            let frames = self.frame_areas.lock().first().map(|reserved| reserved.area);
            let frames = frames.ok_or_else(no_memory)?;
            let second = Second::new(pages, inline.trap.clone(), stop, frames)?;
            Trap::start(&inline.trap, &sink).inspect_err(|_| inline.trap.stop())?;
            self.service.add_second(second);
            Ok(inline)
        })?;
        self.service.second().ok_or(Error::Gone { what: "the second descriptor" })
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

impl UffdEngine {
    /// What was mapped here since the mapping was looked at is not ours, and has absent pages of its own.
    fn unregister_others(&self, range: AddrRange) {
        for piece in self.pages.pieces(range) {
            let mapping = self.pages.mappings.at(piece.start());
            // Only what is known to be something else: our own, unregistered, would read as zeros.
            if matches!(mapping, Ok(Some(mapping)) if mapping.kind != VmaKind::Anonymous) {
                // Each descriptor refuses what is not its own.
                let _ = self.pages.unregister(piece);
                self.service.second().iter().for_each(|one| _ = one.pages.unregister(piece));
            }
        }
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
        self.service.stop_reading();
        self.pages.close(self.service.stop_descriptor());
        self.service.second().into_iter().for_each(|second| second.pages.close(&second.stop));
        self.service.join();
        for inline in [self.inline.as_ref(), self.touchers.get()].into_iter().flatten() {
            inline.trap.stop();
        }
        self.frame_areas.lock().clear();
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.pages.mappings.at(addr)
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        let mode = self.mode_of(watch);
        let registering = inline::Registering::begin();
        let done = match self.service.second() {
            Some(second) => second.register(&self.pages, range, mode),
            None => self.pages.register(range, mode),
        };
        if watch == Watch::Absence {
            self.unregister_others(range);
        }
        drop(registering);
        match done {
            Ok(()) => Ok(()),
            // Before Linux 6.7, files cannot be watched: mirrors of them are not told of changes.
            Err(Errno::INVAL)
                if watch == Watch::Changes && self.features & feature::WP_ASYNC == 0 =>
            {
                Ok(())
            }
            Err(errno) => Err(registration_failed(range, errno)),
        }
    }

    fn answer_inline(&self, range: AddrRange, inline: bool) -> Result<()> {
        check_anonymous(&self.pages.mappings, range)?;
        let second = match self.service.second() {
            _ if self.inline.is_some() => return Ok(()),
            Some(second) => second,
            None if inline => self.open_second()?,
            None => return Ok(()),
        };
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.drain();
            let changing = self.layout.change();
            // A change of what was mapped here before must not be taken for one of what is mapped now.
            if !self.pages.is_changing() && !second.pages.is_changing() {
                let mode = self.mode_of(Watch::Changes);
                let done = check_anonymous(&self.pages.mappings, range)
                    .and_then(|()| second.hand_over(&self.pages, range, mode, inline));
                drop(changing);
                // Whoever waits at the old place looks again.
                second.trap.wake(range);
                self.pages.wake(range);
                return done;
            }
            drop(changing);
            if Instant::now() >= deadline {
                let what = "the layout keeps changing";
                return Err(Error::Busy { address: range.start(), what });
            }
            std::thread::yield_now();
        }
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.presence.scan(range, report)
    }

    fn rss(&self) -> Result<Rss> {
        super::linux::rss()
    }

    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match memory::populate(range, write) {
                Err(Error::Fault { .. }) if self.has_touchers() && Instant::now() < deadline => {
                    self.touch_absent(range)?;
                }
                done => return done,
            }
        }
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        match self.service.second() {
            _ if !self.can_move => self.copy_protected(range, frame),
            Some(second) => second.take(&self.pages, range, frame, self.mode_of(Watch::Absence)),
            None => self.pages.take(range, frame),
        }
    }

    fn is_huge(&self, range: AddrRange) -> bool {
        self.presence.is_huge(range)
    }

    fn is_locked(&self, page: VirtAddr) -> bool {
        memory::is_locked(AddrRange::page_of(page))
    }

    fn withdraw(&self, range: AddrRange) -> Progress {
        match self.can_move {
            true => Progress { pages: range.pages(), stop: Stop::Done },
            false => self.drop_copied(range),
        }
    }

    fn copies_read_only(&self) -> bool {
        self.memory.is_some() && self.features & feature::PAGEFAULT_FLAG_WP != 0
    }

    fn take_by_copy(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        self.copy_protected(range, frame)
    }
    fn withdraw_copied(&self, range: AddrRange) -> Progress {
        self.drop_copied(range)
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        let how = if self.can_move { how } else { Give::Copy };
        let pages = self.pages_at(range.start());
        self.after_exists(range, pages.give(range, frame, how))
    }

    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.zero_run(AddrRange::page_of(page), write)
    }

    fn zero_run(&self, run: AddrRange, write: bool) -> Progress {
        let pages = self.pages_at(run.start());
        self.after_exists(run, pages.zero(run, write))
    }

    fn wake(&self, range: AddrRange) {
        match (&self.inline, self.service.second()) {
            (Some(inline), _) => inline.trap.wake(range),
            (None, Some(second)) => second.wake(&self.pages, range),
            (None, None) => self.pages.wake(range),
        }
    }

    fn poison(&self, page: VirtAddr) -> bool {
        // Without the ioctl, a signal is sent to whoever touches the page.
        self.features & feature::POISON == 0 || self.pages_at(page).poison(page)
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
        let mut count = match &self.inline {
            Some(_) => 0,
            None => memory::read(addr, out).unwrap_or(0),
        };
        // What the kernel does not wait for, the toucher brings.
        if count < out.len() && self.has_touchers() {
            let (rest, from) = (&mut out[count..], addr.as_ptr().wrapping_add(count));
            // SAFETY: `out` is the caller's; the other side is a part of the process that was asked for.
            count += unsafe { copy::faulting(rest.as_mut_ptr(), from, rest.len()) };
        }
        memory::transferred(count as isize, addr, "nothing can be read there")
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        let mut count = match &self.inline {
            Some(_) => 0,
            None => memory::write(addr, data).unwrap_or(0),
        };
        if count < data.len() && self.has_touchers() {
            let (rest, to) = (&data[count..], addr.as_ptr().wrapping_add(count));
            // SAFETY: `data` is the caller's; the other side is a part of the process that it asks to change.
            count += unsafe { copy::faulting(to, rest.as_ptr(), rest.len()) };
        }
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
        let pages = match self.service.second() {
            Some(second) if second.has_frame(frames.start()) => &second.pages,
            _ => &self.pages,
        };
        let mut done = 0;
        while done < frames.pages() {
            let progress = pages.fill_frames(frames.sub(done, frames.pages() - done));
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

    fn check_ready(&self, range: AddrRange) -> Result<()> {
        match (&self.inline, self.service.second()) {
            (Some(inline), _) => inline.trap.renew(),
            (None, Some(second)) if second.ranges.overlaps(range) => second.trap.renew(),
            _ => Ok(()),
        }
    }

    fn disown(&self) {
        // As long as the child has it, whoever unmaps memory of the parent's waits for a reader.
        let first = (&self.pages, self.service.stop_descriptor());
        let second = self.service.second().map(|second| (&second.pages, &second.stop));
        for (pages, stop) in std::iter::once(first).chain(second) {
            pages.close_in_this_process(stop);
        }
    }

    fn leave_out_of_children(&self, range: AddrRange, out: bool) -> Result<()> {
        children::leave_out(range, out)
    }

    fn each_left_out_of_children(&self, report: &mut dyn FnMut(AddrRange)) {
        children::each_left_out(report);
    }

    fn is_service_thread(&self) -> bool {
        self.service.is_own_thread()
            || self.inline.as_ref().is_some_and(|inline| inline.trap.is_own_thread())
            || self.service.second().is_some_and(|second| second.trap.is_own_thread())
    }
}
