//! What would help, as the exact line to type or to write. Only what helps here, as far as it was found out.

use crate::facts::Seccomp;
use crate::report::Report;
use hmm_core::{EngineKind, PAGE_SIZE};
use serde::Serialize;

/// Kernels that brought what matters.
const USER_MODE_ONLY: (u32, u32) = (5, 11);
const DEVICE_NODE: (u32, u32) = (6, 1);
const MOVE: (u32, u32) = (6, 8);
const UNPRIVILEGED_SETTING: (u32, u32) = (5, 2);
/// The kernel's usual limit: with less, the signal engine soon hides more than it was asked to.
const USUAL_MAPPINGS: u64 = 65_530;

/// A line that helps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Advice {
    /// A command, or what to have.
    pub(crate) line: String,
    /// What it gives.
    pub(crate) gain: String,
}

/// The lines, the best ones first.
pub(crate) fn of(report: &Report) -> Vec<Advice> {
    let mut list = List { report, found: Vec::new() };
    if report.system.page_size != PAGE_SIZE {
        list.add("a kernel with pages of 4096 bytes", "libhmm knows no other page size");
        return list.found;
    }
    list.own_settings();
    if !report.works(EngineKind::Uffd) && !report.environment.valgrind {
        list.access();
    }
    list.process();
    list.kernel();
    list.system_calls();
    list.found
}

struct List<'a> {
    report: &'a Report,
    found: Vec<Advice>,
}

