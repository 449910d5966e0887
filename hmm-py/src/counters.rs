//! Counters as dictionaries. The structs are taken apart completely, so a counter that is added cannot be forgotten.

use hmm_core::{Counters, GroupEvents, GroupStat, Rss};
use hmm_soft::SoftCounters;
use pyo3::prelude::*;
use pyo3::types::PyDict;

macro_rules! to_dictionary {
    ($py:expr, $values:expr, $struct:ident { $($name:ident),* $(,)? }) => {{
        let $struct { $($name),* } = *$values;
        let dictionary = PyDict::new($py);
        $(dictionary.set_item(stringify!($name), $name)?;)*
        Ok(dictionary)
    }};
}

/// The counters of an mm.
pub(crate) fn of_mm<'py>(py: Python<'py>, values: &Counters) -> PyResult<Bound<'py, PyDict>> {
    to_dictionary!(
        py,
        values,
        Counters {
            cpu_faults,
            device_faults,
            zero_faults,
            parked_faults,
            migrated_to_device,
            migrated_to_system,
            not_migrated,
            device_pages,
            invalidations,
            map_events,
            retries,
            device_pages_dropped,
            poisoned,
            self_faults,
        }
    )
}

/// Resident memory by kind.
pub(crate) fn of_rss<'py>(py: Python<'py>, values: &Rss) -> PyResult<Bound<'py, PyDict>> {
    to_dictionary!(py, values, Rss { anon, file, shmem })
}

/// What a memory group's charges are.
pub(crate) fn of_stat<'py>(py: Python<'py>, values: &GroupStat) -> PyResult<Bound<'py, PyDict>> {
    to_dictionary!(py, values, GroupStat { anon, device })
}

/// What happened to a memory group.
pub(crate) fn of_events<'py>(
    py: Python<'py>,
    values: &GroupEvents,
) -> PyResult<Bound<'py, PyDict>> {
    to_dictionary!(py, values, GroupEvents { max })
}

/// The counters of a soft device.
pub(crate) fn of_soft<'py>(py: Python<'py>, values: &SoftCounters) -> PyResult<Bound<'py, PyDict>> {
    to_dictionary!(
        py,
        values,
        SoftCounters {
            device_faults,
            cpu_faults,
            pages_to_device,
            pages_to_system,
            evictions,
            invalidations,
            retries,
            jobs,
        }
    )
}
