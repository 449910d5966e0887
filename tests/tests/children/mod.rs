//! Children of a test: made by fork, and looked at when they end.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::io::{Error, Read, Write};
use std::os::unix::net::UnixStream;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It found everything as it should be.
    Well,
    /// It did not.
    Badly(i32),
    /// By a signal.
    By(i32),
}

/// A child that may be told to go on.
pub(crate) struct Child {
    pid: i32,
    parents: UnixStream,
}

/// The child's end.
pub(crate) struct Go(UnixStream);

impl Go {
    /// Waits until the parent says so.
    pub(crate) fn wait(&self) {
        assert_eq!((&self.0).read(&mut [0]).unwrap(), 1);
    }
}

impl Child {
    /// Forks; the child ends with what `work` says.
    pub(crate) fn start(work: impl FnOnce(&Go) -> bool) -> Self {
        let (parents, childs) = UnixStream::pair().unwrap();
        // SAFETY: the child runs `work` alone and leaves by _exit.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: a hanging child ends by itself; core files are of no use.
                unsafe {
                    libc::alarm(50);
                    libc::prctl(libc::PR_SET_DUMPABLE, 1);
                    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                    libc::setrlimit(libc::RLIMIT_CORE, &none);
                }
                let go = Go(childs);
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&go)));
                let status = match done {
                    Ok(true) => 0,
                    Ok(false) => 1,
                    Err(_) => 2,
                };
                // SAFETY: ends the child without running the parent's exit handlers.
                unsafe { libc::_exit(status) }
            }
            -1 => panic!("fork: {}", Error::last_os_error()),
            pid => Self { pid, parents },
        }
    }

    pub(crate) fn go(&self) {
        (&self.parents).write_all(&[1]).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(self) -> Ended {
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(self.pid, &mut status, 0) }, self.pid);
        match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
            (true, 0) => Ended::Well,
            (true, status) => Ended::Badly(status),
            (false, _) => Ended::By(libc::WTERMSIG(status)),
        }
    }
}

/// Forks and waits for the child's end.
pub(crate) fn fork_and(work: impl FnOnce() -> bool) -> Ended {
    Child::start(|_| work()).end()
}

/// Every later fork of this process fails: the first process of its new pid namespace has ended.
pub(crate) fn forbid_forks() -> Result<(), Error> {
    // SAFETY: concerns only children; the one that is made leaves at once.
    unsafe {
        if libc::unshare(libc::CLONE_NEWPID) != 0 {
            return Err(Error::last_os_error());
        }
        let first = libc::fork();
        if first == 0 {
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(first, &mut status, 0), first);
    }
    Ok(())
}

/// Moves a mapping of whole pages; what is mapped at the new place goes.
pub(crate) fn move_mapping_to(from: u64, len: usize, to: u64) {
    let old = std::ptr::with_exposed_provenance_mut(from as usize);
    let new = std::ptr::with_exposed_provenance_mut::<libc::c_void>(to as usize);
    // SAFETY: both places are the test's own.
    let moved =
        unsafe { libc::mremap(old, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, new) };
    assert_eq!(moved, new, "{}", Error::last_os_error());
}
