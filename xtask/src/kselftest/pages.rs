//! Huge pages for the tests that map some: reserved before them, given back afterwards.

use super::keeper::Keeper;

/// How many huge pages of the default size the kernel keeps ready.
const NUMBER: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that are reserved as long as this lives.
#[derive(Debug)]
pub(super) struct HugePages {
    keeper: Keeper,
    /// Why there are none.
    missing: Option<String>,
}

impl HugePages {
    /// Adds to what the machine has, so that others who do the same lose nothing. A machine that refuses them is no
    /// error: [`Self::missing`] says so.
    pub(super) fn reserve(count: u64) -> Result<Self, String> {
        let (now, at_end) = scripts(NUMBER, count);
        let (keeper, said) = Keeper::start(&now, &at_end)?;
        let got: u64 = said.parse().unwrap_or(0);
        let missing = (got < count)
            .then(|| format!("{got} huge pages instead of {count} could be added to {NUMBER}"));
        if got >= count {
            println!("# {got} huge pages are reserved");
        }
        Ok(Self { keeper, missing })
    }

    /// Why the machine has too few; none if it has enough.
    pub(super) fn missing(&self) -> Option<&str> {
        self.missing.as_deref()
    }

    /// Gives them back and waits until that is done.
    pub(super) fn give_back(self) -> Result<(), String> {
        drop(self.keeper);
        let left = std::fs::read_to_string(NUMBER).unwrap_or_default();
        println!("# huge pages are given back: {NUMBER} is {}", left.trim());
        Ok(())
    }
}

/// What adds to the number in a file and prints how many came; and what takes as many away.
fn scripts(file: &str, count: u64) -> (String, String) {
    let now = format!(
        "before=$(cat {file}); echo $((before + {count})) >{file}; got=$(($(cat {file}) - before))\n\
         [ \"$got\" -ge 0 ] || got=0\n\
         answer=$got"
    );
    let at_end = format!("[ \"$got\" -eq 0 ] || echo $(($(cat {file}) - got)) >{file}");
    (now, at_end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn as_many_are_taken_away_as_came() {
        let file = std::env::temp_dir().join(format!("huge-{}", std::process::id()));
        let name = file.to_str().expect("text");
        fs::write(&file, "3\n").expect("a file");
        let (now, at_end) = scripts(name, 4);
        let (keeper, said) = Keeper::start(&now, &at_end).expect("there is a shell");
        assert_eq!(said, "4");
        assert_eq!(fs::read_to_string(&file).expect("a file"), "7\n");
        fs::write(&file, "9\n").expect("a file");
        drop(keeper);
        assert_eq!(fs::read_to_string(&file).expect("a file"), "5\n");
        fs::remove_file(&file).expect("a file");
    }

    #[test]
    fn a_number_that_cannot_be_changed_gives_none() {
        let (now, at_end) = scripts("/proc/no/such", 4);
        let (_keeper, said) = Keeper::start(&now, &at_end).expect("there is a shell");
        assert!(said.parse::<u64>().unwrap_or(0) == 0, "{said}");
    }
}
