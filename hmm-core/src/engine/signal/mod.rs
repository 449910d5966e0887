//! The signal engine: for where userfaultfd is refused.
//!
//! Pages that leave become inaccessible (`PROT_NONE`); a touch raises SIGSEGV, and the toucher itself brings the page home
//! or has a service thread do it (`super::trap`). Contents come back before the access does, so that nobody ever sees
//! half a page.
//!
//! The kernel serves nobody here: system calls on a page that is away fail with `EFAULT`. And it tells nothing: what the
//! program unmaps or drops is found out at the next touch or the next look (`look`), and what
//! happens in the very moment in which pages leave or come home is not found out at all.

mod beside;
mod files;
mod hidden;
mod look;
mod protect;
mod withdraw;

pub(super) use beside::Follower;

use super::linux::children;
use super::linux::memory::{self, Memory, Reserved};
use super::linux::strangers;
use super::trap::{Access, Claim, Owner, PAUSE, Signal, Trap, copy};
use super::{
    Engine, FaultSink, Give, LayoutLock, MapEvent, Mapping, Present, Progress, Rss, Stop, Watch,
    threads,
};
use crate::addr::{AddrRange, PAGE_SIZE, VirtAddr};
use crate::arena::Shared;
use crate::error::{Error, Result};
use crate::flags::{Capabilities, Protection};
use crate::limits::{DEADLINE, EVENT_BATCH};
use crate::sync::{Condvar, Mutex, RwLock};
use protect::Protector;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// What the engine and its handler share.
#[derive(Debug)]
struct Common {
    protector: Protector,
    layout: Shared<LayoutLock>,
    sink: RwLock<Option<Arc<dyn FaultSink>>>,
    stopping: Mutex<bool>,
    stop: Condvar,
}

/// `PROT_NONE` and SIGSEGV.
#[derive(Debug)]
pub struct SignalEngine {
    common: Shared<Common>,
    trap: Shared<Trap>,
    watch: Mutex<Option<JoinHandle<()>>>,
    frame_areas: Mutex<Vec<Reserved>>,
}

impl std::fmt::Debug for dyn FaultSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FaultSink")
    }
}

impl SignalEngine {
    /// Needs nothing but signals and a readable `/proc/self/maps`.
    ///
    /// # Errors
    /// `NoMemory`; `Os` where `/proc/self/maps` is out of reach.
    pub fn open() -> Result<Self> {
        let layout = Shared::new(LayoutLock::default());
        let layout = layout.ok_or(Error::NoMemory { what: "the engine's state" })?;
        Self::with_memory(writable_memory(), layout)
    }

    fn with_memory(memory: Option<Memory>, layout: Shared<LayoutLock>) -> Result<Self> {
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let common = Common {
            protector: Protector::new(memory)?,
            layout,
            sink: RwLock::new(None),
            stopping: Mutex::new(false),
            stop: Condvar::new(),
        };
        let common = Shared::new(common).ok_or_else(no_memory)?;
        let owner: NonNull<dyn Owner> = NonNull::from(&*common);
        // SAFETY: `common` lies in the arena and outlives the trap: `stop` is called before the engine is dropped.
        let trap = unsafe { Trap::new(owner, &[Signal::Segv])? };
        Ok(Self { common, trap, watch: Mutex::new(None), frame_areas: Mutex::new(Vec::new()) })
    }

    /// How it reaches pages and knows of them, for people.
    pub fn ways(&self) -> [&'static str; 3] {
        let protector = &self.common.protector;
        let fill = if protector.memory.is_some() { "/proc/self/mem" } else { "mremap" };
        [protector.mappings.way(), protector.presence.way(), fill]
    }
}

/// `/proc/self/mem`, if it reaches pages that are inaccessible: tried on one.
fn writable_memory() -> Option<Memory> {
    let memory = Memory::open().ok()?;
    let reserved = Reserved::new(PAGE_SIZE as u64).ok()?;
    let page = AddrRange::page_of(reserved.area.start());
    // SAFETY: the area was mapped above, and nobody else knows it.
    let hidden = unsafe {
        let start = page.start().as_ptr().cast();
        rustix::mm::mprotect(start, PAGE_SIZE, rustix::mm::MprotectFlags::empty())
    };
    let mut byte = [0];
    let works = hidden.is_ok()
        && memory.poke(page.start(), &[77])
        && memory.peek(page.start(), &mut byte)
        && byte == [77];
    works.then_some(memory)
}

impl Owner for Common {
    fn claim(&self, access: &Access) -> Claim {
        let page = access.addr.page();
        if !self.protector.hidden.contains(page) {
            return self.claim_accessible(access);
        }
        // What looks wrong here is put right first: the page may be another one by now.
        if !self.protector.note_if_changed(page) {
            return Claim::Mine;
        }
        self.drain();
        Claim::Settled
    }

