//! The code that README.md shows is code that runs: each block stands, word for word, in one of the examples, and
//! the examples are tests.

use std::path::{Path, PathBuf};

/// The blocks of code in one language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    let parts = text.split(&fence).skip(1);
    parts.filter_map(|part| part.split_once("```")).map(|(block, _)| block.to_string()).collect()
}

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(folder).expect("the folder of examples is there");
    let paths = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
    paths.map(|path| (path.clone(), std::fs::read_to_string(path).expect("text"))).collect()
}

#[test]
fn every_block_of_code_is_an_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let readme = std::fs::read_to_string(root.join("README.md")).expect("README.md is there");
    for language in ["c", "rust", "python"] {
        let examples = sources(&root.join("examples").join(language));
        let shown = blocks(&readme, language);
        assert!(!shown.is_empty(), "README.md shows {language}");
        for block in shown {
            let found = examples.iter().any(|(_, text)| text.contains(block.trim()));
            assert!(
                found,
                "no file in examples/{language} holds this block of README.md:\n{block}"
            );
        }
    }
}
