//! Reaching this process's memory through the kernel: accesses that never run a signal handler, and system calls that
//! make pages present.

use crate::addr::{AddrRange, LEAF_SIZE, VirtAddr};
use crate::error::{Error, Result};
use crate::inject::{self, Point};
use crate::limits::DEADLINE;
use crate::sync::yield_now;
use once_cell::sync::OnceCell;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MsyncFlags, ProtFlags};
use std::time::Instant;

/// So often a write is tried that the kernel refuses.
const WRITES: usize = 64;

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
        inject::checked(Point::Memory).is_ok()
            && rustix::io::pread(&self.0, &mut *out, addr.get()) == Ok(out.len())
    }

    /// Writes bytes, whatever the protection says; false when some page is not there (earlier ones may be written).
    pub(in crate::engine) fn poke(&self, addr: VirtAddr, data: &[u8]) -> bool {
        inject::checked(Point::Memory).is_ok()
            && rustix::io::pwrite(&self.0, data, addr.get()) == Ok(data.len())
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

/// Makes pages present as accesses would: by `MADV_POPULATE` (Linux 5.14), else page by page.
///
/// # Errors
/// `Fault` or `Permission` as the access would fail.
pub(in crate::engine) fn populate(range: AddrRange, write: bool) -> Result<()> {
    let refused = |errno| Error::os("populate", range.start(), errno);
    inject::checked(Point::Populate).map_err(refused)?;
    if !can_populate() {
        return touch_all(range, write);
    }
    let advice = if write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
    let deadline = Instant::now() + DEADLINE;
    loop {
        let address = range.start();
        return match advise(range, advice) {
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

fn advise(range: AddrRange, advice: Advice) -> std::result::Result<(), Errno> {
    let start = range.start().as_ptr().cast();
    // SAFETY: populating changes no contents, and what is dropped (in a child: after a fork) is frames that nobody needs,
    // or pages whose contents the caller copied. The kernel checks the range.
    unsafe { rustix::mm::madvise(start, range.len() as usize, advice) }
}

/// Whether this kernel has `MADV_POPULATE`: tried on a page that is there.
fn can_populate() -> bool {
    static KNOWN: OnceCell<bool> = OnceCell::new();
    *KNOWN.get_or_init(|| {
        let here = 0_u8;
        let page = AddrRange::page_of(VirtAddr::from_ptr(&raw const here));
        advise(page, Advice::LinuxPopulateRead).is_ok()
    })
}

/// Touches each page by a system call, which fails where an access would kill.
fn touch_all(range: AddrRange, write: bool) -> Result<()> {
    for address in (0..range.pages()).map(|page| range.page_at(page)) {
        match if write { write_to(address) } else { touch(address, false) } {
            Ok(()) => {}
            Err(Errno::FAULT) if write && touch(address, false).is_ok() => {
                return Err(Error::Permission { address, what: "the mapping forbids the access" });
            }
            Err(Errno::FAULT) => {
                return Err(Error::Fault { address, what: "the page cannot be had" });
            }
            Err(errno) => return Err(Error::os("futex", address, errno)),
        }
    }
    Ok(())
}

/// Touches a page for a write. The kernel does not wait for userfaultfd in an atomic operation: it says `EFAULT` where the
/// page is away, which a read brings, and where stores have to wait for a moment.
fn write_to(address: VirtAddr) -> std::result::Result<(), Errno> {
    let mut result = touch(address, true);
    for attempt in 1..WRITES {
        if result != Err(Errno::FAULT) {
            break;
        }
        if attempt > 1 {
            yield_now();
        }
        result = touch(address, false).and_then(|()| touch(address, true));
    }
    result
}

/// Reads a word, or adds nothing to it atomically: what `futex` does with a word that nobody waits for.
fn touch(address: VirtAddr, write: bool) -> std::result::Result<(), Errno> {
    /// `FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_LT, -2048)`: wakes hardly anybody, and too often is allowed.
    const ADD_NOTHING: u32 = (1 << 28) | (2 << 24) | 0x800;
    let word: *mut u32 = address.as_ptr().cast();
    let mut nobody = 0_u32;
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the word is a part of the process whose value does not change; the other one is a variable of this
    // function, and so is the time.
    let done = unsafe {
        if write {
            let wake = libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG;
            libc::syscall(libc::SYS_futex, &raw mut nobody, wake, 0, 0_usize, word, ADD_NOTHING)
        } else {
            let wait = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
            libc::syscall(libc::SYS_futex, word, wait, 0, &raw const now, 0_usize, 0)
        }
    };
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    match (done, errno) {
        (0.., _) | (_, libc::EAGAIN | libc::ETIMEDOUT | libc::EINTR) => Ok(()),
        (_, errno) => Err(Errno::from_raw_os_error(errno)),
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
        // A child of fork has no use for what is in there, and would count it as its own. Linux 4.14.
        let _ = advise(reserved.area, Advice::LinuxWipeOnFork);
        // A core dump would have a gigabyte of holes for the few frames that a migration holds at the time.
        let _ = advise(reserved.whole, Advice::LinuxDontDump);
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
    advise(range, Advice::LinuxDontNeed)
}

/// Whether some page of a range is locked in memory. Invalidating is nothing but this question to anonymous memory and
/// files alike.
pub(in crate::engine) fn is_locked(range: AddrRange) -> bool {
    let start = range.start().as_ptr().cast();
    // SAFETY: the call changes nothing, and checks the range.
    let asked = unsafe { rustix::mm::msync(start, range.len() as usize, MsyncFlags::INVALIDATE) };
    asked == Err(Errno::BUSY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn touching_makes_pages_present_and_fails_where_an_access_would() {
        let reserved = Reserved::new(8 * 4096).unwrap();
        let presence = crate::engine::linux::Presence::open();
        let count = || {
            let mut count = 0;
            let mut add = |run: AddrRange, state| {
                count += if state == crate::engine::Present::Page { run.pages() } else { 0 };
            };
            presence.scan(reserved.area, &mut add).unwrap();
            count
        };
        touch_all(reserved.area, false).unwrap();
        let read = count();
        if presence.way() != "PAGEMAP_SCAN" {
            // The older ways do not tell the page of zeros from others.
            assert_eq!(read, 8);
            return;
        }
        assert_eq!(read, 0, "reads map the page of zeros");
        touch_all(reserved.area.sub(2, 4), true).unwrap();
        assert_eq!(count(), 4);
        let beyond = VirtAddr::new(reserved.area.end().get() + LEAF_SIZE / 2);
        assert_eq!(touch(beyond, false), Err(Errno::FAULT));
        assert_eq!(touch(beyond, true), Err(Errno::FAULT));
    }
}
