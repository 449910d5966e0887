//! How CPU mappings are really changed: the [`Engine`] trait that the mm consumes, the [`FaultSink`] trait through
//! which an engine reports, and the data that passes between them. An engine knows this file and the ground floor.

mod linux;
mod lost;
pub mod mixed;
pub mod model;
mod say;
pub mod signal;
mod threads;
mod trap;
pub mod uffd;

pub(crate) use trap::{HandlersHeld, program_action};

use crate::addr::{AddrRange, VirtAddr};
use crate::error::{Error, Result};
use crate::flags::{Capabilities, Protection};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::sync::Arc;

/// Whether Valgrind runs this process: it loads a library of its own first.
pub(crate) fn under_valgrind() -> bool {
    let preloaded = std::env::var_os("LD_PRELOAD").unwrap_or_default();
    preloaded.to_string_lossy().contains("vgpreload")
}

/// What kind of memory a vma maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmaKind {
    /// Private anonymous memory.
    Anonymous,
    /// Shared anonymous memory, memfd, tmpfs.
    Shared,
    /// A private file mapping. It migrates where the engine has [`Capabilities::PRIVATE_FILES`].
    PrivateFile,
    /// A shared file mapping.
    SharedFile,
    /// hugetlbfs.
    Huge,
    /// Driver memory and the like (`VM_SPECIAL`); never mirrored.
    Special,
}

/// One mapping as the engine sees it now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// Where.
    pub range: AddrRange,
    /// Protection.
    pub protection: Protection,
    /// Kind.
    pub kind: VmaKind,
    /// Tells mappings of different origin apart (file identity), so that neighbours are not joined wrongly.
    pub identity: u64,
}

/// Resident memory by kind, in bytes, under the kernel's names (`rss_anon`, `rss_file`, `rss_shmem`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rss {
    /// Anonymous memory: private, and no page of a file any more.
    pub anon: u64,
    /// Pages of files.
    pub file: u64,
    /// Shared memory: shared anonymous, memfd, tmpfs.
    pub shmem: u64,
}

/// What the CPU page table holds for a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Present {
    /// Nothing (also: never touched).
    None,
    /// An ordinary page.
    Page,
    /// A page of a file or of shared memory. Where the mapping is private, a write gets a copy of it. Not every way of
    /// asking tells it from `Page`.
    File,
    /// The shared zero page.
    Zero,
    /// Swapped out.
    Swapped,
}

/// How much a range is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Watch {
    /// Layout changes are reported.
    Changes,
    /// Also: touches of absent pages are reported.
    Absence,
}

/// How far a mutator came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pages done from the start of the request, in order.
    pub pages: usize,
    /// Why it stopped there.
    pub stop: Stop,
}

/// Why a mutator stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// All done.
    Done,
    /// Layout changes are waiting to be applied: release the layout lock, call [`Engine::drain`], look again.
    Retry,
    /// The next page is shared or pinned and cannot be taken now.
    Busy,
    /// The next page is there already.
    Exists,
    /// The next page's mapping does not allow it (gone, other protection, other kind).
    Refused,
    /// No memory for a page.
    NoMemory,
    /// The page is there, but becomes accessible only together with all others of its leaf: they must come home first.
    WithLeaf,
}

/// Source of [`Engine::give`]'s pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Give {
    /// Copy the frames; they stay populated. Needs no TLB flush: best for single pages.
    Copy,
    /// Move the frames; their slots are empty afterwards. Best for long runs.
    Move,
}

/// A CPU touch of an absent page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultEvent {
    /// Address, rounded down to the page.
    pub addr: VirtAddr,
    /// Whether it was a write.
    pub write: bool,
    /// Kernel id of the toucher (0: unknown).
    pub thread: u32,
    /// The toucher is one of the library's own threads: a callback touched memory that migrates.
    pub from_service_thread: bool,
    /// The toucher itself answers, in a signal handler.
    pub inline: bool,
}

/// A change of the layout that the process made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapEvent {
    /// The range is unmapped.
    Unmap(AddrRange),
    /// The contents of the range are dropped (`MADV_DONTNEED`, `MADV_REMOVE`, …), the mapping stays.
    Remove(AddrRange),
    /// The mapping moved, with its contents, to an address.
    Remap {
        /// Old place.
        from: AddrRange,
        /// Start of the new place.
        to: VirtAddr,
    },
}

/// What the sink did about a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// The page is there (or the mapping is gone), and the toucher was woken: it tries again.
    Resolved,
    /// A migration holds the page, and wakes the toucher when it is done.
    Parked,
    /// The device lost the page: the touch gets SIGBUS.
    Lost,
    /// The device's `fault` must not run in the toucher's signal handler: report the fault again from another thread.
    HandOver,
    /// Layout changes must be read first; report the fault again afterwards.
    Retry,
    /// The toucher itself holds the page, in a migration's callback: nobody can help it.
    WaitsForItself,
}

