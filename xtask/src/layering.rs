//! Who may use whom. Reads the paths that the sources name and reports every edge that the house does not allow;
//! `ARCHITECTURE.md` explains the picture, [`ROOMS`] is its exact form.

use crate::source::{self, NamedPath};
use crate::workspace;
use std::path::Path;

/// A part of hmm-core whose modules may use one another freely.
struct Room {
    /// The room's modules; a module belongs to the room with the longest name that it begins with.
    modules: &'static [&'static str],
    /// The modules outside the room that it may use.
    may_use: &'static [&'static str],
}

/// The ground floor: no knowledge of the floors above.
const GROUND: &[&str] =
    &["addr", "arena", "error", "flags", "inject", "limits", "page_set", "sparse", "stay", "sync"];
/// Interfaces and bookkeeping, below the address space.
const BELOW_MM: &[&str] = &["engine", "ops", "notifier", "devmem", "stats", "account"];
/// What a verb works with.
const BELOW_VERBS: &[&str] = &["engine", "ops", "notifier", "devmem", "stats", "account", "mm"];

/// Every room; each may also use [`GROUND`].
const ROOMS: &[Room] = &[
    Room { modules: GROUND, may_use: &[] },
    Room { modules: &["engine"], may_use: &[] },
    Room { modules: &["stats"], may_use: &[] },
    Room { modules: &["account"], may_use: &[] },
    // The traits that drivers implement name the types that their callbacks receive: data, never a call.
    Room { modules: &["ops"], may_use: &["mm", "migrate", "devmem"] },
    Room { modules: &["notifier"], may_use: &["ops", "stats"] },
    Room { modules: &["devmem"], may_use: &["ops", "stats"] },
    Room { modules: &["mm"], may_use: BELOW_MM },
    // The verbs do not know one another.
    Room { modules: &["mirror"], may_use: BELOW_VERBS },
    Room { modules: &["range"], may_use: BELOW_VERBS },
    Room { modules: &["migrate"], may_use: BELOW_VERBS },
    Room { modules: &["evict"], may_use: BELOW_VERBS },
    Room { modules: &["fork"], may_use: BELOW_VERBS },
    Room { modules: &["preload"], may_use: BELOW_VERBS },
    // Concrete engines know the Engine and FaultSink traits, and never the address space above them.
    Room { modules: &["engine::model"], may_use: &["engine"] },
    Room { modules: &["engine::linux"], may_use: &["engine"] },
    Room { modules: &["engine::trap"], may_use: &["engine"] },
    Room { modules: &["engine::uffd"], may_use: &["engine", "engine::linux", "engine::trap"] },
    Room { modules: &["engine::signal"], may_use: &["engine", "engine::linux", "engine::trap"] },
    // Two engines side by side.
    Room {
        modules: &["engine::mixed"],
        may_use: &["engine", "engine::uffd", "engine::signal", "engine::linux"],
    },
    // The composition root: chooses the engine and puts the parts together.
    Room {
        modules: &["context"],
        may_use: &[
            "engine",
            "engine::model",
            "engine::uffd",
            "engine::signal",
            "engine::mixed",
            "ops",
            "notifier",
            "devmem",
            "stats",
            "mm",
            "mirror",
            "range",
            "migrate",
            "evict",
            "fork",
            "preload",
        ],
    },
];

/// Which packages of the workspace a package may depend on (tests and xtask may use all).
const PACKAGES: &[(&str, &[&str])] = &[
    ("hmm-core", &[]),
    ("devices/soft", &["hmm-core"]),
    ("hmm-capi", &["hmm-core", "hmm-soft"]),
    ("hmm-py", &["hmm-core", "hmm-soft", "hmm-doctor"]),
    ("hmm-doctor", &["hmm-core", "hmm-soft"]),
    ("hmm-preload", &[]),
];
/// Modules of hmm-core that are published whole: bounds, locks and memory that a driver may share with the core.
const PUBLISHED: &[&str] = &["arena", "limits", "sync"];
/// The packages that the rules above speak of.
const OURS: &[&str] = &[
    "hmm-core",
    "hmm-soft",
    "hmm-capi",
    "hmm-py",
    "hmm-preload",
    "hmm-doctor",
    "hmm-tests",
    "hmm-schedules",
    "xtask",
];

