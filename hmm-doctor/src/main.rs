//! `hmm`: the command line of libhmm.
#![forbid(unsafe_code)]

use hmm_doctor::Program;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let variable = |name| std::env::var_os(name).unwrap_or_default();
    let colours = std::io::stdout().is_terminal()
        && variable("NO_COLOR").is_empty()
        && variable("TERM") != "dumb";
    let answer = hmm_doctor::run(&words, &Program::this(), colours);
    // Where nobody reads any more, there is nobody to tell.
    let _ = if answer.status == 2 {
        std::io::stderr().write_all(answer.text.as_bytes())
    } else {
        std::io::stdout().write_all(answer.text.as_bytes())
    };
    ExitCode::from(answer.status)
}
