//! The model: an address space, a CPU page table and a processor inside the process, for tests and experiments.
//!
//! It does what the kernel does, in the kernel's order, but deterministically, from a seed, and with trouble on
//! request. Nothing in it is real memory except the frames, through which drivers copy. The program plays the
//! processor: [`ModelEngine::cpu_read`] and its kin are its loads and stores, [`ModelEngine::munmap`] and its kin
//! its system calls. There are no service threads: a thread that faults, or changes the layout, answers for itself.
//!
//! ```
//! use hmm_core::engine::model::{ModelConfig, ModelEngine};
//! use hmm_core::{Mm, Protection, VmaKind};
//!
//! # fn main() -> hmm_core::Result<()> {
//! let engine = ModelEngine::new(ModelConfig::default());
//! let mm = Mm::with_engine(engine.clone())?;
//! let range = engine.mmap(16, Protection::READ | Protection::WRITE, VmaKind::Anonymous)?;
//! engine.cpu_write(range.start(), b"hello")?;
//! let mut seen = [0; 5];
//! assert_eq!(mm.read(range.start(), &mut seen)?, 5);
//! mm.close()
//! # }
//! ```
//!
//! Locks: the layout lock, then the state's; the latter is a leaf, and no call into the sink is made under it.

mod cpu;
mod faults;
mod frames;
mod layout;
mod pages;
mod space;
mod state;
#[cfg(test)]
mod tests;

pub use faults::ModelFaults;
pub use pages::PageCondition;

use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::engine::{Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, Rss, Watch};
use crate::error::{Error, Result};
use crate::flags::Capabilities;
use crate::sync::{Condvar, Mutex, this_thread};
use faults::Chaos;
use state::State;
use std::sync::Arc;

/// Files, and announcements of a C library, are not modelled.
const LACKS: Capabilities = Capabilities::PRIVATE_FILES.union(Capabilities::ORDERED);

/// How a model is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelConfig {
    /// Where the random numbers of [`ModelFaults`] start.
    pub seed: u64,
    /// What goes wrong.
    pub faults: ModelFaults,
    /// Capabilities that it pretends not to have. Without `POISON` it refuses to poison; the others only change
    /// what it says about itself.
    pub without: Capabilities,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self { seed: 0, faults: ModelFaults::default(), without: Capabilities::empty() }
    }
}

/// The engine that needs no kernel. Methods may be called from any thread.
pub struct ModelEngine {
    layout: LayoutLock,
    state: Mutex<State>,
    /// Rung when a page is touched that someone may wait for.
    touched: Condvar,
    capabilities: Capabilities,
}

impl ModelEngine {
    /// An empty address space.
    pub fn new(config: ModelConfig) -> Arc<Self> {
        Arc::new(Self {
            layout: LayoutLock::default(),
            state: Mutex::new(State::new(Chaos::new(config.seed, config.faults))),
            touched: Condvar::new(),
            capabilities: Capabilities::all().difference(config.without | LACKS),
        })
    }

    /// Other trouble from now on (none: [`ModelFaults::default`]).
    pub fn set_faults(&self, faults: ModelFaults) {
        self.state.lock().chaos.set(faults);
    }

    /// How the page at `addr` is watched now.
    pub fn watched(&self, addr: VirtAddr) -> Option<Watch> {
        self.state.lock().space.at(addr).and_then(|(_, region)| region.watch)
    }

    /// Reads a page like a debugger: swapped-out pages too, and nothing changes by it. False when nothing is there.
    pub fn inspect(&self, page: VirtAddr, out: &mut [u8; PAGE_SIZE]) -> bool {
        let state = self.state.lock();
        let contents = state.contents(page);
        if let Some(bytes) = contents {
            out.copy_from_slice(bytes);
        }
        contents.is_some()
    }

    /// Tells the sink that nothing happened for a moment; the model has no clock.
    pub fn idle(&self) {
        let sink = self.state.lock().sink.clone();
        if let Some(sink) = sink {
            sink.on_idle();
        }
    }
}

impl std::fmt::Debug for ModelEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelEngine")
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}

impl Engine for ModelEngine {
    fn name(&self) -> &'static str {
        "model"
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn layout(&self) -> &LayoutLock {
        &self.layout
    }

    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        self.state.lock().sink = Some(sink);
        Ok(())
    }

    fn stop(&self) {
        let sink = {
            let mut state = self.state.lock();
            state.space.unwatch_all();
            state.wake_all();
            state.sink.take()
        };
        self.touched.notify_all();
        drop(sink); // It may be the last reference to the mm: not under the lock.
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        Ok(self.state.lock().space.next(addr).map(space::mapping_of))
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        let mut state = self.state.lock();
        if !state.space.is_mapped(range) {
            let what = "part of the range is not mapped";
            return Err(Error::Fault { address: range.start(), what });
        }
        if state.chaos.out_of_memory() {
            return Err(Error::NoMemory { what: "to watch a range (made to fail)" });
        }
        state.space.update(range, |region| region.watch = region.watch.max(Some(watch)));
        Ok(())
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        let runs = self.state.lock().scan(range);
        runs.into_iter().for_each(|(run, present)| report(run, present));
        Ok(())
    }

    fn rss(&self) -> Result<Rss> {
        Ok(self.state.lock().rss())
    }

    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        (0..range.pages()).try_for_each(|index| self.fault_in(range.page_at(index), write))
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        self.state.lock().take(range, frame)
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        self.state.lock().give(range, frame, how)
    }

    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        let progress = self.state.lock().zero(page, write);
        if progress.pages > 0 {
            self.wake_range(AddrRange::page_of(page));
        }
        progress
    }

    fn wake(&self, range: AddrRange) {
        self.wake_range(range);
    }

    fn poison(&self, page: VirtAddr) -> bool {
        if !self.capabilities.contains(Capabilities::POISON) {
            return false;
        }
        let done = self.state.lock().poison(page);
        if done {
            self.wake_range(AddrRange::page_of(page));
        }
        done
    }

    fn drain(&self) {
        self.state.lock().chaos.drained();
    }

    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        self.peek_present(addr, out)
    }

    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        self.poke_present(addr, data)
    }

    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        as_system_call(addr, self.load(addr, out))
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        as_system_call(addr, self.store(addr, data))
    }

    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        let mut state = self.state.lock();
        if state.chaos.out_of_memory() {
            return Err(Error::NoMemory { what: "to reserve frames (made to fail)" });
        }
        state.frames.reserve(bytes)
    }

    fn fill_frame(&self, frame: VirtAddr) -> bool {
        let mut state = self.state.lock();
        if state.chaos.out_of_memory() {
            return false;
        }
        state.frames.fill(frame, &[0; PAGE_SIZE], Present::Page)
            || state.frames.present(frame).is_some()
    }

    fn empty_frames(&self, frames: AddrRange) {
        self.state.lock().frames.empty(frames);
    }

    fn is_service_thread(&self) -> bool {
        self.state.lock().serving.contains(&this_thread())
    }
}

/// A partial transfer is a success, and SIGSEGV and SIGBUS are `EFAULT`.
fn as_system_call(addr: VirtAddr, (done, result): (usize, Result<()>)) -> Result<usize> {
    match result {
        Err(_) if done > 0 => Ok(done),
        Err(error @ Error::Busy { .. }) => Err(error),
        Err(_) => Err(Error::Fault { address: addr, what: "nothing of the range can be accessed" }),
        Ok(()) => Ok(done),
    }
}
