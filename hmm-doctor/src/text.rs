//! The report for people: short, aligned, coloured only on a terminal.

use crate::facts::{Access, Action, Seccomp};
use crate::report::{EngineReport, Report};
use std::fmt::Write;

/// Lines are no longer than this, where words allow it.
const WIDTH: usize = 110;
/// Where values begin.
const INDENT: usize = 14;

/// What a word stands for.
#[derive(Clone, Copy)]
enum Tone {
    Good,
    Bad,
    Title,
}

struct Page {
    text: String,
    colours: bool,
}

impl Report {
    /// The report for people.
    pub fn text(&self, colours: bool) -> String {
        let mut page = Page { text: String::new(), colours };
        page.verdict(self);
        page.facts(self);
        page.engines(self);
        page.list("keep in mind", self.limitations.iter().map(String::as_str));
        page.advice(self);
        page.text
    }
}

impl Page {
    fn paint(&self, tone: Tone, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Good => 32,
            Tone::Bad => 31,
            Tone::Title => 1,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// A title, and its value in lines that stand below one another.
    fn row(&mut self, title: &str, value: &str) {
        let padded = format!("{title:<INDENT$}");
        let title = if title.is_empty() { padded } else { self.paint(Tone::Title, &padded) };
        self.text.push_str(&title);
        self.wrapped(INDENT, value);
    }

    /// Words from here on, further lines behind so many blanks.
    fn wrapped(&mut self, indent: usize, value: &str) {
        let mut column = indent;
        for (at, word) in value.split(' ').enumerate() {
            let length = word.chars().count();
            if at > 0 && column + 1 + length > WIDTH {
                let _ = write!(self.text, "\n{:indent$}", "");
                column = indent;
            } else if at > 0 {
                self.text.push(' ');
                column += 1;
            }
            self.text.push_str(word);
            column += length;
        }
        self.text.push('\n');
    }

    fn verdict(&mut self, report: &Report) {
        let (tone, verdict) = match (&report.engine, report.works) {
            (Some(name), true) => (Tone::Good, format!("{name}, which works")),
            (Some(name), false) => (Tone::Bad, format!("{name}, which does not work")),
            (None, _) => (Tone::Bad, "none".to_owned()),
        };
        let verdict = self.paint(tone, &verdict);
        self.row("engine", &verdict);
        self.row("because", &short_reason(report));
        self.text.push('\n');
    }

    fn facts(&mut self, report: &Report) {
        let system = &report.system;
        let kernel = format!(
            "Linux {} {}, pages of {} bytes",
            system.kernel, system.architecture, system.page_size
        );
        self.row("kernel", &kernel);
        self.row("container", &container(report));
        self.row("process", &rights(report));
        self.row("userfaultfd", &userfaultfd(report));
        self.row("", &features(report));
        self.row("/proc/self", &proc_files(report));
        self.row("limits", &limits(report));
        self.row("signals", &signals(report));
        self.row("environment", &environment(report));
        self.text.push('\n');
    }

    fn engines(&mut self, report: &Report) {
        let head = format!(
            "{:<INDENT$}{:>10} {:>12} {:>12}   {:<14} {}",
            "tried", "touch", "out", "home", "system calls", "munmap"
        );
        let head = self.paint(Tone::Title, &head);
        self.text.push_str(&head);
        self.text.push('\n');
        for (at, engine) in report.engines.iter().enumerate() {
            let alike = |other: &&EngineReport| other.reason == engine.reason;
            self.engine(engine, report.engines[..at].iter().find(alike));
        }
    }

    /// A line, or a reason; what another engine gave as its reason already is said once.
    fn engine(&mut self, engine: &EngineReport, alike: Option<&EngineReport>) {
        let Some(proof) = &engine.proof else {
            let how = if engine.opens { "does not work" } else { "cannot be opened" };
            let how = self.paint(Tone::Bad, how);
            let reason = match alike {
                Some(other) => format!("as {}", other.name),
                None => engine.reason.clone().unwrap_or_else(|| "no reason given".into()),
            };
            self.row(&format!("  {}", engine.name), &format!("{how}: {reason}"));
            return;
        };
        let calls = if proof.system_calls { "work" } else { "EFAULT" };
        let told = if proof.layout_changes { "reported" } else { "not reported" };
        let _ = writeln!(
            self.text,
            "{:<INDENT$}{:>7.1} us {:>6.0} MiB/s {:>6.0} MiB/s   {calls:<14} {told}",
            format!("  {}", engine.name),
            proof.touch_us,
            proof.out_mib_per_s,
            proof.home_mib_per_s,
        );
    }

    fn list<'a>(&mut self, title: &str, items: impl Iterator<Item = &'a str>) {
        for (at, item) in items.enumerate() {
            if at == 0 {
                self.text.push('\n');
            }
            self.row(if at == 0 { title } else { "" }, item);
        }
    }

