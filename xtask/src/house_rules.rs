//! Rules that a script can see: how long files are, and where unsafe code may stand.

use crate::source;
use crate::workspace;
use std::path::Path;

/// A file with so many lines is too long.
const TOO_LONG: usize = 500;
/// Folders with code of ours.
const FOLDERS: &[&str] = &[
    "hmm-core",
    "hmm-capi",
    "hmm-py",
    "hmm-preload",
    "hmm-doctor",
    "devices",
    "examples",
    "include",
    "tests",
    "xtask",
];
/// Files that a program writes: as long as they come out.
const GENERATED: &[&str] = &["include/hmm.h"];

/// Files, or folders when they end with `/`, that may hold unsafe code; tests may too.
const UNSAFE: &[&str] = &[
    "hmm-core/src/arena.rs",
    "hmm-core/src/sync.rs",
    "hmm-core/src/fork.rs",
    "hmm-core/src/migrate/exclusive.rs",
    "hmm-core/src/preload/",
    "hmm-core/src/sparse.rs",
    "hmm-core/src/engine/model/frames.rs",
    "hmm-core/src/engine/linux/",
    "hmm-core/src/engine/lost.rs",
    "hmm-core/src/engine/signal/",
    "hmm-core/src/engine/threads.rs",
    "hmm-core/src/engine/trap/",
    "hmm-core/src/engine/uffd/abi.rs",
    "hmm-core/src/engine/uffd/inline.rs",
    "hmm-core/src/engine/uffd/mod.rs",
    "hmm-core/src/engine/uffd/open.rs",
    "hmm-core/src/engine/uffd/pages.rs",
    "hmm-core/src/engine/uffd/service.rs",
    "hmm-capi/src/",
    "hmm-preload/src/",
    "devices/soft/src/mapped.rs",
    "devices/soft/src/memory.rs",
];

/// Every broken rule, one line each.
pub(crate) fn check(root: &Path) -> Result<Vec<String>, String> {
    let mut broken = Vec::new();
    for folder in FOLDERS {
        for file in workspace::files(&root.join(folder), &["rs", "c", "h", "py", "pyi", "sh"])? {
            let name = workspace::below(root, &file);
            let text = workspace::read(&file)?;
            broken.extend(too_long(&name, &text));
            if name.ends_with(".rs") {
                broken.extend(unsafe_outside(&name, &text));
            }
        }
    }
    Ok(broken)
}

fn too_long(name: &str, text: &str) -> Option<String> {
    let lines = text.lines().count();
    let counts = lines >= TOO_LONG && !GENERATED.contains(&name);
    counts.then(|| format!("{name}: {lines} lines; files stay below {TOO_LONG}"))
}

fn unsafe_outside(name: &str, text: &str) -> Option<String> {
    let is_test = name.starts_with("tests/") || name.contains("/tests/");
    let is_named =
        |place: &&str| name == *place || (place.ends_with('/') && name.starts_with(*place));
    if is_test || UNSAFE.iter().any(is_named) {
        return None;
    }
    let tokens = source::tokens(text);
    let token = tokens.iter().find(|token| token.text == "unsafe")?;
    Some(format!(
        "{name}:{}: unsafe code stands only in the files that house_rules.rs names",
        token.line
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_are_reported_but_not_generated_ones() {
        let long = "\n".repeat(TOO_LONG);
        assert!(too_long("hmm-core/src/mm/mod.rs", &long).is_some());
        assert!(too_long("hmm-core/src/mm/mod.rs", &long[1..]).is_none());
        assert!(too_long("include/hmm.h", &long).is_none());
    }

    #[test]
    fn unsafe_code_is_found_in_code_only() {
        let text = "// unsafe\nfn f() { unsafe { g() } }";
        assert!(
            unsafe_outside("hmm-core/src/addr.rs", text).is_some_and(|line| line.contains(":2:"))
        );
        assert!(unsafe_outside("hmm-core/src/addr.rs", "// unsafe").is_none());
        assert!(unsafe_outside("hmm-core/src/arena.rs", text).is_none());
        assert!(unsafe_outside("hmm-capi/src/mm.rs", text).is_none());
        assert!(unsafe_outside("devices/soft/tests/cpu.rs", text).is_none());
    }
}
