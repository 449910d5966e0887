//! A user without rights often cannot read where things were built: a checkout or a Python below `/root`. What such a
//! user needs is then copied to a folder that everybody can read.

use crate::test::process;
use crate::test::rust_tests::Program;
use crate::test::suites;
use crate::test::surroundings::Surroundings;
use crate::workspace::{self, describe};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Copying, or asking a program, takes no longer.
const LIMIT: Duration = Duration::from_secs(120);
/// What tests and examples read, below the root of the repository.
const SOURCES: &[&str] = &["README.md", "ARCHITECTURE.md", "examples", "hmm-py", "tests", ".venv"];
/// What was built beside the Rust programs, below the target folder.
const BUILT: &[&str] = &["capi", "tests-c", "demo"];
/// Parts of Python that no test needs.
const LEFT_OUT: &[&str] =
    &["site-packages", "test", "idlelib", "tkinter", "ensurepip", "__pycache__"];

/// A folder with copies, removed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Stage {
    folder: PathBuf,
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What stays behind lies in a temporary folder.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

impl Stage {
    /// Makes everything readable for programs in these surroundings, which it changes where copies are used.
    pub(crate) fn for_programs(
        surroundings: &mut Surroundings,
        programs: &[Program],
    ) -> Result<Self, String> {
        let folder = std::env::temp_dir().join(format!("hmm-matrix-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let stage = Self { folder };
        stage.make(&stage.folder)?;
        stage.copy_programs(surroundings, programs)?;
        Ok(stage)
    }

    /// Makes Python readable. An error says why Python tests cannot run.
    pub(crate) fn python(&self, surroundings: &mut Surroundings) -> Result<(), String> {
        let mut import = suites::interpreter();
        import.args(["-c", "import hmm, numpy, pytest"]);
        if works(&mut surroundings.around(&import))? {
            return Ok(());
        }
        let says = |what: &str| {
            let mut command = suites::interpreter();
            command.args(["-c", &format!("import os, sys, sysconfig; print({what})")]);
            process::run(&mut command, LIMIT).map(|outcome| outcome.output.trim().to_string())
        };
        let library = PathBuf::from(says("os.path.dirname(os.__file__)")?);
        let program = PathBuf::from(says("os.path.realpath(sys.executable)")?);
        let packages = PathBuf::from(says("sysconfig.get_path('purelib')")?);
        let home = self.folder.join("python");
        let name = library.file_name().ok_or("Python does not say where its library is")?;
        let new_program = home.join("bin/python");
        self.copy(&program, &new_program)?;
        let new_library = home.join("lib").join(name);
        self.make(&new_library)?;
        for entry in fs::read_dir(&library).map_err(|error| describe(&library, &error))?.flatten() {
            if !LEFT_OUT.iter().any(|name| entry.file_name() == *name) {
                self.copy(&entry.path(), &new_library.join(entry.file_name()))?;
            }
        }
        let shared = "os.path.join(*map(sysconfig.get_config_var, ('LIBDIR', 'INSTSONAME')))";
        self.copy_libpython(Path::new(&says(shared)?), &home.join("lib"), surroundings)?;
        let modules = workspace::root().join("hmm-py/python");
        let path = [modules, packages].map(|folder| surroundings.in_copy(folder.as_os_str()));
        let path = path.join(OsString::from(":").as_os_str());
        let own = suites::interpreter().get_program().to_owned();
        surroundings.copies.insert(0, (own.into(), new_program));
        surroundings.variables.push(("PYTHONHOME".into(), Some(home.into())));
        surroundings.variables.push(("PYTHONPATH".into(), Some(path)));
        if works(&mut surroundings.around(&import))? {
            return Ok(());
        }
        let outcome = process::run(&mut surroundings.around(&import), LIMIT)?;
        Err(format!("Python does not work as a copy either: {}", outcome.said().trim()))
    }

    /// The interpreter's shared library, if it has one: the loader would find that of another version instead.
    fn copy_libpython(
        &self,
        library: &Path,
        to: &Path,
        surroundings: &mut Surroundings,
    ) -> Result<(), String> {
        let is_shared = library.to_string_lossy().contains(".so");
        let Some(name) = library.file_name().filter(|_| is_shared && library.is_file()) else {
            return Ok(());
        };
        self.copy(library, &to.join(name))?;
        let is_path = |variable: &&(String, Option<OsString>)| variable.0 == "LD_LIBRARY_PATH";
        let before = surroundings.variables.iter().rfind(is_path).and_then(|one| one.1.clone());
        let mut path = to.as_os_str().to_owned();
        before.into_iter().for_each(|before| {
            path.push(":");
            path.push(before);
        });
        surroundings.variables.push(("LD_LIBRARY_PATH".into(), Some(path)));
        Ok(())
    }

    /// Copies the programs, and what they read, if one of them cannot be read where it is.
    fn copy_programs(
        &self,
        surroundings: &mut Surroundings,
        programs: &[Program],
    ) -> Result<(), String> {
        let (root, target) = (workspace::root(), workspace::target_dir());
        let needed = programs.iter().map(|program| program.path.clone());
        let mut needed = needed.chain([root.join("README.md"), target.join("capi/libhmm.so")]);
        if needed.all(|path| !path.exists() || is_readable(surroundings, &path)) {
            return Ok(());
        }
        let (new_root, new_target) = (self.folder.join("root"), self.folder.join("target"));
        for program in programs {
            let below = program.path.strip_prefix(&target).unwrap_or(&program.path);
            self.copy(&program.path, &new_target.join(below))?;
        }
        for name in BUILT.iter().filter(|name| target.join(name).exists()) {
            self.copy(&target.join(name), &new_target.join(name))?;
        }
        for name in SOURCES.iter().filter(|name| root.join(name).exists()) {
            self.copy(&root.join(name), &new_root.join(name))?;
        }
        // Programs know the library's place by its full path.
        let library = new_target.join("capi").into_os_string();
        surroundings.variables.push(("LD_LIBRARY_PATH".into(), Some(library)));
        surroundings.copies.push((target, new_target));
        surroundings.copies.push((root, new_root));
        match programs.iter().find(|program| !is_readable(surroundings, &program.path)) {
            None => Ok(()),
            Some(program) => {
                let path = program.path.display();
                Err(format!("{path} is for its owner only: build it with umask 022"))
            }
        }
    }

    fn make(&self, folder: &Path) -> Result<(), String> {
        fs::create_dir_all(folder).map_err(|error| describe(folder, &error))?;
        let all_may_read = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder, all_may_read).map_err(|error| describe(folder, &error))
    }

    /// Copies a file or a folder, by links where that is possible, and lets everybody read it.
    fn copy(&self, from: &Path, to: &Path) -> Result<(), String> {
        if let Some(folder) = to.parent() {
            self.make(folder)?;
        }
        let script =
            "cp -al -- \"$0\" \"$1\" 2>&1 || { rm -rf -- \"$1\"; cp -a -- \"$0\" \"$1\"; }";
        let mut command = Command::new("sh");
        command.args(["-c", script]).args([from, to]);
        let outcome = process::run(&mut command, LIMIT)?;
        if outcome.success {
            return Ok(());
        }
        Err(format!("{} cannot be copied: {}", from.display(), outcome.said().trim()))
    }
}

fn works(command: &mut Command) -> Result<bool, String> {
    process::run(command, LIMIT).map(|outcome| outcome.success)
}

fn is_readable(surroundings: &Surroundings, path: &Path) -> bool {
    let mut command = Command::new("test");
    command.arg("-r").arg(path);
    works(&mut surroundings.around(&command)).unwrap_or(false)
}
