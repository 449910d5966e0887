//! Memory groups.

use crate::counters;
use crate::error::detached;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// A memory group, in the words of cgroup v2: who pays for the pages that leave for devices. A page is charged to the
/// group of its address space (`Mm.set_group`) when it leaves for the first time, and stays charged there on both sides
/// until it is dropped.
///
/// `parent` is the group above, whose limit holds for this one, too; `None` is the root group, which has no limit and
/// counts everything. `max` is the limit in bytes: it keeps holes (memory never touched) from being filled on a device,
/// and never keeps a page from leaving or from coming home.
#[pyclass(frozen, eq, module = "hmm")]
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MemoryGroup(hmm_core::MemoryGroup);

impl MemoryGroup {
    pub(crate) fn inner(&self) -> hmm_core::MemoryGroup {
        self.0.clone()
    }
}

impl From<hmm_core::MemoryGroup> for MemoryGroup {
    fn from(group: hmm_core::MemoryGroup) -> Self {
        Self(group)
    }
}

#[pymethods]
impl MemoryGroup {
    /// Raises `hmm.Error`: `ENOMEM` with 256 groups.
    #[new]
    #[pyo3(signature = (*, parent = None, max = None))]
    fn new(py: Python<'_>, parent: Option<&Self>, max: Option<u64>) -> PyResult<Self> {
        let parent = parent.map_or_else(hmm_core::MemoryGroup::root, Self::inner);
        detached(py, || {
            let group = hmm_core::MemoryGroup::create(&parent)?;
            group.set_max(max)?;
            Ok(Self(group))
        })
    }

    /// The root group.
    #[staticmethod]
    fn root() -> Self {
        Self(hmm_core::MemoryGroup::root())
    }

    /// Sets the limit in bytes, rounded down to whole pages; `None`: no limit. A limit below what is charged drops
    /// nothing.
    ///
    /// Raises `hmm.Error`: `EINVAL` for the root group.
    fn set_max(&self, py: Python<'_>, max: Option<u64>) -> PyResult<()> {
        detached(py, || self.0.set_max(max))
    }

    /// The limit in bytes; `None`: no limit of its own.
    #[getter]
    fn max(&self) -> Option<u64> {
        self.0.max()
    }

    /// Bytes charged to it and to the groups below it.
    #[getter]
    fn current(&self) -> u64 {
        self.0.current()
    }

    /// The most that it ever was.
    #[getter]
    fn peak(&self) -> u64 {
        self.0.peak()
    }

    /// The group above; `None` for the root group.
    #[getter]
    fn parent(&self) -> Option<Self> {
        self.0.parent().map(Self)
    }

    /// What the charges are, in bytes: `"anon"`, and of this `"device"`, which is in the memory of devices now.
    fn stat<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        counters::of_stat(py, &self.0.stat())
    }

    /// What happened: `"max"`, the times that a charge went above the limit of the group or of one below it, or was
    /// refused for that.
    fn events<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        counters::of_events(py, &self.0.events())
    }

    fn __repr__(&self) -> String {
        let max = self.0.max().map_or_else(|| "no limit".to_owned(), |max| format!("of {max}"));
        format!("<hmm.MemoryGroup {} bytes, {max}>", self.0.current())
    }
}
