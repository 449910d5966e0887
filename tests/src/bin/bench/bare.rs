//! The baseline of fault latency: the least that a blocking userfaultfd with a thread per core can do.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const COPY: libc::c_ulong = 0xc028_aa03;
const PAGE: u64 = 4096;

/// Threads that fill absent pages of registered ranges from one buffer. They serve until the process ends.
pub(crate) struct BareLoop {
    descriptor: Arc<OwnedFd>,
}

fn ioctl<T>(descriptor: &OwnedFd, number: libc::c_ulong, request: &mut T) -> i32 {
    // SAFETY: the callers pass the structure that belongs to the number.
    unsafe { libc::ioctl(descriptor.as_raw_fd(), number, std::ptr::from_mut(request)) }
}

fn pin_to(cpu: usize) {
    // SAFETY: a zeroed set is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is below the set's size.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: the set is initialised.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}

impl BareLoop {
    /// `None` where userfaultfd is refused.
    pub(crate) fn new() -> Option<Self> {
        const USER_MODE_ONLY: i32 = 1;
        let open = |flags: i32| {
            // SAFETY: the call has no pointers; the result is checked.
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) }
        };
        let fd = [0, USER_MODE_ONLY].map(open).into_iter().find(|fd| *fd >= 0)?;
        // SAFETY: a new descriptor that nobody else owns.
        let descriptor = Arc::new(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        assert_eq!(ioctl(&descriptor, API, &mut [0xaa_u64, 0, 0]), 0);
        for cpu in 0..std::thread::available_parallelism().unwrap().get() {
            let descriptor = Arc::clone(&descriptor);
            std::thread::spawn(move || serve(cpu, &descriptor));
        }
        Some(Self { descriptor })
    }

    /// From now on the absent pages of the range are served; unmapping it ends that.
    pub(crate) fn register(&self, addr: u64, len: u64) {
        assert_eq!(ioctl(&self.descriptor, REGISTER, &mut [addr, len, 1, 0]), 0);
    }
}

fn serve(cpu: usize, descriptor: &OwnedFd) {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    pin_to(cpu);
    let source = Page([7; 4096]);
    loop {
        let mut message = [0_u64; 4];
        // SAFETY: the buffer has room for one message of 32 bytes.
        let count = unsafe {
            libc::read(descriptor.as_raw_fd(), message.as_mut_ptr().cast(), size_of_val(&message))
        };
        if count == 32 {
            let page = message[2] & !(PAGE - 1);
            let mut copy = [page, source.0.as_ptr().addr() as u64, PAGE, 0, 0];
            ioctl(descriptor, COPY, &mut copy);
        }
    }
}
