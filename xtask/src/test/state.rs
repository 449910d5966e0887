//! What the threads of a hanging program are doing, as the kernel tells it. Reads no memory of the program: that
//! could wait for the very page that the program waits for.

use std::fs;
use std::path::Path;

/// Where the number of the group stands among the fields behind the name in `stat`.
const GROUP: usize = 2;
/// Where that of the session stands.
const SESSION: usize = 3;

/// The state of all threads of a process group, one line each.
pub(crate) fn of_group(group: u32) -> String {
    of_all(GROUP, group)
}

/// The state of all threads of a session, one line each.
pub(crate) fn of_session(session: u32) -> String {
    of_all(SESSION, session)
}

fn of_all(field: usize, value: u32) -> String {
    let mut report =
        String::from("\nstate at the time limit (process/thread name state wchan syscall):\n");
    for process in numbers(Path::new("/proc")) {
        let folder = format!("/proc/{process}");
        if number_in(&folder, field) == Some(value) {
            for thread in numbers(Path::new(&format!("{folder}/task"))) {
                let line = of_thread(&format!("{folder}/task/{thread}"));
                report.push_str(&format!("  {process}/{thread} {line}\n"));
            }
        }
    }
    report
}

/// Name, state, kernel function and system call (with its arguments, stack and instruction pointer) of a thread.
fn of_thread(folder: &str) -> String {
    let read = |name: &str| match fs::read_to_string(format!("{folder}/{name}")) {
        Ok(text) if !text.trim().is_empty() => text.trim().to_string(),
        _ => String::from("?"),
    };
    let stat = read("stat");
    let state = after_name(&stat).and_then(|fields| fields.split(' ').next()).unwrap_or("?");
    format!("{} {state} {} [{}]", read("comm"), read("wchan"), read("syscall"))
}

/// A number from the `stat` of a process, counted from behind its name.
fn number_in(folder: &str, field: usize) -> Option<u32> {
    let stat = fs::read_to_string(format!("{folder}/stat")).ok()?;
    after_name(&stat)?.split(' ').nth(field)?.parse().ok()
}

/// The fields of a `stat` line behind the name, which may hold spaces and parentheses itself.
fn after_name(stat: &str) -> Option<&str> {
    stat.rsplit_once(") ").map(|(_, fields)| fields)
}

/// The entries of a folder that are numbers, in order.
fn numbers(folder: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_spaces_are_passed_over() {
        assert_eq!(after_name("12 (a) b) S 1 7 7"), Some("S 1 7 7"));
    }

    #[test]
    fn this_process_has_a_group_a_session_and_a_running_thread() {
        let group = number_in("/proc/self", GROUP).expect("every process has a group");
        let session = number_in("/proc/self", SESSION).expect("every process has a session");
        assert!(of_group(group).contains(" R "));
        assert!(of_session(session).contains(" R "));
    }
}
