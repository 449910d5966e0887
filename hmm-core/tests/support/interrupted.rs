//! An engine at whose every call something else can happen: the schedules that matter, without waiting for luck.

use super::device::{Interruption, happen};
use hmm_core::engine::model::ModelEngine;
use hmm_core::engine::{
    Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, Rss, Watch,
};
use hmm_core::sync::Mutex;
use hmm_core::{AddrRange, Capabilities, Result, VirtAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

/// When something is to happen.
#[derive(Default)]
pub(crate) struct Moment {
    /// Calls until it comes.
    calls: AtomicI64,
    interruption: Mutex<Option<Interruption>>,
}

impl Moment {
    /// Lets something happen at the `calls`-th call of the engine from now on.
    pub(crate) fn set(&self, calls: usize, interruption: Interruption) {
        *self.interruption.lock() = Some(interruption);
        self.calls.store(calls as i64 + 1, Ordering::SeqCst);
    }

    /// Lets it happen now if it has not yet.
    pub(crate) fn end(&self) {
        self.calls.store(0, Ordering::SeqCst);
        happen(&self.interruption);
    }

    fn pass(&self) {
        if self.calls.fetch_sub(1, Ordering::SeqCst) == 1 {
            happen(&self.interruption);
        }
    }
}

/// The model, and the moment at which it is interrupted.
pub(crate) struct InterruptedEngine {
    pub(crate) model: Arc<ModelEngine>,
    pub(crate) moment: Arc<Moment>,
}

impl std::fmt::Debug for InterruptedEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InterruptedEngine")
    }
}

impl InterruptedEngine {
    fn model(&self) -> &ModelEngine {
        self.moment.pass();
        &self.model
    }
}

impl Engine for InterruptedEngine {
    fn name(&self) -> &'static str {
        self.model.name()
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    fn layout(&self) -> &LayoutLock {
        self.model.layout()
    }
    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        self.model.start(sink)
    }
    fn stop(&self) {
        self.model.stop();
    }
    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.model().mapping_at(addr)
    }
    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        self.model().watch(range, watch)
    }
    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.model().scan(range, report)
    }
    fn rss(&self) -> Result<Rss> {
        self.model.rss()
    }
    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        self.model().populate(range, write)
    }
    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        self.model().take(range, frame)
    }
    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        self.model().give(range, frame, how)
    }
    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.model().zero(page, write)
    }
    fn wake(&self, range: AddrRange) {
        self.model().wake(range);
    }
    fn poison(&self, page: VirtAddr) -> bool {
        self.model().poison(page)
    }
    fn drain(&self) {
        self.model().drain();
    }
    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        self.model().peek(addr, out)
    }
    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        self.model().poke(addr, data)
    }
    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        self.model().read(addr, out)
    }
    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        self.model().write(addr, data)
    }
    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        self.model().reserve_frames(bytes)
    }
    fn fill_frame(&self, frame: VirtAddr) -> bool {
        self.model().fill_frame(frame)
    }
    fn empty_frames(&self, frames: AddrRange) {
        self.model().empty_frames(frames);
    }
    fn is_service_thread(&self) -> bool {
        self.model.is_service_thread()
    }
}
