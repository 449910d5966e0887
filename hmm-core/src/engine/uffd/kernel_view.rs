//! What the kernel says about this process: mappings and present pages.

use super::abi::{self, ScanRegion, ScanRequest, VmaQuery};
use crate::addr::{AddrRange, PAGE_SIZE, USER_END, VirtAddr};
use crate::engine::{Mapping, Present, VmaKind};
use crate::error::{Error, Result};
use crate::flags::Protection;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};

/// Regions asked for at once.
const REGIONS: usize = 64;
const NAME: usize = 64;

/// Open files of `/proc/self`.
#[derive(Debug)]
pub(super) struct KernelView {
    maps: OwnedFd,
    pagemap: OwnedFd,
    memory: OwnedFd,
    /// `PROCMAP_QUERY` is missing (before Linux 6.11): parse the text.
    parse_maps: AtomicBool,
}

fn open(path: &'static str, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::os(path, VirtAddr::new(0), errno))
}

impl KernelView {
    pub(super) fn open() -> Result<Self> {
        Ok(Self {
            maps: open("/proc/self/maps", OFlags::RDONLY)?,
            pagemap: open("/proc/self/pagemap", OFlags::RDONLY)?,
            memory: open("/proc/self/mem", OFlags::RDWR)?,
            parse_maps: AtomicBool::new(false),
        })
    }

    /// `/proc/self/mem`: accesses that never wait for a userfault.
    pub(super) fn memory(&self) -> &OwnedFd {
        &self.memory
    }

    /// The first mapping that ends above `addr`.
    pub(super) fn mapping_at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        if addr.get() >= USER_END {
            return Ok(None);
        }
        if !self.parse_maps.load(Ordering::Relaxed) {
            match self.query(addr) {
                Err(Errno::NOTTY) => self.parse_maps.store(true, Ordering::Relaxed),
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(Error::os("PROCMAP_QUERY", addr, errno)),
                Ok(mapping) => return Ok(mapping),
            }
        }
        parse_maps(addr)
    }

    fn query(&self, addr: VirtAddr) -> std::result::Result<Option<Mapping>, Errno> {
        let mut query = VmaQuery {
            size: size_of::<VmaQuery>() as u64,
            flags: abi::VMA_COVERING_OR_NEXT,
            address: addr.get(),
            ..VmaQuery::default()
        };
        abi::vma_query(&self.maps, &mut query)?;
        let mut kind = kind_of(&query);
        if kind == VmaKind::Anonymous && query.vma_flags & abi::VMA_WRITABLE == 0 {
            // [vvar] and [vdso] look anonymous; only their names tell.
            kind = self.kind_by_name(addr);
        }
        let identity = query.inode ^ (u64::from(query.device_major) << 48);
        let identity = identity ^ (u64::from(query.device_minor) << 32);
        Ok(mapping(query.start, query.end, protection_of(query.vma_flags), kind, identity))
    }

    fn kind_by_name(&self, addr: VirtAddr) -> VmaKind {
        let mut name = [0_u8; NAME];
        let mut query = VmaQuery {
            size: size_of::<VmaQuery>() as u64,
            flags: abi::VMA_COVERING_OR_NEXT,
            address: addr.get(),
            name_size: NAME as u32,
            name: name.as_mut_ptr().expose_provenance() as u64,
            ..VmaQuery::default()
        };
        if abi::vma_query(&self.maps, &mut query).is_ok() && is_special(&name) {
            return VmaKind::Special;
        }
        VmaKind::Anonymous
    }

    /// Runs of equal state that together cover the range.
    pub(super) fn scan(
        &self,
        range: AddrRange,
        report: &mut dyn FnMut(AddrRange, Present),
    ) -> Result<()> {
        let mut regions = [ScanRegion::default(); REGIONS];
        let mut next = range.start().get();
        while next < range.end().get() {
            let mut request = ScanRequest {
                start: next,
                end: range.end().get(),
                category_any_of: abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED,
                return_mask: abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED | abi::PAGE_IS_PFNZERO,
                ..ScanRequest::default()
            };
            let count = abi::pagemap_scan(&self.pagemap, &mut request, &mut regions)
                .map_err(|errno| Error::os("PAGEMAP_SCAN", range.start(), errno))?;
            for region in regions.iter().take(count) {
                if next < region.start {
                    report(AddrRange::from_bounds(next, region.start), Present::None);
                }
                report(AddrRange::from_bounds(region.start, region.end), present(region));
                next = region.end;
            }
            let walked = if count < REGIONS { range.end().get() } else { request.walk_end };
            if next < walked {
                report(AddrRange::from_bounds(next, walked), Present::None);
                next = walked;
            }
        }
        Ok(())
    }
}

