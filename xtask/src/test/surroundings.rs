//! What programs are run in: words before the command, variables, and copies that stand in for folders that a program
//! could not read where they are.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The surroundings of test programs; without anything in them, programs run as they are.
#[derive(Debug, Clone, Default)]
pub(crate) struct Surroundings {
    /// Words before each command: a program that runs it, with its options.
    pub(crate) before: Vec<OsString>,
    /// Variables that are set (or removed) for it.
    pub(crate) variables: Vec<(String, Option<OsString>)>,
    /// Folders, and the copies that are used in their place.
    pub(crate) copies: Vec<(PathBuf, PathBuf)>,
}

impl Surroundings {
    /// The same command, in these surroundings.
    pub(crate) fn around(&self, command: &Command) -> Command {
        let inner = std::iter::once(command.get_program()).chain(command.get_args());
        let inner = inner.map(|word| self.in_copy(word));
        let mut words = self.before.iter().cloned().chain(inner);
        let mut whole = Command::new(words.next().unwrap_or_default());
        whole.args(words);
        if let Some(folder) = command.get_current_dir() {
            whole.current_dir(self.in_copy(folder.as_os_str()));
        }
        for (name, value) in command.get_envs() {
            set(&mut whole, name, value.map(|value| self.in_copy(value)));
        }
        for (name, value) in &self.variables {
            set(&mut whole, OsStr::new(name), value.clone());
        }
        whole
    }

    /// A word with the path of a copy, where it begins with that of a copied folder.
    pub(crate) fn in_copy(&self, word: &OsStr) -> OsString {
        let path = Path::new(word);
        let found = self.copies.iter().find(|(folder, _)| path.starts_with(folder));
        let Some((folder, copy)) = found else { return word.to_owned() };
        let rest = &word.as_bytes()[folder.as_os_str().len()..];
        OsString::from_vec([copy.as_os_str().as_bytes(), rest].concat())
    }
}

fn set(command: &mut Command, name: &OsStr, value: Option<OsString>) {
    match value {
        Some(value) => command.env(name, value),
        None => command.env_remove(name),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Command) -> Vec<&str> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_str().expect("text")).collect()
    }

    #[test]
    fn without_anything_a_command_is_as_it_was() {
        let mut command = Command::new("/a/program");
        command.arg("x").env("NAME", "/a/b").current_dir("/a");
        let same = Surroundings::default().around(&command);
        assert_eq!(words(&same), ["/a/program", "x"]);
        assert_eq!(same.get_current_dir(), Some(Path::new("/a")));
        assert_eq!(format!("{:?}", same.get_envs()), format!("{:?}", command.get_envs()));
    }

    #[test]
    fn words_come_before_and_copies_stand_in() {
        let surroundings = Surroundings {
            before: ["confine", "--"].map(OsString::from).to_vec(),
            variables: vec![("ENGINE".into(), Some("signal".into())), ("OLD".into(), None)],
            copies: vec![("/a".into(), "/tmp/copy".into())],
        };
        let mut command = Command::new("/a/program");
        command.args(["/ab", "/a"]).env("PLACE", "/a/b").current_dir("/a/c");
        let whole = surroundings.around(&command);
        assert_eq!(words(&whole), ["confine", "--", "/tmp/copy/program", "/ab", "/tmp/copy"]);
        assert_eq!(whole.get_current_dir(), Some(Path::new("/tmp/copy/c")));
        let variables: Vec<_> = whole.get_envs().collect();
        let some = |value| Some(OsStr::new(value));
        assert!(variables.contains(&(OsStr::new("PLACE"), some("/tmp/copy/b"))));
        assert!(variables.contains(&(OsStr::new("ENGINE"), some("signal"))));
        assert!(variables.contains(&(OsStr::new("OLD"), None)));
    }
}
