//! `hmm.SoftDevice`: a software accelerator with memory and page tables of its own.

use crate::counters;
use crate::error::{detached, to_python};
use crate::kernel::{self, Work};
use crate::memory::Memory;
use crate::{mm, registry};
use hmm_core::{AddrRange, Error, Result};
use hmm_soft::{Kernel, Policy, SoftConfig};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A software accelerator on the mm of this process. It reads and writes arrays where they lie, by the process's own
/// addresses, and holds migrated pages in memory of its own. `with` closes it at the end of the block.
#[pyclass(frozen, module = "hmm")]
pub(crate) struct SoftDevice {
    inner: Arc<hmm_soft::SoftDevice>,
    memory: u64,
    /// Memory of kernels that ran past their deadline: the device may still write there, so it stays exported until
    /// the device is closed. Never dropped under the lock: that needs Python.
    overdue: Mutex<Vec<Memory>>,
}

fn policy_of(name: &str) -> PyResult<Policy> {
    match name {
        "never" => Ok(Policy::Never),
        "on_request" => Ok(Policy::OnRequest),
        "on_touch" => Ok(Policy::OnTouch),
        _ => {
            let message =
                format!("policy must be 'never', 'on_request' or 'on_touch', not '{name}'");
            Err(PyValueError::new_err(message))
        }
    }
}

fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|reason| PyValueError::new_err(format!("{name} in seconds: {reason}")))
}

impl SoftDevice {
    /// Runs a kernel to its end; `None` is no work and gives 0.
    fn run(&self, py: Python<'_>, work: Option<Work>) -> PyResult<u64> {
        let Some(Work { kernel, memory }) = work else { return Ok(0) };
        let (outcome, ended) = py.detach(|| match self.inner.run(kernel) {
            Err(error @ Error::Busy { .. }) => {
                self.overdue.lock().unwrap_or_else(PoisonError::into_inner).extend(memory);
                (Err(error), Vec::new())
            }
            outcome => (outcome, memory),
        });
        // The exports end here, attached again.
        drop(ended);
        outcome.map_err(to_python)
    }

    fn on_pages<T: Default + Send>(
        &self,
        py: Python<'_>,
        memory: &Memory,
        call: impl FnOnce(&hmm_soft::SoftDevice, AddrRange) -> Result<T> + Send,
    ) -> PyResult<T> {
        detached(py, || memory.pages()?.map_or(Ok(T::default()), |range| call(&self.inner, range)))
    }

    fn shut(&self, py: Python<'_>) -> PyResult<()> {
        let (outcome, ended) = py.detach(|| match self.inner.close() {
            Ok(()) => (Ok(()), self.take_overdue()),
            // A kernel that does not end may still write to its memory.
            error => (error, Vec::new()),
        });
        drop(ended);
        outcome.map_err(to_python)
    }

