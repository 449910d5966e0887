//! Service threads: one pinned to each core, so that a fault is answered where it was raised.
//!
//! Messages are read in small batches with the layout lock held for writing, and layout changes among them are applied
//! before it is released. Only then are faults answered, from the state of the page as it is by now.

mod both;

use super::abi::{self, Message, Range};
use super::second::Second;
use crate::addr::{AddrRange, VirtAddr};
use crate::arena::Shared;
use crate::engine::trap::Trap;
use crate::engine::{
    FaultEvent, FaultSink, LayoutLock, MapEvent, MapTicket, Resolution, lost, say, threads,
};
use crate::error::{Error, Result};
use crate::limits::{EVENT_BATCH, MIGRATIONS, RANGE_DEADLINE, STUCK};
use crate::sync::{Mutex, RwLock, RwLockWriteGuard, this_thread};
use both::Heard;
use once_cell::sync::OnceCell;
use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const THREADS: usize = 1024;
/// A fault that needs other events to be read first is tried again so often before it is woken to fault anew.
const TRIES: usize = 64;
/// Looks at a taken lock before a thread queues for it.
const MISSES: usize = 64;

/// The threads and what they share.
#[derive(Debug, Clone)]
pub(super) struct Service {
    shared: Shared<Common>,
}

/// Stands for a drop whose event was seen.
const SEEN: AddrRange = AddrRange::page_of(VirtAddr::new(0));

struct Stuck {
    count: usize,
    address: u64,
}

struct Common {
    descriptor: Shared<OwnedFd>,
    layout: Shared<LayoutLock>,
    sink: RwLock<Option<Arc<dyn FaultSink>>>,
    stop: OwnedFd,
    /// For ranges that are answered inline.
    second: OnceCell<Shared<Second>>,
    /// pthread handles and kernel ids of the service threads.
    handles: [AtomicUsize; THREADS],
    ids: [AtomicU32; THREADS],
    work: [Work; THREADS],
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Drops of the engine's own, which are reported like the program's.
    drops: Mutex<[Option<AddrRange>; MIGRATIONS]>,
    /// The kernel has no poison: who touches a lost page is sent a signal.
    sends_signals: bool,
}

/// What a service thread is doing, for the watch.
#[derive(Default)]
struct Work {
    /// Address of the fault that it answers; 0: none.
    address: AtomicU64,
    /// Milliseconds since the start of the process's clock.
    since: AtomicU64,
}

impl std::fmt::Debug for Common {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Common")
    }
}

/// What a stop event counts down from: once the descriptors are closed their numbers stand for the stop event, and a thread
/// that is about to read one of them takes one away.
const FOR_EVER: u64 = 1 << 62;

/// An event that ends service threads.
///
/// # Errors
/// When there is no descriptor for it.
pub(super) fn stop_event() -> Result<OwnedFd> {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
    rustix::event::eventfd(0, flags).map_err(|errno| Error::os("eventfd", VirtAddr::new(0), errno))
}

impl Service {
    pub(super) fn new(
        descriptor: Shared<OwnedFd>,
        layout: Shared<LayoutLock>,
        sends_signals: bool,
    ) -> Result<Self> {
        let stop = stop_event()?;
        let shared = Common {
            descriptor,
            layout,
            sink: RwLock::new(None),
            stop,
            second: OnceCell::new(),
            handles: [const { AtomicUsize::new(0) }; THREADS],
            ids: [const { AtomicU32::new(0) }; THREADS],
            work: std::array::from_fn(|_| Work::default()),
            threads: Mutex::new(Vec::new()),
            drops: Mutex::new([None; MIGRATIONS]),
            sends_signals,
        };
        let no_memory = Error::NoMemory { what: "the service threads' state" };
        let shared = Shared::new(shared).ok_or(no_memory)?;
        Ok(Self { shared })
    }

