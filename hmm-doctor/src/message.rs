//! What a process in which an engine is tried tells the one that started it: one line of JSON for each message.

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// What begins now: the last one names where a process hangs or crashes.
    Step(String),
    /// How the library reaches pages and knows of them here, as the signal engine names it.
    Ways(Vec<String>),
    /// The engine cannot be opened, and why.
    Refused(String),
    /// It was opened and does not do what it should.
    Failed(String),
    /// It does.
    Proven(Proof),
    /// Which engine a program gets here.
    Chosen(Chosen),
}

/// What was seen of an engine that works.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Proof {
    /// What the engine says of itself.
    pub(crate) capabilities: Vec<String>,
    /// Whether a system call on a page that is away does its work.
    pub(crate) system_calls: bool,
    /// Whether a mirror is told of munmap as it happens.
    pub(crate) layout_changes: bool,
    /// A touch of one page that is away, in microseconds.
    pub(crate) touch_us: f64,
    /// To the device, in MiB a second.
    pub(crate) out_mib_per_s: f64,
    /// Back home, in MiB a second.
    pub(crate) home_mib_per_s: f64,
}

/// The engine that a program gets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Chosen {
    /// Its name; `None` when a program gets none.
    pub(crate) engine: Option<String>,
    /// `HMM_ENGINE` asks for one engine.
    pub(crate) forced: bool,
    /// Why this one, and why no better one; or why none.
    pub(crate) reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_their_line() {
        let chosen = Chosen { engine: None, forced: true, reason: "a \"reason\"".into() };
        for message in [Message::Step("touching".into()), Message::Chosen(chosen)] {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), message);
        }
    }
}
