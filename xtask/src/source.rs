//! Reads Rust sources as tokens: enough to see which paths and keywords the code names, without its comments,
//! strings and tests.

/// One token of code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    /// Its text; `::` is one token, other punctuation one character each, a literal `""`.
    pub(crate) text: String,
    /// Line number, from 1.
    pub(crate) line: usize,
}

/// A path that the code names, as its segments (`["crate", "mm", "Mm"]`).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NamedPath {
    /// The segments.
    pub(crate) segments: Vec<String>,
    /// Line number of the first segment.
    pub(crate) line: usize,
}

/// The tokens of a source file.
pub(crate) fn tokens(text: &str) -> Vec<Token> {
    let mut scanner = Scanner { rest: text, line: 1, found: Vec::new() };
    while scanner.step() {}
    scanner.found
}

/// The tokens without the items that are compiled for tests only.
pub(crate) fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::with_capacity(tokens.len());
    let mut at = 0;
    while at < tokens.len() {
        let marked = MARK.iter().enumerate().all(|(i, mark)| is(&tokens, at + i, mark));
        if marked {
            at = end_of_item(&tokens, at + MARK.len());
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// All paths that begin with one of these segments, with `use` trees taken apart.
pub(crate) fn paths(tokens: &[Token], roots: &[&str]) -> Vec<NamedPath> {
    let mut found = Vec::new();
    for at in 0..tokens.len() {
        let begins = roots.contains(&tokens[at].text.as_str());
        let continues = at > 0 && is(tokens, at - 1, "::");
        if begins && !continues && is(tokens, at + 1, "::") {
            let mut prefix = Vec::new();
            tree(tokens, at, &mut prefix, &mut found);
        }
    }
    found
}

fn is(tokens: &[Token], at: usize, text: &str) -> bool {
    tokens.get(at).is_some_and(|token| token.text == text)
}

/// The index after the item that begins here: after its block, or its semicolon.
fn end_of_item(tokens: &[Token], start: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(start) {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && token.text == "}" {
                    return at + 1;
                }
            }
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
    }
    tokens.len()
}

/// Reads one tree of a path from `at` on and returns the index after it.
fn tree(
    tokens: &[Token],
    mut at: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<NamedPath>,
) -> usize {
    let depth = prefix.len();
    let line = tokens.get(at).map_or(0, |token| token.line);
    loop {
        if is(tokens, at, "{") {
            at = branches(tokens, at + 1, prefix, found);
            prefix.truncate(depth);
            return at;
        }
        match tokens.get(at) {
            Some(token) if is_word(&token.text) || token.text == "*" => {
                prefix.push(token.text.clone());
                at += 1;
            }
            _ => break,
        }
        if !is(tokens, at, "::") {
            break;
        }
        at += 1;
    }
    found.push(NamedPath { segments: prefix.clone(), line });
    prefix.truncate(depth);
    at
}

/// Reads the branches of a `{…}` and returns the index after its end.
fn branches(
    tokens: &[Token],
    mut at: usize,
    prefix: &mut Vec<String>,
    found: &mut Vec<NamedPath>,
) -> usize {
    while at < tokens.len() && !is(tokens, at, "}") {
        if is(tokens, at, ",") {
            at += 1;
            continue;
        }
        at = tree(tokens, at, prefix, found);
        while at < tokens.len() && !is(tokens, at, ",") && !is(tokens, at, "}") {
            at += 1; // `as name`
        }
    }
    at + 1
}

fn is_word(text: &str) -> bool {
    text.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

struct Scanner<'a> {
    rest: &'a str,
    line: usize,
    found: Vec<Token>,
}

impl Scanner<'_> {
    /// Reads one token, comment or space. False at the end.
    fn step(&mut self) -> bool {
        let Some(first) = self.rest.chars().next() else { return false };
        if self.rest.starts_with("//") {
            self.skip(self.rest.find('\n').unwrap_or(self.rest.len()));
        } else if self.rest.starts_with("/*") {
            self.skip(block_comment(self.rest));
        } else if let Some(length) = string(self.rest) {
            self.take(length, Some("\"\""));
        } else if first == '\'' {
            self.quote();
        } else if first.is_alphanumeric() || first == '_' {
            let end = self.rest.find(|c: char| !c.is_alphanumeric() && c != '_');
            self.take(end.unwrap_or(self.rest.len()), None);
        } else if self.rest.starts_with("::") {
            self.take(2, None);
        } else if first.is_whitespace() {
            self.skip(first.len_utf8());
        } else {
            self.take(first.len_utf8(), None);
        }
        true
    }

    /// A character literal, or the mark of a lifetime.
    fn quote(&mut self) {
        let inside = &self.rest[1..];
        let mut characters = inside.char_indices();
        let first = characters.next().map_or('\'', |(_, c)| c);
        let second = characters.next();
        if first == '\\' {
            let after = second.map_or(inside.len(), |(at, c)| at + c.len_utf8());
            let end = inside[after..].find('\'').map_or(inside.len(), |at| after + at + 1);
            self.take(1 + end, Some("\"\""));
        } else if let Some((at, '\'')) = second {
            self.take(1 + at + 1, Some("\"\""));
        } else {
            self.skip(1);
        }
    }

    fn skip(&mut self, length: usize) {
        let (gone, rest) = self.rest.split_at(length);
        self.line += gone.matches('\n').count();
        self.rest = rest;
    }

    fn take(&mut self, length: usize, instead: Option<&str>) {
        let text = instead.unwrap_or(&self.rest[..length]).to_string();
        self.found.push(Token { text, line: self.line });
        self.skip(length);
    }
}

