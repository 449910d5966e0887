//! Everything that was found, as one object. The documentation of the crate names its keys.

use crate::advice::{self, Advice};
use crate::child::{self, Program};
use crate::facts::{Environment, Limits, ProcFiles, Signals, System, Userfaultfd};
use crate::limitations;
use crate::message::{Chosen, Message, Proof};
use crate::trial::AUTO;
use hmm_core::EngineKind;
use serde::Serialize;
use std::time::Duration;

/// A process in which an engine is tried takes no longer. Usually it takes a small part of it.
const LIMIT: Duration = Duration::from_secs(12);
/// The same, where everything is slow.
const VALGRIND_LIMIT: Duration = Duration::from_secs(30);

/// Number of the form of this object: it changes when keys go or change their meaning, not when keys are added.
const SCHEMA: u32 = 1;

/// One engine, as it was tried.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct EngineReport {
    pub(crate) name: &'static str,
    /// It does not refuse to be opened and started.
    pub(crate) opens: bool,
    /// And does what it should.
    pub(crate) works: bool,
    /// Why not.
    pub(crate) reason: Option<String>,
    /// What was seen when it works.
    pub(crate) proof: Option<Proof>,
}

/// What `hmm doctor` found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    // The order is that of the keys: programs that read only the first two find them first.
    pub(crate) engine: Option<String>,
    pub(crate) reason: String,
    pub(crate) works: bool,
    pub(crate) forced: bool,
    pub(crate) schema: u32,
    pub(crate) version: &'static str,
    pub(crate) system: System,
    pub(crate) userfaultfd: Userfaultfd,
    pub(crate) proc_files: ProcFiles,
    pub(crate) limits: Limits,
    pub(crate) signals: Signals,
    pub(crate) environment: Environment,
    pub(crate) engines: Vec<EngineReport>,
    pub(crate) limitations: Vec<String>,
    pub(crate) advice: Vec<Advice>,
}

/// Looks at everything and tries every engine, each in a process of its own that `program` is started for.
pub fn examine(program: &Program) -> Report {
    let environment = Environment::look();
    let limit = if environment.valgrind { VALGRIND_LIMIT } else { LIMIT };
    let (said, answer) = child::try_engine(program, AUTO, limit);
    let chosen = choice(answer);
    // One after another: they measure, too.
    let trials = EngineKind::ALL.into_iter();
    let engines: Vec<_> =
        trials.map(|kind| tried(kind, child::try_engine(program, kind.name(), limit).1)).collect();
    let found = engines.iter().find(|one| chosen.engine.as_deref() == Some(one.name));
    let mut report = Report {
        works: found.is_some_and(|one| one.works),
        engine: chosen.engine,
        reason: chosen.reason,
        forced: chosen.forced,
        schema: SCHEMA,
        version: env!("CARGO_PKG_VERSION"),
        system: System::look(),
        userfaultfd: Userfaultfd::look(),
        proc_files: ProcFiles::look(said.ways().as_deref()),
        limits: Limits::look(),
        signals: Signals::look(),
        environment,
        engines,
        limitations: Vec::new(),
        advice: Vec::new(),
    };
    report.limitations = limitations::of(&report);
    report.advice = advice::of(&report);
    report
}

fn choice(answer: Result<Message, String>) -> Chosen {
    let none = |reason| Chosen { engine: None, forced: false, reason };
    match answer {
        Ok(Message::Chosen(chosen)) => chosen,
        Ok(other) => none(format!("no choice, but {other:?}")),
        Err(reason) => none(format!("no engine could be chosen: {reason}")),
    }
}

fn tried(kind: EngineKind, answer: Result<Message, String>) -> EngineReport {
    let report = |opens, works, reason, proof| EngineReport {
        name: kind.name(),
        opens,
        works,
        reason,
        proof,
    };
    match answer {
        Ok(Message::Proven(proof)) => report(true, true, None, Some(proof)),
        Ok(Message::Refused(reason)) => report(false, false, Some(reason), None),
        Ok(Message::Failed(reason)) => report(true, false, Some(reason), None),
        Ok(other) => report(false, false, Some(format!("no result, but {other:?}")), None),
        // It crashed or hung: an engine that refuses says so.
        Err(reason) => report(true, false, Some(reason), None),
    }
}