    /// Looks at what did not look as it should, and reports what the program did.
    fn drain(&self) {
        let Some(sink) = self.sink.read().clone() else { return };
        while let Some(range) = self.protector.next_suspect() {
            let changing = self.layout.change();
            let mut tickets = [const { None }; EVENT_BATCH];
            let mut next = Some(range);
            let mut count = 0;
            // A few at a time: what is reported must be finished without the lock.
            while let (Some(rest), Some(ticket)) = (next, tickets.get_mut(count)) {
                let gone = self.protector.examine(rest);
                *ticket = gone.map(|gone| sink.on_map_event(MapEvent::Unmap(gone)));
                next =
                    gone.and_then(|gone| AddrRange::new(gone.end().get(), rest.end().get()).ok());
                count += 1;
            }
            drop(changing);
            tickets.into_iter().flatten().for_each(|ticket| sink.finish_map_event(ticket));
            next.into_iter().for_each(|rest| self.protector.suspect(rest));
        }
    }
}

fn allows(mapping: &Mapping, access: &Access) -> bool {
    let wanted = if access.write { Protection::WRITE } else { Protection::READ };
    mapping.range.contains(access.addr.page()) && mapping.protection.contains(wanted)
}

impl Common {
    /// The page was shown since the fault, or it is the program's own affair. While its leaf is locked it does not change.
    fn claim_accessible(&self, access: &Access) -> Claim {
        let page = access.addr.page();
        let Some(leaf) = self.protector.hidden.leaf_or_new(page) else { return Claim::Stranger };
        let state = leaf.lock();
        match self.protector.mappings.at(page) {
            _ if state.hidden.contains(page.index_in_leaf()) => Claim::Settled,
            Ok(Some(mapping)) if allows(&mapping, access) => Claim::Settled,
            // The kernel does not say: the access is made again.
            Err(_) => Claim::Settled,
            Ok(_) => Claim::Stranger,
        }
    }

    /// Notices a foreign handler of the signal, frees what nobody uses.
    fn watch(&self, trap: &Trap) {
        let sink = self.sink.read().clone();
        threads::prepare(sink.as_deref());
        let mut stopping = self.stopping.lock();
        while !*stopping {
            stopping = self.stop.wait_for(stopping, PAUSE);
            if *stopping {
                return;
            }
            drop(stopping);
            trap.look_after();
            sink.iter().for_each(|sink| sink.on_idle());
            stopping = self.stopping.lock();
        }
    }
}

