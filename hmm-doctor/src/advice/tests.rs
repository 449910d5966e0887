//! Situations, and what is said about them.

use super::*;
use crate::facts::Action;
use crate::report::tests::{plain_report, proof};

fn lines(report: &Report) -> Vec<String> {
    of(report).into_iter().map(|advice| advice.line).collect()
}

const PRELOAD: &str = "LD_PRELOAD=libhmm_preload.so PROGRAM";

/// As root finds it, without a container.
fn complete() -> Report {
    let mut report = plain_report();
    report.system.user_id = 0;
    report.system.capabilities = vec!["CAP_SYS_PTRACE"];
    report.userfaultfd.device.opens = true;
    report.engine = Some("uffd".into());
    let all = proof(&["MOVE", "KERNEL_FAULTS", "EVENTS"]);
    (report.engines[0].opens, report.engines[0].works) = (true, true);
    report.engines[0].proof = Some(all);
    report
}

/// Docker without extra rights.
fn docker() -> Report {
    let mut report = plain_report();
    report.system.container = vec!["/.dockerenv".into()];
    report.system.user_id = 0;
    report.system.seccomp = Seccomp::Filter;
    report.userfaultfd.refused = Some("userfaultfd is refused".into());
    report.userfaultfd.device_mode = None;
    report.userfaultfd.features.clear();
    report.engine = Some("signal".into());
    report.engines[1].works = false;
    report
}

#[test]
fn where_everything_works_nothing_is_said() {
    assert_eq!(lines(&complete()), [""; 0]);
}

#[test]
fn a_user_without_rights_gets_the_setting_and_the_node() {
    let report = plain_report();
    let expected = [
        "sudo setfacl -m u:1000:rw /dev/userfaultfd",
        "sudo sysctl -w vm.unprivileged_userfaultfd=1",
        PRELOAD,
    ];
    assert_eq!(lines(&report), expected);
}

#[test]
fn what_is_so_already_is_not_advised() {
    let mut report = plain_report();
    report.userfaultfd.unprivileged = Some(1);
    assert_eq!(lines(&report), [PRELOAD], "the right is there: something else is missing");
    report.environment.preload = true;
    assert_eq!(lines(&report), [""; 0]);
}

#[test]
fn in_a_container_the_device_comes_first() {
    let expected = [
        "docker run --device /dev/userfaultfd IMAGE",
        "docker run --security-opt seccomp=PROFILE.json IMAGE",
        PRELOAD,
    ];
    assert_eq!(lines(&docker()), expected);
}

#[test]
fn a_container_that_may_make_the_call_lacks_only_the_capability() {
    let mut report = docker();
    report.userfaultfd.refused = None;
    report.userfaultfd.features = plain_report().userfaultfd.features;
    let found = lines(&report);
    assert!(found.contains(&"docker run --cap-add SYS_PTRACE IMAGE".into()), "{found:?}");
    assert!(found.contains(&"sysctl -w vm.unprivileged_userfaultfd=1".into()), "{found:?}");
    report.system.user_namespace = true;
    assert!(!lines(&report).iter().any(|line| line.contains("SYS_PTRACE")), "rootless: no use");
}

#[test]
fn gvisor_needs_another_runtime() {
    let mut report = docker();
    report.system.container.push("gVisor".into());
    report.system.kernel = "4.4.0".into();
    (report.userfaultfd.unprivileged, report.userfaultfd.device_minor) = (None, None);
    assert_eq!(lines(&report), ["docker run --runtime=runc IMAGE", PRELOAD]);
}

#[test]
fn a_kernel_without_userfaultfd_is_named() {
    let mut report = docker();
    (report.system.container, report.system.seccomp) = (Vec::new(), Seccomp::Off);
    (report.userfaultfd.unprivileged, report.userfaultfd.device_minor) = (None, None);
    assert_eq!(lines(&report), ["a kernel with CONFIG_USERFAULTFD=y", PRELOAD]);
}

#[test]
fn old_kernels_are_named_with_what_newer_ones_bring() {
    let mut report = plain_report();
    report.system.kernel = "5.10.0".into();
    report.userfaultfd.refused = Some("userfaultfd is refused".into());
    (report.userfaultfd.device_mode, report.userfaultfd.device_minor) = (None, None);
    report.engine = Some("signal".into());
    let expected = ["sudo sysctl -w vm.unprivileged_userfaultfd=1", "Linux 5.11 or newer", PRELOAD];
    assert_eq!(lines(&report), expected);
    let mut report = complete();
    report.system.kernel = "6.5.0".into();
    report.userfaultfd.features.retain(|feature| feature.name != "move");
    assert_eq!(lines(&report), ["Linux 6.8 or newer"]);
}

#[test]
fn variables_that_keep_a_better_engine_away_are_named() {
    let mut report = complete();
    report.environment.engine = Some("signal".into());
    (report.engine, report.forced) = (Some("signal".into()), true);
    assert_eq!(lines(&report), ["unset HMM_ENGINE", PRELOAD]);
    report.engine = None;
    assert_eq!(lines(&report), ["unset HMM_ENGINE"]);
    report.environment.engine = None;
    report.works = false;
    assert_eq!(lines(&report), ["export HMM_ENGINE=uffd"]);
    report.works = true;
    report.environment.uffd_disable = Some("move".into());
    assert_eq!(lines(&report), ["unset HMM_UFFD_DISABLE"]);
}

#[test]
fn what_this_process_lacks_is_named() {
    let mut report = docker();
    report.signals.sigsegv = Action::Ignored;
    report.engine = None;
    report.limits.address_space = Some(1 << 30);
    report.limits.overcommit_memory = Some(2);
    let found = lines(&report);
    for line in [
        "env --default-signal=SEGV PROGRAM",
        "ulimit -v unlimited",
        "sysctl -w vm.overcommit_memory=0",
    ] {
        assert!(found.contains(&line.into()), "{line}: {found:?}");
    }
}

#[test]
fn few_mappings_matter_to_the_signal_engine_only() {
    let mut report = docker();
    report.limits.max_map_count = Some(1000);
    report.proc_files.mem_ignores_protection = Some(false);
    let found = lines(&report);
    assert!(found.contains(&"sysctl -w vm.max_map_count=262144".into()), "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("proc_mem.force_override")), "{found:?}");
    let mut report = complete();
    report.limits.max_map_count = Some(1000);
    assert_eq!(lines(&report), [""; 0]);
}

#[test]
fn another_page_size_is_the_end_of_it() {
    let mut report = docker();
    report.system.page_size = 65_536;
    assert_eq!(lines(&report), ["a kernel with pages of 4096 bytes"]);
}

#[test]
fn valgrind_is_named_and_no_right_is_asked_for() {
    let mut report = plain_report();
    report.environment.valgrind = true;
    assert_eq!(lines(&report), ["run the program without Valgrind", PRELOAD]);
}
