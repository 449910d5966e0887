//! The kernel's ABI of `PAGEMAP_SCAN` and `PROCMAP_QUERY`: structures, numbers, thin ioctl calls.
//!
//! Written from the headers' facts rather than taken from the system, whose headers may be older than its kernel.

use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, Updater, opcode};
use std::ffi::c_void;

pub(super) const PAGE_IS_FILE: u64 = 1 << 2;
pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub(super) const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub(super) const PAGE_IS_HUGE: u64 = 1 << 6;

pub(super) const VMA_READABLE: u64 = 1 << 0;
pub(super) const VMA_WRITABLE: u64 = 1 << 1;
pub(super) const VMA_EXECUTABLE: u64 = 1 << 2;
pub(super) const VMA_SHARED: u64 = 1 << 3;
pub(super) const VMA_COVERING_OR_NEXT: u64 = 1 << 4;

#[repr(C)]
#[derive(Default)]
pub(super) struct ScanRequest {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) walk_end: u64,
    pub(super) regions: u64,
    pub(super) regions_len: u64,
    pub(super) max_pages: u64,
    pub(super) category_inverted: u64,
    pub(super) category_mask: u64,
    pub(super) category_any_of: u64,
    pub(super) return_mask: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
pub(super) struct ScanRegion {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) categories: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct VmaQuery {
    pub(super) size: u64,
    pub(super) flags: u64,
    pub(super) address: u64,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) vma_flags: u64,
    pub(super) page_size: u64,
    pub(super) offset: u64,
    pub(super) inode: u64,
    pub(super) device_major: u32,
    pub(super) device_minor: u32,
    pub(super) name_size: u32,
    pub(super) build_id_size: u32,
    pub(super) name: u64,
    pub(super) build_id: u64,
}

const _: () = {
    assert!(size_of::<ScanRequest>() == 96);
    assert!(size_of::<ScanRegion>() == 24);
    assert!(size_of::<VmaQuery>() == 104);
};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<ScanRequest>(b'f', 16);
const PROCMAP_QUERY: Opcode = opcode::read_write::<VmaQuery>(b'f', 17);

/// `PROCMAP_QUERY`.
pub(super) fn vma_query(fd: impl AsFd, request: &mut VmaQuery) -> Result<(), Errno> {
    // SAFETY: the number belongs to this structure (its size is part of it), which lives during the call; the kernel
    // checks the address of the name in it.
    unsafe { ioctl::ioctl(fd, Updater::<'_, { PROCMAP_QUERY }, VmaQuery>::new(request)) }
}

/// Returns the number of regions stored.
struct Scan<'a>(&'a mut ScanRequest);

// SAFETY: the number belongs to the structure; the kernel updates it and returns a count.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }
    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(output).unwrap_or(0))
    }
}

/// `PAGEMAP_SCAN` into `regions`.
pub(super) fn pagemap_scan(
    fd: impl AsFd,
    request: &mut ScanRequest,
    regions: &mut [ScanRegion],
) -> Result<usize, Errno> {
    request.size = size_of::<ScanRequest>() as u64;
    request.regions = regions.as_mut_ptr().expose_provenance() as u64;
    request.regions_len = regions.len() as u64;
    // SAFETY: `regions` is writable for `regions_len` elements during the call.
    unsafe { ioctl::ioctl(fd, Scan(request)) }
}
