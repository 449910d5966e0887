//! The sources of this repository keep to the house's rules: who uses whom, file lengths, unsafe code.

use std::process::Command;

#[test]
fn no_edge_is_forbidden() {
    let output = Command::new(env!("CARGO_BIN_EXE_xtask")).arg("layering").output();
    let output = output.expect("xtask starts");
    let reasons = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the house's rules are broken:\n{reasons}");
}
