//! SIGBUS for who touches a page that its device lost, where the kernel cannot be asked to send it.

use crate::addr::VirtAddr;
use rustix::fs::{Mode, OFlags};
use std::ffi::CStr;
use std::io::Write;

/// `si_code` of the kernel's own memory failures.
const BUS_MCEERR_AR: i32 = 4;

/// A `siginfo_t` as the kernel has it for SIGBUS.
#[repr(C)]
struct Info {
    signal: i32,
    errno: i32,
    code: i32,
    padding: i32,
    addr: u64,
    rest: [u64; 13],
}

/// Sends SIGBUS with an address to a thread of this process. Where the signal cannot be sent, or the thread blocks it, the
/// process ends, as it does when the kernel has such a signal to deliver: the toucher would wait for ever.
pub(super) fn send(thread: u32, addr: VirtAddr) {
    if thread != super::threads::id() && is_blocked(thread) {
        std::process::abort();
    }
    // The kernel lets nobody send another thread what only the kernel itself sends.
    let code = if thread == super::threads::id() { BUS_MCEERR_AR } else { libc::SI_QUEUE };
    let info =
        Info { signal: libc::SIGBUS, errno: 0, code, padding: 0, addr: addr.get(), rest: [0; 13] };
    const { assert!(size_of::<Info>() == size_of::<libc::siginfo_t>()) };
    // SAFETY: the structure has the kernel's form; a process may send itself such a signal.
    let sent = unsafe {
        let process = libc::getpid();
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, process, thread, libc::SIGBUS, &raw const info)
    };
    let gone = std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
    if sent != 0 && !gone {
        std::process::abort();
    }
}

/// Whether a thread blocks SIGBUS. Without `/proc` it is taken for no.
fn is_blocked(thread: u32) -> bool {
    const NAME: &str = "SigBlk:\t";
    let mut path = [0_u8; 48];
    let _ = write!(&mut path[..], "/proc/self/task/{thread}/status");
    let Ok(path) = CStr::from_bytes_until_nul(&path) else { return false };
    let Ok(file) = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return false;
    };
    let mut text = [0_u8; 4096];
    let count = rustix::io::read(&file, &mut text[..]).unwrap_or(0);
    let text = str::from_utf8(&text[..count]).unwrap_or_default();
    let mask = text.split_once(NAME).and_then(|(_, rest)| rest.get(..16));
    let mask = mask.and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or(0);
    mask & 1 << (libc::SIGBUS - 1) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::threads;

    #[test]
    fn a_blocked_signal_is_seen() {
        assert!(!is_blocked(threads::id()));
        // SAFETY: the set is initialised before it is used, and the mask is this thread's alone.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        }
        assert!(is_blocked(threads::id()));
        assert!(!is_blocked(u32::MAX));
    }
}
