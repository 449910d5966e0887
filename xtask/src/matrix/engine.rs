//! Asks which engine runs in some surroundings.

use crate::test::process;
use crate::test::rust_tests::Program;
use crate::test::surroundings::Surroundings;
use std::time::Duration;

/// Programs that say it in JSON, and how they are asked; the first that was built answers.
const PROBES: &[(&str, &[&str])] = &[("hmm", &["doctor", "--json"]), ("engine", &[])];
/// The answer takes no longer.
const LIMIT: Duration = Duration::from_secs(20);

/// The engine that runs somewhere.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    /// Its name; none when no engine works.
    pub(crate) name: Option<String>,
    /// Why this one, or why none.
    pub(crate) reason: String,
}

/// The engine of a program in these surroundings.
pub(crate) fn probe(programs: &[Program], surroundings: &Surroundings) -> Result<Engine, String> {
    let built = |name: &str| programs.iter().find(|one| one.name == name && !one.is_test);
    let mut probes = PROBES.iter().filter_map(|(name, words)| Some((built(name)?, words)));
    let (program, words) = probes.next().ok_or("no program was built that knows the engine")?;
    let mut command = program.command();
    command.args(*words);
    let outcome = process::run(&mut surroundings.around(&command), LIMIT)?;
    if field(&outcome.output, "engine").is_none() && field(&outcome.output, "reason").is_none() {
        let reason = format!("{} says: {}", program.name, outcome.said().trim());
        return Ok(Engine { name: None, reason });
    }
    let reason = field(&outcome.output, "reason").unwrap_or_default();
    Ok(Engine { name: field(&outcome.output, "engine"), reason })
}

/// The text of the first field with this name. `None` when it is no text.
fn field(json: &str, name: &str) -> Option<String> {
    let mark = format!("\"{name}\"");
    let rest = json[json.find(&mark)? + mark.len()..].trim_start().strip_prefix(':')?;
    let mut characters = rest.trim_start().strip_prefix('"')?.chars();
    let mut text = String::new();
    loop {
        match characters.next()? {
            '"' => return Some(text),
            '\\' => text.extend(characters.next()),
            other => text.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let json = r#"{"engine": "uffd", "reason":"all \"is\" well", "more": null}"#;
        assert_eq!(field(json, "engine").as_deref(), Some("uffd"));
        assert_eq!(field(json, "reason").as_deref(), Some("all \"is\" well"));
        assert_eq!(field(json, "more"), None);
        assert_eq!(field(json, "less"), None);
        assert_eq!(field("{\"engine\": \"cut", "engine"), None);
    }
}
