//! Generates `include/hmm.h`: declarations and documentation from hmm-capi by cbindgen, and around them the hand-written
//! parts in `hmm-capi/header/`, for what Rust has no words for (macros, inline functions, sections).

use crate::workspace::{self, describe, read};
use cbindgen::{Config, DocumentationStyle, Language, Style};
use std::fs;
use std::path::Path;

/// What hmm-capi exports, in the order in which a reader meets it.
const SOURCES: &[&str] = &[
    "version",
    "error",
    "mm",
    "counters",
    "vma",
    "mirror",
    "range",
    "range_4_17",
    "pages",
    "devices",
    "devmem",
    "migrate",
    "interval",
    "range_fault",
    "pagemap",
    "migrate_phases",
    "exclusive",
    "groups",
    "stay",
    "inject",
    "soft",
    "soft_kernels",
];
const HEADER: &str = "include/hmm.h";
const WARNING: &str =
    "/* Generated from hmm-capi; do not edit. To make it anew: cargo run -p xtask -- gen-header */";

/// Writes the header, or with `check` compares it with the committed one.
pub(crate) fn run(check: bool) -> Result<(), String> {
    let root = workspace::root();
    let path = root.join(HEADER);
    let text = generate(&root)?;
    if !check {
        return fs::write(&path, text).map_err(|error| describe(&path, &error));
    }
    let committed = read(&path)?;
    match first_difference(&committed, &text) {
        None => Ok(()),
        Some(line) => Err(format!(
            "{HEADER}:{line} is not what hmm-capi says; run: cargo run -p xtask -- gen-header"
        )),
    }
}

/// The whole header.
fn generate(root: &Path) -> Result<String, String> {
    let parts = root.join("hmm-capi/header");
    let top = read(&parts.join("top.h"))?
        .replace("@MAJOR@", env!("CARGO_PKG_VERSION_MAJOR"))
        .replace("@MINOR@", env!("CARGO_PKG_VERSION_MINOR"))
        .replace("@PATCH@", env!("CARGO_PKG_VERSION_PATCH"));
    let helpers = read(&parts.join("helpers.h"))?;
    let mut text = compact_comments(&declarations(root, top)?);
    for (function, banner) in sections(&read(&parts.join("sections.h"))?)? {
        text = insert_before_function(&text, function, banner)?;
    }
    text = wrap_device_structs(&text)?;
    text = make_fault_page_variable(&text)?;
    text = name_the_memory_type(&text)?;
    // The helpers belong behind the declarations, inside the include guard.
    let end = text.rfind("#endif").ok_or("cbindgen wrote no include guard")?;
    Ok(format!("{}{helpers}\n{}", &text[..end], &text[end..]))
}

fn config(top: String) -> Config {
    let mut config = Config {
        language: Language::C,
        cpp_compat: true,
        include_guard: Some("HMM_H".into()),
        autogen_warning: Some(WARNING.into()),
        no_includes: true,
        sys_includes: ["stdbool.h", "stddef.h", "stdint.h"].map(String::from).to_vec(),
        after_includes: Some(top),
        style: Style::Tag,
        usize_is_size_t: true,
        documentation_style: DocumentationStyle::Doxy,
        line_length: 100,
        ..Config::default()
    };
    // No function has an argument of these: numbers of newer versions, or of the program's own, may come.
    config.export.include = ["hmm_stay", "memory_type"].map(String::from).to_vec();
    config.export.item_types = {
        use cbindgen::ItemType::{Enums, Functions, OpaqueItems, Structs, Typedefs};
        vec![Enums, Structs, Typedefs, OpaqueItems, Functions]
    };
    config
}

/// What cbindgen makes of hmm-capi.
fn declarations(root: &Path, top: String) -> Result<String, String> {
    let mut builder = cbindgen::Builder::new().with_config(config(top));
    for source in SOURCES {
        builder = builder.with_src(root.join("hmm-capi/src").join(format!("{source}.rs")));
    }
    let bindings = builder.generate().map_err(|error| format!("cbindgen: {error}"))?;
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    String::from_utf8(bytes).map_err(|error| format!("cbindgen wrote no UTF-8: {error}"))
}

/// Cuts the file of section banners: `//@ before NAME` starts the banner of the section that begins with that function.
fn sections(text: &str) -> Result<Vec<(&str, &str)>, String> {
    let mut found = Vec::new();
    for part in text.split("//@ before ").skip(1) {
        let (function, banner) = part.split_once('\n').ok_or("a section banner has no text")?;
        found.push((function.trim(), banner));
    }
    Ok(found)
}

