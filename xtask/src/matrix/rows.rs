//! The environments of the matrix, and which tests run in them.

/// One environment, and what is expected of it.
#[derive(Debug)]
pub(crate) struct Row {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What it stands for.
    pub(crate) what: &'static str,
    /// Options of `confine`; without any, programs run as they are.
    pub(crate) confine: &'static [&'static str],
    /// Variables that are set.
    pub(crate) variables: &'static [(&'static str, &'static str)],
    /// How much longer tests may take there, as in [`PATIENCE`].
    pub(crate) patience: u32,
    /// The engine that must run there: one of these.
    pub(crate) engines: &'static [&'static str],
}

impl Row {
    /// The user that the row's programs run as, if it names one.
    pub(crate) fn user(&self) -> Option<&'static str> {
        let at = self.confine.iter().position(|word| *word == "--user")?;
        self.confine.get(at + 1).copied()
    }
}

/// The variable that tells tests so: a whole number by which they multiply their limits.
pub(crate) const PATIENCE: &str = "HMM_TEST_PATIENCE";

/// All rows, in the order in which they run.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "root",
        what: "everything is allowed",
        confine: &[],
        variables: &[],
        patience: 1,
        engines: &["uffd"],
    },
    Row {
        name: "nobody",
        what: "a user without rights, on the kernel's default settings",
        confine: &["--user", "nobody"],
        variables: &[],
        patience: 1,
        engines: &["uffd-inline"],
    },
    Row {
        name: "enosys",
        what: "a kernel without userfaultfd",
        confine: &["--errno", "userfaultfd=ENOSYS", "--deny-path", "/dev/userfaultfd=ENOENT"],
        variables: &[],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "eperm",
        what: "userfaultfd is refused, as system call and as device node",
        confine: &["--errno", "userfaultfd=EPERM", "--deny-path", "/dev/userfaultfd=EACCES"],
        variables: &[],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "docker",
        what: "a container without extra rights",
        confine: &["--docker"],
        variables: &[],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "gvisor",
        what: "a sandbox with a kernel of its own",
        confine: &["--gvisor"],
        variables: &[],
        // Mappings are read as text, and every page that came home adds one.
        patience: 4,
        engines: &["signal"],
    },
    Row {
        name: "no-move",
        what: "userfaultfd before Linux 6.8: no UFFDIO_MOVE",
        confine: &[],
        variables: &[("HMM_UFFD_DISABLE", "move")],
        patience: 1,
        engines: &["uffd"],
    },
    Row {
        name: "no-wp",
        what: "userfaultfd without asynchronous write protection",
        confine: &[],
        variables: &[("HMM_UFFD_DISABLE", "wp")],
        patience: 1,
        engines: &["uffd"],
    },
    Row {
        name: "no-events",
        what: "userfaultfd that reports no layout changes",
        confine: &[],
        variables: &[("HMM_UFFD_DISABLE", "events")],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "no-proc-mem",
        what: "a user without rights, and /proc/self/mem refused",
        confine: &["--user", "nobody", "--deny-path", "/proc/self/mem=EACCES"],
        variables: &[],
        patience: 1,
        engines: &["uffd-inline", "signal"],
    },
    Row {
        name: "no-proc-mem-no-uffd",
        what: "neither /proc/self/mem nor userfaultfd",
        confine: &[
            "--deny-path",
            "/proc/self/mem=EACCES",
            "--errno",
            "userfaultfd=ENOSYS",
            "--deny-path",
            "/dev/userfaultfd=ENOENT",
        ],
        variables: &[],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "small-maps",
        what: "few mappings for each process, and no userfaultfd",
        confine: &[
            "--max-map-count",
            "1000",
            "--errno",
            "userfaultfd=ENOSYS",
            "--deny-path",
            "/dev/userfaultfd=ENOENT",
        ],
        variables: &[],
        patience: 1,
        engines: &["signal"],
    },
    Row {
        name: "old-kernel",
        what: "no ioctls on /proc/self/maps and pagemap, no MADV_POPULATE",
        confine: &["--old-kernel"],
        variables: &[],
        patience: 1,
        engines: &["uffd"],
    },
    Row {
        name: "inline",
        what: "root, with the engine of a user without rights",
        confine: &[],
        variables: &[("HMM_ENGINE", "uffd-inline")],
        patience: 1,
        engines: &["uffd-inline"],
    },
    Row {
        name: "one-cpu",
        what: "one CPU for all threads",
        confine: &["--cpu", "0"],
        variables: &[],
        patience: 1,
        engines: &["uffd"],
    },
];

/// Variables that would choose for every row; they are removed before a row sets its own.
pub(crate) const CHOOSERS: &[&str] = &["HMM_ENGINE", "HMM_UFFD_DISABLE"];

/// Tests that do not run here, by the beginning of their names: they run on the model engine, or are about this
/// repository, or are the promises', which `cargo xtask promises` runs on each engine.
pub(crate) const ELSEWHERE: &[&str] = &[
    "xtask ",
    "tests confine ",
    "tests promises ",
    "tests/c/promises",
    "hmm-core model_",
    "soft model ",
    "hmm-core hmm_core engine::model",
];

/// The rows of `--quick`: each engine, and what is most unlike the machine of whoever wrote it.
pub(crate) const QUICK_ROWS: &[&str] = &["nobody", "enosys", "no-move", "one-cpu"];
/// What a test's name has to contain to run in `--quick`.
pub(crate) const QUICK_TESTS: &[&str] = &[
    "tests faults ",
    "tests devices ",
    "tests shutdown ",
    "tests/c/m",
    "examples/c/",
    "quickstart",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_quick_names_rows() {
        for (at, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..at].iter().all(|other| other.name != row.name), "{}", row.name);
            assert!(!row.engines.is_empty(), "{}", row.name);
        }
        for name in QUICK_ROWS {
            assert!(ROWS.iter().any(|row| row.name == *name), "{name}");
        }
    }

    #[test]
    fn a_row_knows_its_user() {
        let user = |name| ROWS.iter().find(|row| row.name == name).and_then(Row::user);
        assert_eq!((user("nobody"), user("docker")), (Some("nobody"), None));
    }
}
