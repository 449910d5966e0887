//! System calls and errors by name.

/// System calls that `--errno` knows.
pub(crate) const CALLS: &[(&str, libc::c_long)] = &[
    ("madvise", libc::SYS_madvise),
    ("membarrier", libc::SYS_membarrier),
    ("memfd_create", libc::SYS_memfd_create),
    ("mincore", libc::SYS_mincore),
    ("mremap", libc::SYS_mremap),
    ("process_madvise", libc::SYS_process_madvise),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("ptrace", libc::SYS_ptrace),
    ("userfaultfd", libc::SYS_userfaultfd),
];

/// Errors that can be asked for.
pub(crate) const ERRORS: &[(&str, i32)] = &[
    ("EACCES", libc::EACCES),
    ("EBUSY", libc::EBUSY),
    ("EINVAL", libc::EINVAL),
    ("ENOENT", libc::ENOENT),
    ("ENOMEM", libc::ENOMEM),
    ("ENOSYS", libc::ENOSYS),
    ("ENOTTY", libc::ENOTTY),
    ("EPERM", libc::EPERM),
];

/// The value that a table has for a name.
pub(crate) fn named<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(one, _)| *one == name).map(|(_, value)| *value)
}

/// The names of a table, for people.
pub(crate) fn names<T>(table: &[(&str, T)]) -> String {
    table.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ")
}
