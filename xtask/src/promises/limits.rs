//! What is not shown, or in part, or under a condition: why, and what there is instead.

/// A remark on a promise, for some engines.
pub(super) struct Remark {
    pub(super) number: u8,
    pub(super) engines: &'static [&'static str],
    /// What is missing, or the condition.
    pub(super) what: &'static str,
    /// What there is instead, or without the condition.
    pub(super) instead: &'static str,
}

const REAL: &[&str] = &["uffd", "uffd-inline", "signal"];
const SIGNAL: &[&str] = &["signal"];
const IN_ORDER: &str = "The program runs under libhmm_preload.so with `HMM_LAYOUT=ordered`.";
const OWN_ACCOUNTS: &str = "In the library's accounts (`Mm::rss`, `MemoryGroup`).";

/// What is shown under a condition, by number.
pub(super) const CONDITIONS: &[Remark] = &[
    Remark {
        number: 23,
        engines: REAL,
        what: IN_ORDER,
        instead: "Migration and homecoming wait for callbacks always. munmap, mremap and madvise may return before them; \
                  `Mm::sync`, and every call that looks at a range or migrates, return after them.",
    },
    Remark {
        number: 24,
        engines: REAL,
        what: IN_ORDER,
        instead: "Migration keeps it always. After munmap a new mapping may be in use before the callback ran; what the \
                  device finds by an old entry of its table is its own old page, never foreign data.",
    },
    Remark {
        number: 36,
        engines: SIGNAL,
        what: IN_ORDER,
        instead: "Migration, homecoming, and what happens to pages that are away make a look stale always; what the program \
                  drops or unmaps of pages in system memory is not noticed.",
    },
    Remark {
        number: 39,
        engines: SIGNAL,
        what: IN_ORDER,
        instead: "As for 36. An entry for a page that is not there any more lets no access through: `peek` and `poke` fail.",
    },
    Remark {
        number: 63,
        engines: REAL,
        what: IN_ORDER,
        instead: "Touches wait always. A page that is unmapped while the driver is told of it is dropped when the migration \
                  lands, and mirrors are told then, so that no table stays wrong (with `EVENTS` and `MOVE`; on the signal \
                  engine nothing may be unmapped while it migrates).",
    },
    Remark {
        number: 68,
        engines: SIGNAL,
        what: "As for 23, or the memory is at home when its protection changes (`guard`, `make_present`).",
        instead: "mprotect shows zeros for pages that are away.",
    },
    Remark {
        number: 75,
        engines: REAL,
        what: OWN_ACCOUNTS,
        instead: "/proc shows system memory alone: the kernel knows of no device.",
    },
    Remark {
        number: 76,
        engines: REAL,
        what: OWN_ACCOUNTS,
        instead: "The kernel's cgroups are charged for system memory alone.",
    },
    Remark { number: 78, engines: REAL, what: OWN_ACCOUNTS, instead: "As for 76." },
    Remark { number: 79, engines: REAL, what: OWN_ACCOUNTS, instead: "As for 75 and 76." },
];

/// What is missing, by number.
pub(super) const LIMITS: &[Remark] = &[
    Remark {
        number: 21,
        engines: REAL,
        what: "Reclaim, and copies that a write makes, are told to no process; mprotect is told under libhmm_preload.so \
               alone; without it the signal engine finds out only what happens to pages that are away.",
        instead: "A device reaches system memory by its address, through the CPU's own page table, and so follows what the \
                  kernel does to a page in place. Protection is looked up at each device access (`peek`, `poke`) and fault.",
    },
    Remark {
        number: 66,
        engines: SIGNAL,
        what: "What the kernel pinned for itself or others (direct I/O, io_uring) cannot be seen.",
        instead: "Pins and guards of the library are respected: hold what is handed to asynchronous I/O (`pin_range`, `guard`).",
    },
    Remark {
        number: 69,
        engines: &["uffd", "uffd-inline", "signal", "model"],
        what: "A process cannot change the page table of another: its relatives keep the page where it was.",
        instead: "The page becomes the migrating process's own first, and all find their data.",
    },
    Remark {
        number: 77,
        engines: REAL,
        what: "Shown for memory groups. The kernel's cgroup may have no room for the system memory of a page that comes home.",
        instead: "The page stays on its device, and the touch is tried again; it never becomes zeros.",
    },
    Remark {
        number: 80,
        engines: &["uffd-inline", "signal"],
        what: "The kernel's own pins of a page that is away fail with EFAULT instead of bringing it home.",
        instead: "`pin_range` and `guard` bring it home first; libhmm_preload.so does so for programs that know nothing of it.",
    },
    Remark {
        number: 81,
        engines: REAL,
        what: "A process that exits or is killed runs no callbacks: its drivers end with it.",
        instead: "Closing the address space runs `free` for every page. What a driver has outside of the process (an open \
                  device, shared memory) is given back by the kernel when its descriptors close, also after SIGKILL.",
    },
    Remark {
        number: 82,
        engines: REAL,
        what: "The library's accounts count it; the kernel, when it looks for a process to end, does not.",
        instead: "`Mm::rss` and the groups tell who is large.",
    },
];

/// Whether an engine keeps a promise only in part, or not at all.
pub(super) fn is_limited(number: u8, engine: &str) -> bool {
    names(LIMITS, number, engine)
}

/// Whether an engine keeps a promise under a condition.
pub(super) fn is_conditional(number: u8, engine: &str) -> bool {
    names(CONDITIONS, number, engine)
}

fn names(remarks: &[Remark], number: u8, engine: &str) -> bool {
    remarks.iter().any(|remark| remark.number == number && remark.engines.contains(&engine))
}
