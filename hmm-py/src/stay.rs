//! Why pages stay, in words.

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The reasons for which pages stay where they are (see `SoftDevice.migrate_explained`), each with what it means and what
/// to do about it.
#[pyfunction]
pub(crate) fn stay_reasons(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let reasons = PyDict::new(py);
    for why in hmm_core::Stay::ALL {
        reasons.set_item(why.name(), why.text())?;
    }
    Ok(reasons)
}
