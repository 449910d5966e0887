//! Userfaultfd for anonymous memory, and beside it the signal engine for private file mappings, which userfaultfd cannot
//! move.
//!
//! Both share one layout lock, and userfaultfd's frames. Layout changes of file mappings are reported by userfaultfd, which
//! watches them; the signal engine's table follows before the mm hears of them. Kernels that cannot watch files (before
//! Linux 6.7) leave that to the program: pages of files leave only if it announces its changes. The signal engine starts,
//! and puts its handler first, when pages of a file are to leave for the first time.
//!
//! System calls on pages of a file that are away fail with `EFAULT`, whatever the capabilities say of anonymous memory.

use super::signal::{Follower, SignalEngine};
use super::uffd::UffdEngine;
use super::{
    Engine, FaultEvent, FaultSink, Give, LayoutLock, MapEvent, MapTicket, Mapping, Present,
    Progress, Resolution, Rss, Stop, VmaKind, Watch,
};
use crate::addr::{AddrRange, VirtAddr};
use crate::arena;
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::limits::DEADLINE;
use crate::sync::{Mutex, RwLock};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Both engines.
#[derive(Debug)]
pub struct MixedEngine {
    uffd: UffdEngine,
    files: SignalEngine,
    /// The kernel reports layout changes of file mappings.
    watches: bool,
    /// The program announces layout changes.
    announced: AtomicBool,
    /// Pages of files may be away: the signal engine runs.
    in_use: AtomicBool,
    starting: Mutex<()>,
    sink: RwLock<Option<Arc<dyn FaultSink>>>,
    /// What userfaultfd reports to.
    relay: RwLock<Option<Arc<Relay>>>,
}

/// Tells the signal engine's table of layout changes before the mm.
#[derive(Debug)]
struct Relay {
    files: Follower,
    sink: Arc<dyn FaultSink>,
}

impl FaultSink for Relay {
    fn on_fault(&self, fault: FaultEvent) -> Resolution {
        self.sink.on_fault(fault)
    }
    fn on_map_event(&self, event: MapEvent) -> MapTicket {
        self.files.apply(&event);
        self.sink.on_map_event(event)
    }
    fn finish_map_event(&self, ticket: MapTicket) {
        self.sink.finish_map_event(ticket);
    }
    fn on_idle(&self) {
        self.sink.on_idle();
    }
    fn must_stay(&self, range: AddrRange) -> bool {
        self.sink.must_stay(range)
    }
    fn on_own_memory(&self, range: AddrRange) {
        self.sink.on_own_memory(range);
    }
}

fn stopped(stop: Stop) -> Progress {
    Progress { pages: 0, stop }
}

impl MixedEngine {
    /// Puts the signal engine beside userfaultfd, where both can do their part: userfaultfd alone otherwise.
    pub fn open(uffd: UffdEngine) -> Arc<dyn Engine> {
        let (watches, announced) = (uffd.watches_files(), AtomicBool::new(false));
        match SignalEngine::beside(uffd.shared_layout()) {
            Ok(Some(files)) => Arc::new(Self {
                uffd,
                files,
                watches,
                announced,
                in_use: AtomicBool::new(false),
                starting: Mutex::new(()),
                sink: RwLock::new(None),
                relay: RwLock::new(None),
            }),
            _ => Arc::new(uffd),
        }
    }

