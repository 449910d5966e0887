//! Reaching this process's memory through the kernel: accesses that never run a signal handler, and system calls that
//! make pages present.

use crate::addr::{AddrRange, LEAF_SIZE, VirtAddr};
use crate::error::{Error, Result};
use crate::limits::DEADLINE;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::time::Instant;

/// `/proc/self/mem`: accesses that ignore protections and never wait for a userfault.
#[derive(Debug)]
pub(in crate::engine) struct Memory(OwnedFd);

impl Memory {
    /// # Errors
    /// `Os` where the file is not ours to open: a sandbox, or a process that is not dumpable.
    pub(in crate::engine) fn open() -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open("/proc/self/mem", flags, Mode::empty())
            .map(Self)
            .map_err(|errno| Error::os("open /proc/self/mem", VirtAddr::new(0), errno))
    }

    /// Reads bytes; false when some page is not there.
    pub(in crate::engine) fn peek(&self, addr: VirtAddr, out: &mut [u8]) -> bool {
        rustix::io::pread(&self.0, &mut *out, addr.get()) == Ok(out.len())
    }

    /// Writes bytes, whatever the protection says; false when some page is not there (earlier ones may be written).
    pub(in crate::engine) fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        rustix::io::pwrite(&self.0, data, addr.get()) == Ok(data.len())
    }

    /// Copies whole pages between two places of this process.
    pub(in crate::engine) fn copy_in(&self, pages: AddrRange, to: VirtAddr) -> bool {
        let to: *mut u8 = to.as_ptr();
        // SAFETY: the callers own the pages at `to`, as many as are asked for; nobody else looks at them now.
        let out = unsafe { std::slice::from_raw_parts_mut(to, pages.len() as usize) };
        self.peek(pages.start(), out)
    }

    /// Copies whole pages from a place that the caller owns.
    pub(in crate::engine) fn copy_out(&self, from: VirtAddr, pages: AddrRange) -> bool {
        let from: *const u8 = from.as_ptr();
        // SAFETY: the callers own the pages at `from`, and they are present.
        let data = unsafe { std::slice::from_raw_parts(from, pages.len() as usize) };
        self.poke(pages.start(), data)
    }
}

/// Makes pages present as accesses would (`MADV_POPULATE`).
///
/// # Errors
/// `Fault` or `Permission` as the access would fail.
pub(in crate::engine) fn populate(range: AddrRange, write: bool) -> Result<()> {
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    let deadline = Instant::now() + DEADLINE;
    loop {
        // SAFETY: populating changes no contents; the kernel checks the range.
        let done = unsafe {
            rustix::mm::madvise(range.start().as_ptr().cast(), range.len() as usize, advice)
        };
        let address = range.start();
        return match done {
            Ok(()) => Ok(()),
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => continue,
            Err(Errno::NOMEM) => Err(Error::Fault { address, what: "a part is not mapped" }),
            Err(Errno::INVAL) => {
                Err(Error::Permission { address, what: "the mapping forbids the access" })
            }
            Err(Errno::FAULT) => Err(Error::Fault { address, what: "the page cannot be had" }),
            Err(errno) => Err(Error::os("MADV_POPULATE", address, errno)),
        };
    }
}

/// Reads as a system call does. Returns the bytes read.
pub(in crate::engine) fn read(addr: VirtAddr, out: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote = libc::iovec { iov_base: addr.as_ptr().cast(), iov_len: out.len() };
    // SAFETY: `local` is `out`, writable; the kernel checks `remote`, which is only read.
    let count = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    transferred(count, addr, "nothing can be read there")
}

/// Writes as a system call does. Returns the bytes written.
pub(in crate::engine) fn write(addr: VirtAddr, data: &[u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let remote = libc::iovec { iov_base: addr.as_ptr().cast(), iov_len: data.len() };
    // SAFETY: `local` is `data`, only read; the kernel checks `remote`, memory that the caller asks to change.
    let count = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
    transferred(count, addr, "nothing can be written there")
}

/// A count of bytes as a result: none at all is a fault.
pub(in crate::engine) fn transferred(
    count: isize,
    address: VirtAddr,
    what: &'static str,
) -> Result<usize> {
    match usize::try_from(count) {
        Ok(0) | Err(_) => Err(Error::Fault { address, what }),
        Ok(count) => Ok(count),
    }
}

/// New private memory, 2 MiB aligned, that nothing has touched yet. What lies around it has no access, so that the kernel
/// never joins it to a neighbour, which may be watched. Unmapped when dropped.
#[derive(Debug)]
pub(in crate::engine) struct Reserved {
    pub(in crate::engine) area: AddrRange,
    whole: AddrRange,
}

impl Reserved {
    /// # Errors
    /// `NoMemory`.
    pub(in crate::engine) fn new(bytes: u64) -> Result<Self> {
        let no_memory = |_| Error::NoMemory { what: "address space for frames" };
        let length = bytes + 2 * LEAF_SIZE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapped = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length as usize,
                ProtFlags::empty(),
                flags,
            )
        };
        let base = mapped.map_err(no_memory)?.expose_provenance() as u64;
        let whole = AddrRange::new(base, base + length)?;
        let start = (base + 1).next_multiple_of(LEAF_SIZE);
        let reserved = Self { area: AddrRange::new(start, start + bytes)?, whole };
        let (start, access) =
            (reserved.area.start().as_ptr().cast(), MprotectFlags::READ | MprotectFlags::WRITE);
        // SAFETY: the area lies inside the new mapping.
        unsafe { rustix::mm::mprotect(start, bytes as usize, access) }.map_err(no_memory)?;
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let start = self.whole.start().as_ptr().cast();
        // SAFETY: the mapping is this value's own, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(start, self.whole.len() as usize) };
    }
}

/// Frees the pages of a range; they read as zeros afterwards.
///
/// # Errors
/// The kernel's errno.
pub(in crate::engine) fn drop_pages(range: AddrRange) -> std::result::Result<(), Errno> {
    let start = range.start().as_ptr().cast();
    // SAFETY: the callers pass frames that nobody needs, or pages whose contents they have copied.
    unsafe { rustix::mm::madvise(start, range.len() as usize, Advice::LinuxDontNeed) }
}
