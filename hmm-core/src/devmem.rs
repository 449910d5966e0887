//! Device memory: windows of pfns with a descriptor for each page, reference counts, owners and driver words.
//!
//! A free page has no reference. A migration takes the first when it commits; whoever drops the last one runs the
//! driver's `free`, once. (Kernels since v6.1 count like this; promises 47, 48, 53, 56.)

use crate::addr::Pfn;
use crate::arena::{self, Buffer};
use crate::error::{Error, Result};
use crate::limits::{DEVICE_WINDOW_SHIFT, DEVICES};
use crate::ops::{DevmemOps, OwnerId};
use crate::sync::{Condvar, Mutex, RwLock, RwLockWriteGuard};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

static WINDOWS: [RwLock<Option<Arc<Devmem>>>; DEVICES] = [const { RwLock::new(None) }; DEVICES];

/// The memory of one device (`struct hmm_devmem`).
pub struct Devmem {
    ops: Arc<dyn DevmemOps>,
    owner: OwnerId,
    /// The CPU reaches it.
    coherent: bool,
    window: usize,
    pages: Buffer<PageDescriptor>,
    in_use: AtomicUsize,
    removing: AtomicBool,
    /// It is the parent's: this process was forked since.
    inherited: AtomicBool,
    all_free: (Mutex<()>, Condvar),
}

struct PageDescriptor {
    references: AtomicU32,
    driver_word: AtomicU64,
    /// Next page of a list of pages to drop; only the list's holder uses it.
    next: AtomicU64,
}

impl Devmem {
    /// Registers `pages` pages of device memory. They are free, and the driver's to hand out.
    ///
    /// # Errors
    /// `Invalid` for 0 pages or more than one window holds; `NoMemory` when descriptors or windows run out.
    pub fn add(ops: Arc<dyn DevmemOps>, owner: OwnerId, pages: usize) -> Result<Arc<Self>> {
        Self::add_kind(ops, owner, pages, false)
    }

    /// As [`Devmem::add`], for memory that the CPU reaches (`MEMORY_DEVICE_COHERENT`): its pages stay mapped. In user
    /// space nobody can say where a page lies, so migration changes whose page it is and by which number it goes, and its
    /// contents stay where they are: a destination here needs no copy, nor does a page that comes home from here.
    /// `fault` is never called.
    ///
    /// # Errors
    /// As for [`Devmem::add`].
    pub fn add_coherent(
        ops: Arc<dyn DevmemOps>,
        owner: OwnerId,
        pages: usize,
    ) -> Result<Arc<Self>> {
        Self::add_kind(ops, owner, pages, true)
    }

    fn add_kind(
        ops: Arc<dyn DevmemOps>,
        owner: OwnerId,
        pages: usize,
        coherent: bool,
    ) -> Result<Arc<Self>> {
        if pages == 0 || pages > 1 << DEVICE_WINDOW_SHIFT {
            return Err(Error::invalid(0, "device memory of 0 pages, or of more than 256 GiB"));
        }
        let no_memory = Error::NoMemory { what: "device page descriptors" };
        let descriptors = Buffer::new(pages, |_| PageDescriptor {
            references: AtomicU32::new(0),
            driver_word: AtomicU64::new(0),
            next: AtomicU64::new(0),
        })
        .ok_or(no_memory)?;
        for (window, place) in WINDOWS.iter().enumerate() {
            let mut place = place.write();
            if place.is_none() {
                let devmem = Arc::new(Self {
                    ops,
                    owner,
                    coherent,
                    window,
                    pages: descriptors,
                    in_use: AtomicUsize::new(0),
                    removing: AtomicBool::new(false),
                    inherited: AtomicBool::new(false),
                    all_free: (Mutex::new(()), Condvar::new()),
                });
                if !arena::keep_object(&devmem) {
                    break;
                }
                *place = Some(Arc::clone(&devmem));
                return Ok(devmem);
            }
        }
        Err(Error::NoMemory { what: "pfn windows for device memory (64 devices)" })
    }

    /// The device memory that holds a page.
    pub fn find(page: Pfn) -> Option<Arc<Self>> {
        let offset = page.get().checked_sub(Pfn::DEVICE_BASE)?;
        let window = usize::try_from(offset >> DEVICE_WINDOW_SHIFT).ok()?;
        let devmem = WINDOWS.get(window)?.read().clone()?;
        devmem.descriptor(page).is_some().then_some(devmem)
    }

    /// The number of the window that a device page lies in.
    pub(crate) fn window_of(page: Pfn) -> usize {
        (page.get().saturating_sub(Pfn::DEVICE_BASE) >> DEVICE_WINDOW_SHIFT) as usize
    }

    /// All device memory, with the numbers of the windows.
    pub(crate) fn each(mut look: impl FnMut(usize, &Self)) {
        for (number, place) in WINDOWS.iter().enumerate() {
            let devmem = place.read().clone();
            devmem.iter().for_each(|devmem| look(number, devmem));
        }
    }

