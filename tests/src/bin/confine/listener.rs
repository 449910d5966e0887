//! The supervisor's side of the opens: threads that receive each question of the filter, read the path from the
//! caller's memory and answer.
//!
//! Reading may wait: the page that holds the path can be one that the command itself has to bring back. So there are
//! as many threads as wait at a time, and a question that waits too long is answered from outside: its open goes on.

use crate::checked;
use crate::paths::{Denied, Open, verdict};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A path is not read for longer.
const READING: Duration = Duration::from_secs(2);
/// Threads that may wait for memory at a time.
const MOST_THREADS: usize = 64;
/// How long a thread sleeps when a question vanished, at most.
const AGAIN_MILLISECONDS: i32 = 100;
/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`.
const SYNC_WAKE_UP: libc::c_ulong = 1;
/// A page, and with it the piece of memory that is read at a time: the next one may not be there.
const PAGE: u64 = 4096;

/// Answers questions until the last confined process is gone.
pub(crate) struct Listener {
    descriptor: OwnedFd,
    denied: Vec<Denied>,
    desk: Mutex<Desk>,
    /// The errno with which memory cannot be read at all, or 0.
    blind: AtomicI32,
    late: AtomicBool,
}

/// Who works on what.
#[derive(Default)]
struct Desk {
    threads: usize,
    idle: usize,
    /// Questions in work, and since when.
    open: Vec<(u64, Instant)>,
}

/// A question as the kernel writes it; a later kernel may write more.
#[repr(C)]
struct Question {
    notification: libc::seccomp_notif,
    room: [u64; 16],
}

impl Listener {
    /// Starts to answer.
    pub(crate) fn start(descriptor: OwnedFd, denied: Vec<Denied>) -> io::Result<Arc<Self>> {
        wake_at_once(&descriptor);
        let listener = Arc::new(Self {
            descriptor,
            denied,
            desk: Mutex::default(),
            blind: AtomicI32::new(0),
            late: AtomicBool::new(false),
        });
        listener.add_thread(&mut listener.desk())?;
        Ok(listener)
    }

    /// The errno with which the command's memory cannot be read, if that is so: then nothing is refused.
    pub(crate) fn is_blind(&self) -> Option<io::Error> {
        let errno = self.blind.load(Ordering::SeqCst);
        (errno != 0).then(|| io::Error::from_raw_os_error(errno))
    }

    /// Lets opens go on whose path could not be read in time.
    pub(crate) fn let_late_ones_go(&self) {
        let mut desk = self.desk();
        let late = desk.open.extract_if(.., |(_, since)| since.elapsed() >= READING);
        for (id, _) in late {
            self.answer(id, None);
            if !self.late.swap(true, Ordering::SeqCst) {
                eprintln!("confine: a path could not be read in time; its open went on unchecked");
            }
        }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_thread(self: &Arc<Self>, desk: &mut Desk) -> io::Result<()> {
        let listener = Arc::clone(self);
        std::thread::Builder::new().spawn(move || listener.work())?;
        desk.threads += 1;
        desk.idle += 1;
        Ok(())
    }

    fn work(self: Arc<Self>) {
        while let Some(question) = self.receive() {
            {
                let mut desk = self.desk();
                desk.idle -= 1;
                desk.open.push((question.id, Instant::now()));
                if desk.idle == 0 && desk.threads < MOST_THREADS {
                    // Without one more thread the next question waits for this one, or for its deadline.
                    let _ = self.add_thread(&mut desk);
                }
            }
            let errno = self.judge(&question);
            let mut desk = self.desk();
            desk.idle += 1;
            if let Some(at) = desk.open.iter().position(|(id, _)| *id == question.id) {
                desk.open.swap_remove(at);
                drop(desk);
                self.answer(question.id, errno);
            }
        }
    }

    /// The next question. `None`: nobody is left who could ask.
    fn receive(&self) -> Option<libc::seccomp_notif> {
        loop {
            // SAFETY: zero is a valid value of every field, and what the kernel wants to find.
            let mut question: Question = unsafe { std::mem::zeroed() };
            // SAFETY: the structure has the kernel's layout and room for more.
            let done = unsafe {
                let place = &raw mut question;
                libc::ioctl(self.descriptor.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, place)
            };
            match checked(done).map_err(|error| error.raw_os_error()) {
                Ok(_) => return Some(question.notification),
                Err(Some(libc::EINTR)) => {}
                // Who asked was killed meanwhile, or it was the last.
                Err(Some(libc::ENOENT)) if !self.is_over() => {}
                Err(_) => return None,
            }
        }
    }

    fn is_over(&self) -> bool {
        let descriptor = self.descriptor.as_raw_fd();
        let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry.
        unsafe { libc::poll(&raw mut poll, 1, AGAIN_MILLISECONDS) };
        poll.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
    }

    /// Answers: the call fails with an errno, or goes on. Who asked may be gone, which is an answer too.
    fn answer(&self, id: u64, errno: Option<i32>) {
        let goes_on = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        let mut answer = libc::seccomp_notif_resp {
            id,
            val: 0,
            error: errno.map_or(0, |errno| -errno),
            flags: if errno.is_some() { 0 } else { goes_on },
        };
        // SAFETY: the structure has the kernel's layout.
        unsafe {
            let place = &raw mut answer;
            libc::ioctl(self.descriptor.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, place)
        };
    }

    /// The errno with which this open fails, if it shall.
    fn judge(&self, question: &libc::seccomp_notif) -> Option<i32> {
        let call = libc::c_long::from(question.data.nr);
        let place = place_of(call, &question.data.args)?;
        let read = || -> io::Result<_> {
            let path = read_text(question.pid, place.path)?;
            let flags = match place.flags {
                Flags::Value(flags) => flags,
                Flags::InMemory(address) => read_word(question.pid, address)?,
            };
            Ok((path, flags))
        };
        match read() {
            Ok((path, flags)) => {
                let open = Open { thread: question.pid, folder: place.folder, path: &path, flags };
                verdict(&self.denied, &open)
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                self.blind.store(error.raw_os_error().unwrap_or(libc::EPERM), Ordering::SeqCst);
                Some(libc::EPERM)
            }
            // The kernel will say the same of this path, or the caller is gone.
            Err(_) => None,
        }
    }
}

/// Lets the kernel (6.6) run the answering thread where the asking one slept, which makes an open cheaper. Older
/// kernels refuse, and all is well.
fn wake_at_once(descriptor: &OwnedFd) {
    let (number, flag) = (libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP);
    // SAFETY: the argument is a number, not a pointer.
    unsafe { libc::ioctl(descriptor.as_raw_fd(), number, flag) };
}

/// The calls that open a file.
pub(crate) const OPENS: &[libc::c_long] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_creat,
    libc::SYS_openat,
    libc::SYS_openat2,
];

/// Where an open has its arguments.
struct Place {
    folder: i32,
    path: u64,
    flags: Flags,
}

enum Flags {
    Value(u64),
    InMemory(u64),
}

fn place_of(call: libc::c_long, arguments: &[u64; 6]) -> Option<Place> {
    let [first, second, third, ..] = *arguments;
    #[cfg(target_arch = "x86_64")]
    if call == libc::SYS_open || call == libc::SYS_creat {
        let creates = call == libc::SYS_creat;
        let flags = Flags::Value(if creates { libc::O_WRONLY as u64 } else { second });
        return Some(Place { folder: libc::AT_FDCWD, path: first, flags });
    }
    let flags = match call {
        libc::SYS_openat => Flags::Value(third),
        // The first word of `struct open_how`.
        libc::SYS_openat2 => Flags::InMemory(third),
        _ => return None,
    };
    Some(Place { folder: first as i32, path: second, flags })
}

/// The bytes up to a NUL.
fn read_text(thread: u32, address: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let mut at = address;
    while text.len() < libc::PATH_MAX as usize {
        let mut piece = vec![0; (PAGE - at % PAGE) as usize];
        let count = read(thread, at, &mut piece)?;
        if let Some(end) = piece[..count].iter().position(|byte| *byte == 0) {
            text.extend_from_slice(&piece[..end]);
            return Ok(text);
        }
        text.extend_from_slice(&piece[..count]);
        at += count as u64;
    }
    Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG))
}

fn read_word(thread: u32, address: u64) -> io::Result<u64> {
    let mut word = [0; 8];
    read(thread, address, &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

/// Reads memory of another process, at least one byte of it.
fn read(thread: u32, address: u64, into: &mut [u8]) -> io::Result<usize> {
    let ours = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let theirs = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(address as usize),
        iov_len: into.len(),
    };
    // SAFETY: our part is a buffer that lives until the call returns; theirs is an address of another process, which
    // the kernel checks.
    let count = checked(unsafe {
        libc::process_vm_readv(thread as libc::pid_t, &raw const ours, 1, &raw const theirs, 1, 0)
    })?;
    match count {
        0 => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        count => Ok(count.unsigned_abs()),
    }
}
