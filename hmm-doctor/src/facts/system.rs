//! The machine, and the rights of this process.

use super::{field, holds, text};
use hmm_core::PAGE_SIZE;
use rustix::process::DumpableBehavior;
use serde::Serialize;
use std::path::Path;

/// Capabilities that have to do with userfaultfd, and their numbers.
const CAPABILITIES: [(&str, u32); 2] = [("CAP_SYS_PTRACE", 19), ("CAP_SYS_ADMIN", 21)];
/// Words in the cgroups of processes that run in containers.
const CGROUPS: [&str; 5] = ["docker", "kubepods", "containerd", "libpod", "lxc"];
/// What gVisor calls the date of its kernel.
const GVISOR: &str = "Sun Jan 10 15:06:54 PST 2016";

/// Whether system calls of this process are filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Seccomp {
    Off,
    Strict,
    Filter,
    Unknown,
}

/// The machine and the process's rights.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct System {
    pub(crate) kernel: String,
    pub(crate) architecture: &'static str,
    pub(crate) page_size: usize,
    /// What looks like a container; a hint only.
    pub(crate) container: Vec<String>,
    /// Capabilities count for less in a user namespace: not towards userfaultfd.
    pub(crate) user_namespace: bool,
    /// The effective one.
    pub(crate) user_id: u32,
    pub(crate) capabilities: Vec<&'static str>,
    pub(crate) seccomp: Seccomp,
    pub(crate) no_new_privileges: bool,
    /// Otherwise `/proc/self/mem` belongs to root.
    pub(crate) dumpable: bool,
}

impl System {
    pub(crate) fn look() -> Self {
        let status = text("/proc/self/status").unwrap_or_default();
        let uname = rustix::system::uname();
        let capability =
            |(name, bit): &(&'static str, u32)| holds(&status, "CapEff", *bit).then_some(*name);
        let dumpable = rustix::process::dumpable_behavior();
        Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: std::env::consts::ARCH,
            page_size: page_size().unwrap_or(PAGE_SIZE),
            container: container_hints(&uname.version().to_string_lossy()),
            user_namespace: text("/proc/self/uid_map").is_some_and(|map| !is_initial(&map)),
            user_id: rustix::process::geteuid().as_raw(),
            capabilities: CAPABILITIES.iter().filter_map(capability).collect(),
            seccomp: seccomp(field(&status, "Seccomp")),
            no_new_privileges: field(&status, "NoNewPrivs") == Some("1"),
            dumpable: dumpable.is_ok_and(|behavior| behavior == DumpableBehavior::Dumpable),
        }
    }

    /// The kernel's version, as far as it has two numbers.
    pub(crate) fn version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.kernel.split(|c: char| !c.is_ascii_digit());
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    }

    /// Whether the kernel is known to be older.
    pub(crate) fn is_before(&self, version: (u32, u32)) -> bool {
        self.version().is_some_and(|own| own < version)
    }

    pub(crate) fn is_container(&self) -> bool {
        !self.container.is_empty()
    }

    pub(crate) fn is_gvisor(&self) -> bool {
        self.container.iter().any(|hint| hint == "gVisor")
    }

    /// Whether the capability holds outside of a user namespace too.
    pub(crate) fn has_ptrace(&self) -> bool {
        self.capabilities.contains(&"CAP_SYS_PTRACE") && !self.user_namespace
    }
}

/// As the kernel told this process at its start.
fn page_size() -> Option<usize> {
    /// `AT_PAGESZ`
    const PAGE_SIZE_ENTRY: usize = 6;
    let bytes = std::fs::read("/proc/self/auxv").ok()?;
    let words: Vec<_> =
        bytes.as_chunks().0.iter().map(|word| usize::from_ne_bytes(*word)).collect();
    words.as_chunks().0.iter().find(|[entry, _]| *entry == PAGE_SIZE_ENTRY).map(|[_, value]| *value)
}

fn seccomp(mode: Option<&str>) -> Seccomp {
    match mode {
        Some("0") => Seccomp::Off,
        Some("1") => Seccomp::Strict,
        Some("2") => Seccomp::Filter,
        _ => Seccomp::Unknown,
    }
}

/// Whether a map of user ids is that of a process outside of any user namespace.
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn container_hints(version: &str) -> Vec<String> {
    let mut hints = Vec::new();
    let files = ["/.dockerenv", "/run/.containerenv"];
    hints.extend(files.iter().filter(|file| Path::new(file).exists()).map(|file| (*file).into()));
    hints.extend(std::env::var("container").ok().map(|name| format!("container={name}")));
    let cgroups = text("/proc/self/cgroup").unwrap_or_default();
    let word = CGROUPS.iter().find(|word| cgroups.contains(**word));
    hints.extend(word.map(|word| format!("cgroup of {word}")));
    hints.extend(version.contains(GVISOR).then(|| "gVisor".into()));
    hints
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A user without rights on a present kernel.
    pub(crate) fn plain_system() -> System {
        System {
            kernel: "6.18.1-generic".into(),
            architecture: "x86_64",
            page_size: 4096,
            container: Vec::new(),
            user_namespace: false,
            user_id: 1000,
            capabilities: Vec::new(),
            seccomp: Seccomp::Off,
            no_new_privileges: false,
            dumpable: true,
        }
    }

    #[test]
    fn versions_are_read_and_compared_by_number() {
        let system = |kernel: &str| System { kernel: kernel.into(), ..plain_system() };
        assert_eq!(system("6.18.44-fc-v657").version(), Some((6, 18)));
        assert_eq!(system("5.4").version(), Some((5, 4)));
        assert!(system("5.10.0").is_before((5, 11)) && !system("6.8.0").is_before((6, 8)));
        assert!(!system("strange").is_before((6, 8)));
    }

    #[test]
    fn a_capability_in_a_user_namespace_does_not_count() {
        let capabilities = vec!["CAP_SYS_PTRACE"];
        let mut system = System { capabilities, ..plain_system() };
        assert!(system.has_ptrace());
        system.user_namespace = true;
        assert!(!system.has_ptrace());
        assert!(is_initial("         0          0 4294967295"));
        assert!(!is_initial("0 1000 1\n1 100000 65536"));
    }

    #[test]
    fn the_kernel_tells_the_size_of_pages() {
        assert!(page_size().unwrap().is_power_of_two());
    }

    #[test]
    fn gvisor_is_known_by_its_kernels_date() {
        let hints = container_hints("#1 SMP Sun Jan 10 15:06:54 PST 2016");
        assert_eq!(hints.last().map(String::as_str), Some("gVisor"));
    }
}
