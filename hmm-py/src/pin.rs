//! A pinned range of memory.

use crate::error::{detached, to_python};
use crate::memory::Memory;
use hmm_core::{AddrRange, Error, Mm, Result};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};

/// Memory that stays home: it was brought home and never migrates until `unpin()`, the end of a `with` block, or
/// the end of this object. Keeps the exporter of the buffer alive and of its size.
#[pyclass(frozen, module = "hmm")]
#[derive(Debug)]
pub(crate) struct Pin {
    mm: Arc<Mm>,
    range: Option<AddrRange>,
    /// The pinned memory until it is unpinned. Taken out of the lock before it is dropped: that needs Python.
    held: Mutex<Option<Memory>>,
}

impl Pin {
    pub(crate) fn new(py: Python<'_>, mm: &Arc<Mm>, memory: Memory) -> PyResult<Self> {
        let range = memory.pages().map_err(to_python)?;
        detached(py, || range.map_or(Ok(()), |range| mm.pin_range(range)))?;
        Ok(Self { mm: mm.clone(), range, held: Mutex::new(Some(memory)) })
    }

    fn release(&self, py: Python<'_>) -> PyResult<()> {
        let held = py.detach(|| self.held.lock().unwrap_or_else(PoisonError::into_inner).take());
        if held.is_none() {
            return Ok(());
        }
        let outcome = detached(py, || self.range.map_or(Ok(()), |range| unpin(&self.mm, range)));
        drop(held);
        outcome
    }
}

/// A closed mm holds no pins any more.
fn unpin(mm: &Mm, range: AddrRange) -> Result<()> {
    match mm.unpin_range(range) {
        Err(Error::Gone { .. }) => Ok(()),
        other => other,
    }
}

#[pymethods]
impl Pin {
    /// Lets the memory migrate again. Idempotent.
    fn unpin(&self, py: Python<'_>) -> PyResult<()> {
        self.release(py)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.release(py)
    }

    fn __repr__(&self) -> String {
        match self.range {
            Some(range) => format!("<hmm.Pin {range}>"),
            None => "<hmm.Pin of nothing>".to_owned(),
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // There is nobody to tell: the range may have been unmapped, which unpins it as well.
        let _ = Python::try_attach(|py| self.release(py));
    }
}
