//! Failures on request, for Python.

use crate::error::detached;
use pyo3::prelude::*;

/// Lets calls to the kernel, allocations and callbacks fail now and then, for tests: `hmm.inject("move=EBUSY/10,arena/100")`
/// lets one `UFFDIO_MOVE` in ten say `EBUSY`, and one allocation in a hundred fail. The rules are those of `HMM_INJECT`; they
/// replace all others of the process, and an empty text ends all failures. Returns how often each point failed so far.
#[pyfunction]
#[pyo3(signature = (rules = None))]
pub(crate) fn inject(
    py: Python<'_>,
    rules: Option<&str>,
) -> PyResult<std::collections::BTreeMap<&'static str, u64>> {
    if let Some(rules) = rules {
        detached(py, || hmm_core::inject::configure(rules))?;
    }
    let points = hmm_core::inject::Point::ALL.iter();
    Ok(points.map(|point| (point.name(), hmm_core::inject::failures(*point))).collect())
}
