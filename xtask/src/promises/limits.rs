//! What is not shown, or only in part: why, and what there is instead.

/// A promise that some engines do not keep whole.
pub(super) struct Limit {
    pub(super) number: u8,
    pub(super) engines: &'static [&'static str],
    pub(super) missing: &'static str,
    pub(super) instead: &'static str,
}

const REAL: &[&str] = &["uffd", "uffd-inline", "signal"];

/// All of them, by number.
pub(super) const LIMITS: &[Limit] = &[
    Limit {
        number: 21,
        engines: &["uffd", "uffd-inline"],
        missing: "The kernel tells a process of munmap, mremap and madvise; not of mprotect, reclaim, or copies on write.",
        instead: "A device reaches system memory by its address, through the CPU's own page table, and so follows what the \
                  kernel does to a page in place. Protection is looked up at each device access (`peek`, `poke`) and fault.",
    },
    Limit {
        number: 21,
        engines: &["signal"],
        missing: "As for uffd; and of what the program does, only changes of pages that are away are found out.",
        instead: "As for uffd. A driver that keeps translations of system pages asks for `EVENTS` in the capabilities.",
    },
    Limit {
        number: 23,
        engines: REAL,
        missing: "Migration and homecoming wait for the callbacks. munmap, mremap and madvise may return before them.",
        instead: "`Mm::sync`, and every call that looks at a range or migrates, return after them.",
    },
    Limit {
        number: 24,
        engines: REAL,
        missing: "After munmap a new mapping may be in use at the same addresses before the callback ran.",
        instead: "As for 23. What a device loads through an old entry of its table is its own old page, never foreign data.",
    },
    Limit {
        number: 36,
        engines: &["signal"],
        missing: "As for 21: what the program drops or unmaps of pages in system memory is not noticed.",
        instead: "Everything else is: migration, homecoming, and what happens to pages that are away.",
    },
    Limit {
        number: 39,
        engines: &["signal"],
        missing: "As for 36.",
        instead: "An entry for a page that is not there any more lets no access through: `peek` and `poke` fail.",
    },
    Limit {
        number: 63,
        engines: REAL,
        missing: "Nobody can keep a program from unmapping a range while its driver is told what moved.",
        instead: "Such a page is dropped when the migration lands, and mirrors are told then, so that no table stays wrong \
                  (with `EVENTS` and `MOVE`; on the signal engine nothing may be unmapped while it migrates).",
    },
    Limit {
        number: 66,
        engines: &["signal"],
        missing: "What the kernel pinned for itself or others (direct I/O, io_uring) cannot be seen.",
        instead: "Pins and guards of the library are respected: hold what is handed to asynchronous I/O (`pin_range`, `guard`).",
    },
    Limit {
        number: 69,
        engines: &["uffd", "uffd-inline", "signal", "model"],
        missing: "A process cannot change the page table of another: its relatives keep the page where it was.",
        instead: "The page becomes the migrating process's own first, and both find their data.",
    },
    Limit {
        number: 75,
        engines: REAL,
        missing: "Not built yet.",
        instead: "`device_pages` in the counters is what to add to the resident memory that /proc reports.",
    },
    Limit { number: 76, engines: REAL, missing: "Not built yet.", instead: "Nothing yet." },
    Limit { number: 77, engines: REAL, missing: "Not built yet.", instead: "Nothing yet." },
    Limit { number: 78, engines: REAL, missing: "Not built yet.", instead: "Nothing yet." },
    Limit { number: 79, engines: REAL, missing: "Not built yet.", instead: "Nothing yet." },
    Limit {
        number: 80,
        engines: &["uffd-inline", "signal"],
        missing: "The kernel's own pins of a page that is away fail with EFAULT instead of bringing it home.",
        instead: "`pin_range` and `guard` bring it home first; libhmm_preload.so does so for programs that know nothing of it.",
    },
    Limit {
        number: 81,
        engines: REAL,
        missing: "A process that exits or is killed runs no callbacks: its drivers end with it.",
        instead: "Closing the address space runs `free` for every page. What a driver has outside of the process (an open \
                  device, shared memory) is given back by the kernel when its descriptors close, also after SIGKILL.",
    },
    Limit { number: 82, engines: REAL, missing: "Not built yet.", instead: "As for 75." },
];

/// Whether an engine keeps a promise only in part, or not at all.
pub(super) fn is_limited(number: u8, engine: &str) -> bool {
    LIMITS.iter().any(|limit| limit.number == number && limit.engines.contains(&engine))
}
