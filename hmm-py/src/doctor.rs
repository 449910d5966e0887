//! `python -m hmm`: the same command line as that of the program `hmm`.

use hmm_doctor::{Answer, Program};
use pyo3::prelude::*;
use std::ffi::OsString;

/// Does what the words behind `python -m hmm` say. `program` are the words that start the same command again: engines
/// are tried in processes of their own. Returns the text to print, and the exit status; with status 2 the text is for
/// standard error. `colours` are for a terminal.
#[pyfunction]
#[pyo3(signature = (words, program, *, colours = false))]
pub(crate) fn run_command(
    py: Python<'_>,
    words: Vec<String>,
    program: Vec<OsString>,
    colours: bool,
) -> (String, u8) {
    let program = Program::new("python -m hmm", program);
    let Answer { text, status } = py.detach(|| hmm_doctor::run(&words, &program, colours));
    (text, status)
}
