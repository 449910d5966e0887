//! What does not work with the engine that a program gets here, and what to do instead.

use crate::report::Report;
use hmm_core::EngineKind;

/// What every engine has in common.
const ALWAYS: [&str; 2] = [
    "shared memory, hugetlb and file mappings, private ones too, do not migrate: they are mirrored where they are",
    "stacks of threads should not migrate: leave them out, or pin them",
];

/// One sentence for each; none without an engine.
pub(crate) fn of(report: &Report) -> Vec<String> {
    let Some(proof) = report.chosen().and_then(|engine| engine.proof.as_ref()) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let has = |name: &str| proof.capabilities.iter().any(|one| one == name);
    if !has("KERNEL_FAULTS") && proof.system_calls {
        found.push("system calls on pages that are away work because libhmm_preload.so is loaded");
    } else if !proof.system_calls {
        found.push(
            "system calls on pages that are away fail with EFAULT: call hmm_make_present before, put hmm_guard around \
             them, or run the program under libhmm_preload.so",
        );
    }
    if !has("EVENTS") && has("ORDERED") {
        found.push(
            "munmap, mremap and madvise are announced because libhmm_preload.so is loaded; mirrors hear of what libc \
             does by itself (free of large blocks) late, at the next touch or call of the library",
        );
    } else if !has("EVENTS") {
        found.push(
            "munmap, mremap and madvise are not reported: mirrors hear of them late, at the next touch or call of the \
             library, unless the program runs under libhmm_preload.so, which announces them",
        );
    }
    if !has("MOVE") {
        found.push("pages are copied where others are moved: migration is slower");
    }
    if report.engine.as_deref() == Some(EngineKind::Signal.name()) {
        found.push(
            "a touch of a page that is away raises SIGSEGV: a thread that blocks it dies, and gdb stops (handle \
             SIGSEGV nostop noprint)",
        );
    } else if report.engine.as_deref() == Some(EngineKind::UffdInline.name()) {
        found.push(
            "a touch of a page that is away raises SIGBUS: a thread that blocks it dies, and gdb stops (handle SIGBUS \
             nostop noprint)",
        );
    }
    found.extend(ALWAYS);
    found.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::{plain_report, proof};

    #[test]
    fn what_an_engine_can_is_no_limitation() {
        let mut report = plain_report();
        let all = ["MOVE", "KERNEL_FAULTS", "EVENTS"];
        (report.engine, report.engines[0].proof) = (Some("uffd".into()), Some(proof(&all)));
        assert_eq!(of(&report), ALWAYS);
        report.engine = None;
        assert_eq!(of(&report), Vec::<String>::new());
    }

    #[test]
    fn each_missing_capability_is_named() {
        let mut report = plain_report();
        let found = of(&report).join("\n");
        assert!(found.contains("EFAULT") && found.contains("SIGBUS") && !found.contains("munmap"));
        report.engine = Some("signal".into());
        let found = of(&report).join("\n");
        assert!(found.contains("munmap") && found.contains("SIGSEGV") && found.contains("copied"));
        report.engines[2].proof.as_mut().unwrap().system_calls = true;
        let found = of(&report).join("\n");
        assert!(found.contains("libhmm_preload.so is loaded") && !found.contains("EFAULT"));
    }
}
