//! The command line, which `hmm` and `python -m hmm` share.

use crate::child::Program;
use crate::{report, trial};

/// What a command line leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// To print: on standard error when the status is 2, on standard output otherwise.
    pub text: String,
    /// The exit status.
    pub status: u8,
}

/// The exit status of a command line that makes no sense.
const USAGE: u8 = 2;

/// Does what the words behind the program's name say. `colours` are for a terminal.
pub fn run(words: &[String], program: &Program, colours: bool) -> Answer {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let good = |text| Answer { text, status: 0 };
    match words.as_slice() {
        ["--version" | "-V"] => good(format!("libhmm {}\n", env!("CARGO_PKG_VERSION"))),
        ["--help" | "-h" | "help"] | ["doctor", "--help" | "-h"] => good(help(program)),
        ["doctor"] => {
            let report = report::examine(program);
            Answer { text: report.text(colours), status: report.status() }
        }
        ["doctor", "--json"] => {
            let report = report::examine(program);
            Answer { text: report.json(), status: report.status() }
        }
        ["doctor", "--try", engine] => {
            if trial::run(engine) {
                return good(String::new());
            }
            let text = format!("{}: no such engine: {engine}\n", program.name());
            Answer { text, status: USAGE }
        }
        [] => Answer { text: help(program), status: USAGE },
        _ => {
            let name = program.name();
            let text = format!("{name}: these words make no sense: {}\n", words.join(" "));
            Answer { text: text + &help(program), status: USAGE }
        }
    }
}

fn help(program: &Program) -> String {
    let name = program.name();
    format!(
        "usage: {name} doctor [--json]\n       {name} --version | --help\n\n\
         doctor tries every engine of libhmm here, says which one programs get and why, what does not work with it,\n\
         and what would help. --json prints one object instead. The exit status is 0 when programs get an engine\n\
         that works, 1 when they do not, and 2 when the words make no sense.\n\n\
         HMM_ENGINE=auto|uffd|uffd-inline|signal chooses an engine, HMM_UFFD_DISABLE=FEATURE,... leaves features of\n\
         userfaultfd unused; both count here as in any program.\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(words: &[&str]) -> Answer {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        run(&words, &Program::new("hmm", Vec::new()), false)
    }

    #[test]
    fn help_and_version_are_said() {
        let version = answer(&["--version"]);
        assert_eq!((version.text.starts_with("libhmm 0."), version.status), (true, 0));
        assert_eq!(answer(&["--help"]), answer(&["doctor", "-h"]));
        assert!(answer(&["--help"]).text.contains("usage: hmm doctor [--json]"));
    }

    #[test]
    fn words_that_make_no_sense_are_named() {
        assert_eq!(answer(&[]).status, 2);
        let odd = answer(&["doctor", "--jsn"]);
        assert_eq!((odd.status, odd.text.contains("doctor --jsn")), (2, true));
        let unknown = answer(&["doctor", "--try", "abacus"]);
        assert_eq!((unknown.status, unknown.text.contains("abacus")), (2, true));
    }
}
