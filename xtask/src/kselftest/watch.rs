//! Runs the tests and watches them. They put each test in a process group of its own, so everything runs in a session
//! of its own: that is what is looked at when nothing happens any more, and what is killed.

use super::keeper::Keeper;
use crate::test::state;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, PipeReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long what is waited for.
#[derive(Debug)]
pub(super) struct Limits {
    /// After so long without a word the state of all threads is shown, once for each silence.
    pub(super) show: Duration,
    /// After so long without a word everything is killed.
    pub(super) silence: Duration,
    /// A run takes no longer.
    pub(super) whole: Duration,
}

/// The tests end a test themselves when it takes 30 s: the state is shown before that.
pub(super) const LIMITS: Limits = Limits {
    show: Duration::from_secs(25),
    silence: Duration::from_secs(60),
    whole: Duration::from_secs(900),
};
/// Longest pause between two looks at whether the program has ended.
const PAUSE: Duration = Duration::from_millis(50);
/// The end of the output is awaited so long after the end of the program.
const AFTER_END: Duration = Duration::from_secs(2);
/// Lines that wait to be taken in.
const AHEAD: usize = 1000;
/// A run that says more is killed: 58 tests say 250 lines.
const MOST_LINES: usize = 20_000;
/// Kills every process of the session `$session`, until none is left.
const KILL_SESSION: &str = r#"
for round in 1 2 3 4 5 6 7 8 9 10; do
	left=
	for stat in /proc/[0-9]*/stat; do
		read -r line <"$stat" || continue
		process=${stat%/stat}; process=${process#/proc/}
		set -- "$session" ${line##*) }
		[ "$5" = "$session" ] && [ "$2" != Z ] && left="$left $process"
	done
	[ -z "$left" ] && break
	kill -KILL $left
	sleep 0.1
done
"#;

/// What a program said and how it ended.
#[derive(Debug)]
pub(super) struct Seen {
    /// Both streams, in the order in which they were written.
    pub(super) lines: Vec<String>,
    /// Whether it ended by itself and said that all went well.
    pub(super) success: bool,
    /// How it ended, for people.
    pub(super) ending: String,
}

/// A command in a session of its own, whose number is that of its process.
pub(super) fn in_session<S: AsRef<OsStr>>(words: &[S]) -> Command {
    let mut command = Command::new("setsid");
    command.args(words);
    command
}

/// Runs a command of [`in_session`] to its end, or until a limit. Nothing of its session is left afterwards, also when
/// this program is killed.
pub(super) fn run(mut command: Command, limits: &Limits, prints: bool) -> Result<Seen, String> {
    let pipe = || -> std::io::Result<_> {
        let (reader, writer) = std::io::pipe()?;
        Ok((reader, writer.try_clone()?, writer))
    };
    let (reader, output, errors) =
        pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let child = command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    // The ends of the pipe that the command holds.
    drop(command);
    let at_end = format!("session={}\n{KILL_SESSION}", child.id());
    let (keeper, _) = Keeper::start(":", &at_end)?;
    let mut watch =
        Watch { child, limits, prints, lines: Vec::new(), start: Instant::now(), showed: false };
    let ended = watch.follow(&lines_of(reader))?;
    drop(keeper);
    let (success, ending) = match ended {
        Ok(status) => (status.success(), status.to_string()),
        Err(limit) => {
            // It was killed: no zombie of it shall be left.
            let _ = watch.child.try_wait();
            (false, limit)
        }
    };
    Ok(Seen { lines: watch.lines, success, ending })
}

/// A running program.
#[derive(Debug)]
struct Watch<'a> {
    child: Child,
    limits: &'a Limits,
    prints: bool,
    lines: Vec<String>,
    start: Instant,
    /// Whether the state was shown since the last line.
    showed: bool,
}

impl Watch<'_> {
    /// Takes in lines until the program has ended, or a limit is reached: then says which.
    fn follow(&mut self, lines: &Receiver<String>) -> Result<Result<ExitStatus, String>, String> {
        let mut last = Instant::now();
        let mut ended: Option<(ExitStatus, Instant)> = None;
        loop {
            match lines.recv_timeout(PAUSE) {
                Ok(line) => {
                    last = Instant::now();
                    self.showed = false;
                    self.take(line);
                }
                Err(RecvTimeoutError::Disconnected) if ended.is_none() => std::thread::sleep(PAUSE),
                Err(_) => {}
            }
            if ended.is_none() {
                let status = self.child.try_wait();
                let status = status.map_err(|error| format!("cannot wait for it: {error}"))?;
                ended = status.map(|status| (status, Instant::now()));
            }
            match ended {
                // Another process may hold the pipe open.
                Some((status, at)) if self.is_all(lines, at) => return Ok(Ok(status)),
                Some(_) => {}
                None => {
                    if let Some(limit) = self.look(last) {
                        return Ok(Err(limit));
                    }
                }
            }
        }
    }

    /// Whether all that was written has been taken in, some time after the end.
    fn is_all(&mut self, lines: &Receiver<String>, end: Instant) -> bool {
        loop {
            match lines.try_recv() {
                Ok(line) => self.take(line),
                Err(mpsc::TryRecvError::Disconnected) => return true,
                Err(mpsc::TryRecvError::Empty) => return end.elapsed() > AFTER_END,
            }
        }
    }

    fn take(&mut self, line: String) {
        if self.prints {
            println!("{line}");
        }
        self.lines.push(line);
    }

    /// Shows the state of a program that is silent for long; says which limit it has reached.
    fn look(&mut self, last: Instant) -> Option<String> {
        let silence = last.elapsed();
        if silence > self.limits.show && !self.showed {
            self.showed = true;
            for line in state::of_session(self.child.id()).trim().lines() {
                self.take(format!("# {line}"));
            }
        }
        if silence > self.limits.silence {
            return Some(format!("was silent for {} s and is killed", silence.as_secs()));
        }
        if self.lines.len() > MOST_LINES {
            return Some(format!("said more than {MOST_LINES} lines and is killed"));
        }
        let whole = self.limits.whole;
        (self.start.elapsed() > whole).then(|| format!("took {} s and is killed", whole.as_secs()))
    }
}