    fn advice(&mut self, report: &Report) {
        for (at, advice) in report.advice.iter().enumerate() {
            if at == 0 {
                self.text.push('\n');
            }
            self.row(if at == 0 { "would help" } else { "" }, &advice.line);
            let indent = INDENT + 4;
            let _ = write!(self.text, "{:indent$}", "");
            self.wrapped(indent, &advice.gain);
        }
    }
}

/// The reason, without what stands in the table of engines.
fn short_reason(report: &Report) -> String {
    let known = report.engines.iter().filter_map(|one| Some((one.name, one.reason.as_ref()?)));
    known.fold(report.reason.clone(), |text, (name, reason)| {
        text.replace(&format!("{name}: {reason}"), &format!("{name}: see below"))
    })
}

fn access(name: &str, access: &Access) -> String {
    match &access.error {
        None => format!("{name} opens"),
        Some(error) => format!("{name} does not open ({error})"),
    }
}

fn container(report: &Report) -> String {
    let hints = &report.system.container;
    let mut text = if hints.is_empty() { "no sign of one".into() } else { hints.join(", ") };
    if report.system.user_namespace {
        text.push_str("; in a user namespace");
    }
    text
}

fn rights(report: &Report) -> String {
    let system = &report.system;
    let capabilities = if system.capabilities.is_empty() {
        "neither CAP_SYS_PTRACE nor CAP_SYS_ADMIN".into()
    } else {
        system.capabilities.join(" ")
    };
    let seccomp = match system.seccomp {
        Seccomp::Off => "no seccomp",
        Seccomp::Strict => "strict seccomp",
        Seccomp::Filter => "seccomp filters system calls",
        Seccomp::Unknown => "seccomp unknown",
    };
    let mut text = format!("user {}; {capabilities}; {seccomp}", system.user_id);
    if system.no_new_privileges {
        text.push_str("; no new privileges");
    }
    if !system.dumpable {
        text.push_str("; not dumpable");
    }
    text
}

fn userfaultfd(report: &Report) -> String {
    let uffd = &report.userfaultfd;
    let mode = uffd.device_mode.as_ref().map_or_else(String::new, |mode| format!(" mode {mode},"));
    let device = access(&format!("/dev/userfaultfd{mode}"), &uffd.device);
    match uffd.unprivileged {
        Some(value) => format!("{device}; vm.unprivileged_userfaultfd={value}"),
        None => format!("{device}; no vm.unprivileged_userfaultfd"),
    }
}

fn features(report: &Report) -> String {
    let uffd = &report.userfaultfd;
    if let Some(reason) = &uffd.refused {
        let alike = report.engines.iter().find(|one| one.reason.as_ref() == Some(reason));
        return match alike {
            Some(engine) => format!("none can be opened: see {} below", engine.name),
            None => reason.clone(),
        };
    }
    let names = |wanted: &dyn Fn(bool, bool) -> bool| {
        let of = uffd.features.iter().filter(|one| wanted(one.offered, one.masked));
        of.map(|one| one.name).collect::<Vec<_>>().join(" ")
    };
    let mut text = format!("offers {}", names(&|offered, masked| offered && !masked));
    let masked = names(&|_, masked| masked);
    if !masked.is_empty() {
        let _ = write!(text, "; masked: {masked}");
    }
    let missing = uffd.features.iter().filter(|one| !one.offered);
    let missing: Vec<_> =
        missing.map(|one| format!("{} (Linux {})", one.name, one.since)).collect();
    if !missing.is_empty() {
        let _ = write!(text, "; lacks {}", missing.join(" "));
    }
    text
}