impl List<'_> {
    fn add(&mut self, line: impl Into<String>, gain: impl Into<String>) {
        self.found.push(Advice { line: line.into(), gain: gain.into() });
    }

    /// A command for root, on the machine itself.
    fn add_for_root(&mut self, command: &str, gain: &str) {
        let system = &self.report.system;
        let sudo = if system.user_id == 0 { "" } else { "sudo " };
        let place = if system.is_container() { " (on the host)" } else { "" };
        self.add(format!("{sudo}{command}"), format!("{gain}{place}"));
    }

    /// The program that makes containers here.
    fn runtime(&self) -> &'static str {
        let hints = &self.report.system.container;
        let is_podman =
            hints.iter().any(|hint| hint.contains("containerenv") || hint.contains("podman"));
        if is_podman { "podman" } else { "docker" }
    }

    /// Variables that keep a better engine away.
    fn own_settings(&mut self) {
        let Report { engine, engines, environment, .. } = self.report;
        let better = engines.iter().take_while(|one| engine.as_deref() != Some(one.name));
        let better = better.into_iter().find(|one| one.works).map(|one| one.name);
        if let (Some(better), Some(_)) = (better, &environment.engine) {
            self.add("unset HMM_ENGINE", format!("the engine {better} works here"));
        }
        let working = engines.iter().find(|one| one.works).map(|one| one.name);
        if let (false, Some(name), None) = (self.report.works, working, &environment.engine) {
            let gain = format!("the engine {name} works here, the one that is chosen does not");
            self.add(format!("export HMM_ENGINE={name}"), gain);
        }
        if environment.uffd_disable.is_some() {
            self.add("unset HMM_UFFD_DISABLE", "all features of userfaultfd are used");
        }
        if environment.valgrind && !self.report.works(EngineKind::Uffd) {
            self.add("run the program without Valgrind", "userfaultfd does not work under it");
        }
    }

    /// Whether a complete userfaultfd can be had, so that something else is missing.
    fn has_access(&self) -> bool {
        let (system, uffd) = (&self.report.system, &self.report.userfaultfd);
        let by_call = system.has_ptrace() || uffd.unprivileged == Some(1);
        uffd.device.opens || (uffd.refused.is_none() && by_call)
    }

    /// Whether this kernel is known to have userfaultfd, or not to have it.
    fn kernel_has_it(&self) -> Option<bool> {
        let Report { system, userfaultfd: uffd, limits, .. } = self.report;
        if uffd.refused.is_none() || uffd.unprivileged.is_some() || uffd.device_minor.is_some() {
            return Some(true);
        }
        if system.is_gvisor() {
            return Some(false);
        }
        // Where other settings can be read, a missing one is not there.
        let is_readable = limits.overcommit_memory.is_some();
        (is_readable && !system.is_before(UNPRIVILEGED_SETTING)).then_some(false)
    }

    /// A userfaultfd that serves the kernel's own accesses needs a right: by the setting, by the node, or by a
    /// capability.
    fn access(&mut self) {
        if self.has_access() {
            return;
        }
        if self.kernel_has_it() == Some(false) {
            if self.report.system.is_gvisor() {
                let line = format!("{} run --runtime=runc IMAGE", self.runtime());
                self.add(line, "the host's own kernel has userfaultfd; gVisor has none");
            } else {
                self.add("a kernel with CONFIG_USERFAULTFD=y", "userfaultfd: the engine uffd");
            }
            return;
        }
        self.device_node();
        self.system_call();
    }

    fn device_node(&mut self) {
        let Report { system, userfaultfd: uffd, .. } = self.report;
        let unknown = uffd.device_minor.is_none() && system.is_before(DEVICE_NODE);
        if unknown {
            return;
        }
        let gain = "the engine uffd: system calls on pages that are away work, too";
        match (&uffd.device_mode, uffd.device_minor) {
            (None, _) if system.is_container() => {
                let line = format!("{} run --device /dev/userfaultfd IMAGE", self.runtime());
                self.add(
                    line,
                    format!("{gain} (the node's mode on the host decides who may open it)"),
                );
            }
            (None, Some(minor)) => {
                self.add_for_root(&format!("mknod -m 0600 /dev/userfaultfd c 10 {minor}"), gain);
            }
            (None, None) => {}
            (Some(_), _) if system.is_container() => {
                self.add_for_root(
                    "chmod 0666 /dev/userfaultfd",
                    &format!("{gain}, for every user"),
                );
            }
            (Some(_), _) => {
                let line = format!("setfacl -m u:{}:rw /dev/userfaultfd", system.user_id);
                let lasting = "a udev rule makes it last: KERNEL==\"userfaultfd\", MODE=\"0660\", GROUP=\"users\"";
                self.add_for_root(&line, &format!("{gain}; {lasting}"));
            }
        }
    }

    fn system_call(&mut self) {
        let Report { system, userfaultfd: uffd, .. } = self.report;
        let is_filtered = uffd.refused.is_some() && system.seccomp == Seccomp::Filter;
        if is_filtered && system.is_container() {
            let line = format!("{} run --security-opt seccomp=PROFILE.json IMAGE", self.runtime());
            let gain = "with a profile that allows userfaultfd: at least the engine uffd-inline";
            self.add(line, gain);
        }
        let is_allowed = uffd.refused.is_none() || system.is_before(USER_MODE_ONLY);
        if uffd.unprivileged == Some(0) && is_allowed && !is_filtered {
            let gain = "the engine uffd, for every user";
            self.add_for_root("sysctl -w vm.unprivileged_userfaultfd=1", gain);
        }
        let may_be_root = system.user_id == 0 && !system.user_namespace && !system.has_ptrace();
        if system.is_container() && may_be_root && is_allowed && !is_filtered {
            let line = format!("{} run --cap-add SYS_PTRACE IMAGE", self.runtime());
            self.add(line, "the engine uffd, for the container's root");
        }
    }

    /// What this process was started with, and its limits.
    fn process(&mut self) {
        let Report { system, proc_files, limits, signals, engine, .. } = self.report;
        if !proc_files.mem.opens && !system.dumpable {
            let line = "start the program without setuid, setgid and file capabilities";
            self.add(line, "a process that is dumpable has /proc/self/mem");
        }
        let ignored = signals.ignored();
        if !ignored.is_empty() && !self.report.works(EngineKind::Uffd) {
            let line = format!("env --default-signal={} PROGRAM", ignored.join(","));
            self.add(
                line,
                "whoever started this ignores a signal that engines answer touches with",
            );
        }
        if engine.is_none() && limits.address_space.is_some() {
            self.add("ulimit -v unlimited", "the library reserves address space for its frames");
        }
        if engine.is_none() && limits.overcommit_memory == Some(2) {
            let gain = "address space that is only reserved is not counted";
            self.add_for_root("sysctl -w vm.overcommit_memory=0", gain);
        }
        let is_signal = engine.as_deref() == Some(EngineKind::Signal.name());
        if is_signal && limits.max_map_count.is_some_and(|count| count < USUAL_MAPPINGS) {
            let gain =
                "scattered pages leave one by one: the signal engine needs a mapping for each run";
            self.add_for_root("sysctl -w vm.max_map_count=262144", gain);
        }
        if is_signal && proc_files.mem.opens && proc_files.mem_ignores_protection == Some(false) {
            let line = "proc_mem.force_override=always on the kernel's command line";
            self.add(line, "pages are filled through /proc/self/mem, which is faster");
        }
    }

    fn kernel(&mut self) {
        let Report { system, userfaultfd: uffd, .. } = self.report;
        if uffd.refused.is_some() {
            if system.is_before(USER_MODE_ONLY) && self.kernel_has_it() == Some(true) {
                let gain = "the engine uffd-inline needs no privilege there";
                self.add("Linux 5.11 or newer", gain);
            }
        } else if !uffd.offers("move") && system.is_before(MOVE) {
            self.add("Linux 6.8 or newer", "userfaultfd moves pages instead of copying them");
        }
    }

    fn system_calls(&mut self) {
        let Some(proof) = self.report.chosen().and_then(|engine| engine.proof.as_ref()) else {
            return;
        };
        if !proof.system_calls && !self.report.environment.preload {
            let gain = "system calls of unmodified programs work on pages that are away";
            self.add("LD_PRELOAD=libhmm_preload.so PROGRAM", gain);
        }
    }
}

#[cfg(test)]
mod tests;
