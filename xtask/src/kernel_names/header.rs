//! The names that a header offers, as the compiler sees them: what a switch hides is not there, and what it renames has
//! the shape of what it stands for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// `name()` for functions and macros with arguments, `struct name`, `enum name`, `struct.field`, and `name` for the rest.
pub(super) type Names = BTreeSet<String>;

/// The names of a header, with one macro defined before it.
pub(super) fn names(root: &Path, header: &str, switch: Option<&str>) -> Result<Names, String> {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(&compiler);
    command.current_dir(root).args(["-E", "-dD", "-std=gnu11", "-Iinclude", "-x", "c"]);
    command.args(switch.map(|name| format!("-D{name}"))).arg(header);
    let output =
        command.output().map_err(|error| format!("{}: {error}", compiler.to_string_lossy()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(names_of(&String::from_utf8_lossy(&output.stdout)))
}

/// The names in what the preprocessor wrote, without those of system headers.
fn names_of(preprocessed: &str) -> Names {
    let mut found = Found::default();
    let (mut code, mut is_ours) = (String::new(), false);
    for line in preprocessed.lines() {
        if let Some(marker) = line.strip_prefix("# ") {
            // The flag 3 is for system headers; names in angle brackets are no files.
            let flags = marker.rsplit('"').next().unwrap_or_default();
            is_ours = !flags.split(' ').any(|flag| flag == "3") && !marker.contains("\"<");
        } else if !is_ours {
        } else if let Some(definition) = line.strip_prefix("#define ") {
            found.define(definition);
        } else if let Some(name) = line.strip_prefix("#undef ") {
            found.undefine(name);
        } else if !line.starts_with('#') {
            code.push_str(line);
            code.push('\n');
        }
    }
    found.declare(&tokens(&code));
    found.resolve()
}

#[derive(Default)]
struct Found {
    names: Names,
    /// Macros that stand for another name.
    aliases: BTreeMap<String, String>,
}

impl Found {
    fn define(&mut self, definition: &str) {
        let end = definition.find(|one| !is_word(one)).unwrap_or(definition.len());
        let (name, value) = definition.split_at(end);
        if value.starts_with('(') {
            self.names.insert(format!("{name}()"));
            return;
        }
        self.names.insert(name.to_string());
        let value = value.trim();
        if !value.is_empty() && value.chars().all(is_word) {
            self.aliases.insert(name.to_string(), value.to_string());
        }
    }

    fn undefine(&mut self, name: &str) {
        self.names.remove(name);
        self.names.remove(&format!("{name}()"));
        self.aliases.remove(name);
    }

    /// Finds what the code declares outside of functions.
    fn declare(&mut self, tokens: &[&str]) {
        let (mut at, mut is_typedef) = (0, false);
        while at < tokens.len() {
            let (one, next) = (tokens[at], tokens.get(at + 1).copied().unwrap_or_default());
            match one {
                "typedef" => is_typedef = true,
                ";" if is_typedef => {
                    self.names.insert(tokens[at - 1].to_string());
                    is_typedef = false;
                }
                "struct" | "enum" if next != "{" => {
                    self.names.insert(format!("{one} {next}"));
                    if tokens.get(at + 2) == Some(&"{") {
                        let end = behind(tokens, at + 2);
                        self.members(one, next, &tokens[at + 3..end - 1]);
                        at = end;
                        continue;
                    }
                    at += 1;
                }
                "{" | "(" => {
                    at = behind(tokens, at);
                    continue;
                }
                _ if next == "(" && is_name(one) && !is_typedef => {
                    self.names.insert(format!("{one}()"));
                }
                _ => {}
            }
            at += 1;
        }
    }

    fn members(&mut self, kind: &str, name: &str, body: &[&str]) {
        if kind == "enum" {
            let starts = |at: &usize| *at == 0 || body[*at - 1] == ",";
            let values = (0..body.len()).filter(starts).filter(|at| is_name(body[*at]));
            self.names.extend(values.map(|at| body[at].to_string()));
            return;
        }
        self.names.extend(fields(body).into_iter().map(|field| format!("{name}.{field}")));
    }

    /// What a macro renames has the shape of what the new name stands for.
    fn resolve(mut self) -> Names {
        for (name, target) in &self.aliases {
            for kind in ["struct ", "enum "] {
                if self.names.contains(&format!("{kind}{target}")) {
                    let hidden = format!("{name}.");
                    let shown = format!("{target}.");
                    self.names.retain(|one| !one.starts_with(&hidden));
                    let fields: Vec<String> = self
                        .names
                        .iter()
                        .filter_map(|one| one.strip_prefix(&shown))
                        .map(|field| format!("{hidden}{field}"))
                        .collect();
                    self.names.extend(fields);
                    self.names.insert(format!("{kind}{name}"));
                    self.names.remove(name);
                }
            }
            if self.names.contains(&format!("{target}()")) {
                self.names.insert(format!("{name}()"));
                self.names.remove(name);
            }
        }
        self.names
    }
}

/// The names of the fields that the body of a struct declares.
fn fields(body: &[&str]) -> Vec<String> {
    let (mut found, mut part, mut at) = (Vec::new(), Vec::new(), 0);
    while at < body.len() {
        match body[at] {
            "{" => {
                at = behind(body, at);
                continue;
            }
            "(" if body.get(at + 1) == Some(&"*") => {
                // A pointer to a function: `(*name)(…)`.
                found.extend(body.get(at + 2).map(ToString::to_string));
                at = behind(body, behind(body, at));
                part.clear();
                continue;
            }
            "[" => {
                at = behind(body, at);
                continue;
            }
            "," | ";" => {
                found.extend(part.pop().map(str::to_string));
                part.clear();
            }
            word => part.push(word),
        }
        at += 1;
    }
    found
}

/// The index behind the bracket that closes the one here.
fn behind(tokens: &[&str], start: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(start) {
        match *token {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// Words and single other characters; literals do not matter here.
fn tokens(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match is_word(first) {
            true => rest.find(|one| !is_word(one)).unwrap_or(rest.len()),
            false => first.len_utf8(),
        };
        found.push(&rest[..end]);
        rest = rest[end..].trim_start();
    }
    found
}

fn is_word(one: char) -> bool {
    one.is_ascii_alphanumeric() || one == '_'
}

fn is_name(token: &str) -> bool {
    token.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && !["__attribute__", "_Alignas", "sizeof"].contains(&token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: &str) -> Vec<String> {
        names_of(&format!(
            "# 1 \"hmm.h\"\n{code}\n# 1 \"/usr/include/stdint.h\" 1 3 4\nint skipped;\n"
        ))
        .into_iter()
        .collect()
    }

    #[test]
    fn declarations_have_their_names() {
        assert_eq!(
            of("int a(struct b *c);\nstatic inline int d(void)\n{ return e(1); }"),
            ["a()", "d()"]
        );
        assert_eq!(of("typedef unsigned long f;\nstruct g;"), ["f", "struct g"]);
        assert_eq!(of("enum h { I = 1, J };"), ["I", "J", "enum h"]);
        assert_eq!(of("#define K 1\n#define L(m) m\n#define N 1\n#undef N"), ["K", "L()"]);
    }

    #[test]
    fn fields_are_found_in_all_forms() {
        let code = "struct a { unsigned long *b, c[4]; int (*d)(struct e *f, int g); struct { int h; } i; };";
        assert_eq!(of(code), ["a.b", "a.c", "a.d", "a.i", "struct a"]);
    }

    #[test]
    fn a_renamed_struct_has_the_fields_of_the_other() {
        let code =
            "struct a { int b; };\nstruct c { int d; };\nint e(void);\n#define a c\n#define f e";
        assert_eq!(of(code), ["a.d", "c.d", "e()", "f()", "struct a", "struct c"]);
    }
}
