//! Two schedules on the model engine: a pin that comes while a migration tries again, and a page that is rescued just
//! before it is declared lost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, on_device};
use hmm_core::engine::model::{ModelConfig, ModelEngine, PageCondition};
use hmm_core::engine::{
    Engine, FaultSink, Give, LayoutLock, Mapping, Present, Progress, VmaKind, Watch,
};
use hmm_core::{AddrRange, Capabilities, Mm, Protection, Result, VirtAddr};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

/// What happens once, at one call.
type Event = Box<dyn FnOnce() + Send>;

/// The model, with something that happens when a page is populated, or at a later hold of the layout lock.
struct Staged {
    model: Arc<ModelEngine>,
    at_populate: Mutex<Option<Event>>,
    at_layout: Mutex<Option<Event>>,
    layouts: AtomicI64,
}

impl std::fmt::Debug for Staged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Staged")
    }
}

fn happen(event: &Mutex<Option<Event>>) {
    let event = event.lock().unwrap().take();
    if let Some(event) = event {
        event();
    }
}

impl Engine for Staged {
    fn name(&self) -> &'static str {
        self.model.name()
    }
    fn capabilities(&self) -> Capabilities {
        self.model.capabilities()
    }
    fn layout(&self) -> &LayoutLock {
        if self.layouts.fetch_sub(1, Ordering::SeqCst) == 1 {
            happen(&self.at_layout);
        }
        self.model.layout()
    }
    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()> {
        self.model.start(sink)
    }
    fn stop(&self) {
        self.model.stop();
    }
    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        self.model.mapping_at(addr)
    }
    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()> {
        self.model.watch(range, watch)
    }
    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()> {
        self.model.scan(range, report)
    }
    fn populate(&self, range: AddrRange, write: bool) -> Result<()> {
        happen(&self.at_populate);
        self.model.populate(range, write)
    }
    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress {
        self.model.take(range, frame)
    }
    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress {
        self.model.give(range, frame, how)
    }
    fn zero(&self, page: VirtAddr, write: bool) -> Progress {
        self.model.zero(page, write)
    }
    fn wake(&self, range: AddrRange) {
        self.model.wake(range);
    }
    fn poison(&self, page: VirtAddr) -> bool {
        self.model.poison(page)
    }
    fn drain(&self) {
        self.model.drain();
    }
    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        self.model.peek(addr, out)
    }
    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        self.model.poke(addr, data)
    }
    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
        self.model.read(addr, out)
    }
    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize> {
        self.model.write(addr, data)
    }
    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange> {
        self.model.reserve_frames(bytes)
    }
    fn fill_frame(&self, frame: VirtAddr) -> bool {
        self.model.fill_frame(frame)
    }
    fn empty_frames(&self, frames: AddrRange) {
        self.model.empty_frames(frames);
    }
    fn is_service_thread(&self) -> bool {
        self.model.is_service_thread()
    }
}

/// An mm with one page in which 7 is written.
fn stage() -> (Arc<Staged>, Arc<Mm>, AddrRange) {
    let model = ModelEngine::new(ModelConfig::default());
    let staged = Arc::new(Staged {
        model: Arc::clone(&model),
        at_populate: Mutex::default(),
        at_layout: Mutex::default(),
        layouts: AtomicI64::new(0),
    });
    let mm = Mm::with_engine(staged.clone()).unwrap();
    let range = model.mmap(1, Protection::READ | Protection::WRITE, VmaKind::Anonymous).unwrap();
    model.cpu_write(range.start(), &[7]).unwrap();
    (staged, mm, range)
}

#[test]
fn a_page_pinned_while_a_migration_tries_again_stays() {
    let (staged, mm, range) = stage();
    let card = Card::new(&mm, 1);
    staged.model.set_condition(range, PageCondition::Shared);
    let pinning = Arc::clone(&mm);
    let pin = move || pinning.pin_range(range).unwrap();
    *staged.at_populate.lock().unwrap() = Some(Box::new(pin));
    card.to_device(range).unwrap();
    assert_eq!(on_device(&mm, range), 0, "a pinned page left");
    mm.close().unwrap();
}

#[test]
fn a_page_that_came_home_meanwhile_is_not_declared_lost() {
    for hold in 1..6 {
        let (staged, mm, range) = stage();
        let card = Arc::new(Card::new(&mm, 1));
        assert_eq!(card.all_to_device(range), 1);
        *card.driver.lost.lock().unwrap() = Some(range.start().get());
        let other = Arc::clone(&card);
        let rescue = move || {
            // From another thread, as another user of the device would.
            let home = std::thread::spawn(move || other.to_system(range).map(|_| ()));
            home.join().unwrap().unwrap();
        };
        *staged.at_layout.lock().unwrap() = Some(Box::new(rescue));
        staged.layouts.store(hold, Ordering::SeqCst);
        let mut byte = [0];
        let read = staged.model.cpu_read(range.start(), &mut byte);
        staged.layouts.store(0, Ordering::SeqCst);
        assert!(read.is_err() || byte == [7], "hold {hold}");
        assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0, "hold {hold}");
        assert_eq!(card.driver.frees.load(Ordering::SeqCst), 1, "hold {hold}");
        assert!(card.devmem.in_use() == 0, "hold {hold}: {} in use", card.devmem.in_use());
        assert_eq!(mm.counters().device_pages, 0, "hold {hold}");
        mm.close().unwrap();
    }
}
