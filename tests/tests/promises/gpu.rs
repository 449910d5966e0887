//! A device with a page table of its own, kept in step by a mirror. It reaches memory only through that table, and only
//! while it holds the table's lock: what a real device would do with its translation cache.

use crate::driver::{Card, Driver, Hook};
use hmm_core::{
    Access, AddrRange, Error, Invalidation, Mm, Notifier, NotifierOps, OwnerId, PfnEntry, PfnFlags,
    RangeRequest, VirtAddr,
};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Invalidations that are noted.
const NOTED: usize = 256;

/// The device's page table for one range, and what its mirror heard. Callbacks allocate nothing.
pub(crate) struct Table {
    range: AddrRange,
    pub(crate) entries: Mutex<Vec<PfnEntry>>,
    heard: Mutex<Vec<Invalidation>>,
    pub(crate) calls: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) releases: AtomicUsize,
    /// The mirror only listens: the table stays as it is.
    pub(crate) is_lazy: AtomicBool,
    /// Runs in each callback, first.
    during: Mutex<Option<Hook>>,
}

impl NotifierOps for Table {
    fn invalidate(&self, update: &Invalidation) {
        self.running.fetch_add(1, Ordering::SeqCst);
        let during = self.during.lock().unwrap().clone();
        if let Some(during) = during {
            during();
        }
        let mut heard = self.heard.lock().unwrap();
        if heard.len() < NOTED {
            heard.push(*update);
        }
        if let Some(part) = self.range.intersect(update.range)
            && !self.is_lazy.load(Ordering::SeqCst)
        {
            let first = self.index(part.start());
            let mut entries = self.entries.lock().unwrap();
            entries[first..first + part.pages()].fill(PfnEntry::default());
        }
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    fn release(&self) {
        self.releases.fetch_add(1, Ordering::SeqCst);
    }
}

impl Table {
    fn index(&self, addr: VirtAddr) -> usize {
        AddrRange::new(self.range.start().get(), addr.page().get() + 4096).unwrap().pages() - 1
    }

    /// The entry of a page.
    pub(crate) fn entry(&self, addr: u64) -> PfnEntry {
        self.entries.lock().unwrap()[self.index(VirtAddr::new(addr))]
    }

    /// Whether the mirror heard of a change that covers a range, since it was made or last asked.
    pub(crate) fn heard_of(&self, range: AddrRange) -> bool {
        let heard = std::mem::replace(&mut *self.heard.lock().unwrap(), Vec::with_capacity(NOTED));
        let covers = |page: usize| {
            let page = VirtAddr::new(range.start().get() + (page << 12) as u64);
            heard.iter().any(|update| update.range.contains(page))
        };
        (0..range.pages()).all(covers)
    }

    /// Lets `hook` run in each callback from now on.
    pub(crate) fn in_callbacks(&self, hook: impl Fn() + Send + Sync + 'static) {
        *self.during.lock().unwrap() = Some(Arc::new(hook));
    }
}

/// The device.
pub(crate) struct Gpu {
    pub(crate) mm: Arc<Mm>,
    pub(crate) table: Arc<Table>,
    pub(crate) notifier: Arc<Notifier>,
    memory: Option<Arc<Driver>>,
}

impl Gpu {
    /// A device without memory of its own that mirrors a range.
    pub(crate) fn new(mm: &Arc<Mm>, range: AddrRange) -> Self {
        Self::with_memory(mm, range, None)
    }

    /// A device that has the memory of a card, too.
    pub(crate) fn of(card: &Card, range: AddrRange) -> Self {
        Self::with_memory(&card.mm, range, Some(Arc::clone(&card.driver)))
    }

    fn with_memory(mm: &Arc<Mm>, range: AddrRange, memory: Option<Arc<Driver>>) -> Self {
        let table = Arc::new(Table {
            range,
            entries: Mutex::new(vec![PfnEntry::default(); range.pages()]),
            heard: Mutex::new(Vec::with_capacity(NOTED)),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            releases: AtomicUsize::new(0),
            is_lazy: AtomicBool::new(false),
            during: Mutex::new(None),
        });
        let notifier = mm.notifier_insert(range, table.clone()).unwrap();
        Self { mm: Arc::clone(mm), table, notifier, memory }
    }

