//! One error type, one table to errno. Every error names the address, what was tried, and what to do.

use crate::addr::VirtAddr;

/// Result of the library's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and (in the text) what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A bad argument; nothing was changed. `EINVAL`
    #[error("invalid argument at {address}: {what}")]
    Invalid {
        /// The address concerned.
        address: VirtAddr,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Nothing is mapped there, or the access is impossible. `EFAULT`
    #[error("bad address {address}: {what}")]
    Fault {
        /// The address concerned.
        address: VirtAddr,
        /// What failed.
        what: &'static str,
    },
    /// The protection of the mapping forbids it. `EPERM`
    #[error("not permitted at {address}: {what}")]
    Permission {
        /// The address concerned.
        address: VirtAddr,
        /// What the mapping lacks.
        what: &'static str,
    },
    /// It is in use, or kept changing for longer than the deadline; try again. `EBUSY`
    #[error("busy at {address}: {what}")]
    Busy {
        /// The address concerned.
        address: VirtAddr,
        /// What was awaited.
        what: &'static str,
    },
    /// No memory, or a fixed bound of the library was reached. `ENOMEM`
    #[error("out of memory: {what}")]
    NoMemory {
        /// Which memory or bound.
        what: &'static str,
    },
    /// This engine, kernel or version of the library cannot do it. `EOPNOTSUPP`
    #[error("not supported: {what}")]
    Unsupported {
        /// What is missing, and what would help.
        what: String,
    },
    /// The call would wait for itself (made from inside a callback it waits for). `EDEADLK`
    #[error("would deadlock: {what}")]
    Deadlock {
        /// Which wait.
        what: &'static str,
    },
    /// The mm was closed, or belongs to the parent of this process. `ENODEV`
    #[error("gone: {what}")]
    Gone {
        /// What is gone.
        what: &'static str,
    },
    /// The device lost the data of that page. `EIO`
    #[error("data lost at {address}: {what}")]
    Lost {
        /// The page.
        address: VirtAddr,
        /// How.
        what: &'static str,
    },
    /// The library's own accounts contradict one another: a bug of the library, or of a driver. `EUCLEAN`
    #[error("inconsistent: {what}")]
    Inconsistent {
        /// What differs from what.
        what: String,
    },
    /// A system call failed.
    #[error("{call} failed at {address} with errno {errno}")]
    Os {
        /// The system call or ioctl.
        call: &'static str,
        /// The address concerned.
        address: VirtAddr,
        /// The kernel's errno.
        errno: i32,
    },
}

impl Error {
    pub(crate) fn invalid(address: u64, what: &'static str) -> Self {
        Self::Invalid { address: VirtAddr::new(address), what }
    }

    pub(crate) fn os(call: &'static str, address: VirtAddr, errno: rustix::io::Errno) -> Self {
        Self::Os { call, address, errno: errno.raw_os_error() }
    }

    /// The errno that stands for this error in C (positive).
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid { .. } => libc::EINVAL,
            Self::Fault { .. } => libc::EFAULT,
            Self::Permission { .. } => libc::EPERM,
            Self::Busy { .. } => libc::EBUSY,
            Self::NoMemory { .. } => libc::ENOMEM,
            Self::Unsupported { .. } => libc::EOPNOTSUPP,
            Self::Deadlock { .. } => libc::EDEADLK,
            Self::Gone { .. } => libc::ENODEV,
            Self::Lost { .. } => libc::EIO,
            Self::Inconsistent { .. } => libc::EUCLEAN,
            Self::Os { errno, .. } => *errno,
        }
    }
}
