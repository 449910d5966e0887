//! `hmm.Mm`: the address space of this process.

use crate::counters;
use crate::error::{detached, to_python};
use crate::group::MemoryGroup;
use crate::guard::Guard;
use crate::memory::Memory;
use crate::pin::Pin;
use crate::registry;
use hmm_core::{ForkMode, Residency};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::Arc;

/// Nothing is there yet (never touched, or dropped).
pub(crate) const RESIDENCY_NONE: u8 = 0;
/// In system memory.
pub(crate) const RESIDENCY_SYSTEM: u8 = 1;
/// In the memory of a device.
pub(crate) const RESIDENCY_DEVICE: u8 = 2;
/// On its way.
pub(crate) const RESIDENCY_MIGRATING: u8 = 3;
/// Lost; a touch raises SIGBUS.
pub(crate) const RESIDENCY_POISONED: u8 = 4;
/// Not mapped.
pub(crate) const RESIDENCY_UNMAPPED: u8 = 5;

const FORK_MODES: [(&str, ForkMode); 2] =
    [("home", ForkMode::Home), ("dont-copy", ForkMode::DontCopy)];

fn residency_code(residency: Residency) -> u8 {
    match residency {
        Residency::None => RESIDENCY_NONE,
        Residency::System => RESIDENCY_SYSTEM,
        Residency::Device(_) => RESIDENCY_DEVICE,
        Residency::Migrating => RESIDENCY_MIGRATING,
        Residency::Poisoned => RESIDENCY_POISONED,
        Residency::Unmapped => RESIDENCY_UNMAPPED,
    }
}

/// The address space of this process. `with` closes it at the end of the block.
#[pyclass(frozen, module = "hmm")]
#[derive(Debug)]
pub(crate) struct Mm {
    pub(crate) inner: Arc<hmm_core::Mm>,
}

/// The mm of this process, opened on first use, and again after a close.
///
/// Raises `hmm.Error`: `EOPNOTSUPP` where no engine works; the text says why.
#[pyfunction]
pub(crate) fn current(py: Python<'_>) -> PyResult<Mm> {
    let inner = detached(py, || {
        let mm = hmm_core::Mm::current()?;
        registry::remember_mm(&mm);
        Ok(mm)
    })?;
    Ok(Mm { inner })
}

