//! What known environments lack, as far as it matters to this library. Each table is short and holds facts: what that
//! environment refuses, and with which errno.

use crate::filter::{Rule, Then, When};
use crate::paths::Denied;

/// Calls that Docker's default profile refuses with EPERM to a container without extra capabilities, on kernels from
/// 4.8 on. ptrace, `process_vm_readv` and `process_vm_writev` are allowed there; they are not in the table.
const DOCKER: &[(&str, libc::c_long)] = &[
    ("add_key", libc::SYS_add_key),
    ("bpf", libc::SYS_bpf),
    ("fanotify_init", libc::SYS_fanotify_init),
    ("fsopen", libc::SYS_fsopen),
    ("get_mempolicy", libc::SYS_get_mempolicy),
    ("kcmp", libc::SYS_kcmp),
    ("keyctl", libc::SYS_keyctl),
    ("mbind", libc::SYS_mbind),
    ("migrate_pages", libc::SYS_migrate_pages),
    ("mount", libc::SYS_mount),
    ("mount_setattr", libc::SYS_mount_setattr),
    ("move_mount", libc::SYS_move_mount),
    ("move_pages", libc::SYS_move_pages),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("open_tree", libc::SYS_open_tree),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("pidfd_getfd", libc::SYS_pidfd_getfd),
    ("pivot_root", libc::SYS_pivot_root),
    ("process_madvise", libc::SYS_process_madvise),
    ("request_key", libc::SYS_request_key),
    ("set_mempolicy", libc::SYS_set_mempolicy),
    ("setns", libc::SYS_setns),
    ("umount2", libc::SYS_umount2),
    ("unshare", libc::SYS_unshare),
    ("userfaultfd", libc::SYS_userfaultfd),
];
/// Flags of `clone` that make a namespace: Docker refuses the call when one is there.
const NAMESPACES: u32 = 0x7E02_0000;

/// Capabilities that Docker leaves to a container's root, by their numbers: chown, `dac_override`, fowner, fsetid, kill,
/// setgid, setuid, setpcap, `net_bind_service`, `net_raw`, `sys_chroot`, mknod, `audit_write`, setfcap.
pub(crate) const DOCKER_CAPABILITIES: &[u32] = &[0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31];

/// `PROCMAP_QUERY` (Linux 6.11): `_IOWR('f', 17, 104 bytes)`.
const PROCMAP_QUERY: u32 = read_write_ioctl(b'f', 17, 104);
/// `PAGEMAP_SCAN` (Linux 6.7): `_IOWR('f', 16, 96 bytes)`.
const PAGEMAP_SCAN: u32 = read_write_ioctl(b'f', 16, 96);
/// `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE` (Linux 5.14).
const POPULATE: [u32; 2] = [22, 23];

/// The number of an ioctl that takes a structure of `size` bytes and writes to it.
const fn read_write_ioctl(kind: u8, number: u32, size: u32) -> u32 {
    (3 << 30) | (size << 16) | ((kind as u32) << 8) | number
}

const fn refused(call: libc::c_long, errno: i32) -> Rule {
    Rule { call, when: When::Always, then: Then::Errno(errno) }
}

fn refused_with(call: libc::c_long, argument: u32, value: u32, errno: i32) -> Rule {
    Rule { call, when: When::Equals { argument, value }, then: Then::Errno(errno) }
}

/// The relevant part of Docker's default profile.
pub(crate) fn docker(rules: &mut Vec<Rule>, denied: &mut Vec<Denied>) {
    rules.extend(DOCKER.iter().map(|(_, call)| refused(*call, libc::EPERM)));
    let namespaces = When::AnyBit { argument: 0, bits: NAMESPACES };
    rules.push(Rule { call: libc::SYS_clone, when: namespaces, then: Then::Errno(libc::EPERM) });
    // The flags of clone3 lie in memory, where a filter cannot look: libraries fall back to clone.
    rules.push(refused(libc::SYS_clone3, libc::ENOSYS));
    denied.push(Denied::new("/dev/userfaultfd", libc::ENOENT, false));
}

/// What gVisor has not.
pub(crate) fn gvisor(rules: &mut Vec<Rule>, denied: &mut Vec<Denied>) {
    rules.push(refused(libc::SYS_userfaultfd, libc::ENOSYS));
    rules.extend(new_ioctls());
    denied.push(Denied::new("/dev/userfaultfd", libc::ENOENT, false));
    denied.push(Denied::new("/proc/self/mem", libc::EACCES, true));
    denied.push(Denied::new("/proc/self/pagemap", libc::ENOENT, false));
}

/// What kernels before 5.14 have not.
pub(crate) fn old_kernel(rules: &mut Vec<Rule>) {
    rules.extend(new_ioctls());
    rules.extend(POPULATE.map(|advice| refused_with(libc::SYS_madvise, 2, advice, libc::EINVAL)));
}

fn new_ioctls() -> [Rule; 2] {
    [PROCMAP_QUERY, PAGEMAP_SCAN]
        .map(|number| refused_with(libc::SYS_ioctl, 1, number, libc::ENOTTY))
}

/// The calls that `--docker` refuses, for people.
pub(crate) fn docker_calls() -> String {
    crate::syscalls::names(DOCKER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_of_the_kernel() {
        assert_eq!((PROCMAP_QUERY, PAGEMAP_SCAN), (0xC068_6611, 0xC060_6610));
    }
}
