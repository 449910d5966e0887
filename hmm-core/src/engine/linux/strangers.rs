//! Whether somebody else's userfaultfd has a range: its absent pages are not the kernel's to give.
//!
//! A system call of our own userfaultfd would say so; without one, only `/proc/self/smaps` does, which takes milliseconds.
//! It is read in processes that have a userfaultfd open. One that was opened here and lives on in another process alone
//! is not seen.

use crate::addr::AddrRange;
use rustix::fs::{Mode, OFlags, RawDir};
use rustix::io::Errno;
use std::mem::MaybeUninit;

/// Bytes read at once.
const ROOM: usize = 2048;
/// Room for what is looked at in a line.
const LINE: usize = 256;
const LINK: &[u8] = b"anon_inode:[userfaultfd]";
/// Flags of a mapping with missing, write-protect and minor mode.
const WATCHED: [&str; 3] = ["um", "uw", "ui"];

/// Whether another userfaultfd of this process has some page of the range.
pub(in crate::engine) fn watch(range: AddrRange) -> bool {
    is_any_open().unwrap_or(false) && find(range).unwrap_or(false)
}

/// Whether this process has a userfaultfd open.
fn is_any_open() -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut entries = RawDir::new(&folder, &mut room);
    while let Some(entry) = entries.next() {
        let mut link = [MaybeUninit::uninit(); LINK.len()];
        match rustix::fs::readlinkat_raw(&folder, entry?.file_name(), &mut link) {
            Ok((text, _)) if *text == *LINK => return Ok(true),
            // The folder itself, and what was closed meanwhile.
            _ => {}
        }
    }
    Ok(false)
}

fn find(range: AddrRange) -> Result<bool, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let smaps = rustix::fs::open("/proc/self/smaps", flags, Mode::empty())?;
    let (mut text, mut look) = ([0; ROOM], Look { range, mapping: None, found: false });
    let (mut line, mut length) = ([0; LINE], 0);
    loop {
        let count = rustix::io::read(&smaps, &mut text)?;
        for byte in &text[..count] {
            if *byte == b'\n' {
                look.at(std::str::from_utf8(&line[..length]).unwrap_or(""));
                length = 0;
            } else if let Some(place) = line.get_mut(length) {
                (*place, length) = (*byte, length + 1);
            }
        }
        if count == 0 || look.found {
            return Ok(look.found);
        }
    }
}

/// What was read so far.
struct Look {
    range: AddrRange,
    /// The mapping that the lines are about.
    mapping: Option<AddrRange>,
    found: bool,
}

impl Look {
    fn at(&mut self, line: &str) {
        if let Some(mapping) = mapping_of(line) {
            self.mapping = Some(mapping);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let is_watched = flags.split_ascii_whitespace().any(|flag| WATCHED.contains(&flag));
            let is_there = self.mapping.is_some_and(|mapping| mapping.overlaps(self.range));
            self.found |= is_watched && is_there;
        }
    }
}

/// The mapping whose description begins with this line.
fn mapping_of(line: &str) -> Option<AddrRange> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    AddrRange::new(u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_those_of_the_mapping_before_them() {
        let range = AddrRange::new(0x5000, 0x7000).unwrap();
        let text = |flags: &str| {
            format!(
                "00001000-00004000 rw-p 00000000 00:00 0\nVmFlags: rd wr um\n\
                 00006000-00009000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\nVmFlags: rd{flags}\n"
            )
        };
        for (flags, expected) in [(" wr ac", false), (" wr um ac", true), (" uw", true)] {
            let mut look = Look { range, mapping: None, found: false };
            text(flags).lines().for_each(|line| look.at(line));
            assert_eq!(look.found, expected, "{flags}");
        }
    }
}