fn present(region: &ScanRegion) -> Present {
    if region.categories & abi::PAGE_IS_PFNZERO != 0 {
        Present::Zero
    } else if region.categories & abi::PAGE_IS_PRESENT != 0 {
        Present::Page
    } else {
        Present::Swapped
    }
}

fn kind_of(query: &VmaQuery) -> VmaKind {
    let shared = query.vma_flags & abi::VMA_SHARED != 0;
    match (query.inode, shared) {
        _ if query.page_size > PAGE_SIZE as u64 => VmaKind::Huge,
        (0, false) => VmaKind::Anonymous,
        (_, true) if query.device_major == 0 => VmaKind::Shared,
        (_, true) => VmaKind::SharedFile,
        (_, false) => VmaKind::PrivateFile,
    }
}

fn protection_of(flags: u64) -> Protection {
    let mut protection = Protection::empty();
    protection.set(Protection::READ, flags & abi::VMA_READABLE != 0);
    protection.set(Protection::WRITE, flags & abi::VMA_WRITABLE != 0);
    protection.set(Protection::EXEC, flags & abi::VMA_EXECUTABLE != 0);
    protection
}

fn is_special(name: &[u8]) -> bool {
    [&b"[vvar"[..], b"[vdso]", b"[vsyscall]"].iter().any(|special| name.starts_with(special))
}

/// Mappings above the managed addresses are left out.
fn mapping(
    start: u64,
    end: u64,
    protection: Protection,
    kind: VmaKind,
    identity: u64,
) -> Option<Mapping> {
    let range = AddrRange::new(start, end.min(USER_END)).ok()?;
    Some(Mapping { range, protection, kind, identity })
}

/// Slow, and it allocates: only for kernels before 6.11.
fn parse_maps(addr: VirtAddr) -> Result<Option<Mapping>> {
    let fail = |error: std::io::Error| Error::Os {
        call: "/proc/self/maps",
        address: addr,
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    };
    for line in BufReader::new(std::fs::File::open("/proc/self/maps").map_err(fail)?).lines() {
        let line = line.map_err(fail)?;
        if let Some(found) = parse_line(&line)
            && found.range.end() > addr
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let flags = fields.next()?.as_bytes();
    let (device, inode) = (fields.nth(1)?, fields.next()?.parse::<u64>().ok()?);
    let name = fields.next().unwrap_or("");
    let has = |at: usize, flag: u8| flags.get(at) == Some(&flag);
    let mut protection = Protection::empty();
    protection.set(Protection::READ, has(0, b'r'));
    protection.set(Protection::WRITE, has(1, b'w'));
    protection.set(Protection::EXEC, has(2, b'x'));
    let kind = match (inode, has(3, b's')) {
        _ if is_special(name.as_bytes()) => VmaKind::Special,
        (0, false) => VmaKind::Anonymous,
        (_, true) if device.starts_with("00:") => VmaKind::Shared,
        (_, true) => VmaKind::SharedFile,
        (_, false) => VmaKind::PrivateFile,
    };
    let device = device.replace(':', "");
    let identity = inode ^ (u64::from_str_radix(&device, 16).unwrap_or(0) << 32);
    mapping(start, end, protection, kind, identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_query_agree_about_this_process() {
        let view = KernelView::open().unwrap();
        let local = 0_u64;
        for address in [VirtAddr::from_ptr(&raw const local), VirtAddr::new(0x1000)] {
            let asked = view.mapping_at(address.page()).unwrap().unwrap();
            let parsed = parse_maps(address.page()).unwrap().unwrap();
            assert_eq!(asked.range, parsed.range);
            assert_eq!((asked.protection, asked.kind), (parsed.protection, parsed.kind));
        }
    }
}
