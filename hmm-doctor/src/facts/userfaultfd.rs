//! Userfaultfd: how it can be had here, and what it offers.

use super::{Access, number, text};
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;

const NODE: &str = "/dev/userfaultfd";

/// A feature, as `hmm_core` knows it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Feature {
    pub(crate) name: &'static str,
    pub(crate) since: &'static str,
    pub(crate) offered: bool,
    pub(crate) masked: bool,
}

/// Userfaultfd here.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Userfaultfd {
    /// The device node.
    pub(crate) device: Access,
    /// Its permissions, in octal; null where it does not exist.
    pub(crate) device_mode: Option<String>,
    /// Its minor number in `/proc/misc`; null where the kernel has none, or does not say.
    pub(crate) device_minor: Option<u32>,
    /// `vm.unprivileged_userfaultfd`; null where there is none.
    pub(crate) unprivileged: Option<u32>,
    /// Why none at all can be opened, not even for faults of user code.
    pub(crate) refused: Option<String>,
    pub(crate) features: Vec<Feature>,
}

impl Userfaultfd {
    pub(crate) fn look() -> Self {
        let features = hmm_core::engine::uffd::features();
        let feature = |one: hmm_core::engine::uffd::Feature| Feature {
            name: one.name,
            since: one.since,
            offered: one.offered,
            masked: one.masked,
        };
        // Where it cannot be seen it cannot be opened either, and the other way round.
        let opened = OpenOptions::new().read(true).write(true).open(NODE);
        let is_there =
            opened.as_ref().err().is_none_or(|error| error.kind() != ErrorKind::NotFound);
        let node = std::fs::metadata(NODE).ok().filter(|_| is_there);
        let mode = node.map(|node| node.permissions().mode() & 0o7777);
        Self {
            device: Access::new(&opened),
            device_mode: mode.map(|mode| format!("{mode:04o}")),
            device_minor: text("/proc/misc").as_deref().and_then(minor),
            unprivileged: number("/proc/sys/vm/unprivileged_userfaultfd"),
            refused: features.as_ref().err().map(ToString::to_string),
            features: features.unwrap_or_default().into_iter().map(feature).collect(),
        }
    }

    /// Whether the kernel has the feature.
    pub(crate) fn offers(&self, name: &str) -> bool {
        self.features.iter().any(|one| one.name == name && one.offered)
    }
}

/// The minor number of userfaultfd in the kernel's list of such devices.
fn minor(list: &str) -> Option<u32> {
    let line = list.lines().find(|line| line.ends_with(" userfaultfd"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// As a user without rights finds it on a present kernel.
    pub(crate) fn plain_userfaultfd() -> Userfaultfd {
        let feature = |name| Feature { name, since: "6.8", offered: true, masked: false };
        Userfaultfd {
            device: Access { opens: false, error: Some("Permission denied".into()) },
            device_mode: Some("0600".into()),
            device_minor: Some(257),
            unprivileged: Some(0),
            refused: None,
            features: ["wp", "events", "sigbus", "move"].map(feature).to_vec(),
        }
    }

    #[test]
    fn the_minor_number_is_that_of_userfaultfd() {
        assert_eq!(minor("122 vhost\n257 userfaultfd\n 10 tun"), Some(257));
        assert_eq!(minor("122 vhost"), None);
    }
}
