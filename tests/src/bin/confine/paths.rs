//! Which opens are refused: paths brought to one form and compared.

use std::path::PathBuf;

/// A file that cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Denied {
    /// Its path in normal form.
    path: Vec<u8>,
    /// How opening it fails.
    pub(crate) errno: i32,
    /// Whether reading is allowed.
    only_writing: bool,
}

/// An open that a process asks for.
#[derive(Debug)]
pub(crate) struct Open<'a> {
    /// The thread that asks.
    pub(crate) thread: u32,
    /// The folder that a relative path starts from, as the call has it.
    pub(crate) folder: i32,
    /// The path, without its NUL.
    pub(crate) path: &'a [u8],
    /// The flags, as for `open`.
    pub(crate) flags: u64,
}

impl Denied {
    /// Refuses a file, given by an absolute path.
    pub(crate) fn new(path: &str, errno: i32, only_writing: bool) -> Self {
        Self { path: normal(path.as_bytes(), |_| false), errno, only_writing }
    }

    fn name(&self) -> &[u8] {
        last(&self.path)
    }

    fn refuses(&self, flags: u64) -> bool {
        let access = flags & libc::O_ACCMODE as u64;
        !self.only_writing || access != libc::O_RDONLY as u64
    }
}

/// The errno with which an open fails, if it shall.
pub(crate) fn verdict(denied: &[Denied], open: &Open<'_>) -> Option<i32> {
    // Most opens have nothing to do with it: their last name tells, without looking anywhere.
    let name = last(open.path);
    let mut candidates = denied.iter().filter(|one| one.name() == name && one.refuses(open.flags));
    candidates.clone().next()?;
    let path = absolute(open)?;
    let path = normal(&path, |number| is_same_process(number, open.thread));
    candidates.find(|one| one.path == path).map(|one| one.errno)
}

fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
}

/// The path from the root on. `None`: the thread or its folder is gone, and the kernel will say so.
fn absolute(open: &Open<'_>) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    if open.path.starts_with(b"/") {
        return Some(open.path.to_vec());
    }
    let place = if open.folder == libc::AT_FDCWD {
        format!("/proc/{}/cwd", open.thread)
    } else {
        format!("/proc/{}/fd/{}", open.thread, open.folder)
    };
    let folder: PathBuf = std::fs::read_link(place).ok()?;
    let mut path = folder.into_os_string().into_vec();
    path.push(b'/');
    path.extend_from_slice(open.path);
    Some(path)
}

/// The path without empty names, `.` and `..`, and with `/proc/self` for every name that a process has for its own
/// folder there. Links are not followed.
fn normal(path: &[u8], is_own: impl Fn(u32) -> bool) -> Vec<u8> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => _ = names.pop(),
            _ => names.push(name),
        }
    }
    if names.len() > 1 && names[0] == b"proc" {
        if names[1] == b"thread-self" || number(names[1]).is_some_and(is_own) {
            names[1] = b"self";
        }
        // Threads have the files of their process once more.
        if names.len() > 4 && names[1] == b"self" && names[2] == b"task" {
            names.drain(2..4);
        }
    }
    names.iter().flat_map(|name| [b"/", *name].concat()).collect()
}

fn number(name: &[u8]) -> Option<u32> {
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// Whether a number in `/proc` is a thread of the process that another thread belongs to.
fn is_same_process(number: u32, thread: u32) -> bool {
    let process = process_of(thread);
    process.is_some() && process_of(number) == process
}

fn process_of(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(path: &str) -> String {
        String::from_utf8_lossy(&normal(path.as_bytes(), |number| number == 12)).into_owned()
    }

    #[test]
    fn all_names_of_the_own_folder_are_one() {
        for path in [
            "/proc/self/mem",
            "/proc/thread-self/mem",
            "/proc/12/mem",
            "//proc/./self/../12/task/14/mem",
            "/proc/self/task/14/mem",
            "/dev/../proc/self/mem",
        ] {
            assert_eq!(own(path), "/proc/self/mem", "{path}");
        }
        assert_eq!(own("/proc/13/mem"), "/proc/13/mem");
        assert_eq!(own("/proc/self/task"), "/proc/self/task");
        assert_eq!(own("/dev/userfaultfd"), "/dev/userfaultfd");
    }

    fn asked(path: &str, folder: i32, flags: i32) -> Option<i32> {
        let denied = [
            Denied::new("/proc/self/mem", 1, false),
            Denied::new("/proc/self/pagemap", 2, true),
            Denied::new("/dev/null", 3, false),
        ];
        let open =
            Open { thread: std::process::id(), folder, path: path.as_bytes(), flags: flags as u64 };
        verdict(&denied, &open)
    }

    #[test]
    fn only_what_was_named_is_refused() {
        let here = libc::AT_FDCWD;
        assert_eq!(asked("/proc/self/mem", here, libc::O_RDONLY), Some(1));
        assert_eq!(asked(&format!("/proc/{}/mem", std::process::id()), here, 0), Some(1));
        assert_eq!(asked("/proc/1/mem", here, 0), None);
        assert_eq!(asked("/proc/self/maps", here, 0), None);
        assert_eq!(asked("mem", here, 0), None);
        assert_eq!(asked("", here, 0), None);
    }

    #[test]
    fn reading_is_allowed_where_only_writing_is_refused() {
        let here = libc::AT_FDCWD;
        assert_eq!(asked("/proc/self/pagemap", here, libc::O_RDONLY | libc::O_CLOEXEC), None);
        assert_eq!(asked("/proc/self/pagemap", here, libc::O_WRONLY), Some(2));
        assert_eq!(asked("/proc/self/pagemap", here, libc::O_RDWR), Some(2));
    }

    #[test]
    fn relative_paths_start_at_their_folder() {
        use std::os::fd::AsRawFd;
        let devices = std::fs::File::open("/dev").expect("there are devices");
        assert_eq!(asked("null", devices.as_raw_fd(), 0), Some(3));
        assert_eq!(asked("./x/../null", devices.as_raw_fd(), 0), Some(3));
        assert_eq!(asked("zero", devices.as_raw_fd(), 0), None);
        let own = std::fs::File::open("/proc/self").expect("there is a folder of this process");
        assert_eq!(asked("mem", own.as_raw_fd(), 0), Some(1));
    }
}