    /// Pages of a card are reported to it, those of others come home.
    pub(crate) fn owner(&self) -> OwnerId {
        self.memory.as_ref().map_or_else(OwnerId::unique, |memory| memory.owner)
    }

    /// Fills a part of the table as hmm.txt tells: look, lock, ask, write.
    pub(crate) fn map(&self, part: AddrRange, access: Access) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let tracker = self.mm.track(part)?;
        let request = RangeRequest { range: part, owner: Some(self.owner()) };
        let mut pfns = vec![PfnEntry::default(); part.pages()];
        while Instant::now() < deadline {
            let sequence = tracker.begin()?;
            match self.mm.range_fault(&request, access, &mut pfns) {
                Err(Error::Busy { .. }) => continue,
                other => other?,
            }
            let first = self.table.index(part.start());
            let mut entries = self.table.entries.lock().unwrap();
            if !tracker.changed(sequence) {
                entries[first..first + pfns.len()].copy_from_slice(&pfns);
                return Ok(());
            }
        }
        Err(Error::Busy { address: part.start(), what: "the range kept changing" })
    }

    /// A load of the device, if its table has the page.
    pub(crate) fn load(&self, addr: u64) -> Option<u64> {
        let entries = self.table.entries.lock().unwrap();
        let entry = entries[self.table.index(VirtAddr::new(addr))];
        let page = entry.pfn()?;
        if entry.flags().contains(PfnFlags::DEVICE) {
            return Some(self.device_word(page, addr).load(Ordering::SeqCst));
        }
        let at = page.to_addr()?.get() + addr % 4096;
        let mut bytes = [0; 8];
        self.mm.peek(VirtAddr::new(at), &mut bytes).then(|| u64::from_ne_bytes(bytes))
    }

    /// A store of the device; false when its table does not let it.
    pub(crate) fn store(&self, addr: u64, value: u64) -> bool {
        let entries = self.table.entries.lock().unwrap();
        let entry = entries[self.table.index(VirtAddr::new(addr))];
        let Some(page) = entry.pfn().filter(|_| entry.flags().contains(PfnFlags::WRITE)) else {
            return false;
        };
        if entry.flags().contains(PfnFlags::DEVICE) {
            self.device_word(page, addr).store(value, Ordering::SeqCst);
            return true;
        }
        let at = page.to_addr().unwrap().get() + addr % 4096;
        self.mm.poke(VirtAddr::new(at), &value.to_ne_bytes())
    }

    fn device_word(&self, page: hmm_core::Pfn, addr: u64) -> &AtomicU64 {
        let frame = self.memory.as_ref().unwrap().frame(page);
        // SAFETY: the word lies in the card's memory, which outlives the device, and is only reached as an atomic here.
        unsafe { AtomicU64::from_ptr(frame.add(addr as usize % 4096).cast()) }
    }

    /// A load that takes device faults until it succeeds.
    pub(crate) fn read(&self, addr: u64) -> Result<u64, Error> {
        self.until_done(addr, Access::Read, || self.load(addr))
    }

    /// A store that takes device faults until it succeeds.
    pub(crate) fn write(&self, addr: u64, value: u64) -> Result<(), Error> {
        self.until_done(addr, Access::Write, || self.store(addr, value).then_some(()))
    }

    fn until_done<R>(
        &self,
        addr: u64,
        access: Access,
        work: impl Fn() -> Option<R>,
    ) -> Result<R, Error> {
        let page = AddrRange::covering(addr, 1)?;
        for _ in 0..10_000 {
            if let Some(done) = work() {
                return Ok(done);
            }
            self.map(page, access)?;
        }
        Err(Error::Busy { address: page.start(), what: "the device cannot keep the page" })
    }
}