    fn in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire)
    }

    /// Starts the signal engine, once.
    fn start_files(&self) -> Result<()> {
        let _one = self.starting.lock();
        let sink = self.sink.read().clone();
        if let (false, Some(sink)) = (self.in_use(), sink) {
            // What was started before the failure is stopped again.
            self.files.start(sink).inspect_err(|_| self.files.stop())?;
            self.in_use.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn is_file_mapping(&self, page: VirtAddr) -> bool {
        matches!(
            self.uffd.mapping_at(page),
            Ok(Some(mapping))
                if mapping.kind == VmaKind::PrivateFile && mapping.range.contains(page)
        )
    }

    /// Whether a page is the signal engine's affair.
    fn is_of_file(&self, page: VirtAddr) -> bool {
        self.in_use() && (self.files.has(page) || self.is_file_mapping(page))
    }

    /// Nothing that the program did to its layout waits to be read after it, or the take is undone: while the layout
    /// lock is held nothing is read.
    fn take_file(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        if !self.in_use() {
            return stopped(Stop::Refused);
        }
        let Some(within) = self.files.within_file(range) else { return stopped(Stop::Busy) };
        let frames = AddrRange::from_bounds(frame.get(), frame.get() + within.len());
        // A touch of an absent frame would wait for a reader, and readers wait for the layout lock.
        if let Err(stop) = self.uffd.fill_held(frames) {
            return stopped(stop);
        }
        let mut taken = self.files.take(within, frame);
        if taken.pages > 0 && self.uffd.is_changing(range.start()) {
            self.files.put_back(range.sub(0, taken.pages));
            return stopped(Stop::Retry);
        }
        if taken.stop == Stop::Done && within != range {
            taken.stop = Stop::Busy;
        }
        taken
    }
}

impl Engine for MixedEngine {
    fn name(&self) -> &'static str {
        self.uffd.name()
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = self.uffd.capabilities();
        let told = self.watches || self.announced.load(Ordering::Acquire);
        capabilities.set(Capabilities::PRIVATE_FILES, told);
        capabilities
    }

    fn layout(&self) -> &LayoutLock {
        self.uffd.layout()
    }

    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        let relay = Arc::new(Relay { files: self.files.follower(), sink: Arc::clone(&sink) });
        // Service threads use it.
        if !arena::keep_object(&relay) {
            return Err(Error::NoMemory { what: "places for objects of the library (512)" });
        }
        *self.relay.write() = Some(Arc::clone(&relay));
        *self.sink.write() = Some(sink);
        self.uffd.start(relay)
    }

    fn stop(&self) {
        *self.sink.write() = None;
        let _one = self.starting.lock();
        if self.in_use.swap(false, Ordering::AcqRel) {
            self.files.stop();
        }
        self.uffd.stop();
        if let Some(relay) = self.relay.write().take() {
            arena::forget_object(&*relay);
        }
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        let mapping = self.uffd.mapping_at(addr)?;
        let is_file = mapping.is_some_and(|mapping| mapping.kind == VmaKind::PrivateFile);
        if self.in_use() && (is_file || self.files.has(addr)) {
            return self.files.mapping_at(addr);
        }
        Ok(mapping)
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        // Pages of a file that are absent are the kernel's affair.
        let watch = if self.is_of_file(range.start()) { Watch::Changes } else { watch };
        self.uffd.watch(range, watch)
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.uffd.scan(range, report)
    }

    fn rss(&self) -> Result<Rss> {
        self.uffd.rss()
    }

    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.files.touch(range)?;
            match self.uffd.populate(range, write) {
                Err(_) if self.files.has_any(range) && Instant::now() < deadline => {}
                done => return done,
            }
        }
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        if self.is_file_mapping(range.start()) {
            return self.take_file(range, frame);
        }
        self.uffd.take(range, frame)
    }

    fn is_huge(&self, range: AddrRange) -> bool {
        self.uffd.is_huge(range)
    }

    fn is_locked(&self, page: VirtAddr) -> bool {
        self.uffd.is_locked(page)
    }

    fn withdraw(&self, range: AddrRange) -> Progress {
        if !self.in_use() || !self.files.has(range.start()) {
            return self.uffd.withdraw(range);
        }
        if self.is_service_thread() {
            // A drop waits until its event was read, and this may be who reads.
            return stopped(Stop::Refused);
        }
        match self.watches {
            true => self.files.withdraw_by(range, &|part| self.uffd.drop_watched(part)),
            false => self.files.withdraw(range),
        }
    }

    fn announces(&self) {
        self.announced.store(true, Ordering::Release);
    }

    fn changed(&self, event: MapEvent) {
        let (MapEvent::Unmap(range) | MapEvent::Remove(range)) = event else { return };
        if !self.watches && self.in_use() && self.files.has_any(range) {
            self.files.changed(event);
        }
    }

    fn copies_read_only(&self) -> bool {
        self.uffd.copies_read_only()
    }

    fn take_by_copy(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        self.uffd.take_by_copy(range, frame)
    }

    fn withdraw_copied(&self, range: AddrRange) -> Progress {
        self.uffd.withdraw_copied(range)
    }

    fn hides(&self, range: AddrRange) -> bool {
        self.in_use() && self.files.hides(range)
    }

    fn uncover(&self, range: AddrRange) -> Result<()> {
        self.files.uncover(range)
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        if !self.is_of_file(range.start()) {
            return self.uffd.give(range, frame, how);
        }
        if self.uffd.is_changing(range.start()) {
            return stopped(Stop::Retry);
        }
        self.files.give(range, frame, Give::Copy)
    }

    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.zero_run(AddrRange::page_of(page), write)
    }

    fn zero_run(&self, run: AddrRange, write: bool) -> Progress {
        let page = run.start();
        if !self.is_of_file(page) {
            return self.uffd.zero_run(run, write);
        }
        if self.uffd.is_changing(page) {
            return stopped(Stop::Retry);
        }
        self.files.zero(page, write)
    }

    fn wake(&self, range: AddrRange) {
        self.uffd.wake(range);
        if self.in_use() {
            self.files.wake(range);
        }
    }

    fn poison(&self, page: VirtAddr) -> bool {
        if self.is_of_file(page) { self.files.poison(page) } else { self.uffd.poison(page) }
    }

    fn drain(&self) {
        self.uffd.drain();
        if self.in_use() {
            self.files.drain();
        }
    }

    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        let len = out.len();
        self.files.while_present(addr, len, |addr, bytes| self.uffd.peek(addr, &mut out[bytes]))
    }

    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        let len = data.len();
        self.files.while_present(addr, len, |addr, bytes| self.uffd.poke(addr, &data[bytes]))
    }

    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        let range = AddrRange::covering(addr.get(), out.len() as u64)?;
        match self.uffd.read(addr, out) {
            Ok(count) if count == out.len() => Ok(count),
            // The kernel's own accesses stop at what is inaccessible; this one does not.
            _ if self.files.has_any(range) => self.files.read(addr, out),
            done => done,
        }
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        let range = AddrRange::covering(addr.get(), data.len() as u64)?;
        match self.uffd.write(addr, data) {
            Ok(count) if count == data.len() => Ok(count),
            _ if self.files.has_any(range) => self.files.write(addr, data),
            done => done,
        }
    }

    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        self.uffd.reserve_frames(bytes)
    }

    fn fill_frame(&self, frame: VirtAddr) -> bool {
        self.uffd.fill_frame(frame)
    }

    fn fill_frames(&self, frames: AddrRange) -> usize {
        self.uffd.fill_frames(frames)
    }

    fn empty_frames(&self, frames: AddrRange) {
        self.uffd.empty_frames(frames);
    }

    fn check_ready(&self, range: AddrRange) -> Result<()> {
        if !self.is_file_mapping(range.start()) {
            return self.uffd.check_ready(range);
        }
        if !self.is_service_thread() {
            self.start_files()?;
        }
        self.files.check_ready(range)
    }

    fn answer_inline(&self, range: AddrRange, inline: bool) -> Result<()> {
        self.uffd.answer_inline(range, inline)
    }

    fn disown(&self) {
        self.uffd.disown();
    }

    fn leave_out_of_children(&self, range: AddrRange, out: bool) -> Result<()> {
        self.uffd.leave_out_of_children(range, out)
    }

    fn each_left_out_of_children(&self, report: &mut dyn FnMut(AddrRange)) {
        self.uffd.each_left_out_of_children(report);
    }

    fn hides_pages_at_home(&self, leaf: AddrRange) -> bool {
        self.in_use() && self.files.hides_pages_at_home(leaf)
    }

    fn is_service_thread(&self) -> bool {
        self.uffd.is_service_thread() || self.files.is_service_thread()
    }
}
