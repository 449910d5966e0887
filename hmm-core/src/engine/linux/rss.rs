//! How much memory the process has, by kind: `/proc/self/smaps_rollup` (Linux 4.14) walks the page tables and is exact;
//! the counters in `/proc/self/status` may lag behind by some dozen pages for each processor.

use crate::addr::VirtAddr;
use crate::engine::Rss;
use crate::error::{Error, Result};
use rustix::fs::{Mode, OFlags};

/// Both texts are shorter.
const TEXT: usize = 4096;

/// What is resident now.
///
/// # Errors
/// `Os` where `/proc` cannot be read; `Unsupported` where it does not say.
pub(in crate::engine) fn rss() -> Result<Rss> {
    let mut text = [0; TEXT];
    let counters = read("/proc/self/status", &mut text).map(Counters::of)?;
    // gVisor and the like have no such file.
    if let Ok(text) = read("/proc/self/smaps_rollup", &mut text)
        && let (Some(all), Some(anon)) = (bytes(text, "Rss:"), bytes(text, "Anonymous:"))
    {
        let rest = all.saturating_sub(anon);
        let shmem = counters.shmem.unwrap_or(0).min(rest);
        return Ok(Rss { anon, file: rest - shmem, shmem });
    }
    counters.rss()
}

struct Counters {
    all: Option<u64>,
    anon: Option<u64>,
    file: Option<u64>,
    shmem: Option<u64>,
}

impl Counters {
    fn of(text: &[u8]) -> Self {
        let [all, anon, file, shmem] =
            ["VmRSS:", "RssAnon:", "RssFile:", "RssShmem:"].map(|name| bytes(text, name));
        Self { all, anon, file, shmem }
    }

    fn rss(&self) -> Result<Rss> {
        match (self.anon, self.file, self.shmem, self.all) {
            (Some(anon), Some(file), Some(shmem), _) => Ok(Rss { anon, file, shmem }),
            // Kinds are not told apart here, and nearly all is anonymous.
            (_, _, _, Some(anon)) => Ok(Rss { anon, file: 0, shmem: 0 }),
            _ => Err(Error::Unsupported {
                what: "/proc/self/status does not say how much memory the process has".to_owned(),
            }),
        }
    }
}

fn read<'a>(path: &'static str, text: &'a mut [u8]) -> Result<&'a [u8]> {
    let failed = |errno| Error::os(path, VirtAddr::new(0), errno);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    let mut len = 0;
    while len < text.len() {
        match rustix::io::read(&file, &mut text[len..]).map_err(failed)? {
            0 => break,
            more => len += more,
        }
    }
    Ok(&text[..len])
}

/// The number behind a name, which the kernel writes in KiB.
fn bytes(text: &[u8], name: &str) -> Option<u64> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let line = lines.find_map(|line| line.strip_prefix(name.as_bytes()))?;
    let number = str::from_utf8(line).ok()?.split_whitespace().next()?;
    number.parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PAGE_SIZE;

    #[test]
    fn kinds_are_read_from_either_text() {
        let text = b"Name:\tx\nVmRSS:\t    2196 kB\nRssAnon:\t     152 kB\nRssFile:\t    2040 kB\nRssShmem:\t       4 kB\n";
        let expected = Rss { anon: 152 << 10, file: 2040 << 10, shmem: 4 << 10 };
        assert_eq!(Counters::of(text).rss(), Ok(expected));
        let expected = Rss { anon: 2196 << 10, file: 0, shmem: 0 };
        assert_eq!(Counters::of(&text[..28]).rss(), Ok(expected));
        assert!(Counters::of(b"Name:\tx\n").rss().is_err());
        assert_eq!(bytes(b"Rss: 12 kB", "Anonymous:"), None);
    }

    #[test]
    fn the_exact_text_sees_every_page() {
        let before = rss().unwrap();
        let pages = super::super::memory::Reserved::new(512 * PAGE_SIZE as u64).unwrap();
        super::super::memory::populate(pages.area, true).unwrap();
        let grown = rss().unwrap().anon - before.anon;
        // Other tests run beside this one.
        assert!(grown >= 448 * PAGE_SIZE as u64, "{grown}");
    }
}