/// Where an engine reports. Implemented by the mm.
pub trait FaultSink: Send + Sync {
    /// A fault. Called with no lock held.
    fn on_fault(&self, fault: FaultEvent) -> Resolution;
    /// A layout change. Called with the layout lock held for writing, in the order in which the changes were made;
    /// returns a ticket. Must not block on user code.
    fn on_map_event(&self, event: MapEvent) -> MapTicket;
    /// Finish what `on_map_event` began (callbacks, freed device pages). Called after the layout lock was released.
    fn finish_map_event(&self, ticket: MapTicket);
    /// Nothing happened for a moment. Called now and then, from a thread that nobody waits for.
    fn on_idle(&self) {}
    /// Whether some page of a range must never be out of reach.
    fn must_stay(&self, range: AddrRange) -> bool;
    /// Memory that the engine's own threads need (their stacks): it must never migrate.
    fn on_own_memory(&self, range: AddrRange);
}

/// Links [`FaultSink::on_map_event`] with [`FaultSink::finish_map_event`].
#[derive(Debug)]
#[must_use = "an unfinished ticket leaves a range invalid for ever"]
pub struct MapTicket(pub(crate) usize);

/// Orders what the process does to its layout against what the library does to its pages.
///
/// Held for writing while layout events are read **and** applied; held for reading around each take, give or zero
/// together with the page-table update that belongs to it. Never taken twice by one thread.
#[derive(Debug, Default)]
pub struct LayoutLock(RwLock<()>);

impl LayoutLock {
    /// Holds the layout still.
    pub fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.0.read()
    }
    /// As [`LayoutLock::change`], if nobody holds the layout now.
    pub fn try_change(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        self.0.try_write()
    }
    /// For reading and applying events.
    pub fn change(&self) -> RwLockWriteGuard<'_, ()> {
        self.0.write()
    }
}

