//! This process: its files in `/proc`, its limits, its signals, what it was started with.

use super::{Access, field, holds, number, text};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

/// Signals that engines answer touches with, and their bits in the sets of `/proc/self/status`.
const SEGV: (&str, u32) = ("SIGSEGV", 10);
const BUS: (&str, u32) = ("SIGBUS", 6);

/// Files of `/proc/self` that engines use.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ProcFiles {
    /// `/proc/self/mem`, for writing.
    pub(crate) mem: Access,
    /// Whether it reaches pages that are inaccessible; null where that could not be tried.
    pub(crate) mem_ignores_protection: Option<bool>,
    /// `/proc/self/pagemap`.
    pub(crate) pagemap: Access,
    /// Whether the ioctl works; null where that could not be tried.
    pub(crate) pagemap_scan: Option<bool>,
    /// The same, on `/proc/self/maps`.
    pub(crate) procmap_query: Option<bool>,
}

impl ProcFiles {
    /// `ways` are those that the library found out in a process of its own.
    pub(crate) fn look(ways: Option<&[String]>) -> Self {
        let has = |way: &str| ways.map(|ways| ways.iter().any(|one| one == way));
        Self {
            mem: Access::of("/proc/self/mem", true),
            mem_ignores_protection: has("/proc/self/mem"),
            pagemap: Access::of("/proc/self/pagemap", false),
            pagemap_scan: has("PAGEMAP_SCAN"),
            procmap_query: has("PROCMAP_QUERY"),
        }
    }
}

/// Limits; null means that there is none, or that it is not known.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Limits {
    /// `vm.max_map_count`.
    pub(crate) max_map_count: Option<u64>,
    /// Mappings of this process now.
    pub(crate) mappings: Option<u64>,
    /// `RLIMIT_MEMLOCK`, in bytes.
    pub(crate) locked_memory: Option<u64>,
    /// `RLIMIT_AS`, in bytes.
    pub(crate) address_space: Option<u64>,
    /// `vm.overcommit_memory`.
    pub(crate) overcommit_memory: Option<u32>,
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub(crate) huge_pages: Option<String>,
}

impl Limits {
    pub(crate) fn look() -> Self {
        Self {
            max_map_count: number("/proc/sys/vm/max_map_count"),
            mappings: text("/proc/self/maps").map(|maps| maps.lines().count() as u64),
            locked_memory: getrlimit(Resource::Memlock).current,
            address_space: getrlimit(Resource::As).current,
            overcommit_memory: number("/proc/sys/vm/overcommit_memory"),
            huge_pages: text("/sys/kernel/mm/transparent_hugepage/enabled")
                .and_then(|choices| chosen(&choices).map(str::to_owned)),
        }
    }
}

/// The word in brackets.
fn chosen(choices: &str) -> Option<&str> {
    Some(choices.split_once('[')?.1.split_once(']')?.0)
}

/// What happens at a signal. A handler in `hmm` itself is that of Rust's runtime, for stacks that overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Action {
    Default,
    Ignored,
    Handled,
}

/// The signals of the engines that work with signals.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Signals {
    pub(crate) sigsegv: Action,
    pub(crate) sigbus: Action,
    /// Which of the two this thread blocks.
    pub(crate) blocked: Vec<&'static str>,
}

impl Signals {
    pub(crate) fn look() -> Self {
        let status = text("/proc/thread-self/status").or_else(|| text("/proc/self/status"));
        let status = status.unwrap_or_default();
        let is_blocked = |(_, bit): &(&str, u32)| holds(&status, "SigBlk", *bit);
        Self {
            sigsegv: action(&status, SEGV.1),
            sigbus: action(&status, BUS.1),
            blocked: [SEGV, BUS].into_iter().filter(is_blocked).map(|(name, _)| name).collect(),
        }
    }

    /// Those that are ignored, as `env --default-signal` wants them.
    pub(crate) fn ignored(&self) -> Vec<&'static str> {
        let both = [("SEGV", self.sigsegv), ("BUS", self.sigbus)];
        both.into_iter().filter(|one| one.1 == Action::Ignored).map(|one| one.0).collect()
    }
}

fn action(status: &str, bit: u32) -> Action {
    if holds(status, "SigIgn", bit) {
        Action::Ignored
    } else if holds(status, "SigCgt", bit) {
        Action::Handled
    } else {
        Action::Default
    }
}

/// What this process was started with or under.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Environment {
    /// `HMM_ENGINE`.
    pub(crate) engine: Option<String>,
    /// `HMM_UFFD_DISABLE`.
    pub(crate) uffd_disable: Option<String>,
    /// `libhmm_preload.so` is loaded.
    pub(crate) preload: bool,
    /// This runs under Valgrind.
    pub(crate) valgrind: bool,
    /// A tracer (a debugger, strace) is attached.
    pub(crate) traced: bool,
}

impl Environment {
    pub(crate) fn look() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let preloaded = std::env::var("LD_PRELOAD").unwrap_or_default();
        let maps = text("/proc/self/maps").unwrap_or_default();
        let status = text("/proc/self/status").unwrap_or_default();
        Self {
            engine: variable("HMM_ENGINE"),
            uffd_disable: variable("HMM_UFFD_DISABLE"),
            preload: maps.contains("libhmm_preload"),
            valgrind: preloaded.contains("vgpreload") || maps.contains("/vgpreload"),
            traced: field(&status, "TracerPid").is_some_and(|tracer| tracer != "0"),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Nothing that is in anybody's way.
    pub(crate) fn plain_process() -> (ProcFiles, Limits, Signals, Environment) {
        let opens = || Access { opens: true, error: None };
        let files = ProcFiles {
            mem: opens(),
            mem_ignores_protection: Some(true),
            pagemap: opens(),
            pagemap_scan: Some(true),
            procmap_query: Some(true),
        };
        let limits = Limits {
            max_map_count: Some(1_048_576),
            mappings: Some(40),
            locked_memory: Some(8 << 20),
            address_space: None,
            overcommit_memory: Some(0),
            huge_pages: Some("madvise".into()),
        };
        let blocked = Vec::new();
        let signals = Signals { sigsegv: Action::Default, sigbus: Action::Default, blocked };
        let environment = Environment {
            engine: None,
            uffd_disable: None,
            preload: false,
            valgrind: false,
            traced: false,
        };
        (files, limits, signals, environment)
    }

    #[test]
    fn the_choice_stands_in_brackets() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always"), None);
    }

    #[test]
    fn an_ignored_signal_is_not_a_handled_one() {
        let status = "SigIgn:\t0000000000000400\nSigCgt:\t0000000000000440\n";
        assert_eq!(action(status, SEGV.1), Action::Ignored);
        assert_eq!(action(status, BUS.1), Action::Handled);
        assert_eq!(action("", SEGV.1), Action::Default);
    }
}