    /// Starts the threads; the watch looks after the trap, too, if there is one.
    pub(super) fn start(&self, sink: Arc<dyn FaultSink>, trap: Option<Shared<Trap>>) -> Result<()> {
        *self.shared.sink.write() = Some(sink);
        let mut threads = self.shared.threads.lock();
        let mut cpus = threads::usable_cpus();
        if let [only] = cpus[..] {
            // A second one answers when a callback on the first touches what is away.
            cpus.push(only);
        }
        for (number, cpu) in cpus.into_iter().take(THREADS - 1).enumerate() {
            let shared = self.shared.clone();
            let spawned = std::thread::Builder::new()
                .name(format!("hmm-uffd/{cpu}"))
                .stack_size(threads::STACK)
                .spawn(move || shared.run(number, cpu));
            threads.push(spawned.map_err(threads::cannot_start)?);
        }
        let number = threads.len();
        let shared = self.shared.clone();
        let watch = std::thread::Builder::new().name("hmm-watch".into()).stack_size(threads::STACK);
        threads.push(
            watch
                .spawn(move || shared.watch(number, trap.as_deref()))
                .map_err(threads::cannot_start)?,
        );
        drop(threads);
        self.wait_until_running()
    }

    /// Faults are answered from now on, and the threads' own memory is known.
    fn wait_until_running(&self) -> Result<()> {
        let count = self.shared.threads.lock().len();
        for _ in 0..10_000 {
            let running = self.shared.ids.iter().take(count);
            if running.filter(|id| id.load(Ordering::Acquire) != 0).count() == count {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let address = VirtAddr::new(0);
        Err(Error::Busy { address, what: "service threads do not start" })
    }

    /// Service threads read no more from now on.
    pub(super) fn stop_reading(&self) {
        let _ = rustix::io::write(&self.shared.stop, &FOR_EVER.to_ne_bytes());
        if let Some(second) = self.second() {
            let _ = rustix::io::write(&second.stop, &FOR_EVER.to_ne_bytes());
        }
    }

    /// Waits until they have ended. Nothing is registered any more: a thread that ends drops its stack, and where that is
    /// watched, as a neighbour of the program's memory, it would wait for somebody to read of it.
    pub(super) fn join(&self) {
        for thread in self.shared.threads.lock().drain(..) {
            // A panic on it has ended the process already.
            let _ = thread.join();
        }
        *self.shared.sink.write() = None;
    }

    pub(super) fn stop_descriptor(&self) -> &OwnedFd {
        &self.shared.stop
    }

    pub(super) fn drain(&self) {
        self.shared.drain();
    }

    /// The calling thread is about to drop the pages of a range, all in one vma. Waits for a place.
    pub(super) fn expect_drop(&self, range: AddrRange) -> usize {
        loop {
            let mut drops = self.shared.drops.lock();
            if let Some(place) = drops.iter().position(Option::is_none) {
                drops[place] = Some(range);
                return place;
            }
            drop(drops);
            std::thread::yield_now();
        }
    }

    /// The drop is done, or did not come. If it came it was read, but whoever read it may not have looked at it yet.
    pub(super) fn forget_drop(&self, place: usize, came: bool) {
        let deadline = Instant::now() + RANGE_DEADLINE;
        while came && self.shared.drops.lock()[place] != Some(SEEN) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        self.shared.drops.lock()[place] = None;
    }

    pub(super) fn is_own_thread(&self) -> bool {
        let me = this_thread();
        let handles = self.shared.handles.iter().map(|one| one.load(Ordering::Relaxed));
        handles.take_while(|one| *one != 0).any(|one| one == me)
    }
}

impl Common {
    fn run(&self, number: usize, cpu: usize) {
        // If this thread disappeared, every later fault would hang: a panic ends the process.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.prepare(number, Some(cpu));
            self.serve(&self.work[number]);
        }));
        if ended.is_err() {
            std::process::abort();
        }
    }

    fn prepare(&self, number: usize, cpu: Option<usize>) {
        if let Some(cpu) = cpu {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            // A core that went offline meanwhile only costs speed.
            let _ = rustix::thread::sched_setaffinity(None, &set);
        }
        let sink = self.sink.read().clone();
        let id = threads::prepare(sink.as_deref());
        self.handles[number].store(this_thread(), Ordering::Relaxed);
        self.ids[number].store(id, Ordering::Release);
    }

    fn serve(&self, work: &Work) {
        let mut missed = 0;
        loop {
            match self.wait_for_messages() {
                Heard::Message => {}
                Heard::Nothing => continue,
                Heard::Stop => return,
            }
            // Every thread is woken for every fault, and most come too late. Queueing for the lock would make the one
            // that answers wait for them; so they look again, and queue only when the lock stays taken.
            let changing = match self.layout.try_change() {
                None if missed < MISSES => {
                    missed += 1;
                    std::thread::yield_now();
                    continue;
                }
                None => self.layout.change(),
                Some(changing) => changing,
            };
            missed = 0;
            self.read_and_answer(work, changing);
        }
    }

    /// Looks after the others: reports who is stuck, and reads on when all are, so that a callback that waits for
    /// itself is named instead of hanging in silence.
    fn watch(&self, number: usize, trap: Option<&Trap>) {
        self.prepare(number, None);
        let mut reported = 0;
        loop {
            if self.pause() {
                return;
            }
            let beside = self.second.get().map(|second| &*second.trap);
            trap.into_iter().chain(beside).for_each(Trap::look_after);
            let stuck = self.stuck(number);
            if stuck.count > 0 && stuck.address != reported {
                reported = stuck.address;
                say::stuck(VirtAddr::new(stuck.address));
            }
            if stuck.count == number {
                self.read_for_stuck_threads();
            } else if let (0, Some(sink)) = (stuck.count, self.sink.read().clone()) {
                // May free memory, which raises an event that one of the others must read.
                sink.on_idle();
            }
        }
    }

    fn stuck(&self, threads: usize) -> Stuck {
        let limit = milliseconds().saturating_sub(STUCK.as_millis() as u64);
        let mut stuck = Stuck { count: 0, address: 0 };
        for work in &self.work[..threads] {
            let address = work.address.load(Ordering::Relaxed);
            if address != 0 && work.since.load(Ordering::Relaxed) < limit {
                stuck = Stuck { count: stuck.count + 1, address };
            }
        }
        stuck
    }

    fn read_for_stuck_threads(&self) {
        let sink = self.sink.read().clone();
        let Some(sink) = sink else { return };
        let mut messages = [Message::default(); EVENT_BATCH];
        let count = self.read_and_apply(&*sink, &mut messages, self.layout.change());
        for message in &messages[..count] {
            if message.event == abi::EVENT_PAGEFAULT {
                let fault = self.fault(message);
                if fault.from_service_thread {
                    say::self_fault(fault.addr);
                }
                // Left in the queue of those who wait: a service thread answers it when it is free again.
                self.wake(fault.addr);
            }
        }
    }

    fn read_and_answer(&self, work: &Work, changing: RwLockWriteGuard<'_, ()>) {
        let sink = self.sink.read().clone();
        let Some(sink) = sink else { return };
        let mut messages = [Message::default(); EVENT_BATCH];
        let count = self.read_and_apply(&*sink, &mut messages, changing);
        for message in &messages[..count] {
            if message.event == abi::EVENT_PAGEFAULT {
                let fault = self.fault(message);
                if fault.from_service_thread {
                    say::self_fault(fault.addr);
                }
                work.since.store(milliseconds(), Ordering::Relaxed);
                work.address.store(fault.addr.get(), Ordering::Relaxed);
                self.answer(&*sink, fault);
                work.address.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Reads a batch and applies its layout changes; returns how many messages were read.
    fn read_and_apply(
        &self,
        sink: &dyn FaultSink,
        messages: &mut [Message; EVENT_BATCH],
        changing: RwLockWriteGuard<'_, ()>,
    ) -> usize {
        if let Some(second) = self.second.get() {
            return self.read_and_apply_both(second, sink, messages, changing);
        }
        let mut tickets: [Option<MapTicket>; EVENT_BATCH] = [const { None }; EVENT_BATCH];
        let count = read(&self.descriptor, messages);
        for (message, ticket) in messages[..count].iter().zip(&mut tickets) {
            let event = map_event(message).filter(|event| !self.is_own_drop(event));
            *ticket = event.map(|event| sink.on_map_event(event));
        }
        drop(changing);
        tickets.into_iter().flatten().for_each(|ticket| sink.finish_map_event(ticket));
        count
    }

    /// Each drop of the engine's own is reported once.
    fn is_own_drop(&self, event: &MapEvent) -> bool {
        let MapEvent::Remove(range) = event else { return false };
        let mut drops = self.drops.lock();
        let own = drops.iter_mut().find(|one| **one == Some(*range));
        // The place stays taken until the drop is done.
        own.map(|one| *one = Some(SEEN)).is_some()
    }

    fn report_lost(&self, fault: FaultEvent) {
        if !self.sends_signals || fault.thread == 0 {
            return self.wake(fault.addr);
        }
        // The signal ends the wait. A wake beside it could reach the toucher's next touch, which has a signal of its own.
        lost::send(fault.thread, fault.addr);
    }

    fn fault(&self, message: &Message) -> FaultEvent {
        let [flags, address, thread] = message.argument;
        let thread = thread as u32;
        let known = self.ids.iter().map(|id| id.load(Ordering::Relaxed)).take_while(|id| *id != 0);
        FaultEvent {
            addr: VirtAddr::new(address).page(),
            write: flags & abi::FAULT_WRITE != 0,
            thread,
            from_service_thread: known.into_iter().any(|id| id == thread),
            inline: false,
        }
    }

    fn answer(&self, sink: &dyn FaultSink, fault: FaultEvent) {
        for _ in 0..TRIES {
            match sink.on_fault(fault) {
                Resolution::Resolved | Resolution::Parked | Resolution::HandOver => return,
                Resolution::Lost => return self.report_lost(fault),
                Resolution::WaitsForItself => return say::own_batch(fault.addr),
                Resolution::Retry => self.drain(),
            }
            std::thread::yield_now();
        }
        // The toucher faults again, and the state may be another by then.
        self.wake(fault.addr);
    }

    /// Reads what waits. Layout changes are applied; faults are sent back to be raised again, since the caller has
    /// work of its own to finish first.
    fn drain(&self) {
        let sink = self.sink.read().clone();
        let Some(sink) = sink else { return };
        let mut messages = [Message::default(); EVENT_BATCH];
        let count = self.read_and_apply(&*sink, &mut messages, self.layout.change());
        for message in &messages[..count] {
            if message.event == abi::EVENT_PAGEFAULT {
                self.wake(VirtAddr::new(message.argument[1]));
            }
        }
    }

    fn wake(&self, addr: VirtAddr) {
        let page = AddrRange::page_of(addr);
        let mut range = Range { start: page.start().get(), len: page.len() };
        let _ = abi::wake(&*self.descriptor, &mut range);
    }
}

fn read(descriptor: &OwnedFd, messages: &mut [Message; EVENT_BATCH]) -> usize {
    let size = size_of_val(messages);
    let start = messages.as_mut_ptr().cast::<u8>();
    // SAFETY: the array is plain data of `size` bytes without padding; every bit pattern is valid for it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(start, size) };
    rustix::io::read(descriptor, bytes).unwrap_or(0) / size_of::<Message>()
}

fn map_event(message: &Message) -> Option<MapEvent> {
    let [first, second, third] = message.argument;
    match message.event {
        abi::EVENT_UNMAP => AddrRange::new(first, second).ok().map(MapEvent::Unmap),
        abi::EVENT_REMOVE => AddrRange::new(first, second).ok().map(MapEvent::Remove),
        abi::EVENT_REMAP => {
            let from = AddrRange::new(first, first.checked_add(third)?).ok()?;
            Some(MapEvent::Remap { from, to: VirtAddr::new(second) })
        }
        _ => None,
    }
}

/// A clock that only moves forward, in milliseconds.
fn milliseconds() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}
