//! The process's mappings: by `PROCMAP_QUERY` (Linux 6.11), else from the text of `/proc/self/maps`. Both ways allocate
//! nothing: faults are answered with them.

use super::abi::{self, VmaQuery};
use crate::addr::{AddrRange, PAGE_SIZE, USER_END, VirtAddr};
use crate::engine::{Mapping, VmaKind};
use crate::error::{Error, Result};
use crate::flags::Protection;
use crate::inject::{self, Point};
use crate::sync::Mutex;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, Ordering};

const NAME: usize = 64;
/// Room for a line of the text; what is longer is a path, whose end does not matter.
const LINE: usize = 256;

/// `/proc/self/maps`.
#[derive(Debug)]
pub(in crate::engine) struct Mappings {
    maps: OwnedFd,
    /// `PROCMAP_QUERY` is missing: parse the text.
    parse: AtomicBool,
    /// Readers of the text share the file's position.
    reading: Mutex<()>,
}

impl Mappings {
    pub(in crate::engine) fn open() -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let maps = rustix::fs::open("/proc/self/maps", flags, Mode::empty())
            .map_err(|errno| Error::os("open /proc/self/maps", VirtAddr::new(0), errno))?;
        Ok(Self { maps, parse: AtomicBool::new(false), reading: Mutex::new(()) })
    }

    /// How it asks, for people.
    pub(in crate::engine) fn way(&self) -> &'static str {
        if self.parse.load(Ordering::Relaxed) { "/proc/self/maps" } else { "PROCMAP_QUERY" }
    }

    /// The first mapping that ends above `addr`.
    pub(in crate::engine) fn at(&self, addr: VirtAddr) -> Result<Option<Mapping>> {
        if addr.get() >= USER_END {
            return Ok(None);
        }
        let failed = |errno| Error::os("mappings", addr, errno);
        inject::checked(Point::Mappings).map_err(failed)?;
        if !self.parse.load(Ordering::Relaxed) {
            match self.query(addr) {
                Err(Errno::NOTTY | Errno::NOSYS) => self.parse.store(true, Ordering::Relaxed),
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(Error::os("PROCMAP_QUERY", addr, errno)),
                Ok(mapping) => return Ok(mapping),
            }
        }
        self.read(addr).map_err(|errno| Error::os("/proc/self/maps", addr, errno))
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

    /// Reads the text up to the line that is wanted.
    fn read(&self, addr: VirtAddr) -> std::result::Result<Option<Mapping>, Errno> {
        let _one = self.reading.lock();
        rustix::fs::seek(&self.maps, SeekFrom::Start(0))?;
        let mut text = [0_u8; PAGE_SIZE];
        let (mut line, mut length) = ([0_u8; LINE], 0);
        loop {
            let count = rustix::io::read(&self.maps, &mut text)?;
            if count == 0 {
                return Ok(None);
            }
            for byte in &text[..count] {
                if *byte != b'\n' {
                    if let Some(place) = line.get_mut(length) {
                        (*place, length) = (*byte, length + 1);
                    }
                    continue;
                }
                let found = parse_line(ascii_part(&line[..length]));
                length = 0;
                if let Some(found) = found
                    && found.range.end() > addr
                {
                    return Ok(Some(found));
                }
            }
        }
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

/// The line up to the first byte of a path that is not text.
fn ascii_part(line: &[u8]) -> &str {
    match std::str::from_utf8(line) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&line[..error.valid_up_to()]).unwrap_or(""),
    }
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
    let (major, minor) = device.split_once(':')?;
    let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
    let identity = inode ^ (number(major) << 48) ^ (number(minor) << 32);
    mapping(start, end, protection, kind, identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_query_agree_about_this_process() {
        let mappings = Mappings::open().unwrap();
        let local = 0_u64;
        for address in [VirtAddr::from_ptr(&raw const local), VirtAddr::new(0x1000)] {
            let asked = mappings.at(address.page()).unwrap().unwrap();
            let parsed = mappings.read(address.page()).unwrap().unwrap();
            assert_eq!(asked.range, parsed.range);
            assert_eq!((asked.protection, asked.kind), (parsed.protection, parsed.kind));
        }
    }
}
