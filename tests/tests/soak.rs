//! The soak in its short form: `make soak MINUTES=n` runs the long one.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

use std::process::Command;

fn soaks(variables: &[(&str, &str)]) {
    let mut soak = Command::new(env!("CARGO_BIN_EXE_soak"));
    let output = soak.args(["--seconds", "4"]).envs(variables.iter().copied()).output().unwrap();
    let (said, errors) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    eprintln!("{said}{errors}");
    assert!(output.status.success(), "{}", output.status);
    assert!(said.contains("all right") || errors.contains("skipped: "), "{said}");
}

#[test]
fn stress_of_everything_at_once() {
    soaks(&[]);
}

#[test]
fn stress_of_everything_at_once_while_calls_fail() {
    soaks(&[("HMM_INJECT", "all/2000")]);
}
