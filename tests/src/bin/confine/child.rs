//! The command's side: becomes what the options say, step by step, and runs the command.

use crate::filter::{self, Rule, Then, When};
use crate::listener::OPENS;
use crate::options::Options;
use crate::user::{self, User};
use crate::{
    CANNOT_RUN, FAILED, Failure, NOT_FOUND, Result, checked, handover, impossible, profiles,
};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What the command's side needs.
pub(crate) struct Plan<'a> {
    /// What the command line says.
    pub(crate) options: &'a Options,
    /// Who runs the command.
    pub(crate) user: Option<&'a User>,
    /// Where the supervisor waits for the descriptor of the opens.
    pub(crate) supervisor: &'a UnixStream,
    /// The supervisor's number.
    pub(crate) parent: libc::pid_t,
    /// The signals that were held off when confine began.
    pub(crate) mask: libc::sigset_t,
}

/// Runs the command in place of this process, or says why not and ends it.
pub(crate) fn run(plan: &Plan<'_>) -> ! {
    let status = match prepare(plan) {
        Ok(mut command) => {
            let error = command.exec();
            let program = command.get_program().to_string_lossy();
            eprintln!("confine: {program}: {error}");
            if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { CANNOT_RUN }
        }
        Err(failure) => {
            eprintln!("confine: {failure}");
            FAILED
        }
    };
    // SAFETY: leaves without running handlers of the parent.
    unsafe { libc::_exit(i32::from(status)) }
}

fn prepare(plan: &Plan<'_>) -> Result<Command> {
    let options = plan.options;
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]);
    if let Some(number) = options.cpu {
        use_one_cpu(number)?;
    }
    if options.docker_capabilities {
        user::keep_capabilities(profiles::DOCKER_CAPABILITIES)?;
    }
    if let Some(user) = plan.user {
        user.become_it().map_err(|error| impossible("the user cannot be changed", &error))?;
        command.envs(user.environment()?);
    }
    die_with(plan.parent).map_err(|error| impossible("cannot be tied to confine", &error))?;
    restore_signals(&plan.mask);
    let rules = all_rules(options);
    if !rules.is_empty() {
        let opens = filter::install(&rules).map_err(|error| why_no_filter(&error))?;
        if let Some(opens) = opens {
            handover::send(plan.supervisor, opens.as_fd())
                .map_err(|error| impossible("the supervisor cannot be reached", &error))?;
        }
    }
    Ok(command)
}

fn all_rules(options: &Options) -> Vec<Rule> {
    let mut rules = options.rules.clone();
    if !options.denied.is_empty() {
        let ask = |call: &libc::c_long| Rule { call: *call, when: When::Always, then: Then::Ask };
        rules.extend(OPENS.iter().map(ask));
    }
    rules
}

fn why_no_filter(error: &io::Error) -> Failure {
    let text = "seccomp takes no filter";
    match error.raw_os_error() {
        Some(libc::EBUSY) => {
            Failure::Impossible("the opens are supervised already: confine in confine?".to_owned())
        }
        _ => impossible(text, error),
    }
}

/// From now on this thread, and all that it starts, run on one of the CPUs that it may use.
fn use_one_cpu(number: usize) -> Result<()> {
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: zero is the empty set.
    let mut usable: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set has this size.
    checked(unsafe { libc::sched_getaffinity(0, size, &raw mut usable) })
        .map_err(|error| impossible("the usable CPUs are not known", &error))?;
    // SAFETY: the number is within the set.
    let is_usable = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &usable) };
    let cpus: Vec<usize> = (0..libc::CPU_SETSIZE as usize).filter(is_usable).collect();
    let Some(cpu) = cpus.get(number) else {
        let text = format!("there is no CPU number {number}: {} can be used", cpus.len());
        return Err(Failure::Impossible(text));
    };
    // SAFETY: zero is the empty set.
    let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the number is within the set.
    unsafe { libc::CPU_SET(*cpu, &mut one) };
    // SAFETY: the set has this size.
    checked(unsafe { libc::sched_setaffinity(0, size, &raw const one) })
        .map_err(|error| impossible(format!("CPU {cpu} cannot be chosen"), &error))?;
    Ok(())
}

/// This process is killed when the supervisor ends. To be said after a change of user, which undoes it.
fn die_with(parent: libc::pid_t) -> io::Result<()> {
    // SAFETY: no pointers.
    checked(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) })?;
    // SAFETY: no arguments.
    if unsafe { libc::getppid() } != parent {
        return Err(io::Error::other("it is gone"));
    }
    Ok(())
}

/// Signals are as they were for confine; SIGPIPE too, which Rust programs ignore.
fn restore_signals(mask: &libc::sigset_t) {
    // SAFETY: the mask was filled in by the kernel; the default action is one for every signal.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::sigprocmask(libc::SIG_SETMASK, std::ptr::from_ref(mask), std::ptr::null_mut());
    }
}
