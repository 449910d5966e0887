//! `cargo xtask kernel-names`: docs/KERNEL.md names every name of the header, and says of no name that it is there when it
//! is not, nor the other way round.

mod document;
mod header;

use crate::workspace;
use document::{Part, Row, Status};
use header::Names;
use std::path::Path;

const DOCUMENT: &str = "docs/KERNEL.md";
const HEADER: &str = "include/hmm.h";
/// What is defined before the header for the newer forms.
const SWITCH_4_17: &str = "HMM_API_4_17";
const SWITCH_7_3: &str = "HMM_API_7_3";

/// The names in each form of the header.
struct Views {
    generation_a: Names,
    generation_b: Names,
}

/// Reports every difference.
pub(crate) fn run() -> Result<(), String> {
    let root = workspace::root();
    let views = views(&root)?;
    let text = workspace::read(&root.join(DOCUMENT))?;
    let rows = document::rows(&text).map_err(|what| format!("{DOCUMENT}: {what}"))?;
    let mut wrong = in_document(&rows, &views);
    wrong.extend(in_header(&rows, &views));
    if wrong.is_empty() {
        println!("{DOCUMENT} and {HEADER} have the same names");
        return Ok(());
    }
    wrong.iter().for_each(|line| eprintln!("{line}"));
    Err(format!("{} differences between {DOCUMENT} and {HEADER}", wrong.len()))
}

fn views(root: &Path) -> Result<Views, String> {
    let mut generation_a = header::names(root, HEADER, None)?;
    generation_a.extend(header::names(root, HEADER, Some(SWITCH_4_17))?);
    Ok(Views { generation_a, generation_b: header::names(root, HEADER, Some(SWITCH_7_3))? })
}

impl Views {
    fn has(&self, part: Part, name: &str) -> bool {
        let (a, b) = (self.generation_a.contains(name), self.generation_b.contains(name));
        match part {
            Part::GenerationA => a,
            Part::GenerationB => b,
            Part::Both => a && b,
        }
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        self.generation_a.union(&self.generation_b)
    }
}

/// Names that the document says are there and are not, and the other way round.
fn in_document(rows: &[Row], views: &Views) -> Vec<String> {
    let mut wrong = Vec::new();
    for row in rows {
        for name in &row.names {
            let is_wrong = match row.status {
                Status::Offered => (!views.has(row.part, name)).then_some("is not"),
                Status::Missing => views.has(row.part, name).then_some("is"),
                Status::Ours => {
                    (!views.all().any(|one| matches(name, one))).then_some("or its like is not")
                }
            };
            wrong.extend(is_wrong.map(|is| {
                format!("{DOCUMENT}:{}: {name} {is} in the header ({:?})", row.line, row.part)
            }));
        }
    }
    wrong
}

/// Names of the header that the document does not have.
fn in_header(rows: &[Row], views: &Views) -> Vec<String> {
    let of = |status: Status| rows.iter().filter(move |row| row.status == status);
    let is_kernels =
        |name: &str| of(Status::Offered).any(|row| row.names.iter().any(|one| one == name));
    let is_ours =
        |name: &str| of(Status::Ours).any(|row| row.names.iter().any(|one| matches(one, name)));
    let is_known = |name: &str| match name.split_once('.') {
        // Fields of ours need no row; room for later versions is nobody's.
        Some((structure, field)) => {
            field == "reserved" || !is_kernels(&format!("struct {structure}")) || is_kernels(name)
        }
        None => is_kernels(name) || is_ours(name),
    };
    views
        .all()
        .filter(|name| !is_known(name))
        .map(|name| format!("{HEADER}: {name} has no row in {DOCUMENT}"))
        .collect()
}

/// Whether a name of ours is meant by a word of the document, which may begin or end with `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let bare = |text: &str| {
        let text = text.trim_start_matches("struct ").trim_start_matches("enum ");
        text.trim_end_matches("()").to_string()
    };
    let (pattern, name) = (bare(pattern), bare(name));
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn views_of(names: &[&str]) -> Views {
        let names: Names = names.iter().map(ToString::to_string).collect();
        Views { generation_a: names.clone(), generation_b: names }
    }

    fn rows_of(text: &str) -> Vec<Row> {
        document::rows(&format!("## Generation A\n{text}")).unwrap_or_default()
    }

    #[test]
    fn what_is_said_to_be_there_is_there() {
        let rows = rows_of("| `a()` | 4.14 | same |  |\n| `b()` | 4.14 | not offered | why |\n");
        assert!(in_document(&rows, &views_of(&["a()"])).is_empty());
        assert_eq!(in_document(&rows, &views_of(&["b()"])).len(), 2);
    }

    #[test]
    fn every_name_of_the_header_has_a_row() {
        let rows =
            rows_of("| `struct a` `.b` | 4.14 | same |  |\n## Names of ours\n| `hmm_c_*` | d |\n");
        assert!(
            in_header(&rows, &views_of(&["struct a", "a.b", "a.reserved", "hmm_c_d()"])).is_empty()
        );
        assert_eq!(in_header(&rows, &views_of(&["a.e", "f()"])).len(), 2);
    }
}