impl Engine for SignalEngine {
    fn name(&self) -> &'static str {
        "signal"
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::MISSING_FAULTS | Capabilities::POISON;
        let files = self.common.protector.memory.is_some();
        capabilities.set(Capabilities::PRIVATE_FILES, files);
        capabilities
    }

    fn layout(&self) -> &LayoutLock {
        &self.common.layout
    }

    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        *self.common.sink.write() = Some(Arc::clone(&sink));
        Trap::start(&self.trap, &sink)?;
        let (common, trap) = (self.common.clone(), self.trap.clone());
        let watch = std::thread::Builder::new().name("hmm-watch".into()).stack_size(threads::STACK);
        let watch = watch.spawn(move || common.watch(&trap)).map_err(threads::cannot_start)?;
        *self.watch.lock() = Some(watch);
        Ok(())
    }

    fn stop(&self) {
        *self.common.stopping.lock() = true;
        self.common.stop.notify_all();
        if let Some(watch) = self.watch.lock().take() {
            // A panic there loses nothing.
            let _ = watch.join();
        }
        self.trap.stop();
        *self.common.sink.write() = None;
        self.frame_areas.lock().clear();
    }

    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.common.protector.mapping_at(addr)
    }

    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        if watch == Watch::Absence {
            if strangers::watch(range) {
                let what = "another userfaultfd of this process has the range";
                return Err(Error::Busy { address: range.start(), what });
            }
            Protector::keep_small(range);
        }
        Ok(())
    }

    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.common.protector.presence.scan(range, report)
    }

    fn is_huge(&self, range: AddrRange) -> bool {
        self.common.protector.presence.is_huge(range)
    }

    fn rss(&self) -> Result<Rss> {
        super::linux::rss()
    }

    /// Touches what is hidden first: bringing it home, or waiting for who does, is the handler's business.
    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.touch_hidden(range)?;
            match memory::populate(range, write) {
                Err(_) if self.any_hidden(range) && Instant::now() < deadline => {}
                done => return done,
            }
        }
    }

    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        let sink = self.common.sink.read().clone();
        let must_stay = |range| sink.as_ref().is_some_and(|sink| sink.must_stay(range));
        self.common.protector.take(range, frame, &must_stay)
    }

    fn is_locked(&self, page: VirtAddr) -> bool {
        memory::is_locked(AddrRange::page_of(page))
    }

    fn withdraw(&self, range: AddrRange) -> Progress {
        let drop_file = |part| memory::drop_pages(part).map_err(|_| Stop::Refused);
        self.common.protector.withdraw(range, &drop_file)
    }

    fn give(&self, range: AddrRange, frame: VirtAddr, _: Give) -> Progress {
        self.common.protector.give(range, frame)
    }

    fn refresh(&self, range: AddrRange) {
        self.common.protector.refresh(range);
        self.common.drain();
    }

    fn changed(&self, event: MapEvent) {
        let Some(sink) = self.common.sink.read().clone() else { return };
        let changing = self.common.layout.change();
        self.common.protector.apply(&event);
        if let MapEvent::Remove(range) = event {
            self.common.protector.show_dropped(range);
        }
        let ticket = sink.on_map_event(event);
        drop(changing);
        sink.finish_map_event(ticket);
    }

    fn hides(&self, range: AddrRange) -> bool {
        self.any_hidden(range)
    }

    fn uncover(&self, range: AddrRange) -> Result<()> {
        self.touch_hidden(range)?;
        if self.any_hidden(range) {
            let what = "a page stays out of reach";
            return Err(Error::Busy { address: range.start(), what });
        }
        Ok(())
    }

    fn give_hole(&self, page: VirtAddr) {
        self.common.protector.show_page(page);
    }

    fn zero(&self, page: VirtAddr, _: bool) -> Progress {
        let stop = self.common.protector.show_page(page);
        Progress { pages: usize::from(stop == Stop::Done), stop }
    }

    fn wake(&self, range: AddrRange) {
        self.trap.wake(range);
    }

    fn poison(&self, page: VirtAddr) -> bool {
        self.common.protector.poison(page)
    }

    fn drain(&self) {
        self.common.drain();
    }

    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        let protector = &self.common.protector;
        protector.while_present(addr, out.len(), |addr, bytes| match &protector.memory {
            Some(memory) => memory.peek(addr, &mut out[bytes]),
            None => {
                let out = &mut out[bytes];
                // SAFETY: `out` is the caller's; the other side is a part of the process that was asked for.
                unsafe { copy::present(out.as_mut_ptr(), addr.as_ptr(), out.len()) == out.len() }
            }
        })
    }

    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        let protector = &self.common.protector;
        protector.while_present(addr, data.len(), |addr, bytes| match &protector.memory {
            Some(memory) => memory.poke(addr, &data[bytes]),
            None => {
                let data = &data[bytes];
                // SAFETY: `data` is the caller's; the other side is a part of the process that it asks to change.
                unsafe { copy::present(addr.as_ptr(), data.as_ptr(), data.len()) == data.len() }
            }
        })
    }

    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        // SAFETY: `out` is the caller's; the other side is a part of the process that was asked for.
        let count = unsafe { copy::faulting(out.as_mut_ptr(), addr.as_ptr(), out.len()) };
        memory::transferred(count as isize, addr, "nothing can be read there")
    }

    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        // SAFETY: `data` is the caller's; the other side is a part of the process that it asks to change.
        let count = unsafe { copy::faulting(addr.as_ptr(), data.as_ptr(), data.len()) };
        memory::transferred(count as isize, addr, "nothing can be written there")
    }

    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        let reserved = Reserved::new(bytes)?;
        let area = reserved.area;
        self.frame_areas.lock().push(reserved);
        Ok(area)
    }

    fn fill_frame(&self, frame: VirtAddr) -> bool {
        memory::populate(AddrRange::page_of(frame), true).is_ok()
    }

    fn fill_frames(&self, frames: AddrRange) -> usize {
        if memory::populate(frames, true).is_ok() { frames.pages() } else { 0 }
    }

    fn empty_frames(&self, frames: AddrRange) {
        let _ = memory::drop_pages(frames);
    }

    fn check_ready(&self, _range: AddrRange) -> Result<()> {
        self.trap.renew()
    }

    fn leave_out_of_children(&self, range: AddrRange, out: bool) -> Result<()> {
        children::leave_out(range, out)
    }

    fn each_left_out_of_children(&self, report: &mut dyn FnMut(AddrRange)) {
        children::each_left_out(report);
    }

    fn hides_pages_at_home(&self, leaf: AddrRange) -> bool {
        self.common.protector.hides_pages_at_home(leaf)
    }

    fn is_service_thread(&self) -> bool {
        self.trap.is_own_thread()
    }
}

impl SignalEngine {
    fn any_hidden(&self, range: AddrRange) -> bool {
        let mut any = false;
        self.common.protector.hidden.each_run(range, &mut |_| any = true);
        any
    }

    fn touch_hidden(&self, range: AddrRange) -> Result<()> {
        let hidden = &self.common.protector.hidden;
        let mut failed = None;
        hidden.each_run(range, &mut |run| {
            // A page of the run may have come home with the one before it.
            let pages = (0..run.pages()).map(|page| run.page_at(page));
            for page in pages.filter(|page| hidden.contains(*page)) {
                let mut byte = 0_u8;
                // SAFETY: one byte is read, into a variable of this function.
                if unsafe { copy::faulting(&raw mut byte, page.as_ptr(), 1) } == 0 {
                    failed.get_or_insert(page);
                }
            }
        });
        match failed {
            Some(address) => Err(Error::Fault { address, what: "the page cannot be had" }),
            None => Ok(()),
        }
    }
}
