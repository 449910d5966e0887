//! Opening a userfaultfd: the ways in their order, the features, and why not.

use super::abi::{self, ApiRequest, feature};
use crate::error::{Error, Result};
use once_cell::sync::OnceCell;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

/// Features by the names that people use, and the kernel that brought them.
const NAMES: [(&str, u64, &str); 9] = [
    ("wp", feature::PAGEFAULT_FLAG_WP, "5.7"),
    ("events", EVENTS, "4.11"),
    ("remap", feature::EVENT_REMAP, "4.11"),
    ("remove", feature::EVENT_REMOVE, "4.11"),
    ("unmap", feature::EVENT_UNMAP, "4.11"),
    ("sigbus", feature::SIGBUS, "4.14"),
    ("poison", feature::POISON, "6.6"),
    ("wp_async", feature::WP_ASYNC | feature::WP_UNPOPULATED, "6.7"),
    ("move", feature::MOVE, "6.8"),
];
const EVENTS: u64 = feature::EVENT_REMAP | feature::EVENT_REMOVE | feature::EVENT_UNMAP;
const ASYNC: u64 = feature::WP_ASYNC | feature::WP_UNPOPULATED;
const WANTED: u64 = feature::THREAD_ID | feature::POISON | EVENTS;
/// `HMM_UFFD_DISABLE`: features that are not used although the kernel has them, for tests.
const MASK: &str = "HMM_UFFD_DISABLE";

/// What this kernel offers; asked once for the process, on a descriptor of its own.
static OFFERED: OnceCell<u64> = OnceCell::new();

/// Who answers faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Service threads, which read them; the kernel's own accesses wait too.
    Blocking,
    /// The toucher, in a handler of SIGBUS.
    Inline,
}

/// A descriptor, and what it can do.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) descriptor: OwnedFd,
    pub(super) features: u64,
}

/// A userfaultfd for a mode.
pub(super) fn open(mode: Mode) -> Result<Opened> {
    refuse_valgrind()?;
    let offered = *OFFERED.get_or_try_init(probe)? & !masked()?;
    let features = choose(offered, mode)?;
    let descriptor = match mode {
        Mode::Blocking => open_full()?,
        // What serves the kernel is as good, and the only thing that old kernels know.
        Mode::Inline => open_user_mode().or_else(|_| open_full())?,
    };
    let mut request = ApiRequest { api: abi::API, features, ioctls: 0 };
    abi::api(&descriptor, &mut request).map_err(|errno| refused("UFFDIO_API", errno))?;
    Ok(Opened { descriptor, features })
}

/// The features to ask for, of those that are there.
fn choose(offered: u64, mode: Mode) -> Result<u64> {
    let lacks = |bits: u64| offered & bits != bits;
    let missing = |what: &str| {
        Err(Error::Unsupported {
            what: format!(
                "userfaultfd lacks {what} (the kernel, or {MASK}); 6.8 and later have all"
            ),
        })
    };
    if lacks(EVENTS) {
        return missing("EVENT_REMAP, EVENT_REMOVE or EVENT_UNMAP (Linux 4.11)");
    }
    if mode == Mode::Inline && lacks(feature::SIGBUS) {
        return missing("SIGBUS (Linux 4.14)");
    }
    let mut features = offered & WANTED;
    if mode == Mode::Inline {
        features |= feature::SIGBUS;
    }
    if !lacks(feature::MOVE) {
        features |= feature::MOVE | offered & feature::PAGEFAULT_FLAG_WP;
        let asynchronous = ASYNC | feature::PAGEFAULT_FLAG_WP;
        return Ok(if lacks(asynchronous) { features } else { features | ASYNC });
    }
    // Without MOVE, stores must wait while a page is copied: asynchronous write-protection would let them through.
    if lacks(feature::PAGEFAULT_FLAG_WP) {
        return missing("both MOVE (Linux 6.8) and write-protection (Linux 5.7)");
    }
    Ok(features | feature::PAGEFAULT_FLAG_WP)
}

fn probe() -> Result<u64> {
    let descriptor = open_full().or_else(|full| open_user_mode().map_err(|_| full))?;
    let mut request = ApiRequest { api: abi::API, ..ApiRequest::default() };
    abi::api(&descriptor, &mut request).map_err(|errno| refused("UFFDIO_API", errno))?;
    Ok(request.features)
}

