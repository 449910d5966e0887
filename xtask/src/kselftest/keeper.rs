//! Undoes things when this program ends, however it ends: a shell that waits for the end of a pipe, and outlives a
//! signal that ends us.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};

/// Somebody who undoes what was done.
#[derive(Debug)]
pub(super) struct Keeper {
    shell: Child,
    /// Its end is the sign.
    waits_for: Option<ChildStdin>,
}

impl Keeper {
    /// Does something now, and the other thing when the keeper is dropped or this program is gone: words for a shell.
    /// Returns what the former left in the variable `answer`, one line.
    pub(super) fn start(now: &str, at_end: &str) -> Result<(Self, String), String> {
        let ready = "echo \"$answer\"; read -r end";
        let script = format!("trap '' INT TERM HUP PIPE\n{now}\n{ready}\n{at_end}\n");
        let mut command = shell(&script);
        let mut shell = command
            .spawn()
            .map_err(|error| format!("cannot start a shell that cleans up: {error}"))?;
        let waits_for = shell.stdin.take();
        let mut line = String::new();
        if let Some(output) = shell.stdout.take() {
            BufReader::new(output)
                .read_line(&mut line)
                .map_err(|error| format!("a shell that cleans up says nothing: {error}"))?;
        }
        Ok((Self { shell, waits_for }, line.trim().to_string()))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.waits_for.take());
        // It ends by itself: nothing can be done about a shell that does not.
        let _ = self.shell.wait();
    }
}

/// A shell in a group of its own, which the terminal's signals do not reach.
fn shell(script: &str) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_undone_at_the_end() {
        let file = std::env::temp_dir().join(format!("keeper-{}", std::process::id()));
        let (now, at_end) =
            (format!("answer=done; echo 1 >{}", file.display()), format!("rm {}", file.display()));
        let (keeper, said) = Keeper::start(&now, &at_end).expect("there is a shell");
        assert_eq!(said, "done");
        assert!(file.exists());
        drop(keeper);
        assert!(!file.exists());
    }

    #[test]
    fn silence_is_an_empty_answer() {
        let (_keeper, said) = Keeper::start(":", ":").expect("there is a shell");
        assert_eq!(said, "");
    }
}
