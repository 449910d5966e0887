//! The process that stays outside: starts the command's side, answers for its opens, hands signals on, and ends with
//! the command's status.

use crate::listener::Listener;
use crate::map_count::MapCount;
use crate::options::Options;
use crate::user::User;
use crate::{Failure, Result, checked, child, handover, impossible};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The command's side prepares itself no longer.
const PREPARATION: Duration = Duration::from_secs(20);
/// Time between a signal that shall end the command, and its end by force.
const GRACE: Duration = Duration::from_secs(5);
/// How often deadlines are looked at.
const TICK_MILLISECONDS: i32 = 250;
/// Signals that are handed on to the command.
const HANDED_ON: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Runs the command and returns its status, as a shell would have it.
pub(crate) fn run(options: &Options) -> Result<u8> {
    let user = options.user.as_deref().map(User::find).transpose()?;
    // Put back when this value is dropped, which is on every way out.
    let _map_count = options.max_map_count.map(MapCount::set).transpose()?;
    let signals = Signals::take().map_err(|error| impossible("signals cannot be read", &error))?;
    let (ours, theirs) =
        UnixStream::pair().map_err(|error| impossible("no socket can be made", &error))?;
    // SAFETY: no arguments.
    let parent = unsafe { libc::getpid() };
    // SAFETY: this program has one thread so far, so the child may do everything.
    let forked = checked(unsafe { libc::fork() });
    let command = match forked.map_err(|error| impossible("no process can be made", &error))? {
        0 => {
            drop(ours);
            child::run(&child::Plan {
                options,
                user: user.as_ref(),
                supervisor: &theirs,
                parent,
                mask: signals.before,
            })
        }
        process => Command { process, kill_at: None },
    };
    drop(theirs);
    let listener = match listen(options, &ours) {
        Ok(listener) => listener,
        Err(failure) => {
            command.send(libc::SIGKILL);
            return Err(failure);
        }
    };
    command.watch(&signals, listener.as_deref())
}

/// Starts to answer for the command's opens. A command's side that ended before has said why.
fn listen(options: &Options, socket: &UnixStream) -> Result<Option<Arc<Listener>>> {
    if options.denied.is_empty() {
        return Ok(None);
    }
    let failed = |error| impossible("opens cannot be supervised", &error);
    let Some(descriptor) = handover::receive(socket, PREPARATION).map_err(failed)? else {
        return Ok(None);
    };
    Listener::start(descriptor, options.denied.clone()).map(Some).map_err(failed)
}

/// The signals of this process, read from a descriptor.
struct Signals {
    descriptor: OwnedFd,
    /// What was held off before.
    before: libc::sigset_t,
}

impl Signals {
    fn take() -> io::Result<Self> {
        // SAFETY: zero is a valid set, and is emptied before it is used.
        let (mut ours, mut before) = unsafe { std::mem::zeroed::<[libc::sigset_t; 2]>() }.into();
        // SAFETY: the sets are valid, and all numbers are signals.
        unsafe {
            libc::sigemptyset(&raw mut ours);
            for signal in HANDED_ON.iter().chain(&[libc::SIGCHLD]) {
                libc::sigaddset(&raw mut ours, *signal);
            }
        }
        // SAFETY: both sets are valid.
        checked(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const ours, &raw mut before) })?;
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the set is valid.
        let descriptor = checked(unsafe { libc::signalfd(-1, &raw const ours, flags) })?;
        // SAFETY: the kernel made it for this call.
        Ok(Self { descriptor: unsafe { OwnedFd::from_raw_fd(descriptor) }, before })
    }

    /// Waits for a signal, or a tick.
    fn next(&self) -> Option<libc::signalfd_siginfo> {
        let descriptor = self.descriptor.as_raw_fd();
        let mut poll = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry.
        unsafe { libc::poll(&raw mut poll, 1, TICK_MILLISECONDS) };
        // SAFETY: zero is a valid value of every field.
        let mut signal: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of_val(&signal);
        // SAFETY: the kernel writes one structure of this size, or nothing.
        let count = unsafe { libc::read(descriptor, (&raw mut signal).cast(), size) };
        (count == size.cast_signed()).then_some(signal)
    }
}

/// The process of the command.
struct Command {
    process: libc::pid_t,
    /// When it is ended by force.
    kill_at: Option<Instant>,
}

impl Command {
    fn send(&self, signal: i32) {
        // SAFETY: no pointers; the child was not waited for yet, so its number is its own.
        unsafe { libc::kill(self.process, signal) };
    }

    /// Waits for its end.
    fn watch(mut self, signals: &Signals, listener: Option<&Listener>) -> Result<u8> {
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status_of(status));
            }
            if let Some(signal) = signals.next() {
                self.hand_on(&signal);
            }
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.send(libc::SIGKILL);
            }
            let Some(listener) = listener else { continue };
            listener.let_late_ones_go();
            if let Some(error) = listener.is_blind() {
                self.send(libc::SIGKILL);
                return Err(impossible("paths of the command cannot be read", &error));
            }
        }
    }

    /// Gives the command a signal that was meant for it. The terminal gives its signals to both already.
    fn hand_on(&mut self, signal: &libc::signalfd_siginfo) {
        let number = signal.ssi_signo.cast_signed();
        if !HANDED_ON.contains(&number) {
            return;
        }
        if signal.ssi_code != libc::SI_KERNEL {
            self.send(number);
        }
        self.kill_at.get_or_insert(Instant::now() + GRACE);
    }

    fn ended(&self) -> Result<Option<ExitStatus>> {
        let mut status = 0;
        // SAFETY: the status is written to a place that lives.
        let process =
            checked(unsafe { libc::waitpid(self.process, &raw mut status, libc::WNOHANG) })
                .map_err(|error| Failure::Impossible(format!("the command is lost: {error}")))?;
        Ok((process == self.process).then(|| ExitStatus::from_raw(status)))
    }
}

fn status_of(status: ExitStatus) -> u8 {
    if let Some(signal) = status.signal() {
        eprintln!("confine: the command ended by {status}");
        return (128 + signal) as u8;
    }
    status.code().unwrap_or_default() as u8
}