    /// First page.
    pub fn pfn_first(&self) -> Pfn {
        Pfn::new(Pfn::DEVICE_BASE + ((self.window as u64) << DEVICE_WINDOW_SHIFT))
    }
    /// One behind the last page.
    pub fn pfn_last(&self) -> Pfn {
        Pfn::new(self.pfn_first().get() + self.pages.len() as u64)
    }
    /// Pages.
    pub fn len(&self) -> usize {
        self.pages.len()
    }
    /// Never true: device memory has at least one page.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
    /// Whose it is.
    pub fn owner(&self) -> OwnerId {
        self.owner
    }
    /// Whether the CPU reaches it ([`Devmem::add_coherent`]).
    pub fn is_coherent(&self) -> bool {
        self.coherent
    }
    /// Pages that hold data of some process.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::SeqCst)
    }
    /// Stores the driver's word of a page; it survives until the page is freed (promise 53).
    pub fn set_drvdata(&self, page: Pfn, word: u64) {
        if let Some(descriptor) = self.descriptor(page) {
            descriptor.driver_word.store(word, Ordering::Release);
        }
    }
    /// The driver's word of a page (0 when never set).
    pub fn drvdata(&self, page: Pfn) -> u64 {
        self.descriptor(page).map_or(0, |one| one.driver_word.load(Ordering::Acquire))
    }

    pub(crate) fn ops(&self) -> &Arc<dyn DevmemOps> {
        &self.ops
    }

    /// Whether it belongs to the parent, from which this process was forked.
    pub(crate) fn is_inherited(&self) -> bool {
        self.inherited.load(Ordering::Relaxed)
    }

    pub(crate) fn start_removing(&self) -> bool {
        !self.removing.swap(true, Ordering::SeqCst)
    }

    pub(crate) fn stop_removing(&self) {
        self.removing.store(false, Ordering::Release);
    }

    /// Gives the window back. All pages are free.
    pub(crate) fn unlink(&self) {
        *WINDOWS[self.window].write() = None;
    }

    /// Waits until every page is free, at most for `time`.
    pub(crate) fn wait_until_free(&self, time: Duration) -> bool {
        let guard = self.all_free.0.lock();
        if self.in_use() > 0 {
            drop(self.all_free.1.wait_for(guard, time));
        }
        self.in_use() == 0
    }

    fn descriptor(&self, page: Pfn) -> Option<&PageDescriptor> {
        let index = page.get().checked_sub(self.pfn_first().get())?;
        self.pages.get(usize::try_from(index).ok()?)
    }

    /// First reference of a free page; false when it is in use, foreign, or the memory is being removed.
    pub(crate) fn claim(&self, page: Pfn) -> bool {
        let Some(descriptor) = self.descriptor(page) else { return false };
        // Counted before the look at `removing`: whoever removes sets that first, and looks at the count then.
        self.in_use.fetch_add(1, Ordering::SeqCst);
        let references = &descriptor.references;
        let claimed = !self.removing.load(Ordering::SeqCst)
            && references.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if !claimed {
            self.uncount();
        }
        claimed
    }

    /// One more reference of a page in use.
    pub(crate) fn get(&self, page: Pfn) -> bool {
        self.descriptor(page).is_some_and(|one| {
            one.references
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |count| {
                    if count == 0 { None } else { count.checked_add(1) }
                })
                .is_ok()
        })
    }

    /// Drops a reference; the last one runs the driver's `free`. No lock of the library may be held.
    pub(crate) fn put(&self, page: Pfn) {
        let Some(descriptor) = self.descriptor(page) else { return };
        if descriptor.references.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.ops.free(self, page);
            self.uncount();
        }
    }

    /// Hands a destination page that was never committed back to the driver.
    pub(crate) fn reject(&self, page: Pfn) {
        let Some(descriptor) = self.descriptor(page) else { return };
        if descriptor.references.load(Ordering::Acquire) == 0 {
            self.ops.free(self, page);
        }
    }

    fn uncount(&self) {
        if self.in_use.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _guard = self.all_free.0.lock();
            self.all_free.1.notify_all();
        }
    }
}

/// All windows, held across a fork, so that no child inherits one of them taken.
pub(crate) struct WindowsHeld([RwLockWriteGuard<'static, Option<Arc<Devmem>>>; DEVICES]);

impl WindowsHeld {
    pub(crate) fn take() -> Self {
        Self(std::array::from_fn(|window| WINDOWS[window].write()))
    }

    /// In the child: the devices are the parent's. Nothing of them is taken down here, and their windows are free.
    pub(crate) fn disown(&mut self) {
        for devmem in self.0.iter_mut().filter_map(|window| window.take()) {
            devmem.inherited.store(true, Ordering::Relaxed);
            let _ = Arc::into_raw(devmem);
        }
    }
}

/// Looks devices up by page; neighbours are mostly pages of the same one.
#[derive(Debug, Default)]
pub(crate) struct LastFound(Option<Arc<Devmem>>);

impl LastFound {
    pub(crate) fn find(&mut self, page: Pfn) -> Option<&Devmem> {
        let is_here = |devmem: &Arc<Devmem>| devmem.descriptor(page).is_some();
        if !self.0.as_ref().is_some_and(is_here) {
            self.0 = Devmem::find(page);
        }
        self.0.as_deref()
    }
}

/// A list of device pages that lost their place, linked through their descriptors: no allocation needed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DoomedPages {
    head: u64,
    pub(crate) count: usize,
}

impl DoomedPages {
    pub(crate) fn push(&mut self, page: Pfn) {
        if let Some(devmem) = Devmem::find(page)
            && let Some(descriptor) = devmem.descriptor(page)
        {
            descriptor.next.store(self.head, Ordering::Relaxed);
            self.head = page.get();
            self.count += 1;
        }
    }

    /// Drops each page's reference. No lock of the library may be held.
    pub(crate) fn put_all(self) {
        let mut page = self.head;
        while page != 0
            && let Some(devmem) = Devmem::find(Pfn::new(page))
            && let Some(descriptor) = devmem.descriptor(Pfn::new(page))
        {
            let next = descriptor.next.load(Ordering::Relaxed);
            devmem.put(Pfn::new(page));
            page = next;
        }
    }
}

impl Drop for Devmem {
    fn drop(&mut self) {
        arena::forget_object(self);
    }
}

impl fmt::Debug for Devmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Devmem({:?}, {} of {} pages used)", self.pfn_first(), self.in_use(), self.len())
    }
}
