//! Gets the kernel's tests: from what an earlier call left, from the installed package, or from the package archive
//! without installing anything, which needs no rights. Builds them with the kernel's own flags.

use crate::test::process::{self, Outcome};
use crate::workspace::describe;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Debian's package, and the folder in it.
const PACKAGE: &str = "linux-source-6.1";
/// Where it installs the source.
const INSTALLED: &str = "/usr/src/linux-source-6.1.tar.xz";
/// The tests.
const TESTS: &str = "tools/testing/selftests/vm/hmm-tests.c";
/// All that is taken out: the tests and what they include.
const FILES: [&str; 5] = [
    TESTS,
    "tools/testing/selftests/kselftest.h",
    "tools/testing/selftests/kselftest_harness.h",
    "lib/test_hmm_uapi.h",
    "mm/gup_test.h",
];
/// Asking the archive what it has takes no longer.
const UPDATE_LIMIT: Duration = Duration::from_secs(120);
/// Getting 140 MB takes no longer.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(300);
/// Unpacking takes no longer.
const UNPACK_LIMIT: Duration = Duration::from_secs(300);
/// Compiling takes no longer.
const BUILD_LIMIT: Duration = Duration::from_secs(120);

/// The folder with the files, as they lie in the kernel. An error says why they cannot be had.
pub(super) fn get(folder: &Path) -> Result<PathBuf, String> {
    let top = folder.join(PACKAGE);
    if !is_whole(&top) {
        let work = folder.join(format!("getting-{}", std::process::id()));
        make(&work)?;
        let got = fetch(&work);
        let kept = got.and_then(|()| keep(&work.join(PACKAGE), &top));
        // What is left of an attempt is of no use; the next one has another name.
        let _ = fs::remove_dir_all(&work);
        kept?;
    }
    let origin = fs::read_to_string(top.join("origin")).unwrap_or_default();
    println!("# {TESTS} of {}", origin.trim());
    Ok(top)
}

fn is_whole(top: &Path) -> bool {
    FILES.iter().all(|file| top.join(file).is_file())
}

/// Puts the files in their place; somebody else may have done so meanwhile.
fn keep(got: &Path, top: &Path) -> Result<(), String> {
    match fs::rename(got, top) {
        Err(error) if !is_whole(top) => Err(describe(top, &error)),
        _ => Ok(()),
    }
}

/// Unpacks the files below `work`, whence they come.
fn fetch(work: &Path) -> Result<(), String> {
    if Path::new(INSTALLED).is_file() {
        unpack(work, &format!("cat {INSTALLED}"))?;
        return note(work, INSTALLED);
    }
    if Command::new("apt-get").arg("--version").output().is_err() {
        return Err(format!("there is neither {INSTALLED} nor an apt-get to get {PACKAGE} with"));
    }
    println!("# getting {PACKAGE} from the package archive: 140 MB, once");
    let package = download(work)?;
    let name = package.file_name().unwrap_or_default().to_string_lossy();
    let inner = format!("dpkg-deb --fsys-tarfile {name} | tar -xOf - .{INSTALLED}");
    unpack(work, &inner)?;
    note(work, &name)
}

/// Takes the files out of the archive that a shell command prints. A pipe's end may be closed early: what counts is
/// that the files are there.
fn unpack(work: &Path, printing: &str) -> Result<(), String> {
    let files: Vec<String> = FILES.iter().map(|file| format!("{PACKAGE}/{file}")).collect();
    let script = format!("{printing} | tar -xJf - --occurrence=1 {}", files.join(" "));
    let mut shell = Command::new("sh");
    let outcome = process::run(shell.arg("-c").arg(script).current_dir(work), UNPACK_LIMIT)?;
    if is_whole(&work.join(PACKAGE)) {
        return Ok(());
    }
    Err(format!("the source of {PACKAGE} cannot be unpacked: {}", reason(&outcome)))
}

fn note(work: &Path, origin: &str) -> Result<(), String> {
    let path = work.join(PACKAGE).join("origin");
    fs::write(&path, origin).map_err(|error| describe(&path, &error))
}

/// The package, from the archive as this machine knows it, or else as the archive is now.
fn download(work: &Path) -> Result<PathBuf, String> {
    let known = apt(work, &["download", PACKAGE], false, DOWNLOAD_LIMIT)?;
    if !known.success {
        apt(work, &["update"], true, UPDATE_LIMIT)?;
        let fresh = apt(work, &["download", PACKAGE], true, DOWNLOAD_LIMIT)?;
        if !fresh.success {
            return Err(format!(
                "the package {PACKAGE} cannot be had ({}; with fresh lists: {}); {INSTALLED} would do too",
                reason(&known),
                reason(&fresh)
            ));
        }
    }
    let found = fs::read_dir(work).map_err(|error| describe(work, &error))?;
    let mut paths = found.flatten().map(|entry| entry.path());
    let package = paths.find(|path| path.extension().is_some_and(|end| end == "deb"));
    package.ok_or_else(|| format!("apt-get left no package {PACKAGE}"))
}

/// Runs apt-get; with lists of its own below `work` if it may not change, or should not trust, those of the system.
fn apt(
    work: &Path,
    words: &[&str],
    has_own_lists: bool,
    limit: Duration,
) -> Result<Outcome, String> {
    let mut command = Command::new("apt-get");
    command.args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=1"]);
    command.args(["-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20"]);
    if has_own_lists {
        for (option, name) in [("Dir::State::Lists", "lists"), ("Dir::Cache", "cache")] {
            let place = work.join(name);
            make(&place.join("partial"))?;
            command.arg("-o").arg(format!("{option}={}", place.display()));
        }
    }
    command.args(words).current_dir(work).env("LC_ALL", "C");
    process::run(&mut command, limit)
}

/// The last thing that a program complained of, or how it ended.
fn reason(outcome: &Outcome) -> String {
    let said = outcome.errors.lines().map(str::trim).rfind(|line| !line.is_empty());
    match said {
        Some(line) if !outcome.hung => line.to_string(),
        _ => outcome.ending.clone(),
    }
}

/// Builds the tests as they are, with the flags of the Makefile beside them.
pub(super) fn build(top: &Path, folder: &Path) -> Result<PathBuf, String> {
    let program = folder.join("hmm-tests");
    let compiler = std::env::var_os("CC").filter(|name| !name.is_empty());
    let mut command = Command::new(compiler.unwrap_or_else(|| "cc".into()));
    command.arg("-Wall").arg("-I").arg(top).arg("-no-pie").arg("-o").arg(&program);
    command.arg(top.join(TESTS)).args(["-lrt", "-lpthread"]);
    let outcome = process::run(&mut command, BUILD_LIMIT)?;
    if outcome.success {
        return Ok(program);
    }
    Err(format!("{TESTS} does not build:\n{}", outcome.said()))
}

fn make(folder: &Path) -> Result<(), String> {
    fs::create_dir_all(folder).map_err(|error| describe(folder, &error))
}
