//! Opening a userfaultfd: the ways in their order, the features, and why not.

use super::abi::{self, ApiRequest, feature};
use crate::error::{Error, Result};
use once_cell::sync::OnceCell;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;

/// Without these the engine cannot work.
const REQUIRED: [(u64, &str); 5] = [
    (feature::EVENT_REMAP, "EVENT_REMAP (Linux 4.11)"),
    (feature::EVENT_REMOVE, "EVENT_REMOVE (Linux 4.11)"),
    (feature::EVENT_UNMAP, "EVENT_UNMAP (Linux 4.11)"),
    (feature::WP_ASYNC | feature::WP_UNPOPULATED, "WP_ASYNC (Linux 6.7)"),
    (feature::MOVE, "MOVE (Linux 6.8)"),
];
const WANTED: u64 = feature::PAGEFAULT_FLAG_WP | feature::THREAD_ID | feature::POISON;

/// What this kernel offers; asked once for the process, on a descriptor of its own.
static OFFERED: OnceCell<u64> = OnceCell::new();

/// A userfaultfd that serves the kernel's own accesses too, and the features it has.
pub(super) fn open() -> Result<(OwnedFd, u64)> {
    refuse_valgrind()?;
    let offered = *OFFERED.get_or_try_init(probe)?;
    let mut features = offered & WANTED;
    for (bits, name) in REQUIRED {
        if offered & bits != bits {
            return Err(Error::Unsupported {
                what: format!(
                    "userfaultfd of this kernel lacks {name}; a kernel from 6.8 on has all"
                ),
            });
        }
        features |= bits;
    }
    let descriptor = open_any()?;
    let mut request = ApiRequest { api: abi::API, features, ioctls: 0 };
    abi::api(&descriptor, &mut request).map_err(|errno| refused("UFFDIO_API", errno))?;
    Ok((descriptor, features))
}

fn probe() -> Result<u64> {
    let descriptor = open_any()?;
    let mut request = ApiRequest { api: abi::API, ..ApiRequest::default() };
    abi::api(&descriptor, &mut request).map_err(|errno| refused("UFFDIO_API", errno))?;
    Ok(request.features)
}

/// The device node, then the system call. Every refusal moves on to the next way; the reasons are kept.
fn open_any() -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let options = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits();
    let by_node = rustix::fs::open("/dev/userfaultfd", flags, Mode::empty())
        .and_then(|node| abi::new_descriptor(&node, options));
    let node_errno = match by_node {
        Ok(descriptor) => return Ok(descriptor),
        Err(errno) => errno,
    };
    let flags = UserfaultfdFlags::NONBLOCK | UserfaultfdFlags::CLOEXEC;
    // SAFETY: a descriptor alone changes nothing; ranges are registered one by one later.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(descriptor) => Ok(descriptor),
        Err(call_errno) => Err(Error::Unsupported {
            what: format!(
                "userfaultfd is refused: /dev/userfaultfd says {node_errno}, the system call says {call_errno}; \
                 give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1, or allow userfaultfd in the \
                 container's seccomp profile (this version has no engine that does without)"
            ),
        }),
    }
}

fn refused(call: &'static str, errno: Errno) -> Error {
    Error::Unsupported { what: format!("{call} fails with {errno}") }
}

/// Under Valgrind the first fault would hang: the toucher sleeps in the kernel with Valgrind's big lock held.
fn refuse_valgrind() -> Result<()> {
    let preloaded = std::env::var_os("LD_PRELOAD").unwrap_or_default();
    if preloaded.to_string_lossy().contains("vgpreload") {
        let what = "userfaultfd does not work under Valgrind; use the model engine".into();
        return Err(Error::Unsupported { what });
    }
    Ok(())
}
