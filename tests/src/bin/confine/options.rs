//! The command line.

use crate::filter::{Rule, Then, When};
use crate::paths::Denied;
use crate::{Failure, Result, profiles, syscalls};
use std::ffi::OsString;

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// How to use it.
    Help,
    /// What each option does.
    List,
    /// Run a command.
    Run(Box<Options>),
}

/// The environment of the command, and the command.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// What system calls do.
    pub(crate) rules: Vec<Rule>,
    /// What cannot be opened.
    pub(crate) denied: Vec<Denied>,
    /// Whether capabilities are those of a Docker container.
    pub(crate) docker_capabilities: bool,
    /// Who runs it.
    pub(crate) user: Option<String>,
    /// On which CPU, counted from 0 among those that this process may use.
    pub(crate) cpu: Option<usize>,
    /// How many mappings any process may have meanwhile.
    pub(crate) max_map_count: Option<u64>,
    /// The command and its arguments.
    pub(crate) command: Vec<OsString>,
}

/// Each option, its argument, and what it does.
const OPTIONS: &[(&str, &str, &str)] = &[
    ("--errno", "CALL=ERRNO", "the system call fails with the errno"),
    ("--deny-path", "PATH=ERRNO", "opening the file fails; all names of /proc/self count as one"),
    ("--deny-write", "PATH=ERRNO", "opening the file for writing fails"),
    ("--docker", "", "calls, device nodes and capabilities as in Docker without extra rights"),
    (
        "--gvisor",
        "",
        "no userfaultfd, no /proc/self/pagemap, no writing to /proc/self/mem, no new ioctls",
    ),
    ("--old-kernel", "", "no PROCMAP_QUERY, PAGEMAP_SCAN, MADV_POPULATE_READ, MADV_POPULATE_WRITE"),
    ("--user", "NAME", "runs as this user, with HOME and TMPDIR where it can write (needs root)"),
    ("--cpu", "N", "runs on one CPU: number N, from 0, of those that can be used here"),
    ("--max-map-count", "N", "sets vm.max_map_count for the whole machine meanwhile (needs root)"),
];
/// Fewer mappings would stop programs that have nothing to do with the test.
const FEWEST_MAPS: u64 = 256;

/// How to use it.
pub(crate) fn help() -> String {
    let mut text = String::from(
        "usage: confine [OPTION]... -- COMMAND [ARGUMENT]...\n       confine --list\n\n",
    );
    for (name, argument, what) in OPTIONS {
        let left = format!("{name} {argument}");
        text.push_str(&format!("  {left:<25} {what}\n"));
    }
    text.push_str(
        "\nThe exit status is that of the command, 128 + N when signal N killed it, and 125 when\n\
         it could not be run as asked (126: not executable, 127: not found).\n",
    );
    text
}

/// What each option does, to the last call.
pub(crate) fn list() -> String {
    let both = "PROCMAP_QUERY and PAGEMAP_SCAN: ENOTTY";
    format!(
        "{}\n\
         calls that --errno knows: {}\n\
         errors: {}\n\n\
         --docker: EPERM: {}; clone with a new namespace: EPERM; clone3: ENOSYS; /dev/userfaultfd: ENOENT; \
         capabilities: the 14 of a container's root\n\
         --gvisor: userfaultfd: ENOSYS; {both}; /dev/userfaultfd and /proc/self/pagemap: ENOENT; \
         /proc/self/mem for writing: EACCES\n\
         --old-kernel: {both}; MADV_POPULATE_READ and MADV_POPULATE_WRITE: EINVAL\n\n\
         Opens are decided by a supervisor that reads the path, and nothing else costs anything. It and\n\
         everything that it started die together; what the command leaves behind can open nothing.\n\
         A command that outlives a signal to confine (SIGTERM, SIGINT, SIGHUP, SIGQUIT) by 5 s is killed.\n",
        help(),
        syscalls::names(syscalls::CALLS),
        syscalls::names(syscalls::ERRORS),
        profiles::docker_calls(),
    )
}

/// Reads the words behind the program's name.
pub(crate) fn parse(words: Vec<OsString>) -> Result<Request> {
    let mut options = Options::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let name = word.to_str().unwrap_or_default().to_owned();
        match name.as_str() {
            "--help" | "-h" => return Ok(Request::Help),
            "--list" => return Ok(Request::List),
            "--docker" => {
                options.docker_capabilities = true;
                profiles::docker(&mut options.rules, &mut options.denied);
            }
            "--gvisor" => profiles::gvisor(&mut options.rules, &mut options.denied),
            "--old-kernel" => profiles::old_kernel(&mut options.rules),
            "--" => {
                options.command = words.collect();
                break;
            }
            _ => {
                let value = words.next().and_then(|value| value.into_string().ok());
                set(&mut options, &name, value.as_deref())?;
            }
        }
    }
    if options.command.is_empty() {
        return Err(Failure::Usage("no command behind --".to_owned()));
    }
    Ok(Request::Run(Box::new(options)))
}

