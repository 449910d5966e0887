//! Memory that system calls can use.

use crate::error::detached;
use crate::memory::Memory;
use hmm_core::{AddrRange, Mm, PresentGuard};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory that stays present for system calls: it was brought home and does not migrate until `release()`, the end of a
/// `with` block, or the end of this object. Keeps the exporter of the buffer alive and of its size.
#[pyclass(frozen, module = "hmm")]
#[derive(Debug)]
pub(crate) struct Guard {
    range: Option<AddrRange>,
    /// What is held until it is released. Taken out of the lock before it is dropped: the memory needs Python for that,
    /// the guard the library's locks.
    held: Mutex<Option<(Option<PresentGuard>, Memory)>>,
}

impl Guard {
    pub(crate) fn new(py: Python<'_>, mm: &Arc<Mm>, memory: Memory, write: bool) -> PyResult<Self> {
        // What Python may not write to, no call will.
        let write = write && !memory.is_read_only();
        let (range, guard) = detached(py, || {
            let range = memory.pages()?;
            Ok((range, range.map(|range| mm.guard(range, write)).transpose()?))
        })?;
        Ok(Self { range, held: Mutex::new(Some((guard, memory))) })
    }

    fn let_go(&self, py: Python<'_>) {
        let memory = py.detach(|| {
            let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
            held.map(|(_, memory)| memory)
        });
        drop(memory);
    }
}

#[pymethods]
impl Guard {
    /// Lets the memory migrate again. Idempotent.
    fn release(&self, py: Python<'_>) {
        self.let_go(py);
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.let_go(py);
    }

    fn __repr__(&self) -> String {
        match self.range {
            Some(range) => format!("<hmm.Guard {range}>"),
            None => "<hmm.Guard of nothing>".to_owned(),
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = Python::try_attach(|py| self.let_go(py));
    }
}
