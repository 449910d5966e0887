//! Reads the tables of docs/KERNEL.md.

/// What a row says of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// As in the kernel, or nearly so: the header has it.
    Offered,
    /// The header has it not.
    Missing,
    /// Not the kernel's. A `*` at an end stands for any characters.
    Ours,
}

/// Which form of the header a section is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    GenerationA,
    GenerationB,
    Both,
}

/// One row of a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) line: usize,
    pub(super) part: Part,
    pub(super) status: Status,
    pub(super) names: Vec<String>,
}

/// The rows of the document. An error names a line that cannot be understood.
pub(super) fn rows(document: &str) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    let mut section = "";
    for (number, text) in (1..).zip(document.lines()) {
        if let Some(title) = text.strip_prefix("## ") {
            section = title;
        }
        let cells: Vec<&str> = text.trim_matches('|').split(" | ").map(str::trim).collect();
        // Before the first section stands a table of switches; heads of tables have no name in front.
        if section.is_empty() || !text.starts_with("| `") {
            continue;
        }
        let row = row(number, section, &cells).map_err(|what| format!("line {number}: {what}"))?;
        rows.push(row);
    }
    Ok(rows)
}

fn row(line: usize, section: &str, cells: &[&str]) -> Result<Row, String> {
    let names = names(cells[0])?;
    let part = match section {
        _ if section.starts_with("Generation A") => Part::GenerationA,
        _ if section.starts_with("Generation B") => Part::GenerationB,
        _ => Part::Both,
    };
    if section.starts_with("Names of ours") {
        return Ok(Row { line, part, status: Status::Ours, names });
    }
    let (Some(status), Some(how)) = (cells.get(2), cells.get(3)) else {
        return Err("a row has a name, kernels, what ours is, and how".into());
    };
    let status = match *status {
        "same" => Status::Offered,
        "differs" if !how.is_empty() => Status::Offered,
        "not offered" if !how.is_empty() => Status::Missing,
        "differs" | "not offered" => return Err("a difference needs its reason".into()),
        other => return Err(format!("{other:?} is neither same, differs nor not offered")),
    };
    Ok(Row { line, part, status, names })
}

/// The names in backticks; `.field` belongs to the struct of the name before.
fn names(cell: &str) -> Result<Vec<String>, String> {
    let mut found: Vec<String> = Vec::new();
    for name in cell.split('`').skip(1).step_by(2) {
        if let Some(field) = name.strip_prefix('.') {
            let before = found.last().ok_or("a field without a struct")?;
            let base = before.trim_start_matches("struct ");
            let base = base.split('.').next().unwrap_or(base).to_string();
            found.push(format!("{base}.{field}"));
        } else {
            found.push(name.to_string());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_by_section() {
        let text = "## Generation A\n| name | kernels | ours | how |\n| --- | --- | --- | --- |\n\
                    | `struct a` `.b` `.c` | 4.14 | same |  |\n## Names of ours\n| `d_*` | 5 |\n";
        let found = rows(text).unwrap_or_default();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].names, ["struct a", "a.b", "a.c"]);
        assert_eq!((found[0].part, found[0].status), (Part::GenerationA, Status::Offered));
        assert_eq!(found[1].status, Status::Ours);
    }

    #[test]
    fn a_difference_needs_a_reason() {
        assert!(rows("## Generation B\n| `a()` | 6.1 | differs |  |\n").is_err());
        assert!(rows("## Generation B\n| `a()` | 6.1 | nearly | so |\n").is_err());
    }
}
