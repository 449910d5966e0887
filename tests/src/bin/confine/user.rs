//! Becoming another user, and giving up capabilities.

use crate::{Failure, Result, checked, impossible};
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A user of this system.
#[derive(Debug)]
pub(crate) struct User {
    name: String,
    uid: libc::uid_t,
    gid: libc::gid_t,
}

impl User {
    /// Looks a user up, and refuses what would fail later.
    pub(crate) fn find(name: &str) -> Result<Self> {
        let text = CString::new(name).map_err(|_| Failure::Usage("a name has no NUL".into()))?;
        // SAFETY: the name ends with a NUL.
        let entry = unsafe { libc::getpwnam(text.as_ptr()) };
        // SAFETY: the entry is null or stays valid until the next call, and this program has one thread so far.
        let Some(entry) = (unsafe { entry.as_ref() }) else {
            return Err(Failure::Impossible(format!("there is no user {name}")));
        };
        // SAFETY: no arguments.
        let own = unsafe { libc::geteuid() };
        if own != 0 && own != entry.pw_uid {
            return Err(Failure::Impossible(format!("only root can run a command as {name}")));
        }
        Ok(Self { name: name.to_owned(), uid: entry.pw_uid, gid: entry.pw_gid })
    }

    /// Makes this process the user's, for good.
    pub(crate) fn become_it(&self) -> io::Result<()> {
        // SAFETY: no arguments.
        if unsafe { libc::geteuid() } == self.uid {
            return Ok(());
        }
        // SAFETY: the list has one entry.
        checked(unsafe { libc::setgroups(1, &self.gid) })?;
        // SAFETY: no pointers.
        checked(unsafe { libc::setgid(self.gid) })?;
        // SAFETY: no pointers.
        checked(unsafe { libc::setuid(self.uid) })?;
        Ok(())
    }

    /// What the user's environment differs in. To be asked once this process is the user's.
    pub(crate) fn environment(&self) -> Result<Vec<(&'static str, PathBuf)>> {
        let named = std::env::var_os("TMPDIR").map(PathBuf::from);
        let usual = ["/tmp", "/var/tmp", "/dev/shm"].map(PathBuf::from);
        let place = named.into_iter().chain(usual).find(|place| is_writable(place));
        let place = place.ok_or_else(|| {
            Failure::Impossible(format!("{} can write to no temporary folder", self.name))
        })?;
        let name = PathBuf::from(&self.name);
        Ok(vec![
            ("HOME", place.clone()),
            ("TMPDIR", place),
            ("USER", name.clone()),
            ("LOGNAME", name),
        ])
    }
}

fn is_writable(place: &Path) -> bool {
    let Ok(text) = CString::new(place.as_os_str().as_bytes()) else { return false };
    // SAFETY: the path ends with a NUL.
    unsafe { libc::access(text.as_ptr(), libc::W_OK | libc::X_OK) == 0 }
}

/// The head of the structure that `capget` and `capset` take (`_LINUX_CAPABILITY_VERSION_3`: two words each).
#[repr(C)]
struct CapabilityHead {
    version: u32,
    pid: i32,
}

/// Keeps only these capabilities, also for what is run later. A process without capabilities has nothing to lose.
pub(crate) fn keep_capabilities(numbers: &[u32]) -> Result<()> {
    let mut head = CapabilityHead { version: 0x2008_0522, pid: 0 };
    // Effective, permitted and inheritable; the low words of all three, then the high words.
    let mut sets = [[0u32; 3]; 2];
    let failed = |error| impossible("capabilities cannot be given up", &error);
    // SAFETY: both structures are as long as their version says.
    checked(unsafe { libc::syscall(libc::SYS_capget, &raw mut head, sets.as_mut_ptr()) })
        .map_err(failed)?;
    if sets.iter().flatten().all(|word| *word == 0) {
        return Ok(());
    }
    for capability in (0..64).filter(|capability| !numbers.contains(capability)) {
        // SAFETY: no pointers. The kernel refuses numbers that it does not have, which is as good.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        let word = &mut sets[capability as usize / 32];
        word.iter_mut().for_each(|set| *set &= !(1 << (capability % 32)));
    }
    // SAFETY: as above.
    checked(unsafe { libc::syscall(libc::SYS_capset, &raw mut head, sets.as_ptr()) })
        .map_err(failed)?;
    Ok(())
}
