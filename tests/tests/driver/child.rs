//! A test that runs itself again in a process of its own.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const MARK: &str = "HMM_TEST_CHILD";

/// How a child ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// `None`: it hung, and was killed.
    pub(crate) status: Option<ExitStatus>,
    pub(crate) stderr: String,
}

impl Ended {
    /// Its exit code, if it ended by itself.
    pub(crate) fn code(&self) -> Option<i32> {
        self.status.and_then(|status| status.code())
    }
    /// The signal that ended it.
    pub(crate) fn signal(&self) -> Option<i32> {
        self.status.and_then(|status| status.signal())
    }
    /// Whether it ended by itself, and well.
    pub(crate) fn is_good(&self) -> bool {
        self.code() == Some(0)
    }
    /// The reason that it gave for skipping.
    pub(crate) fn skipped(&self) -> Option<&str> {
        self.stderr.lines().find_map(|line| line.strip_prefix("skipped: "))
    }
}

/// Whether this process is the child of a test.
pub(crate) fn is_child() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Variables of a child's environment.
pub(crate) type Variables = [(&'static str, &'static str)];

/// Runs the named test of this binary in a child (where [`is_child`] is true), for at most `limit`.
pub(crate) fn child_of(test: &str, limit: Duration) -> Ended {
    child_with(test, limit, &[])
}

/// Runs the named test in a child once for each of several environments, which name engines, and lets `check` look at how
/// each ended. Skipped when all of them are.
pub(crate) fn on_each(
    test: &str,
    limit: Duration,
    environments: &[&Variables],
    check: impl Fn(&Ended),
) {
    let mut skipped = Vec::new();
    for variables in environments {
        let ended = child_with(test, limit, variables);
        match ended.skipped() {
            Some(reason) => skipped.push(format!("{variables:?}: {reason}")),
            None => {
                eprintln!("{variables:?}: {ended:?}");
                check(&ended);
            }
        }
    }
    if skipped.len() == environments.len() {
        eprintln!("skipped: {}", skipped.join("; "));
    }
}

/// As [`child_of`], with variables of the environment.
pub(crate) fn child_with(test: &str, limit: Duration, variables: &Variables) -> Ended {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(MARK, "1")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stream = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let status = wait(&mut child, limit);
    Ended { status, stderr: reader.join().unwrap() }
}

fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}