/// Every forbidden edge, one line each.
pub(crate) fn check(root: &Path) -> Result<Vec<String>, String> {
    let mut broken = Vec::new();
    let core = root.join("hmm-core/src");
    for file in workspace::files(&core, &["rs"])? {
        let module = module_of(&workspace::below(&core, &file));
        let text = workspace::read(&file)?;
        let name = workspace::below(root, &file);
        broken.extend(core_edges(&module, &text).into_iter().map(|edge| format!("{name}:{edge}")));
    }
    for file in workspace::files(&root.join("devices"), &["rs"])? {
        let text = workspace::read(&file)?;
        let name = workspace::below(root, &file);
        if name.contains("/src/") {
            broken.extend(device_edges(&text).into_iter().map(|edge| format!("{name}:{edge}")));
        }
    }
    for (folder, allowed) in PACKAGES {
        let manifest = workspace::read(&root.join(folder).join("Cargo.toml"))?;
        broken.extend(
            package_edges(&manifest, allowed)
                .into_iter()
                .map(|edge| format!("{folder}/Cargo.toml:{edge}")),
        );
    }
    Ok(broken)
}

/// The module of a file, from its path below `src` (`engine/uffd/mod.rs` is `engine::uffd`; the root is empty).
fn module_of(path: &str) -> Vec<String> {
    let mut parts: Vec<String> =
        path.trim_end_matches(".rs").split('/').map(String::from).collect();
    if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
        parts.pop();
    }
    parts
}

/// The room of a module path, and the name by which it belongs there.
fn room_of(module: &[String]) -> Option<(&'static Room, &'static str)> {
    (1..=module.len()).rev().find_map(|length| {
        let name = module[..length].join("::");
        ROOMS.iter().find_map(|room| {
            room.modules.iter().find(|one| **one == name).map(|found| (room, *found))
        })
    })
}

/// The forbidden edges of one file of hmm-core, each as `line: reason`.
fn core_edges(module: &[String], text: &str) -> Vec<String> {
    let Some(top) = module.first() else { return Vec::new() };
    if module.last().is_some_and(|last| last == "tests") {
        return Vec::new();
    }
    let Some((room, _)) = room_of(module) else {
        return vec![format!(
            "1: module {top} has no room yet: give it one in xtask/src/layering.rs"
        )];
    };
    let tokens = source::without_tests(source::tokens(text));
    source::paths(&tokens, &["crate", "super", "self"])
        .iter()
        .filter_map(|path| forbidden(room, module, path))
        .collect()
}

/// Why a path may not be named in a module of this room, if so.
fn forbidden(room: &Room, module: &[String], path: &NamedPath) -> Option<String> {
    let target = absolute(module, &path.segments);
    let written = path.segments.join("::");
    let Some((_, name)) = room_of(&target) else {
        return Some(format!(
            "{}: `{written}` names no room: name the module that the item stands in",
            path.line
        ));
    };
    let allowed = room.modules.contains(&name) || room.may_use.contains(&name);
    if allowed || GROUND.contains(&name) {
        return None;
    }
    Some(format!("{}: {} may not use {name} (`{written}`)", path.line, module.join("::")))
}

/// The path from the crate's root, without `crate`.
fn absolute(module: &[String], segments: &[String]) -> Vec<String> {
    let mut base = module.to_vec();
    let mut rest = segments;
    if let Some((first, after)) = rest.split_first()
        && (first == "crate" || first == "self")
    {
        if first == "crate" {
            base.clear();
        }
        rest = after;
    }
    while let Some((first, after)) = rest.split_first()
        && first == "super"
    {
        base.pop();
        rest = after;
    }
    base.extend(rest.iter().cloned());
    base
}

/// The forbidden edges of a device: it uses the core's root and the published part of its ground floor, and nothing
/// deeper.
fn device_edges(text: &str) -> Vec<String> {
    let tokens = source::without_tests(source::tokens(text));
    source::paths(&tokens, &["hmm_core"])
        .iter()
        .filter(|path| path.segments.len() > 2 && is_module_name(&path.segments[1]))
        .filter(|path| !PUBLISHED.contains(&path.segments[1].as_str()))
        .map(|path| {
            let written = path.segments.join("::");
            format!(
                "{}: a device uses the root of hmm_core and {PUBLISHED:?}, not `{written}`",
                path.line
            )
        })
        .collect()
}