#[pymethods]
impl Mm {
    /// How CPU mappings are changed here: `"uffd"`, `"uffd-inline"` or `"signal"`.
    #[getter]
    fn engine(&self) -> &'static str {
        self.inner.engine_name()
    }

    /// What the engine can do, as names:
    ///
    /// - `"MISSING_FAULTS"`: touches of memory that is on a device bring it home. Every engine has it.
    /// - `"MOVE"`: contents move without a copy. Where it is missing, migration is slower.
    /// - `"KERNEL_FAULTS"`: system calls on such memory wait for it. Where it is missing, `write`, `readinto` and the like
    ///   fail with `EFAULT`, or stop short: wrap them in `with hmm.guard(memory):`.
    /// - `"POISON"`: a touch of memory that a device lost raises SIGBUS. Every engine has it.
    /// - `"EVENTS"`: changes of mappings (a `mmap` object closed, an array freed) are noticed as they are made. Where it
    ///   is missing, those of memory on a device are noticed at the next touch or call (`sync`), the others not at all.
    /// - `"PRIVATE_FILES"`: private mappings of files (`numpy.memmap` in mode `"c"`) migrate, too. Where it is missing they
    ///   stay. System calls on such memory on a device need a guard on every engine.
    /// - `"ORDERED"`: changes of mappings are announced before they are made, by `libhmm_preload.so`: they may be made while
    ///   the memory migrates.
    #[getter]
    fn capabilities(&self) -> Vec<&'static str> {
        self.inner.capabilities().iter_names().map(|(name, _)| name).collect()
    }

    /// What children of a fork get of memory that is on a device, from the next fork on:
    ///
    /// - `"home"` (the default): a copy. Every page comes home before the fork.
    /// - `"dont-copy"`: nothing. The pages stay on their devices, and the child has no mapping there: a touch of its kills
    ///   it with SIGSEGV. For children that do not need the data.
    ///
    /// `subprocess` forks only with `preexec_fn` and a few other options; else it is a `vfork`, which needs nothing of this.
    #[getter]
    fn fork_mode(&self) -> &'static str {
        let mode = self.inner.fork_mode();
        FORK_MODES.iter().find(|one| one.1 == mode).map_or("home", |one| one.0)
    }

    #[setter]
    fn set_fork_mode(&self, mode: &str) -> PyResult<()> {
        let Some((_, known)) = FORK_MODES.iter().find(|one| one.0 == mode) else {
            let names = FORK_MODES.map(|one| one.0).join(", ");
            return Err(PyValueError::new_err(format!("fork_mode is one of {names}, not {mode}")));
        };
        self.inner.set_fork_mode(*known).map_err(to_python)
    }

    /// The counters of the mm by name.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = py.detach(|| self.inner.counters());
        counters::of_mm(py, &values)
    }

    /// Resident memory by kind (`"anon"`, `"file"`, `"shmem"`), in bytes: what the kernel counts, without what the library
    /// holds, and with what is on devices counted as anonymous. It does not change by migration. The memory of a
    /// `SoftDevice` is memory of this process, too, once it is used.
    ///
    /// Raises `hmm.Error` where `/proc` does not tell.
    fn rss<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = detached(py, || self.inner.rss())?;
        counters::of_rss(py, &values)
    }

    /// The memory group that pays for what leaves from now on.
    #[getter]
    fn group(&self, py: Python<'_>) -> MemoryGroup {
        MemoryGroup::from(py.detach(|| self.inner.group()))
    }

    /// Moves the address space into a memory group, `None` for the root group. What is charged already stays where it is
    /// (see `move_charges`).
    fn set_group(&self, py: Python<'_>, group: Option<&MemoryGroup>) -> PyResult<()> {
        let group = group.map_or_else(hmm_core::MemoryGroup::root, MemoryGroup::inner);
        detached(py, || self.inner.set_group(&group))
    }

    /// Charges the pages of this address space to the group that it is in now, as far as that has room. Returns how many
    /// changed groups.
    fn move_charges(&self, py: Python<'_>) -> PyResult<usize> {
        detached(py, || self.inner.move_charges())
    }

    /// Ends the charges of pages at home that the program dropped, where nobody reports that: without the capability
    /// `"EVENTS"`. Elsewhere it does nothing.
    fn settle_charges(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.settle_charges())
    }

    /// Compares what the library counts with its page table: counters, the pages of each device, charges. Only
    /// meaningful while nothing is under way.
    ///
    /// Raises `hmm.Error`: `EUCLEAN` when something differs; the text says what.
    fn check_accounts(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.check_accounts())
    }

    /// Waits until changes of mappings (a `mmap` object closed, an array freed) that were made before this call are
    /// applied: the device pages of what is gone are free then. Without the capability `"EVENTS"` this is where they are
    /// looked for.
    fn sync(&self, py: Python<'_>) {
        py.detach(|| self.inner.sync());
    }

    /// Where each page of the memory is: one `hmm.Residency` value a byte.
    ///
    /// Raises `hmm.Error` for an impossible address range.
    fn residency<'py>(&self, py: Python<'py>, memory: Memory) -> PyResult<Bound<'py, PyBytes>> {
        let codes = detached(py, || {
            let Some(range) = memory.pages()? else { return Ok(Vec::new()) };
            let mut pages = vec![Residency::None; range.pages()];
            self.inner.residency(range, &mut pages)?;
            Ok(pages.into_iter().map(residency_code).collect())
        })?;
        Ok(PyBytes::new(py, &codes))
    }

    /// Brings device pages home and populates holes, so that the next touches do not fault. Returns how many pages
    /// came home. With `write` the pages are made writable, so a private copy is taken where there is none yet.
    ///
    /// Raises `hmm.Error`: `EFAULT` where nothing is mapped, `EPERM` where the protection forbids it.
    #[pyo3(signature = (memory, *, write = false))]
    fn make_present(&self, py: Python<'_>, memory: Memory, write: bool) -> PyResult<usize> {
        detached(py, || match memory.pages()? {
            Some(range) => self.inner.make_present(range, write),
            None => Ok(0),
        })
    }

    /// Keeps the memory present for system calls until the `Guard` that is returned goes: brings it home, populates it,
    /// and lets none of it migrate. With `write` for calls that write to it, such as `readinto`; a read-only buffer is
    /// made present for reading in either case. Works on every engine; see `capabilities` for where it is needed.
    ///
    /// Raises `hmm.Error`: `EFAULT` where nothing is mapped, `EPERM` where the protection forbids the access, `ENOMEM`
    /// with too many guards and pins, `EBUSY` when a page does not come home in time, `EIO` when a device lost one.
    #[pyo3(signature = (memory, *, write = true))]
    fn guard(&self, py: Python<'_>, memory: Memory, write: bool) -> PyResult<Guard> {
        Guard::new(py, &self.inner, memory, write)
    }

    /// Lets whoever touches memory that is away bring it home itself, in a handler of SIGBUS: the fastest way there is.
    /// For whole pages (a `mmap` object, say) that are never handed to system calls while they may be away: those fail
    /// with `EFAULT` (see `guard`). On the engine `"uffd-inline"` all memory is so.
    ///
    /// Raises `hmm.Error`: `EINVAL` unless it is whole pages of private anonymous memory, `EOPNOTSUPP` on engines without
    /// userfaultfd, `EBUSY` when a page does not come home in time, `EIO` when a device lost one.
    fn inline_range(&self, py: Python<'_>, memory: Memory) -> PyResult<()> {
        detached(py, || self.inner.inline_range(memory.whole_pages()?))
    }

    /// Undoes `inline_range` on memory, or on a part of it.
    ///
    /// Raises `hmm.Error` as `inline_range` does.
    fn blocking_range(&self, py: Python<'_>, memory: Memory) -> PyResult<()> {
        detached(py, || self.inner.blocking_range(memory.whole_pages()?))
    }

    /// Brings the memory home and keeps it there until the `Pin` that is returned goes.
    ///
    /// Raises `hmm.Error`: `ENOMEM` with too many pins, `EBUSY` when a page does not come home in time.
    fn pin(&self, py: Python<'_>, memory: Memory) -> PyResult<Pin> {
        Pin::new(py, &self.inner, memory)
    }

    /// Tells the drivers, brings all pages home and stops the engine. Idempotent. Later calls raise `ENODEV`.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        detached(py, || self.inner.close())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        format!("<hmm.Mm engine={}>", self.inner.engine_name())
    }
}