/// Puts text in front of a function's documentation.
fn insert_before_function(text: &str, function: &str, banner: &str) -> Result<String, String> {
    let missing = || format!("no function {function} to put a section in front of");
    let is_declared_at = |at: usize| {
        let line = &text[text[..at].rfind('\n').map_or(0, |newline| newline + 1)..at];
        line.starts_with(|first: char| first.is_ascii_alphabetic())
    };
    let start = format!("{function}(");
    let mut calls = text.match_indices(&start).map(|(at, _)| at);
    let call = calls.find(|at| is_declared_at(*at)).ok_or_else(missing)?;
    let at = text[..call].rfind("/**").ok_or_else(missing)?;
    Ok(format!("{}{banner}{}", &text[..at], &text[at..]))
}

/// Programs that have a `struct device` of their own can leave ours incomplete.
fn wrap_device_structs(text: &str) -> Result<String, String> {
    let missing = || "struct device and struct hmm_device do not follow one another".to_string();
    let first = text.find("struct device {").ok_or_else(missing)?;
    let first = text[..first].rfind("/**").ok_or_else(missing)?;
    let last = first + text[first..].find("struct hmm_device {").ok_or_else(missing)?;
    let last = last + text[last..].find("};").ok_or_else(missing)? + "};".len();
    let structs = &text[first..last];
    if structs.matches("};").count() != 2 {
        return Err(missing());
    }
    Ok(format!(
        "{}#ifndef HMM_NO_STRUCT_DEVICE\n\n{structs}\n\n#else\n\nstruct device;\nstruct hmm_device;\n\n#endif{}",
        &text[..first],
        &text[last..]
    ))
}

/// The page that a fault callback receives is const in one form of the interface.
fn make_fault_page_variable(text: &str) -> Result<String, String> {
    let start = text.find("(*fault)(").ok_or("struct hmm_devmem_ops has no fault")?;
    let end = start + text[start..].find(';').ok_or("fault has no end")?;
    let changed = text[start..end].replace("struct page *page", "HMM_FAULT_PAGE *page");
    if changed == text[start..end] {
        return Err("fault has no argument struct page *page".into());
    }
    Ok(format!("{}{changed}{}", &text[..start], &text[end..]))
}

/// The type of device memory is an enum in C. In Rust it is an integer: a program may store anything there.
fn name_the_memory_type(text: &str) -> Result<String, String> {
    let missing = || "struct dev_pagemap has no member unsigned int type".to_string();
    let start = text.find("struct dev_pagemap {").ok_or_else(missing)?;
    let member = "unsigned int type;";
    let at = start + text[start..].find(member).ok_or_else(missing)?;
    Ok(format!("{}enum memory_type type;{}", &text[..at], &text[at + member.len()..]))
}

/// Comments of one line take one line, not three.
fn compact_comments(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let (mut compact, mut at) = (String::with_capacity(text.len()), 0);
    while at < lines.len() {
        let indent = lines[at].strip_suffix("/**").filter(|indent| indent.trim().is_empty());
        let is_short = indent.is_some() && lines.get(at + 2).is_some_and(|end| end.trim() == "*/");
        match (indent, is_short) {
            (Some(indent), true) => {
                let text = lines[at + 1].trim().trim_start_matches("* ");
                compact.push_str(&format!("{indent}/** {text} */\n"));
                at += 3;
            }
            _ => {
                compact.push_str(lines[at]);
                compact.push('\n');
                at += 1;
            }
        }
    }
    compact
}

/// Number of the first line that differs.
fn first_difference(one: &str, other: &str) -> Option<usize> {
    if one == other {
        return None;
    }
    let equal = one.lines().zip(other.lines()).take_while(|(one, other)| one == other).count();
    Some(equal + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found_by_line() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some(2));
        assert_eq!(first_difference("a\n", "a\nb\n"), Some(2));
    }

    #[test]
    fn short_comments_take_one_line() {
        let text = "/**\n * One.\n */\nint a;\n  /**\n   * Two\n   * lines.\n   */\n";
        let compact = "/** One. */\nint a;\n  /**\n   * Two\n   * lines.\n   */\n";
        assert_eq!(compact_comments(text), compact);
    }

    #[test]
    fn banners_go_in_front_of_the_documentation() {
        let text = "/** refers\n * to f() */\nint g(void);\n/** one */\nint f(void);\n";
        let changed = insert_before_function(text, "f", "/* B */\n");
        assert_eq!(
            changed.as_deref().map_err(String::as_str),
            Ok("/** refers\n * to f() */\nint g(void);\n/* B */\n/** one */\nint f(void);\n")
        );
        assert!(insert_before_function(text, "h", "").is_err());
    }

    #[test]
    fn sections_are_cut_at_their_marks() {
        let cut = sections("//@ before f\nA\n//@ before g\nB\n").unwrap_or_default();
        assert_eq!(cut, [("f", "A\n"), ("g", "B\n")]);
    }
}
