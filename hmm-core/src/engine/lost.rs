//! SIGBUS for who touches a page that its device lost, where the kernel cannot be asked to send it.

use crate::addr::VirtAddr;

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

/// Sends SIGBUS with an address to a thread of this process. A signal that cannot be sent ends the process: the toucher
/// would touch for ever.
pub(super) fn send(thread: u32, addr: VirtAddr) {
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
