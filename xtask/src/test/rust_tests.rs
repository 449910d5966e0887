//! Finds the Rust tests of the workspace: cargo builds the test programs and says where they are, each program lists
//! its tests.

use super::process;
use crate::workspace;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Listing the tests of a program takes no longer.
const LISTING: Duration = Duration::from_secs(20);

/// A program that cargo built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Name of the cargo target.
    pub(crate) name: String,
    /// Folder of its package.
    pub(crate) package: PathBuf,
    /// The program.
    pub(crate) path: PathBuf,
    /// True for a test program, false for an ordinary one.
    pub(crate) is_test: bool,
    /// True for an example.
    pub(crate) is_example: bool,
}

/// One test of one program.
#[derive(Debug)]
pub(crate) struct Test<'a> {
    /// The program that holds it.
    pub(crate) program: &'a Program,
    /// Its name inside the program.
    pub(crate) name: String,
}

impl Test<'_> {
    /// The name for people: package, program and test.
    pub(crate) fn full_name(&self) -> String {
        let package = self.program.package.file_name().unwrap_or_default().to_string_lossy();
        format!("{package} {} {}", self.program.name, self.name)
    }

    /// The command that runs it alone.
    pub(crate) fn command(&self) -> Command {
        let mut command = self.program.command();
        command.args(["--exact", &self.name, "--include-ignored", "--nocapture"]);
        command.args(["--test-threads", "1"]);
        command
    }
}

impl Program {
    /// The program with the surroundings that cargo would give it.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.current_dir(&self.package).env("CARGO_MANIFEST_DIR", &self.package);
        command
    }

    /// Its tests.
    pub(crate) fn tests(&self) -> Result<Vec<Test<'_>>, String> {
        let outcome = process::run(self.command().args(["--list", "--format", "terse"]), LISTING)?;
        if !outcome.success {
            return Err(format!("{} lists no tests: {}", self.path.display(), outcome.errors));
        }
        let names = outcome.output.lines().filter_map(|line| line.strip_suffix(": test"));
        Ok(names.map(|name| Test { program: self, name: name.to_string() }).collect())
    }
}

/// Builds the test programs and examples of one package, or of the whole workspace but for the Python module, which
/// Python tests.
pub(crate) fn build(package: Option<&str>, release: bool) -> Result<Vec<Program>, String> {
    let which = match package {
        Some(name) => vec!["--package", name],
        None => vec!["--workspace", "--exclude", "hmm-py"],
    };
    let output = workspace::cargo()
        .args(["test", "--no-run"])
        .args(which)
        .args(if release { &["--release"][..] } else { &[] })
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(workspace::root())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if !output.status.success() {
        return Err(String::from("the tests do not build"));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let mut programs: Vec<Program> = messages.lines().filter_map(program).collect();
    programs.sort_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
    Ok(programs)
}

/// The program that one of cargo's messages tells of.
fn program(message: &str) -> Option<Program> {
    if !message.starts_with("{\"reason\":\"compiler-artifact\"") {
        return None;
    }
    let target = object(message, "target")?;
    let manifest = PathBuf::from(text(message, "manifest_path")?);
    Some(Program {
        name: text(target, "name")?.to_string(),
        package: manifest.parent()?.to_path_buf(),
        path: PathBuf::from(text(message, "executable")?),
        is_test: object(message, "profile")?.contains("\"test\":true"),
        is_example: target.contains("\"kind\":[\"example\"]"),
    })
}

/// The text of a string field. Cargo's names and paths need no escapes here; one that has them is passed over.
fn text<'a>(json: &'a str, field: &str) -> Option<&'a str> {
    let mark = format!("\"{field}\":\"");
    let start = json.find(&mark)? + mark.len();
    let value = &json[start..start + json[start..].find('"')?];
    (!value.contains('\\')).then_some(value)
}

/// The text of a field that is an object without objects in it.
fn object<'a>(json: &'a str, field: &str) -> Option<&'a str> {
    let mark = format!("\"{field}\":{{");
    let start = json.find(&mark)? + mark.len();
    Some(&json[start..start + json[start..].find('}')?])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: &str = concat!(
        r#"{"reason":"compiler-artifact","package_id":"path+file:///r/tests#hmm-tests@0.1.0","#,
        r#""manifest_path":"/r/tests/Cargo.toml","target":{"kind":["test"],"crate_types":["bin"],"#,
        r#""name":"stress","src_path":"/r/tests/tests/stress.rs","edition":"2024","test":true},"#,
        r#""profile":{"opt_level":"0","debuginfo":2,"test":true},"features":[],"filenames":["/t/s"],"#,
        r#""executable":"/t/stress-1","fresh":true}"#
    );

    #[test]
    fn a_test_program_is_found_in_cargos_messages() {
        let found = program(MESSAGE).expect("the message tells of a program");
        assert_eq!((found.name.as_str(), found.is_test, found.is_example), ("stress", true, false));
        assert_eq!(found.path, PathBuf::from("/t/stress-1"));
        assert_eq!(found.package, PathBuf::from("/r/tests"));
    }

    #[test]
    fn messages_without_a_program_are_passed_over() {
        assert_eq!(program(&MESSAGE.replace("\"/t/stress-1\"", "null")), None);
        assert_eq!(program("{\"reason\":\"build-finished\",\"success\":true}"), None);
    }
}
