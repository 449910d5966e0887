//! What `confine` takes away is away: in the command, its threads and its children; and it hangs nowhere.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use hmm_tests::{Region, skip};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const MARK: &str = "HMM_CONFINED";
const CONFINE: &str = env!("CARGO_BIN_EXE_confine");
/// A confined test takes no longer.
const LIMIT: Duration = Duration::from_secs(20);
const MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// How a program ended, and what it said on both streams.
#[derive(Debug)]
struct Ended {
    status: ExitStatus,
    said: String,
}

/// 0 in the test itself, 1 in its confined copy, 2 in a child of that.
fn depth() -> u32 {
    std::env::var(MARK).map_or(0, |depth| depth.parse().unwrap())
}

fn end_of(command: &mut Command) -> Ended {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut output, mut errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || {
        let mut said = String::new();
        output.read_to_string(&mut said).unwrap();
        errors.read_to_string(&mut said).unwrap();
        said
    });
    let status = wait(&mut child);
    Ended { status, said: reader.join().unwrap() }
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    panic!("{child:?} hangs");
}

/// This test program, for one of its tests.
fn again(test: &str, depth: u32) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads", "1"]);
    command.env(MARK, depth.to_string());
    command
}

fn confine(options: &[&str], command: &Command) -> Command {
    let mut whole = Command::new(CONFINE);
    whole.args(options).arg("--").arg(command.get_program()).args(command.get_args());
    command.get_envs().for_each(|(name, value)| _ = whole.env(name, value.unwrap()));
    whole
}

/// Runs a test once more, confined. There it finds a depth of 1.
fn confined(options: &[&str], test: &str) {
    let ended = end_of(&mut confine(options, &again(test, 1)));
    if let Some(reason) = forbidden(&ended) {
        skip!("{reason}");
    }
    assert_eq!(ended.status.code(), Some(0), "{}", ended.said);
    assert!(ended.said.contains("1 passed"), "{}", ended.said);
    if let Some(reason) = ended.said.lines().find_map(|line| line.strip_prefix("skipped: ")) {
        skip!("{reason}");
    }
}

/// Why this environment does not allow what confine was asked for.
fn forbidden(ended: &Ended) -> Option<String> {
    let reason =
        ended.said.lines().find_map(|line| line.strip_prefix("confine: not possible here: "));
    reason.filter(|_| ended.status.code() == Some(125)).map(str::to_owned)
}

fn shell(options: &[&str], script: &str) -> Command {
    confine(options, Command::new("sh").args(["-c", script]))
}

fn is_root() -> bool {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() == 0 }
}

