//! The parent's side: starts this program again to try an engine, and waits for no longer than a time limit.

use crate::message::Message;
use crate::trial::AUTO;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How this program is started, so that it can start itself again: `hmm`, or `python -m hmm`.
#[derive(Debug, Clone)]
pub struct Program {
    /// For people.
    name: String,
    words: Vec<OsString>,
}

impl Program {
    /// A program by the words that start it; the first is a path. `name` is for people.
    pub fn new(name: &str, words: Vec<OsString>) -> Self {
        Self { name: name.into(), words }
    }

    /// The executable of this process.
    pub fn this() -> Self {
        let own = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
        Self::new("hmm", vec![own.into()])
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn command(&self) -> Command {
        let mut words = self.words.iter();
        let mut command = Command::new(words.next().cloned().unwrap_or_default());
        command.args(words);
        command
    }
}

/// What a process said.
#[derive(Debug, Default)]
pub(crate) struct Said(String);

impl Said {
    fn messages(&self) -> impl DoubleEndedIterator<Item = Message> {
        self.0.lines().filter_map(|line| serde_json::from_str(line).ok())
    }

    /// How the library reaches pages here; `None` when the process did not get that far.
    pub(crate) fn ways(&self) -> Option<Vec<String>> {
        self.messages().find_map(|message| match message {
            Message::Ways(ways) if !ways.is_empty() => Some(ways),
            _ => None,
        })
    }

    /// The last word of a process, unless it did not end as it should.
    fn judge(&self, ended: Option<ExitStatus>, limit: Duration) -> Result<Message, String> {
        let how = match ended {
            Some(status) if status.success() => match self.messages().next_back() {
                Some(Message::Step(_) | Message::Ways(_)) | None => "ended without a result".into(),
                Some(result) => return Ok(result),
            },
            Some(status) => match status.signal() {
                Some(signal) => format!("was killed by {}", signal_name(signal)),
                None => format!("ended with {status}"),
            },
            None => format!("did not end within {:.1} s", limit.as_secs_f64()),
        };
        let mut steps = self.messages().filter_map(|message| match message {
            Message::Step(what) => Some(what),
            _ => None,
        });
        let place = steps.next_back().map_or_else(String::new, |what| format!(" while {what}"));
        let foreign = |line: &&str| !line.starts_with('{') && !line.trim().is_empty();
        let words = self.0.lines().rfind(foreign);
        let words = words.map_or_else(String::new, |line| format!("; it said: {}", line.trim()));
        Err(format!("its process {how}{place}{words}"))
    }
}

/// Starts the program again to try an engine. Returns what it said, and its last word, or how it ended without one.
pub(crate) fn try_engine(
    program: &Program,
    name: &str,
    limit: Duration,
) -> (Said, Result<Message, String>) {
    match run(program, name, limit) {
        Ok((said, ended)) => {
            let answer = said.judge(ended, limit);
            (said, answer)
        }
        Err(error) => {
            let reason = format!("{} cannot be started again: {error}", program.name);
            (Said::default(), Err(reason))
        }
    }
}

/// Returns what the program said and how it ended; `None` when it had to be ended.
fn run(program: &Program, name: &str, limit: Duration) -> io::Result<(Said, Option<ExitStatus>)> {
    let mut command = program.command();
    command.args(["doctor", "--try", name]).stdin(Stdio::null());
    if name != AUTO {
        command.env("HMM_ENGINE", name);
    }
    let (mut reader, writer) = io::pipe()?;
    command.stdout(writer.try_clone()?).stderr(writer);
    let mut child = command.spawn()?;
    // The command has the ends of the pipe that are written to: the child's shall be the last ones.
    drop(command);
    let (sender, receiver) = mpsc::channel();
    let reading = std::thread::Builder::new().name("hmm-doctor".into()).spawn(move || {
        let mut said = Vec::new();
        // What was said until an error is worth as much.
        let _ = reader.read_to_end(&mut said);
        let _ = sender.send(said);
    });
    if let Err(error) = reading {
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    let deadline = Instant::now() + limit;
    let early = receiver.recv_timeout(limit).ok();
    let ended = end(&mut child, deadline)?;
    // The child is gone: nobody holds the pipe open any more.
    let said = early.or_else(|| receiver.recv_timeout(Duration::from_secs(1)).ok());
    let text = String::from_utf8_lossy(&said.unwrap_or_default()).into_owned();
    Ok((Said(text), ended))
}

/// Waits for the end, and makes one at the deadline: `None` then.
fn end(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal_name(number: i32) -> String {
    let known = [(6, "SIGABRT"), (7, "SIGBUS"), (9, "SIGKILL"), (11, "SIGSEGV"), (31, "SIGSYS")];
    let name = known.iter().find(|one| one.0 == number).map(|one| one.1);
    name.map_or_else(|| format!("signal {number}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    fn ended(raw: i32) -> Option<ExitStatus> {
        Some(ExitStatus::from_raw(raw))
    }

    #[test]
    fn the_last_word_counts_when_the_end_is_good() {
        let said = Said("{\"step\":\"a\"}\nlibhmm: x\n{\"refused\":\"no\"}\n".into());
        assert_eq!(said.judge(ended(0), LIMIT), Ok(Message::Refused("no".into())));
        let reason = said.judge(ended(11), LIMIT).unwrap_err();
        assert_eq!(reason, "its process was killed by SIGSEGV while a; it said: libhmm: x");
    }

    #[test]
    fn a_process_without_a_result_is_named_with_its_step() {
        let said = "{\"step\":\"a\"}\n{\"ways\":[\"x\"]}\n{\"step\":\"b\"}\n{\"ways\":[]}\n";
        let said = Said(said.into());
        assert_eq!(said.ways(), Some(vec!["x".to_owned()]));
        let reason = |ended| said.judge(ended, LIMIT).unwrap_err();
        assert_eq!(reason(None), "its process did not end within 3.0 s while b");
        assert_eq!(reason(ended(0)), "its process ended without a result while b");
        assert!(reason(ended(256)).contains("exit status: 1"));
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let words = ["/bin/sh", "-c", "echo '{\"step\":\"sleeping\"}'; exec sleep 1000"];
        let program = Program::new("sh", words.map(OsString::from).to_vec());
        let start = Instant::now();
        let reason = try_engine(&program, "signal", Duration::from_millis(300)).1.unwrap_err();
        assert!(reason.contains("did not end within 0.3 s while sleeping"), "{reason}");
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let program = Program::new("nothing", vec!["/no/such/program".into()]);
        let reason = try_engine(&program, "signal", LIMIT).1.unwrap_err();
        assert!(reason.contains("nothing cannot be started again"), "{reason}");
    }
}