impl Report {
    /// The exit status: 0 when a program gets an engine here, and that engine works; 1 otherwise.
    pub fn status(&self) -> u8 {
        u8::from(!self.works)
    }

    /// One JSON object, with a newline at its end.
    pub fn json(&self) -> String {
        // Plain data cannot fail to be written; a reader would notice the empty object.
        let mut text = serde_json::to_string_pretty(self).unwrap_or_else(|_| "{}".into());
        text.push('\n');
        text
    }

    /// The chosen engine as it was tried.
    pub(crate) fn chosen(&self) -> Option<&EngineReport> {
        self.engine.as_ref().and_then(|name| self.engine_named(name))
    }

    pub(crate) fn engine_named(&self, name: &str) -> Option<&EngineReport> {
        self.engines.iter().find(|one| one.name == name)
    }

    pub(crate) fn works(&self, kind: EngineKind) -> bool {
        self.engine_named(kind.name()).is_some_and(|one| one.works)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::facts::tests::{plain_process, plain_system, plain_userfaultfd};

    /// A proof of an engine that claims these.
    pub(crate) fn proof(capabilities: &[&str]) -> Proof {
        let has = |name| capabilities.contains(&name);
        Proof {
            capabilities: capabilities.iter().map(|name| (*name).to_owned()).collect(),
            system_calls: has("KERNEL_FAULTS"),
            layout_changes: has("EVENTS"),
            touch_us: 5.0,
            out_mib_per_s: 1000.0,
            home_mib_per_s: 2000.0,
        }
    }

    /// What a user without rights finds on a present kernel.
    pub(crate) fn plain_report() -> Report {
        let (proc_files, limits, signals, environment) = plain_process();
        let proven = |name| Ok(Message::Proven(proof(name)));
        let refused = Ok(Message::Refused("userfaultfd is refused".into()));
        Report {
            engine: Some("uffd-inline".into()),
            reason: "engine uffd-inline (the best that works here)".into(),
            works: true,
            forced: false,
            schema: SCHEMA,
            version: "0.0.0",
            system: plain_system(),
            userfaultfd: plain_userfaultfd(),
            proc_files,
            limits,
            signals,
            environment,
            engines: vec![
                tried(EngineKind::Uffd, refused),
                tried(EngineKind::UffdInline, proven(&["EVENTS", "MOVE"])),
                tried(EngineKind::Signal, proven(&[])),
            ],
            limitations: Vec::new(),
            advice: Vec::new(),
        }
    }

    #[test]
    fn answers_become_engines() {
        let of = |answer| tried(EngineKind::Signal, answer);
        let works = of(Ok(Message::Proven(proof(&[]))));
        assert!(works.opens && works.works && works.reason.is_none());
        let refused = of(Ok(Message::Refused("no".into())));
        assert!(!refused.opens && !refused.works && refused.reason.as_deref() == Some("no"));
        let failed = of(Ok(Message::Failed("wrong".into())));
        assert!(failed.opens && !failed.works);
        assert_eq!(of(Err("it hung".into())).reason.as_deref(), Some("it hung"));
    }

    #[test]
    fn a_choice_that_cannot_be_made_is_none() {
        let chosen = choice(Err("it hung".into()));
        assert!(chosen.engine.is_none() && chosen.reason.contains("it hung"));
    }

    #[test]
    fn the_engine_and_the_reason_come_first() {
        let json = plain_report().json();
        let at = |key: &str| json.find(&format!("\"{key}\"")).unwrap();
        assert!(at("engine") < at("reason") && at("reason") < at("works"));
        assert_eq!(plain_report().status(), 0);
        assert_eq!(Report { works: false, ..plain_report() }.status(), 1);
    }
}
