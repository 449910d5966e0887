//! Memory that is swapped out: to a compressed disk in memory (zram) that the test makes and takes away.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, child_of, is_child, on_device};
use hmm_core::PAGE_SIZE;
use hmm_tests::{mm_or_skip, skip};
use kind::{Memory, check_migrates};
use std::ffi::CString;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PAGES: usize = 64;
const DISK: u64 = 32 << 20;

/// A swap device of the test's own, gone when this is dropped.
struct Swap {
    number: String,
    device: CString,
}

impl Swap {
    fn new() -> Result<Self, String> {
        let said = |what: &str, error: std::io::Error| format!("{what}: {error}");
        let number = std::fs::read_to_string("/sys/class/zram-control/hot_add")
            .map_err(|error| said("no zram device can be made", error))?;
        let number = number.trim().to_owned();
        let path = format!("/dev/zram{number}");
        let swap = Self { device: CString::new(path.as_str()).unwrap(), number };
        std::fs::write(format!("/sys/block/zram{}/disksize", swap.number), DISK.to_string())
            .map_err(|error| said("a zram device gets no size", error))?;
        let file = std::fs::File::options()
            .write(true)
            .open(&path)
            .map_err(|error| said("a zram device cannot be opened", error))?;
        file.write_all_at(&Self::header(), 0).map_err(|error| said("a zram device", error))?;
        drop(file);
        // SAFETY: the name is a C string.
        if unsafe { libc::swapon(swap.device.as_ptr(), 0) } != 0 {
            return Err(said("swapon is refused", std::io::Error::last_os_error()));
        }
        Ok(swap)
    }

    /// The first page of a swap area, version 1.
    fn header() -> Vec<u8> {
        let mut page = vec![0; PAGE_SIZE];
        let last = (DISK / PAGE_SIZE as u64 - 1) as u32;
        page[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        page[1028..1032].copy_from_slice(&last.to_ne_bytes());
        page[PAGE_SIZE - 10..].copy_from_slice(b"SWAPSPACE2");
        page
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: the name is a C string. Not in use: an error that changes nothing.
        unsafe { libc::swapoff(self.device.as_ptr()) };
        // Whoever looks at new devices may have it open for a moment.
        for _ in 0..100 {
            if std::fs::write("/sys/class/zram-control/hot_remove", &self.number).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("/dev/zram{} could not be removed", self.number);
    }
}

/// How many pages are in swap now.
fn swapped(memory: &Memory) -> usize {
    let Ok(pagemap) = std::fs::File::open("/proc/self/pagemap") else { return 0 };
    let mut entries = vec![0; memory.pages() * 8];
    pagemap.read_exact_at(&mut entries, memory.addr() / PAGE_SIZE as u64 * 8).unwrap();
    let (entries, _) = entries.as_chunks::<8>();
    entries.iter().filter(|entry| u64::from_ne_bytes(**entry) & 1 << 62 != 0).count()
}

/// Has the kernel put pages into swap, for a while; returns how many are there.
fn put_out(memory: &Memory) -> usize {
    let deadline = Instant::now() + Duration::from_secs(3);
    while swapped(memory) < memory.pages() && Instant::now() < deadline {
        if !memory.advise(libc::MADV_PAGEOUT) {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    swapped(memory)
}

/// The part that may hang or be killed runs in a child: the device goes in any case.
#[test]
fn pages_in_swap_migrate_with_their_data() {
    if is_child() {
        return migrate_from_swap();
    }
    let swap = match Swap::new() {
        Ok(swap) => swap,
        Err(reason) => skip!("{reason}"),
    };
    let ended = child_of("pages_in_swap_migrate_with_their_data", Duration::from_secs(40));
    drop(swap);
    if let Some(reason) = ended.skipped() {
        skip!("{reason}");
    }
    assert!(ended.is_good(), "{ended:?}");
}

fn migrate_from_swap() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let out = put_out(&memory);
    if out == 0 {
        skip!("MADV_PAGEOUT puts nothing into swap here");
    }
    for round in 0..10 {
        // Some of the pages are in memory, some in swap.
        assert!(memory.has_pattern(round));
        assert_eq!(card.all_to_device(memory.range()), PAGES, "round {round}");
        assert_eq!(on_device(&mm, memory.range()), PAGES);
        assert_eq!(memory.wrong_pages(), 0, "round {round}");
        // Two seconds were too short once, on a machine with much else to do.
        let settled = (0..5).any(|_| card.settles_at(0));
        assert!(settled, "round {round}: {} {:?}", card.devmem.in_use(), mm.counters());
        put_out(&memory);
        assert_eq!(card.all_to_device(memory.range()), PAGES);
        card.to_system(memory.range()).unwrap();
        assert_eq!(memory.wrong_pages(), 0, "round {round}");
        put_out(&memory);
    }
    check_migrates(&card, &memory);
}