fn proc_files(report: &Report) -> String {
    let files = &report.proc_files;
    let tried = |works: Option<bool>, name: &str| match works {
        Some(true) => format!("{name} works"),
        Some(false) => format!("{name} does not work"),
        None => format!("{name} not tried"),
    };
    [
        access("mem", &files.mem),
        tried(files.mem_ignores_protection, "writing it where nobody has access"),
        access("pagemap", &files.pagemap),
        tried(files.pagemap_scan, "PAGEMAP_SCAN"),
        tried(files.procmap_query, "PROCMAP_QUERY"),
    ]
    .join("; ")
}

fn limits(report: &Report) -> String {
    let limits = &report.limits;
    let number = |value: Option<u64>| value.map_or_else(|| "?".into(), |value| value.to_string());
    let bytes = |value: Option<u64>| match value {
        None => "unlimited".to_owned(),
        Some(bytes) => format!("{} MiB", bytes >> 20),
    };
    format!(
        "{} of {} mappings; locked memory {}; address space {}; overcommit {}; huge pages {}",
        number(limits.mappings),
        number(limits.max_map_count),
        bytes(limits.locked_memory),
        bytes(limits.address_space),
        number(limits.overcommit_memory.map(u64::from)),
        limits.huge_pages.as_deref().unwrap_or("unknown"),
    )
}

fn signals(report: &Report) -> String {
    let signals = &report.signals;
    let action = |action| match action {
        Action::Default => "default",
        Action::Ignored => "ignored",
        Action::Handled => "handled by this program",
    };
    let blocked = match signals.blocked.as_slice() {
        [] => "neither is blocked".to_owned(),
        names => format!("blocked: {}", names.join(" ")),
    };
    let (segv, bus) = (action(signals.sigsegv), action(signals.sigbus));
    format!("SIGSEGV {segv}, SIGBUS {bus}; {blocked}")
}

fn environment(report: &Report) -> String {
    let environment = &report.environment;
    let mut found = Vec::new();
    found.extend(environment.engine.as_ref().map(|value| format!("HMM_ENGINE={value}")));
    let disabled = environment.uffd_disable.as_ref();
    found.extend(disabled.map(|value| format!("HMM_UFFD_DISABLE={value}")));
    found.extend(environment.preload.then(|| "libhmm_preload.so is loaded".into()));
    let valgrind = "Valgrind (with --trace-children=yes engines are tried under it, too)";
    found.extend(environment.valgrind.then(|| valgrind.into()));
    found.extend(environment.traced.then(|| "a tracer is attached".into()));
    if found.is_empty() { "nothing that matters".into() } else { found.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::plain_report;
    use crate::{advice, limitations};

    fn whole() -> Report {
        let mut report = plain_report();
        report.limitations = limitations::of(&report);
        report.advice = advice::of(&report);
        report
    }

    #[test]
    fn the_text_is_short_and_says_everything() {
        let text = whole().text(false);
        assert!(text.lines().count() < 60, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        for part in ["uffd-inline, which works", "EFAULT", "setfacl", "cannot be opened", "0600"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains('\x1b'));
    }

    #[test]
    fn a_reason_is_said_once() {
        let mut report = whole();
        let reason = Some("userfaultfd is refused".to_owned());
        (report.engines[0].reason, report.engines[1].reason) = (reason.clone(), reason.clone());
        (report.engines[1].proof, report.userfaultfd.refused) = (None, reason);
        report.reason += "; uffd: userfaultfd is refused; uffd-inline: userfaultfd is refused";
        let text = report.text(false);
        assert_eq!(text.matches("userfaultfd is refused").count(), 1, "{text}");
        assert!(text.contains("uffd-inline: see below") && text.contains("as uffd\n"), "{text}");
    }

    #[test]
    fn colours_change_nothing_else() {
        let coloured = whole().text(true);
        assert!(coloured.contains("\x1b[32m"));
        let mut plain = String::new();
        for part in coloured.split('\x1b') {
            plain.push_str(
                part.strip_prefix('[')
                    .map_or(part, |code| code.split_once('m').map_or(code, |(_, rest)| rest)),
            );
        }
        assert_eq!(plain.split_whitespace().collect::<String>(), {
            whole().text(false).split_whitespace().collect::<String>()
        });
    }
}
