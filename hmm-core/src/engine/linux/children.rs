//! What the children of a fork get of this process's memory.

use crate::addr::{AddrRange, PAGE_SIZE, USER_END};
use crate::error::{Error, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::Advice;

/// Room for a line of the text; what is longer is a path, whose end does not matter.
const LINE: usize = 256;

/// Leaves a range out of the children that are forked from now on (`MADV_DONTFORK`), or takes it back in. The kernel
/// cuts the mapping at the borders of what is left out, and joins it again afterwards; userfaultfd reports nothing.
///
/// # Errors
/// `NoMemory` when a part is not mapped, or there are too many mappings.
pub(in crate::engine) fn leave_out(range: AddrRange, out: bool) -> Result<()> {
    let advice = if out { Advice::LinuxDontFork } else { Advice::LinuxDoFork };
    // SAFETY: contents and accesses of this process stay as they are.
    let done =
        unsafe { rustix::mm::madvise(range.start().as_ptr().cast(), range.len() as usize, advice) };
    done.map_err(|errno| match errno {
        Errno::NOMEM | Errno::AGAIN => Error::NoMemory { what: "mappings (vm.max_map_count)" },
        errno => Error::os("MADV_DONTFORK", range.start(), errno),
    })
}

/// Reports the mappings that children do not get, as `/proc/self/smaps` tells; nothing where it cannot be read.
pub(in crate::engine) fn each_left_out(report: &mut dyn FnMut(AddrRange)) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open("/proc/self/smaps", flags, Mode::empty()) else { return };
    let mut text = [0_u8; PAGE_SIZE];
    let (mut line, mut length) = ([0_u8; LINE], 0);
    let mut current = None;
    while let Ok(count @ 1..) = rustix::io::read(&file, &mut text) {
        for byte in &text[..count] {
            if *byte != b'\n' {
                if let Some(place) = line.get_mut(length) {
                    (*place, length) = (*byte, length + 1);
                }
                continue;
            }
            match parse(&line[..length]) {
                Parsed::Mapping(range) => current = range,
                Parsed::LeftOut => current.into_iter().for_each(&mut *report),
                Parsed::Other => {}
            }
            length = 0;
        }
    }
}

enum Parsed {
    /// The first line of a mapping; none above the user addresses.
    Mapping(Option<AddrRange>),
    /// Its flags, and children do not get it.
    LeftOut,
    Other,
}

fn parse(line: &[u8]) -> Parsed {
    if let Some(flags) = line.strip_prefix(b"VmFlags:") {
        let is_out = flags.split(|byte| *byte == b' ').any(|flag| flag == b"dc");
        return if is_out { Parsed::LeftOut } else { Parsed::Other };
    }
    let first = line.split(|byte| *byte == b' ').next().unwrap_or_default();
    let bounds = std::str::from_utf8(first).ok().and_then(|text| text.split_once('-'));
    let number = |text| u64::from_str_radix(text, 16);
    match bounds.map(|(start, end)| (number(start), number(end))) {
        Some((Ok(start), Ok(end))) => {
            Parsed::Mapping(AddrRange::new(start, end.min(USER_END)).ok())
        }
        _ => Parsed::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::linux::memory::Reserved;

    #[test]
    fn what_is_left_out_is_told_and_taken_back() {
        let reserved = Reserved::new(16 * 4096).unwrap();
        let part = reserved.area.sub(3, 5);
        let is_out = || {
            let mut found = false;
            each_left_out(&mut |range| found |= range.overlaps(reserved.area));
            found
        };
        assert!(!is_out());
        leave_out(part, true).unwrap();
        let mut ranges = Vec::new();
        each_left_out(&mut |range| ranges.push(range));
        assert!(ranges.contains(&part), "{ranges:?}");
        leave_out(part, false).unwrap();
        assert!(!is_out());
    }
}