    fn take_overdue(&self) -> Vec<Memory> {
        std::mem::take(&mut *self.overdue.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[pymethods]
impl SoftDevice {
    /// Opens a device, and the mm of this process if it is not open yet.
    ///
    /// - `memory`: bytes of device memory, whole pages.
    /// - `policy`: `"on_request"`: pages move by `migrate()`; `"on_touch"`: a touch by a kernel moves them as well;
    ///   `"never"`: kernels work on system memory in place, and `migrate()` is refused.
    /// - `latency`: seconds added to each batch that is copied or faulted.
    /// - `bandwidth`: bytes a second of the copy engine; 0 is unlimited.
    /// - `fault_around`: pages that a CPU fault may bring home at once, 1 to 512.
    /// - `threads`: device threads, 1 to 64: so many kernels run at once.
    ///
    /// Raises `ValueError` or `hmm.Error` for values out of range.
    #[new]
    #[pyo3(signature = (*, memory = 67108864, policy = "on_request", latency = 0.0, bandwidth = 0, fault_around = 16, threads = 1))]
    fn new(
        py: Python<'_>,
        memory: u64,
        policy: &str,
        latency: f64,
        bandwidth: u64,
        fault_around: u32,
        threads: u32,
    ) -> PyResult<Self> {
        let config = SoftConfig {
            memory,
            policy: policy_of(policy)?,
            latency: seconds("latency", latency)?,
            bandwidth,
            fault_around,
            threads,
        };
        let mm = mm::current(py)?.inner;
        let inner = detached(py, || {
            let device = hmm_soft::SoftDevice::new(&mm, config)?;
            registry::remember_device(&device);
            Ok(device)
        })?;
        Ok(Self { inner, memory, overdue: Mutex::new(Vec::new()) })
    }

    /// Moves the pages of the memory to the device. Returns how many moved; pages that cannot move stay, and a
    /// device that is full takes what it has room for.
    fn migrate(&self, py: Python<'_>, memory: Memory) -> PyResult<usize> {
        self.on_pages(py, &memory, |device, range| device.migrate(range))
    }

    /// As `migrate`, and says why the others stayed: returns how many moved, and a dictionary of the pages that stayed by
    /// reason, such as `{"shared": 16}`; `hmm.stay_reasons()` explains the words. Pages that were on a device already
    /// are in neither.
    fn migrate_explained<'py>(
        &self,
        py: Python<'py>,
        memory: Memory,
    ) -> PyResult<(usize, Bound<'py, PyDict>)> {
        let (moved, stays) =
            self.on_pages(py, &memory, |device, range| device.migrate_explained(range))?;
        let reasons = PyDict::new(py);
        for (why, pages) in stays.iter() {
            reasons.set_item(why.name(), pages)?;
        }
        Ok((moved, reasons))
    }

    /// Brings the pages of the memory home from this device. Returns how many came.
    fn bring_home(&self, py: Python<'_>, memory: Memory) -> PyResult<usize> {
        self.on_pages(py, &memory, |device, range| device.bring_home(range))
    }

    /// `dst[:] = byte`, for any memory.
    fn fill(&self, py: Python<'_>, dst: Memory, byte: u8) -> PyResult<()> {
        self.run(py, kernel::fill(dst, byte)?).map(drop)
    }

    /// `dst[:] = src[:]`, byte by byte, for any memory of equal size that does not overlap.
    fn copy(&self, py: Python<'_>, dst: Memory, src: Memory) -> PyResult<()> {
        self.run(py, kernel::copy(dst, src)?).map(drop)
    }

    /// `y += a * x`, float64. `y` may be `x` itself; otherwise they must not overlap.
    fn axpy(&self, py: Python<'_>, a: f64, x: Memory, y: Memory) -> PyResult<()> {
        self.run(py, kernel::axpy(a, x, y)?).map(drop)
    }

    /// The sum of float64, int64 or uint64 elements; integers wrap at 64 bits.
    fn sum(&self, py: Python<'_>, src: Memory) -> PyResult<Py<PyAny>> {
        let (element, work) = kernel::sum(src)?;
        let bits = self.run(py, work)?;
        kernel::to_number(element, bits, py)
    }

    /// `dst[i] = src[index[i]]` for elements of 8 bytes and int64 or uint64 indices. As on a real device the indices
    /// are not checked: one outside of `src` reads whatever memory of the process it leads to, or fails there.
    fn gather(&self, py: Python<'_>, dst: Memory, src: Memory, index: Memory) -> PyResult<()> {
        self.run(py, kernel::gather(dst, src, index)?).map(drop)
    }

    /// Follows a chain of nodes by the process's own pointers: the next pointer lies `next_offset` bytes into a node,
    /// 0 ends the chain. Returns how many nodes were visited, at most `max_steps`.
    #[pyo3(signature = (head, *, max_steps, next_offset = 0))]
    fn chase(&self, py: Python<'_>, head: u64, max_steps: u64, next_offset: u64) -> PyResult<u64> {
        let kernel = Kernel::Chase { head, next_offset, max_steps };
        self.run(py, Some(Work { kernel, memory: Vec::new() }))
    }

    /// Like `chase`, and returns the sum of the uint64 that lies `value_offset` bytes into each node.
    #[pyo3(signature = (head, *, value_offset, max_steps, next_offset = 0))]
    fn chase_sum(
        &self,
        py: Python<'_>,
        head: u64,
        value_offset: u64,
        max_steps: u64,
        next_offset: u64,
    ) -> PyResult<u64> {
        let kernel = Kernel::ChaseSumU64 { head, next_offset, value_offset, max_steps };
        self.run(py, Some(Work { kernel, memory: Vec::new() }))
    }

    /// `target[index] += value` in one atomic step, for int64 or uint64 elements. The page moves to the device for it,
    /// so the policy `"never"` refuses it. Returns the old value.
    #[pyo3(signature = (target, value, *, index = 0))]
    fn atomic_add(
        &self,
        py: Python<'_>,
        target: Memory,
        value: i128,
        index: u64,
    ) -> PyResult<Py<PyAny>> {
        let (element, work) = kernel::atomic_add(target, index, value)?;
        let bits = self.run(py, Some(work))?;
        kernel::to_number(element, bits, py)
    }

    /// `target[::stride] += value` for int64 or uint64 elements, with plain loads and stores.
    #[pyo3(signature = (target, value, *, stride = 1))]
    fn add(&self, py: Python<'_>, target: Memory, value: i128, stride: u64) -> PyResult<()> {
        self.run(py, kernel::add(target, value, stride)?).map(drop)
    }

    /// The counters of the device by name.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let values = py.detach(|| self.inner.counters());
        counters::of_soft(py, &values)
    }

    /// Bytes of device memory.
    #[getter]
    fn memory(&self) -> u64 {
        self.memory
    }

    /// Changes the policy (see the constructor).
    fn set_policy(&self, py: Python<'_>, policy: &str) -> PyResult<()> {
        let policy = policy_of(policy)?;
        py.detach(|| self.inner.set_policy(policy));
        Ok(())
    }

    /// Changes the added latency, in seconds.
    fn set_latency(&self, py: Python<'_>, latency: f64) -> PyResult<()> {
        let latency = seconds("latency", latency)?;
        py.detach(|| self.inner.set_latency(latency));
        Ok(())
    }

    /// Changes the bandwidth of the copy engine, in bytes a second; 0 is unlimited.
    fn set_bandwidth(&self, py: Python<'_>, bandwidth: u64) {
        py.detach(|| self.inner.set_bandwidth(bandwidth));
    }

    /// Ends the kernels, brings all pages home and frees the device. Idempotent. Later calls raise `ENODEV`.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.shut(py)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.shut(py)
    }

    fn __repr__(&self) -> String {
        format!("<hmm.SoftDevice memory={} KiB>", self.memory >> 10)
    }
}

impl Drop for SoftDevice {
    fn drop(&mut self) {
        // Closing here, detached, keeps the last reference from waiting attached. There is nobody to tell.
        let closed = Python::try_attach(|py| self.shut(py)).is_some_and(|outcome| outcome.is_ok());
        if !closed {
            // Memory that a kernel may still write to must never be freed.
            Box::leak(Box::new(self.take_overdue()));
        }
    }
}