/// Sets an option that takes a value.
fn set(options: &mut Options, name: &str, value: Option<&str>) -> Result<()> {
    if !OPTIONS.iter().any(|(option, _, _)| *option == name) {
        return Err(Failure::Usage(format!("no such option: {name}")));
    }
    let value = value.ok_or_else(|| Failure::Usage(format!("{name} takes a value")))?;
    match name {
        "--errno" => {
            let (call, errno) = pair(name, value)?;
            let call = syscalls::named(syscalls::CALLS, call).ok_or_else(|| {
                let known = syscalls::names(syscalls::CALLS);
                Failure::Usage(format!("{name} does not know {call}, only: {known}"))
            })?;
            // What is said one by one comes before what a profile says.
            options.rules.insert(0, Rule { call, when: When::Always, then: Then::Errno(errno) });
        }
        "--deny-path" | "--deny-write" => {
            let (path, errno) = pair(name, value)?;
            if !path.starts_with('/') {
                return Err(Failure::Usage(format!("{name} takes an absolute path, not {path}")));
            }
            options.denied.insert(0, Denied::new(path, errno, name == "--deny-write"));
        }
        "--user" => options.user = Some(value.to_owned()),
        "--cpu" => options.cpu = Some(number(name, value)?),
        _ => {
            let count = number(name, value)?;
            if count < FEWEST_MAPS {
                let text = format!("{name} takes {FEWEST_MAPS} or more: it is for all processes");
                return Err(Failure::Usage(text));
            }
            options.max_map_count = Some(count);
        }
    }
    Ok(())
}

/// What stands before and behind the last `=`, which is the name of an error.
fn pair<'a>(name: &str, value: &'a str) -> Result<(&'a str, i32)> {
    let (what, errno) = value
        .rsplit_once('=')
        .ok_or_else(|| Failure::Usage(format!("{name} takes NAME=ERRNO, not {value}")))?;
    let errno = syscalls::named(syscalls::ERRORS, errno).ok_or_else(|| {
        let known = syscalls::names(syscalls::ERRORS);
        Failure::Usage(format!("no error is called {errno} here, only: {known}"))
    })?;
    Ok((what, errno))
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
    value.parse().map_err(|_| Failure::Usage(format!("{name} takes a number, not {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Request> {
        parse(words.iter().map(OsString::from).collect())
    }

    fn refused(words: &[&str]) -> String {
        parsed(words).expect_err("these words make no sense").to_string()
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let request = parsed(&["--errno", "mremap=EPERM", "--cpu", "1", "--", "a", "--list"]);
        let Ok(Request::Run(options)) = request else { panic!("{request:?}") };
        assert_eq!((options.rules.len(), options.cpu), (1, Some(1)));
        assert_eq!(options.command, ["a", "--list"]);
    }

    #[test]
    fn what_is_named_one_by_one_comes_before_a_profile() {
        let request = parsed(&["--docker", "--errno", "userfaultfd=EINVAL", "--", "a"]);
        let Ok(Request::Run(options)) = request else { panic!("{request:?}") };
        assert_eq!(options.rules[0].call, libc::SYS_userfaultfd);
        assert_eq!(options.rules[0].then, Then::Errno(libc::EINVAL));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(refused(&["--errno", "mremap=EPERM"]).contains("no command"));
        assert!(refused(&["--errno", "reboot=EPERM", "--", "a"]).contains("does not know reboot"));
        assert!(refused(&["--errno", "mremap=EOOPS", "--", "a"]).contains("EOOPS"));
        assert!(refused(&["--deny-path", "mem=EPERM", "--", "a"]).contains("absolute"));
        assert!(refused(&["--max-map-count", "9", "--", "a"]).contains("256"));
        assert!(refused(&["--cpu", "x", "--", "a"]).contains("number"));
        assert!(refused(&["--user"]).contains("takes a value"));
        assert!(refused(&["--colour", "red", "--", "a"]).contains("no such option"));
    }

    #[test]
    fn every_option_is_explained() {
        assert!(OPTIONS.iter().all(|(name, _, _)| list().contains(name)));
    }
}
