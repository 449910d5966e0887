//! One exception, `hmm.Error`: an `OSError`, so that `except OSError as error: error.errno` works.

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

pyo3::create_exception!(
    hmm,
    Error,
    PyOSError,
    "A call of the library failed; `errno` says how, the text says where and what to do."
);

/// The Python exception for an error of the library.
pub(crate) fn to_python(error: hmm_core::Error) -> PyErr {
    Error::new_err((error.errno(), error.to_string()))
}

/// Runs `work` detached from the interpreter, so that other Python threads go on while it waits, and a thread
/// that faults with the GIL held is never waited for by one that wants the GIL.
pub(crate) fn detached<T: Send>(
    py: Python<'_>,
    work: impl FnOnce() -> hmm_core::Result<T> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(to_python)
}
