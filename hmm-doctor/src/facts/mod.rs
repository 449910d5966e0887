//! What this machine and this process say of themselves. Nothing here changes anything.

mod process;
mod system;
mod userfaultfd;

pub(crate) use process::{Action, Environment, Limits, ProcFiles, Signals};
pub(crate) use system::{Seccomp, System};
pub(crate) use userfaultfd::Userfaultfd;

use serde::Serialize;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

/// Whether a file opens.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Access {
    pub(crate) opens: bool,
    /// Why it does not.
    pub(crate) error: Option<String>,
}

impl Access {
    /// Tries to open a file for reading, or for reading and writing.
    fn of(path: &str, write: bool) -> Self {
        Self::new(&OpenOptions::new().read(true).write(write).open(path))
    }

    fn new(opened: &io::Result<File>) -> Self {
        let error = opened.as_ref().err().map(ToString::to_string);
        Self { opens: opened.is_ok(), error }
    }
}

/// The trimmed text of a file, if it can be read.
fn text(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The number in a file that holds nothing else.
fn number<T: std::str::FromStr>(path: &str) -> Option<T> {
    text(path)?.parse().ok()
}

/// The value of a field of `/proc/self/status`.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim())
}

/// Whether a set of `/proc/self/status`, written in hexadecimal, holds a bit.
fn holds(status: &str, name: &str, bit: u32) -> bool {
    let set = field(status, name).and_then(|text| u64::from_str_radix(text, 16).ok());
    set.is_some_and(|set| set >> bit & 1 == 1)
}

#[cfg(test)]
pub(crate) mod tests {
    pub(crate) use super::process::tests::plain_process;
    pub(crate) use super::system::tests::plain_system;
    pub(crate) use super::userfaultfd::tests::plain_userfaultfd;
    use super::*;

    const STATUS: &str = "Name:\thmm\nUid:\t1\t2\t3\t4\nSigIgn:\t0000000000000400\n";

    #[test]
    fn fields_of_a_status_are_found_by_their_whole_name() {
        assert_eq!(field(STATUS, "Uid"), Some("1\t2\t3\t4"));
        assert_eq!(field(STATUS, "Ui"), None);
        assert!(holds(STATUS, "SigIgn", 10) && !holds(STATUS, "SigIgn", 6));
        assert!(!holds(STATUS, "SigBlk", 10));
    }

    #[test]
    fn a_file_that_does_not_open_says_why() {
        let access = Access::of("/proc/self/no-such-file", false);
        assert!(!access.opens && access.error.is_some());
        assert!(Access::of("/proc/self/maps", false).opens);
    }
}
