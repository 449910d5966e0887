//! Runs a command in an environment that lacks something: system calls fail with a chosen errno, files cannot be
//! opened, the user is another one. What it takes away stays away from all children and threads of the command.
//!
//! It is for tests and protects nobody: a program that wants to get around it can.
#![expect(clippy::print_stdout, reason = "a command line program reports on standard output")]

mod child;
mod filter;
mod handover;
mod listener;
mod map_count;
mod options;
mod paths;
mod profiles;
mod supervisor;
mod syscalls;
mod user;

use options::Request;
use std::fmt;
use std::process::ExitCode;

/// Exit status when confine itself fails, as `env` and `timeout` have it.
const FAILED: u8 = 125;
/// Exit status when the command is there but cannot be run.
const CANNOT_RUN: u8 = 126;
/// Exit status when there is no such command.
const NOT_FOUND: u8 = 127;

/// Why the command was not run as asked.
#[derive(Debug)]
enum Failure {
    /// The command line makes no sense.
    Usage(String),
    /// This environment does not allow it. Tests read the words that are printed for it.
    Impossible(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(reason) => write!(f, "{reason} (confine --help tells the options)"),
            Self::Impossible(reason) => write!(f, "not possible here: {reason}"),
        }
    }
}

/// What an operation says, or why it cannot be done here.
type Result<T> = std::result::Result<T, Failure>;

/// A failed system call, with what it was for.
fn impossible(what: impl fmt::Display, error: &std::io::Error) -> Failure {
    Failure::Impossible(format!("{what}: {error}"))
}

/// The value of a system call that says -1 and sets errno when it fails.
fn checked<T: PartialEq + From<i8>>(value: T) -> std::io::Result<T> {
    if value == T::from(-1) { Err(std::io::Error::last_os_error()) } else { Ok(value) }
}

fn main() -> ExitCode {
    let words = std::env::args_os().skip(1).collect();
    let done = options::parse(words).and_then(|request| match request {
        Request::Help => {
            print!("{}", options::help());
            Ok(0)
        }
        Request::List => {
            print!("{}", options::list());
            Ok(0)
        }
        Request::Run(options) => supervisor::run(&options),
    });
    match done {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("confine: {failure}");
            ExitCode::from(FAILED)
        }
    }
}
