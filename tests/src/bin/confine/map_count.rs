//! Fewer mappings for every process of the machine, for a while.

use crate::{Failure, Result, checked, impossible};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

const SETTING: &str = "/proc/sys/vm/max_map_count";
/// How long another confine's turn is awaited.
const TURN: Duration = Duration::from_secs(30);

/// The setting is small as long as this value lives.
///
/// A guardian puts it back: a process of its own, in a session of its own, that waits for the end of a pipe. The pipe
/// ends with this process however that ends, killed with its whole group included.
#[derive(Debug)]
pub(crate) struct MapCount {
    pipe: Option<OwnedFd>,
    guardian: libc::pid_t,
}

impl MapCount {
    /// Sets it.
    pub(crate) fn set(count: u64) -> Result<Self> {
        let failed = |error| impossible(format!("{SETTING} cannot be set"), &error);
        let mut setting =
            OpenOptions::new().read(true).write(true).open(SETTING).map_err(failed)?;
        take_turn(&setting)?;
        let mut before = String::new();
        setting.read_to_string(&mut before).map_err(failed)?;
        let held = Self::with_guardian(&setting, before.trim()).map_err(failed)?;
        put(&mut setting, &count.to_string()).map_err(failed)?;
        Ok(held)
    }

    fn with_guardian(setting: &File, before: &str) -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: room for both ends.
        checked(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
        // SAFETY: the kernel made both for this call.
        let [read, write] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        // SAFETY: this program has one thread so far, so the child may do everything.
        match checked(unsafe { libc::fork() })? {
            0 => guard(read, write, setting, before),
            guardian => Ok(Self { pipe: Some(write), guardian }),
        }
    }
}

impl Drop for MapCount {
    fn drop(&mut self) {
        self.pipe = None;
        // SAFETY: the guardian is a child of this process; it ends as soon as the pipe does.
        unsafe { libc::waitpid(self.guardian, std::ptr::null_mut(), 0) };
    }
}

/// Two that set it at a time would put each other's value back.
fn take_turn(setting: &File) -> Result<()> {
    let start = Instant::now();
    loop {
        // SAFETY: no pointers.
        match checked(unsafe { libc::flock(setting.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }) {
            Ok(_) => return Ok(()),
            Err(error) if error.raw_os_error() != Some(libc::EWOULDBLOCK) => {
                return Err(impossible(format!("{SETTING} cannot be locked"), &error));
            }
            Err(_) if start.elapsed() > TURN => {
                let text = format!("another confine has set {SETTING}, and does not end");
                return Err(Failure::Impossible(text));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn put(setting: &mut File, value: &str) -> io::Result<()> {
    setting.rewind()?;
    setting.write_all(value.as_bytes())
}

/// Waits for the end of the pipe and puts the value back.
fn guard(read: OwnedFd, write: OwnedFd, setting: &File, before: &str) -> ! {
    drop(write);
    let status = match guarded(read, setting, before) {
        Ok(()) => 0,
        Err(_) => 1,
    };
    // SAFETY: leaves without running handlers of the parent.
    unsafe { libc::_exit(status) }
}

fn guarded(read: OwnedFd, mut setting: &File, before: &str) -> io::Result<()> {
    // SAFETY: the set is filled by the call before it is used.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        libc::setsid();
    }
    // Whoever reads our output shall see its end when the command's side ends.
    let nowhere = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for stream in 0..3 {
        // SAFETY: no pointers; the streams of this process are used by nobody any more.
        checked(unsafe { libc::dup2(nowhere.as_raw_fd(), stream) })?;
    }
    let mut rest = Vec::new();
    File::from(read).read_to_end(&mut rest)?;
    setting.rewind()?;
    setting.write_all(before.as_bytes())
}