/// Reads lines in a thread of its own. A test that fails may say the same for seconds: that is one line, and a count.
fn lines_of(reader: PipeReader) -> Receiver<String> {
    // Who writes faster than lines are taken in waits.
    let (sender, receiver) = mpsc::sync_channel(AHEAD);
    std::thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let (mut line, mut last, mut repeats) = (Vec::new(), Vec::new(), 0_u64);
        loop {
            line.clear();
            // An error ends the output as its end does.
            let is_end = !reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0);
            if !is_end && line == last {
                repeats += 1;
                continue;
            }
            let again = (repeats > 0).then(|| format!("# (said {repeats} times more)"));
            let text = (!is_end).then(|| String::from_utf8_lossy(&line).trim_end().to_string());
            // Nobody listens any more after a limit.
            if again.into_iter().chain(text).any(|text| sender.send(text).is_err()) || is_end {
                return;
            }
            repeats = 0;
            std::mem::swap(&mut last, &mut line);
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn limits(show: u64, silence: u64) -> Limits {
        let milliseconds = Duration::from_millis;
        Limits {
            show: milliseconds(show),
            silence: milliseconds(silence),
            whole: Duration::from_secs(60),
        }
    }

    fn shell(script: &str, limits: &Limits) -> Seen {
        run(in_session(&["sh", "-c", script]), limits, false).expect("the shell starts")
    }

    fn is_gone(process: &str) -> bool {
        let path = Path::new("/proc").join(process).join("stat");
        std::fs::read_to_string(path).map_or(true, |stat| stat.contains(") Z"))
    }

    #[test]
    fn both_streams_come_in_order() {
        let seen = shell("echo a; echo b >&2; echo c; exit 3", &limits(20_000, 40_000));
        assert_eq!(seen.lines, ["a", "b", "c"]);
        assert!(!seen.success && seen.ending.contains('3'), "{seen:?}");
        assert!(shell("true", &limits(20_000, 40_000)).success);
    }

    #[test]
    fn what_is_said_again_and_again_is_counted() {
        let script = "echo a; for i in 1 2 3; do echo b; done; echo c; echo d; echo d";
        let seen = shell(script, &limits(20_000, 40_000));
        let again = |times| format!("# (said {times} times more)");
        let (two, one) = (again(2), again(1));
        assert_eq!(seen.lines, ["a", "b", two.as_str(), "c", "d", one.as_str()]);
        let seen = shell("i=0; while :; do i=$((i+1)); echo $i; done", &limits(20_000, 40_000));
        assert!(!seen.success && seen.ending.contains("lines"), "{}", seen.ending);
    }

    #[test]
    fn silence_is_shown_and_then_ended() {
        let seen = shell("echo begun; sleep 1000", &limits(200, 600));
        assert!(!seen.success && seen.ending.contains("silent"), "{seen:?}");
        assert_eq!(seen.lines[0], "begun");
        assert!(seen.lines.iter().any(|line| line.contains("sleep")), "{seen:?}");
    }

    #[test]
    fn groups_of_their_own_are_killed_too() {
        // With job control a shell gives each command a group.
        let script = "set -m; sleep 1000 & echo $!; exit 0";
        let seen = shell(script, &limits(20_000, 40_000));
        assert!(seen.success, "{seen:?}");
        assert!(is_gone(&seen.lines[0]), "{seen:?}");
    }
}
