//! Runs one program with a time limit. A program that does not end is a failure with its state, never a wait for ever.

use super::state;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// How long the killed program, or what is left of its output, is awaited.
const AFTER_KILL: Duration = Duration::from_secs(10);
/// Longest pause between two looks at a running program.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);
/// Bytes of each stream that are kept; a program that writes more finds its stream closed.
const MOST_OUTPUT: u64 = 16 << 20;

/// What became of a program.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Standard output.
    pub(crate) output: String,
    /// Standard error, and the state of a program that did not end.
    pub(crate) errors: String,
    /// Whether it ended in time and said that all went well.
    pub(crate) success: bool,
    /// Whether it had to be killed at its time limit.
    pub(crate) hung: bool,
    /// What ended it, for people.
    pub(crate) ending: String,
    /// How long it ran.
    pub(crate) time: Duration,
}

impl Outcome {
    /// Both streams, one after the other.
    pub(crate) fn said(&self) -> String {
        format!("{}\n{}", self.output.trim_end(), self.errors)
    }
}

/// Runs a program to its end, or until its time is over. All processes of its group are gone afterwards.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<Outcome, String> {
    let start = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child =
        command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    let output = collect(child.stdout.take());
    let errors = collect(child.stderr.take());
    let ended = wait(&mut child, start + limit)?;
    let mut note = String::new();
    if ended.is_none() {
        note = state::of_group(child.id());
    }
    kill_group(child.id());
    let status = match ended {
        Some(status) => Some(status),
        None => wait(&mut child, Instant::now() + AFTER_KILL)?,
    };
    let ending = match (ended, status) {
        (Some(status), _) => status.to_string(),
        (None, Some(_)) => format!("did not end within {} s and was killed", limit.as_secs()),
        (None, None) => format!("did not end within {} s and cannot be killed", limit.as_secs()),
    };
    Ok(Outcome {
        output: text(&output),
        errors: text(&errors) + &note,
        success: ended.is_some_and(|status| status.success()),
        hung: ended.is_none(),
        ending,
        time: start.elapsed(),
    })
}

/// Waits for the end of a child until a moment.
fn wait(child: &mut Child, until: Instant) -> Result<Option<ExitStatus>, String> {
    let mut pause = Duration::from_millis(1);
    loop {
        let status =
            child.try_wait().map_err(|error| format!("cannot wait for a test: {error}"))?;
        if status.is_some() || Instant::now() >= until {
            return Ok(status);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Reads a stream to its end in a thread of its own.
fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(stream) = stream {
            // What was read before an error is kept.
            let _ = stream.take(MOST_OUTPUT).read_to_end(&mut bytes);
        }
        // Nobody listens any more when the deadline of the reader is over.
        let _ = sender.send(bytes);
    });
    receiver
}

/// What a stream said. A process that left the group may hold the stream open: then its end is not awaited for long.
fn text(stream: &Receiver<Vec<u8>>) -> String {
    match stream.recv_timeout(AFTER_KILL) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => {
            String::from("\n(the output is lost: a process outside the group keeps it open)\n")
        }
    }
}

/// Kills what is left of a process group.
fn kill_group(group: u32) {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("kill -s KILL -- -{group}")).stderr(Stdio::null());
    // An error says that nothing is left.
    let _ = shell.status();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: u64) -> Outcome {
        let limit = Duration::from_millis(limit);
        run(Command::new("sh").arg("-c").arg(script), limit).expect("the shell starts")
    }

    #[test]
    fn output_and_status_are_kept() {
        let outcome = shell("echo out; echo err >&2; exit 3", 10_000);
        assert_eq!((outcome.output.as_str(), outcome.errors.as_str()), ("out\n", "err\n"));
        assert!(!outcome.success && outcome.ending.contains('3'));
        assert!(shell("true", 10_000).success);
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_state() {
        let outcome = shell("echo begun; sleep 1000", 200);
        assert!(outcome.hung && outcome.ending.contains("was killed"), "{outcome:?}");
        assert!(!outcome.success);
        assert_eq!(outcome.output, "begun\n");
        assert!(outcome.errors.contains("sleep"), "{}", outcome.errors);
    }

    #[test]
    fn children_that_are_left_over_are_killed() {
        let outcome = shell("sleep 1000 & echo $!", 10_000);
        let left = outcome.output.trim();
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::read_to_string(format!("/proc/{left}/stat"))
            .is_ok_and(|stat| !stat.contains(") Z"))
        {
            assert!(Instant::now() < deadline, "process {left} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