/// Length of a block comment, which may hold others.
fn block_comment(text: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Length of a string literal of any kind, if one begins here.
fn string(text: &str) -> Option<usize> {
    let prefix = ["br", "cr", "b", "c", "r", ""].into_iter().find(|prefix| {
        text.strip_prefix(*prefix).is_some_and(|rest| rest.starts_with(['"', '#']))
    })?;
    let rest = &text[prefix.len()..];
    let hashes = rest.len() - rest.trim_start_matches('#').len();
    let raw = prefix.ends_with('r');
    if !rest[hashes..].starts_with('"') || (hashes > 0 && !raw) {
        return None;
    }
    let body = prefix.len() + hashes + 1;
    if raw {
        let close = format!("\"{}", "#".repeat(hashes));
        return Some(text[body..].find(&close).map_or(text.len(), |at| body + at + close.len()));
    }
    let mut escaped = false;
    for (at, c) in text[body..].char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return Some(body + at + 1),
            _ => {}
        }
    }
    Some(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        tokens(text).into_iter().map(|token| token.text).collect()
    }

    fn named(text: &str) -> Vec<String> {
        let found = paths(&without_tests(tokens(text)), &["crate", "super"]);
        found.into_iter().map(|path| path.segments.join("::")).collect()
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        let text =
            "a /* unsafe /* b */ */ // unsafe\n\"unsafe \\\" x\" r#\"unsafe\" \"# b'u' '\\'' c";
        assert_eq!(words(text), ["a", "\"\"", "\"\"", "b", "\"\"", "\"\"", "c"]);
    }

    #[test]
    fn lifetimes_are_not_characters() {
        assert_eq!(words("<'a> 'x' &'static"), ["<", "a", ">", "\"\"", "&", "static"]);
    }

    #[test]
    fn lines_are_counted_through_literals() {
        assert_eq!(tokens("\"a\nb\" /*\n*/ c").last().map(|token| token.line), Some(3));
    }

    #[test]
    fn use_trees_are_taken_apart() {
        let text = "use crate::{a::X, b::{self, Y as Z, c::*}}; let x = super::d::f::<T>();";
        let expected =
            ["crate::a::X", "crate::b::self", "crate::b::Y", "crate::b::c::*", "super::d::f"];
        assert_eq!(named(text), expected);
    }

    #[test]
    fn visibility_is_no_path() {
        assert_eq!(named("pub(crate) fn f() {} pub(super) struct S;"), Vec::<String>::new());
    }

    #[test]
    fn items_for_tests_are_left_out() {
        let text = "#[cfg(test)] mod tests { use crate::a::X; fn f() { g({}); } } use crate::b::Y; \
                    #[cfg(test)] use crate::c::Z; #[cfg(test)] #[path = \"x\"] mod t; crate::d::e();";
        assert_eq!(named(text), ["crate::b::Y", "crate::d::e"]);
    }
}