/// The narrow interface through which the mm changes CPU mappings.
///
/// Addresses are page aligned. `take`, `give` and `zero` are called with the layout lock held for reading.
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// `"uffd"`, `"signal"` or `"model"`: for people, never for decisions.
    fn name(&self) -> &'static str;
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// The lock of [`LayoutLock`].
    fn layout(&self) -> &LayoutLock;
    /// Starts answering faults and reporting events to `sink` (once).
    ///
    /// # Errors
    /// When threads cannot be started.
    fn start(&self, sink: Arc<dyn FaultSink>) -> Result<()>;
    /// Stops and releases everything. All pages are home by now.
    fn stop(&self);
    /// The first mapping that ends above `addr` (like `find_vma`).
    ///
    /// # Errors
    /// When the system cannot be asked.
    fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>>;
    /// Be told of changes to a range, which lies in one mapping. Idempotent; may be widened.
    ///
    /// # Errors
    /// When the range cannot be watched.
    fn watch(&self, range: AddrRange, watch: Watch) -> Result<()>;
    /// Reports what is there, as runs in rising order that together cover the range.
    ///
    /// # Errors
    /// When the system cannot be asked.
    fn scan(&self, range: AddrRange, report: &mut dyn FnMut(AddrRange, Present)) -> Result<()>;
    /// What the process has in system memory, the frames among it.
    ///
    /// # Errors
    /// When the system cannot be asked.
    fn rss(&self) -> Result<Rss> {
        let what = format!("the {} engine does not know what is resident", self.name());
        Err(Error::Unsupported { what })
    }
    /// Makes pages present as a CPU access would (zero fill, COW, file read, swap-in). May wait for service threads.
    ///
    /// # Errors
    /// `Fault` or `Permission` as the CPU access would fail.
    fn populate(&self, range: AddrRange, write: bool) -> Result<()>;
    /// Makes pages inaccessible and hands their contents over to empty frames from `frame` on, losing no concurrent
    /// store. Holes stay holes: their frames stay empty.
    fn take(&self, range: AddrRange, frame: VirtAddr) -> Progress;
    /// Whether a range of 2 MiB is mapped as one huge page, or as a part of one.
    fn is_huge(&self, _range: AddrRange) -> bool {
        false
    }
    /// Whether a page is locked in memory (`mlock`). Asked when [`Engine::take`] refused it.
    fn is_locked(&self, _page: VirtAddr) -> bool {
        false
    }
    /// Second half of [`Engine::take`] for engines that only copied the contents: the pages lose what they still have.
    /// Called with no lock held. A page that is not done keeps its contents, and [`Engine::give`] restores it.
    fn withdraw(&self, range: AddrRange) -> Progress {
        Progress { pages: range.pages(), stop: Stop::Done }
    }
    /// Whether pages of a read-only mapping can leave while nobody changes its access: by [`Engine::take_by_copy`] and
    /// [`Engine::withdraw_copied`], and home by [`Give::Copy`].
    fn copies_read_only(&self) -> bool {
        false
    }
    /// As [`Engine::take`], of pages that nobody can write to: their contents are copied, and stay.
    fn take_by_copy(&self, _range: AddrRange, _frame: VirtAddr) -> Progress {
        Progress { pages: 0, stop: Stop::Refused }
    }
    /// As [`Engine::withdraw`], after [`Engine::take_by_copy`].
    fn withdraw_copied(&self, _range: AddrRange) -> Progress {
        Progress { pages: 0, stop: Stop::Refused }
    }
    /// Installs the contents of frames from `frame` on, each page atomically. Need not wake anybody: the caller does,
    /// when it is done with everything else.
    fn give(&self, range: AddrRange, frame: VirtAddr, how: Give) -> Progress;
    /// Finds out what the program did to a range, where nobody reports it. Called with no lock held.
    fn refresh(&self, _range: AddrRange) {}
    /// The program announced this change, and has made it. For memory of which the kernel does not tell the engine;
    /// called with no lock held, while no page of the range can leave.
    fn changed(&self, _event: MapEvent) {}
    /// From now on the program announces its changes.
    fn announces(&self) {}
    /// Whether the engine keeps pages of a range out of reach by their protection, which the program is about to change.
    fn hides(&self, _range: AddrRange) -> bool {
        false
    }
    /// Pages of a range that are at home are within reach again, as the program left them. Called with no lock held.
    ///
    /// # Errors
    /// `Fault` or `Busy` when one is not.
    fn uncover(&self, _range: AddrRange) -> Result<()> {
        Ok(())
    }
    /// A hole that was taken is a hole again.
    fn give_hole(&self, _page: VirtAddr) {}
    /// Installs a page of zeros and wakes who waits for it.
    fn zero(&self, page: VirtAddr, write: bool) -> Progress;
    /// As [`Engine::zero`] for a run of pages, as far as they are holes; the first counts, the rest is best effort.
    fn zero_run(&self, run: AddrRange, write: bool) -> Progress {
        self.zero(run.start(), write)
    }
    /// Lets everyone who waits for a page of the range try again.
    fn wake(&self, range: AddrRange);
    /// A touch of the page gets SIGBUS from now on. False when the engine cannot.
    fn poison(&self, page: VirtAddr) -> bool;
    /// Reads and applies waiting layout events, if any. Called with no lock held, from any thread.
    fn drain(&self);
    /// Reads bytes that are present, without waiting and without faulting. False when some page is not there.
    fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool;
    /// Writes bytes to pages that are present. False when some page is not there (earlier ones may be written).
    fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool;
    /// Reads as a system call would: waits for absent pages. Returns the bytes read.
    ///
    /// # Errors
    /// `Fault` when nothing at all can be read.
    fn read(&self, addr: VirtAddr, out: &mut [u8]) -> Result<usize>;
    /// Writes as a system call would.
    ///
    /// # Errors
    /// `Fault` when nothing at all can be written.
    fn write(&self, addr: VirtAddr, data: &[u8]) -> Result<usize>;
    /// Reserves address space for frames: 2 MiB aligned, all slots empty.
    ///
    /// # Errors
    /// When the address space cannot be had.
    fn reserve_frames(&self, bytes: u64) -> Result<AddrRange>;
    /// Fills an empty frame slot with a page of zeros.
    fn fill_frame(&self, frame: VirtAddr) -> bool;
    /// As [`Engine::fill_frame`], for a run of empty slots. Returns how many from the start are filled now.
    fn fill_frames(&self, frames: AddrRange) -> usize {
        (0..frames.pages()).take_while(|slot| self.fill_frame(frames.page_at(*slot))).count()
    }
    /// Frees the memory of frame slots; they are empty afterwards. Never called by a thread that reads events.
    fn empty_frames(&self, frames: AddrRange);
    /// Whether pages of a range may leave now. Asked by the thread that is about to migrate.
    ///
    /// # Errors
    /// `Unsupported` with the reason, when a touch could not be answered any more.
    fn check_ready(&self, _range: AddrRange) -> Result<()> {
        Ok(())
    }
    /// Lets touches of a range's absent pages be answered by the toucher itself, or again as the engine answers by
    /// itself. Called with no lock held; no page of the range is away or leaves meanwhile. The range is watched for
    /// changes afterwards; its absence has to be watched anew.
    ///
    /// # Errors
    /// `Invalid` when something else than private anonymous memory is in the range; `Busy`; `Unsupported` with the
    /// reason.
    fn answer_inline(&self, _range: AddrRange, _inline: bool) -> Result<()> {
        let name = self.name();
        let what =
            format!("the {name} engine answers all touches alike; inline ranges need userfaultfd");
        Err(Error::Unsupported { what })
    }
    /// In a forked child: lets go of what would keep the parent's memory watched after the parent stopped its engine.
    /// Takes no lock.
    fn disown(&self) {}
    /// Leaves a range, which lies in one mapping, out of the children that are forked from now on, or takes it back in.
    ///
    /// # Errors
    /// `NoMemory` when there are too many mappings.
    fn leave_out_of_children(&self, _range: AddrRange, _out: bool) -> Result<()> {
        Ok(())
    }
    /// Reports what children do not get now.
    fn each_left_out_of_children(&self, _report: &mut dyn FnMut(AddrRange)) {}
    /// Whether pages of a leaf are at home and nevertheless out of reach, so that a child could not reach them.
    fn hides_pages_at_home(&self, _leaf: AddrRange) -> bool {
        false
    }
    /// Whether the calling thread is one of the engine's own (it must then never wait for the others).
    fn is_service_thread(&self) -> bool;
}