fn masked() -> Result<u64> {
    let list = std::env::var(MASK).unwrap_or_default();
    let mut mask = 0;
    for name in list.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let known = NAMES.iter().find(|one| one.0 == name).ok_or_else(|| {
            let names: Vec<_> = NAMES.iter().map(|one| one.0).collect();
            Error::Unsupported { what: format!("{MASK}={name}: unknown feature; one of {names:?}") }
        })?;
        mask |= known.1;
    }
    Ok(mask)
}

/// The device node, then the system call. Every refusal moves on to the next way; the reasons are kept.
fn open_full() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let options = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits();
    let by_node = rustix::fs::open("/dev/userfaultfd", flags, rustix::fs::Mode::empty())
        .and_then(|node| abi::new_descriptor(&node, options));
    let node_errno = match by_node {
        Ok(descriptor) => return Ok(descriptor),
        Err(errno) => errno,
    };
    call(UserfaultfdFlags::empty()).map_err(|call_errno| Error::Unsupported {
        what: format!(
            "userfaultfd is refused: /dev/userfaultfd says {node_errno}, the system call says {call_errno}; give \
             access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1, or allow userfaultfd in the \
             container's seccomp profile"
        ),
    })
}

/// For faults of user code alone: needs no privilege (Linux 5.11).
fn open_user_mode() -> Result<OwnedFd> {
    /// `UFFD_USER_MODE_ONLY`
    const USER_MODE_ONLY: u32 = 1;
    call(UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY))
        .map_err(|errno| refused("userfaultfd(UFFD_USER_MODE_ONLY)", errno))
}

fn call(flags: UserfaultfdFlags) -> std::result::Result<OwnedFd, Errno> {
    let flags = flags | UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::CLOEXEC;
    // SAFETY: a descriptor alone changes nothing; ranges are registered one by one later.
    unsafe { rustix::mm::userfaultfd(flags) }
}

fn refused(call: &'static str, errno: Errno) -> Error {
    Error::Unsupported { what: format!("{call} fails with {errno}") }
}

/// Under Valgrind the first fault would hang: the toucher sleeps in the kernel with Valgrind's big lock held.
fn refuse_valgrind() -> Result<()> {
    if crate::engine::under_valgrind() {
        let what = "userfaultfd does not work under Valgrind".into();
        return Err(Error::Unsupported { what });
    }
    Ok(())
}

/// A feature of userfaultfd, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Its name, as in `HMM_UFFD_DISABLE`.
    pub name: &'static str,
    /// The kernel that brought it.
    pub since: &'static str,
    /// This kernel has it.
    pub offered: bool,
    /// `HMM_UFFD_DISABLE` names it.
    pub masked: bool,
}

/// What this kernel offers.
///
/// # Errors
/// `Unsupported` when no userfaultfd can be opened, or `HMM_UFFD_DISABLE` names what does not exist.
pub fn features() -> Result<Vec<Feature>> {
    let (offered, masked) = (*OFFERED.get_or_try_init(probe)?, masked()?);
    let feature = |(name, bits, since): &(&'static str, u64, &'static str)| Feature {
        name,
        since,
        offered: offered & bits == *bits,
        masked: masked & bits != 0,
    };
    Ok(NAMES.iter().map(feature).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = 0x1ffff;

    #[test]
    fn features_are_chosen_so_that_no_store_is_lost() {
        let with = |gone: u64| choose(ALL & !gone, Mode::Blocking);
        assert_eq!(with(0).unwrap() & (feature::MOVE | ASYNC), feature::MOVE | ASYNC);
        assert_eq!(with(0).unwrap() & feature::SIGBUS, 0);
        let copying = with(feature::MOVE).unwrap();
        assert_eq!(copying & (feature::MOVE | feature::WP_ASYNC), 0);
        assert_ne!(copying & feature::PAGEFAULT_FLAG_WP, 0);
        assert_eq!(with(feature::WP_ASYNC).unwrap() & ASYNC, 0);
        assert!(with(feature::MOVE | feature::PAGEFAULT_FLAG_WP).is_err());
        assert!(with(feature::EVENT_REMOVE).is_err());
        assert!(choose(ALL & !feature::SIGBUS, Mode::Inline).is_err());
        assert_ne!(choose(ALL, Mode::Inline).unwrap() & feature::SIGBUS, 0);
    }
}
