//! What is open in this process, so that the exit hook can bring every page home.

use crate::error::detached;
use hmm_core::{Error, Mm, Result};
use hmm_soft::SoftDevice;
use pyo3::prelude::*;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Locked only by detached threads, and never during a call that can wait.
static OPEN: Mutex<Open> = Mutex::new(Open { mm: None, devices: Vec::new() });

struct Open {
    /// Held, so that the mm stays open between two calls of `hmm.current()`.
    mm: Option<Arc<Mm>>,
    devices: Vec<Weak<SoftDevice>>,
}

fn open() -> MutexGuard<'static, Open> {
    // The lists are valid after every statement, so a panic elsewhere leaves nothing half done.
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Remembers the mm, and drops the closed one that was remembered before.
pub(crate) fn remember_mm(mm: &Arc<Mm>) {
    let before = open().mm.replace(mm.clone());
    drop(before);
}

/// Remembers a device, and forgets those that are gone.
pub(crate) fn remember_device(device: &Arc<SoftDevice>) {
    let mut open = open();
    open.devices.retain(|known| known.strong_count() > 0);
    open.devices.push(Arc::downgrade(device));
}

/// Closes every device, then the mm: all pages are home afterwards. Idempotent; runs at interpreter exit.
///
/// Raises the first `hmm.Error` of these; the others are closed all the same.
#[pyfunction]
pub(crate) fn close_all(py: Python<'_>) -> PyResult<()> {
    detached(py, || {
        let (mm, devices) = {
            let mut open = open();
            (open.mm.take(), std::mem::take(&mut open.devices))
        };
        let mut first = Ok(());
        for device in devices.iter().filter_map(Weak::upgrade) {
            first = first.and(unless_gone(device.close()));
        }
        let last = mm.map_or(Ok(()), |mm| unless_gone(mm.close()));
        first.and(last)
    })
}

/// `ENODEV` is no failure of a close: somebody was faster, or this process is a fork of the one that opened it.
fn unless_gone(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(Error::Gone { .. }) => Ok(()),
        other => other,
    }
}