/// The errno of a system call with these arguments, or 0.
fn errno_of(call: libc::c_long, arguments: [u64; 4]) -> i32 {
    let [a, b, c, d] = arguments;
    // SAFETY: each test passes arguments that harm nothing where the call works.
    let result = unsafe { libc::syscall(call, a, b, c, d, 0u64, 0u64) };
    if result == -1 { std::io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
}

fn opening(path: &str, writes: bool) -> i32 {
    let result = OpenOptions::new().read(true).write(writes).open(path);
    result.err().map_or(0, |error| error.raw_os_error().unwrap())
}

#[test]
fn system_calls_fail_with_the_errno_that_was_asked_for() {
    if depth() == 0 {
        let options = [
            ["--errno", "userfaultfd=ENOSYS"],
            ["--errno", "madvise=EINVAL"],
            ["--errno", "process_vm_readv=EPERM"],
            ["--errno", "process_vm_writev=EACCES"],
            ["--errno", "ptrace=EPERM"],
            ["--errno", "mincore=ENOSYS"],
            ["--errno", "mremap=EINVAL"],
            ["--errno", "memfd_create=EACCES"],
        ];
        return confined(
            options.as_flattened(),
            "system_calls_fail_with_the_errno_that_was_asked_for",
        );
    }
    let expected = [
        (libc::SYS_userfaultfd, libc::ENOSYS),
        (libc::SYS_madvise, libc::EINVAL),
        (libc::SYS_process_vm_readv, libc::EPERM),
        (libc::SYS_process_vm_writev, libc::EACCES),
        (libc::SYS_ptrace, libc::EPERM),
        (libc::SYS_mincore, libc::ENOSYS),
        (libc::SYS_mremap, libc::EINVAL),
        (libc::SYS_memfd_create, libc::EACCES),
        (libc::SYS_getppid, 0),
    ];
    for (call, errno) in expected {
        assert_eq!(errno_of(call, [0; 4]), errno, "call {call}");
    }
}

#[test]
fn threads_and_children_have_no_more_than_the_command() {
    let test = "threads_and_children_have_no_more_than_the_command";
    let options = ["--errno", "mincore=ENOSYS", "--deny-path", "/proc/self/mem=EACCES"];
    if depth() == 0 {
        return confined(&options, test);
    }
    let is_confined = || {
        assert_eq!(errno_of(libc::SYS_mincore, [0; 4]), libc::ENOSYS);
        assert_eq!(opening("/proc/self/mem", false), libc::EACCES);
        assert_eq!(opening("/proc/thread-self/mem", false), libc::EACCES);
        assert_eq!(opening("/proc/self/comm", false), 0);
    };
    is_confined();
    std::thread::scope(|scope| _ = (0..4).map(|_| scope.spawn(is_confined)).collect::<Vec<_>>());
    if depth() == 1 {
        let ended = end_of(&mut again(test, 2));
        assert!(ended.status.success() && ended.said.contains("1 passed"), "{}", ended.said);
    }
}

#[test]
fn a_refused_file_is_refused_by_all_its_names() {
    if depth() == 0 {
        let options = ["--deny-path", "/proc/self/mem=EACCES", "--deny-path", "/dev/zero=ENOENT"];
        return confined(&options, "a_refused_file_is_refused_by_all_its_names");
    }
    let own = std::process::id();
    // SAFETY: no arguments.
    let thread = unsafe { libc::gettid() };
    for path in [
        "/proc/self/mem".to_owned(),
        "/proc/thread-self/mem".to_owned(),
        "//proc/./self/mem".to_owned(),
        format!("/proc/{own}/mem"),
        format!("/proc/{thread}/mem"),
        format!("/proc/self/task/{thread}/mem"),
    ] {
        assert_eq!(opening(&path, false), libc::EACCES, "{path}");
    }
    assert_eq!(opening("/dev/zero", true), libc::ENOENT);
    assert_eq!(opening("/dev/null", true), 0);
    let devices = File::open("/dev").unwrap();
    let (folder, null) = (devices.as_raw_fd() as u64, c"null".as_ptr().expose_provenance() as u64);
    let zero = c"zero".as_ptr().expose_provenance() as u64;
    assert_eq!(errno_of(libc::SYS_openat, [folder, null, 0, 0]), 0);
    assert_eq!(errno_of(libc::SYS_openat, [folder, zero, 0, 0]), libc::ENOENT);
    let how = [0u64; 3];
    let how_at = how.as_ptr().expose_provenance() as u64;
    assert_eq!(errno_of(libc::SYS_openat2, [folder, zero, how_at, 24]), libc::ENOENT);
    #[cfg(target_arch = "x86_64")]
    {
        let path = c"/dev/zero".as_ptr().expose_provenance() as u64;
        assert_eq!(errno_of(libc::SYS_open, [path, 0, 0, 0]), libc::ENOENT);
    }
    // A path that is nowhere fails as ever.
    assert_eq!(errno_of(libc::SYS_openat, [folder, 8, 0, 0]), libc::EFAULT);
}

#[test]
fn docker_refuses_what_its_profile_refuses() {
    if depth() == 0 {
        return confined(&["--docker"], "docker_refuses_what_its_profile_refuses");
    }
    assert_eq!(errno_of(libc::SYS_userfaultfd, [0; 4]), libc::EPERM);
    assert_eq!(errno_of(libc::SYS_keyctl, [0; 4]), libc::EPERM);
    assert_eq!(errno_of(libc::SYS_add_key, [0; 4]), libc::EPERM);
    assert_eq!(errno_of(libc::SYS_unshare, [0; 4]), libc::EPERM);
    assert_eq!(errno_of(libc::SYS_mount, [0; 4]), libc::EPERM);
    assert_eq!(errno_of(libc::SYS_clone3, [0; 4]), libc::ENOSYS);
    let namespace = libc::CLONE_NEWUSER as u64;
    assert_eq!(errno_of(libc::SYS_clone, [namespace, 0, 0, 0]), libc::EPERM);
    assert_eq!(opening("/dev/userfaultfd", true), libc::ENOENT);
    // Of its own family it may be asked for nothing, and says so.
    assert_eq!(errno_of(libc::SYS_process_vm_readv, [u64::from(std::process::id()), 0, 0, 0]), 0);
    std::thread::spawn(|| ()).join().unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let capabilities = u64::from_str_radix(line.trim(), 16).unwrap();
    assert_eq!(capabilities & !0xa804_25fb, 0, "{capabilities:x}");
}

/// The errno of an ioctl on a descriptor that is none: only a filter can say anything else than EBADF.
fn ioctl_on_nothing(number: u64) -> i32 {
    errno_of(libc::SYS_ioctl, [u64::MAX, number, 0, 0])
}

const PROCMAP_QUERY: u64 = 0xC068_6611;
const PAGEMAP_SCAN: u64 = 0xC060_6610;

#[test]
fn gvisor_has_no_userfaultfd_and_no_pagemap() {
    if depth() == 0 {
        return confined(&["--gvisor"], "gvisor_has_no_userfaultfd_and_no_pagemap");
    }
    assert_eq!(errno_of(libc::SYS_userfaultfd, [0; 4]), libc::ENOSYS);
    assert_eq!(opening("/dev/userfaultfd", true), libc::ENOENT);
    assert_eq!(opening("/proc/self/pagemap", false), libc::ENOENT);
    assert_eq!(opening("/proc/self/mem", true), libc::EACCES);
    assert_eq!(opening("/proc/self/mem", false), 0);
    assert_eq!(ioctl_on_nothing(PROCMAP_QUERY), libc::ENOTTY);
    assert_eq!(ioctl_on_nothing(PAGEMAP_SCAN), libc::ENOTTY);
    assert_eq!(ioctl_on_nothing(PAGEMAP_SCAN + 1), libc::EBADF);
}

#[test]
fn an_old_kernel_has_no_new_ioctls_and_populates_nothing() {
    if depth() == 0 {
        let test = "an_old_kernel_has_no_new_ioctls_and_populates_nothing";
        return confined(&["--old-kernel"], test);
    }
    let region = Region::new(1);
    let advise = |advice| errno_of(libc::SYS_madvise, [region.addr(), 4096, advice, 0]);
    assert_eq!([advise(22), advise(23)], [libc::EINVAL; 2]);
    assert_eq!(advise(libc::MADV_DONTNEED as u64), 0);
    assert_eq!(ioctl_on_nothing(PROCMAP_QUERY), libc::ENOTTY);
    assert_eq!(ioctl_on_nothing(PAGEMAP_SCAN), libc::ENOTTY);
    assert_eq!(opening("/proc/self/maps", false), 0);
}

#[test]
fn another_user_has_nothing_of_root() {
    if !is_root() {
        skip!("only root can run a command as nobody");
    }
    let script = "id -u; id -g; id -G; touch $HOME/hmm.$$ && rm $HOME/hmm.$$ && echo home; \
                  test -w $TMPDIR && echo $USER; cat /proc/self/status";
    let ended = end_of(&mut shell(&["--user", "nobody"], script));
    assert_eq!(ended.status.code(), Some(0), "{}", ended.said);
    let lines: Vec<&str> = ended.said.lines().collect();
    assert!(lines[0] != "0" && lines[1] != "0" && lines[1] == lines[2], "{}", ended.said);
    assert_eq!(lines[3..5], ["home", "nobody"]);
    assert!(ended.said.contains("CapPrm:\t0000000000000000"), "{}", ended.said);
    let unknown = end_of(&mut shell(&["--user", "no such user"], "true"));
    assert!(forbidden(&unknown).unwrap().contains("no such user"));
}

#[test]
fn one_cpu_is_one_cpu() {
    let ended = end_of(&mut shell(&["--cpu", "0"], "nproc"));
    assert_eq!((ended.status.code(), ended.said.trim()), (Some(0), "1"));
    let none = end_of(&mut shell(&["--cpu", "1023"], "nproc"));
    assert!(forbidden(&none).unwrap().contains("no CPU number 1023"));
}

#[test]
fn the_map_count_is_put_back_on_every_way_out() {
    let before = std::fs::read_to_string(MAP_COUNT).unwrap();
    let (value, options) = ("20123\n", ["--max-map-count", "20123"]);
    if !is_root() {
        let refused = forbidden(&end_of(&mut shell(&options, "true"))).unwrap();
        skip!("only root may set it, and confine says so: {refused}");
    }
    let script = format!("cat {MAP_COUNT}");
    let ended = end_of(&mut shell(&options, &script));
    if let Some(reason) = forbidden(&ended) {
        skip!("{reason}");
    }
    assert_eq!((ended.said.as_str(), ended.status.code()), (value, Some(0)));
    assert_eq!(std::fs::read_to_string(MAP_COUNT).unwrap(), before);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGKILL] {
        let mut command = shell(&options, "echo ready; exec sleep 1000");
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert_eq!(std::fs::read_to_string(MAP_COUNT).unwrap(), value);
        // SAFETY: the child was not waited for yet.
        unsafe { libc::kill(child.id() as i32, signal) };
        wait(&mut child);
        let deadline = Instant::now() + LIMIT;
        while std::fs::read_to_string(MAP_COUNT).unwrap() != before {
            assert!(Instant::now() < deadline, "not put back after signal {signal}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn the_status_is_that_of_the_command() {
    let status = |options: &[&str], script: &str| {
        let ended = end_of(&mut shell(options, script));
        (ended.status.code().unwrap(), ended.said)
    };
    assert_eq!(status(&[], "exit 0").0, 0);
    assert_eq!(status(&["--errno", "ptrace=EPERM"], "exit 37").0, 37);
    assert_eq!(status(&[], "kill -KILL $$").0, 128 + 9);
    assert_eq!(status(&[], "kill -PIPE $$").0, 128 + 13);
    let code = |words: &[&str]| end_of(Command::new(CONFINE).args(words)).status.code().unwrap();
    assert_eq!(code(&["--", "/no/such/program"]), 127);
    assert_eq!(code(&["--", "/dev/null"]), 126);
    assert_eq!(code(&["--errno", "reboot=EPERM", "--", "true"]), 125);
    assert_eq!(code(&["true"]), 125);
    assert_eq!(code(&["--list"]), 0);
}

#[test]
fn a_supervised_command_keeps_its_status() {
    let options = ["--deny-path", "/proc/self/mem=EACCES"];
    for (script, expected) in [("cat /proc/self/comm; exit 5", 5), ("kill -SEGV $$", 128 + 11)] {
        let ended = end_of(&mut shell(&options, script));
        if let Some(reason) = forbidden(&ended) {
            skip!("{reason}");
        }
        assert_eq!(ended.status.code(), Some(expected), "{}", ended.said);
    }
}

#[test]
fn the_command_dies_with_its_supervisor() {
    let mut command = shell(&[], "echo $$; exec sleep 1000");
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    assert_eq!(wait(&mut child).signal(), Some(libc::SIGKILL));
    let stat = format!("/proc/{}/stat", line.trim());
    let deadline = Instant::now() + LIMIT;
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
        assert!(Instant::now() < deadline, "the command is still there");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_command_that_ignores_the_end_is_ended() {
    let ended = end_of(&mut shell(&[], "trap 'exit 4' TERM; kill -TERM $PPID; sleep 1; exit 3"));
    assert_eq!(ended.status.code(), Some(4), "the command has its signal");
    let start = Instant::now();
    let ended = end_of(&mut shell(&[], "trap '' TERM; kill -TERM $PPID; exec sleep 1000"));
    assert_eq!(ended.status.code(), Some(128 + 9));
    assert!(start.elapsed() >= Duration::from_secs(4), "it had its time");
}

/// A page whose first touch waits until it is filled; `None` where that cannot be had.
fn page_that_waits() -> Option<(Region, File)> {
    use std::os::fd::FromRawFd;
    let region = Region::new(1);
    // SAFETY: a descriptor alone changes nothing.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if descriptor < 0 {
        return None;
    }
    // SAFETY: the kernel made it for this call.
    let file = unsafe { File::from_raw_fd(descriptor as i32) };
    let mut api = [0xAAu64, 0, 0];
    // SAFETY: the kernel's layout: version, features, ioctls.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), 0xC018_AA3F, api.as_mut_ptr()) }, 0);
    let mut register = [region.addr(), 4096, 1, 0];
    // SAFETY: the kernel's layout: start, length, mode (missing pages), ioctls.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), 0xC020_AA00, register.as_mut_ptr()) }, 0);
    Some((region, file))
}

#[test]
fn a_path_that_cannot_be_read_in_time_holds_up_nobody() {
    if depth() == 0 {
        let test = "a_path_that_cannot_be_read_in_time_holds_up_nobody";
        return confined(&["--deny-path", "/proc/self/mem=EACCES"], test);
    }
    let Some((region, file)) = page_that_waits() else {
        skip!("userfaultfd is refused here");
    };
    std::thread::scope(|scope| {
        let address = region.addr();
        let here = libc::AT_FDCWD as u64;
        let opener = scope.spawn(move || errno_of(libc::SYS_openat, [here, address, 0, 0]));
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        assert_eq!(opening("/proc/self/mem", false), libc::EACCES);
        assert_eq!(opening("/proc/self/comm", false), 0);
        assert!(start.elapsed() < Duration::from_secs(1), "another open was held up");
        // Longer than confine waits; then the kernel itself reads the path, and waits too.
        std::thread::sleep(Duration::from_millis(2600));
        let mut zero = [region.addr(), 4096, 0, 0];
        // SAFETY: the kernel's layout: start, length, mode, result.
        assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), 0xC020_AA04, zero.as_mut_ptr()) }, 0);
        assert_eq!(opener.join().unwrap(), libc::ENOENT, "the path is empty");
    });
}