/// Modules begin with a small letter; types, traits and constants do not.
fn is_module_name(segment: &str) -> bool {
    segment.starts_with(|first: char| first.is_lowercase())
}

/// The forbidden dependencies of a manifest.
fn package_edges(manifest: &str, allowed: &[&str]) -> Vec<String> {
    let mut broken = Vec::new();
    let mut in_dependencies = false;
    for (index, line) in manifest.lines().enumerate() {
        let line = line.trim();
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            in_dependencies = table.ends_with("dependencies");
            if let Some((_, package)) = table.split_once("dependencies.") {
                refuse(&mut broken, index, package, allowed);
            }
        } else if in_dependencies {
            let name = line.split(['=', '.', ' ']).next().unwrap_or_default();
            refuse(&mut broken, index, name, allowed);
        }
    }
    broken
}

fn refuse(broken: &mut Vec<String>, index: usize, package: &str, allowed: &[&str]) {
    let package = package.trim_matches('"');
    if OURS.contains(&package) && !allowed.contains(&package) {
        broken.push(format!("{}: may not depend on {package}", index + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(path: &str, text: &str) -> Vec<String> {
        core_edges(&module_of(path), text)
    }

    #[test]
    fn downward_edges_are_allowed() {
        let mm =
            "use crate::engine::{Engine, Progress}; use crate::addr::Pfn; use super::notifier::X;";
        assert_eq!(edges("mm/mod.rs", mm), Vec::<String>::new());
        let part = "use super::abi::Move; use crate::engine::Stop; use crate::limits::DEADLINE;";
        assert_eq!(edges("engine/uffd/service.rs", part), Vec::<String>::new());
        assert_eq!(edges("migrate/copy.rs", "use super::collect::X;"), Vec::<String>::new());
    }

    #[test]
    fn upward_edges_are_reported_with_their_line() {
        let found = edges("engine/uffd/mod.rs", "\nuse crate::mm::Mm;");
        assert_eq!(found, ["2: engine::uffd may not use mm (`crate::mm::Mm`)"]);
        assert_eq!(edges("addr.rs", "fn f() { crate::notifier::g() }").len(), 1);
        assert_eq!(
            edges("mm/page_table.rs", "use crate::{addr::Pfn, range::X, migrate::Y};").len(),
            2
        );
        assert_eq!(edges("mm/mod.rs", "use super::engine::uffd::Uffd;").len(), 1);
    }

    #[test]
    fn verbs_and_engines_do_not_know_one_another() {
        assert_eq!(edges("range.rs", "use crate::migrate::X;").len(), 1);
        assert_eq!(edges("engine/model.rs", "use super::uffd::X;").len(), 1);
    }

    #[test]
    fn unknown_rooms_and_root_names_are_reported() {
        assert_eq!(edges("novelty.rs", "").len(), 1);
        assert_eq!(edges("mm/mod.rs", "use crate::Mm;").len(), 1);
    }

    #[test]
    fn tests_may_use_everything() {
        let text = "#[cfg(test)] mod tests { use crate::mm::Mm; }";
        assert_eq!(edges("addr.rs", text), Vec::<String>::new());
        assert_eq!(edges("addr/tests.rs", "use crate::mm::Mm;"), Vec::<String>::new());
    }

    #[test]
    fn a_device_uses_what_is_published() {
        assert_eq!(
            device_edges("use hmm_core::{Mm, Result, PAGE_SIZE}; hmm_core::Mm::current();"),
            [""; 0]
        );
        assert_eq!(device_edges("use hmm_core::limits::DEADLINE;"), [""; 0]);
        assert_eq!(device_edges("use hmm_core::{Mm, mm::Vma};").len(), 1);
        assert_eq!(device_edges("fn f(x: hmm_core::engine::Stop) {}").len(), 1);
    }

    #[test]
    fn packages_keep_apart() {
        let manifest = "[dependencies]\nhmm-core.workspace = true\nhmm-capi = { path = \"x\" }\n\
                        [dev-dependencies]\nlibc = \"0.2\"\n[target.x.dependencies.hmm-py]\n";
        let found = package_edges(manifest, &["hmm-core"]);
        assert_eq!(found, ["3: may not depend on hmm-capi", "6: may not depend on hmm-py"]);
    }
}
