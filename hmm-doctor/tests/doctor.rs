//! `hmm doctor`, run as a program.

use hmm_core::EngineKind;
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output};

/// All keys of the object, in their order.
const KEYS: [&str; 15] = [
    "engine",
    "reason",
    "works",
    "forced",
    "schema",
    "version",
    "system",
    "userfaultfd",
    "proc_files",
    "limits",
    "signals",
    "environment",
    "engines",
    "limitations",
    "advice",
];

/// The program; beside the folder of the tests, so that a copy of both is used together.
fn hmm() -> Command {
    let test = std::env::current_exe().expect("the test has a path");
    let beside = test.parent().and_then(|folder| Some(folder.parent()?.join("hmm")));
    let built = PathBuf::from(env!("CARGO_BIN_EXE_hmm"));
    let mut command = Command::new(beside.filter(|path| path.exists()).unwrap_or(built));
    command.env_remove("HMM_ENGINE");
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The object, and the exit status.
fn doctor(variables: &[(&str, &str)]) -> (Value, i32) {
    let output = hmm().args(["doctor", "--json"]).envs(variables.iter().copied()).output();
    let output = output.expect("the program starts");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_str(&said(&output)).expect("the output is one object");
    (report, output.status.code().expect("the program ends by itself"))
}

fn engine<'a>(report: &'a Value, name: &str) -> &'a Value {
    let engines = report["engines"].as_array().expect("engines are a list");
    engines.iter().find(|one| one["name"] == name).expect("every engine is in the list")
}

#[test]
fn the_object_has_its_keys_and_agrees_with_the_status() {
    let output = hmm().args(["doctor", "--json"]).output().unwrap();
    let text = said(&output);
    let report: Value = serde_json::from_str(&text).unwrap();
    let object = report.as_object().unwrap();
    assert_eq!(object.len(), KEYS.len());
    let places: Vec<_> =
        KEYS.iter().map(|key| text.find(&format!("\n  \"{key}\":")).expect(key)).collect();
    assert!(places.is_sorted(), "the keys stand in their order");
    assert_eq!(output.status.code(), Some(if report["works"] == true { 0 } else { 1 }));
    for (section, key) in [
        ("system", "kernel"),
        ("userfaultfd", "features"),
        ("proc_files", "pagemap_scan"),
        ("limits", "max_map_count"),
        ("signals", "sigsegv"),
        ("environment", "preload"),
    ] {
        assert!(object[section].get(key).is_some(), "{section}.{key}");
    }
    let names: Vec<_> =
        report["engines"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, EngineKind::ALL.map(EngineKind::name));
}

#[test]
fn every_engine_that_can_be_opened_is_proven() {
    let (report, _) = doctor(&[]);
    for kind in EngineKind::ALL {
        let tried = engine(&report, kind.name());
        match kind.open() {
            Ok(_) => {
                assert_eq!(tried["works"], true, "{tried}");
                let proof = &tried["proof"];
                for measured in ["touch_us", "out_mib_per_s", "home_mib_per_s"] {
                    assert!(proof[measured].as_f64().unwrap() > 0.0, "{measured}: {tried}");
                }
                let capabilities = proof["capabilities"].as_array().unwrap();
                assert!(capabilities.contains(&"MISSING_FAULTS".into()), "{tried}");
            }
            Err(why) => {
                assert_eq!((&tried["opens"], &tried["proof"]), (&false.into(), &Value::Null));
                assert_eq!(tried["reason"], why.to_string());
            }
        }
    }
}

#[test]
fn the_best_engine_is_chosen_and_the_others_are_refused() {
    let (report, status) = doctor(&[]);
    let opens = |name: &&str| engine(&report, name)["opens"] == true;
    let best = EngineKind::ALL.map(EngineKind::name).into_iter().find(opens);
    assert_eq!(report["engine"].as_str(), best);
    assert_eq!((status == 0, report["forced"] == false), (best.is_some(), true));
    let refused = EngineKind::ALL.map(EngineKind::name).into_iter().take_while(|name| !opens(name));
    for name in refused {
        assert!(report["reason"].as_str().unwrap().contains(&format!("{name}: ")), "{report}");
    }
}

#[test]
fn an_engine_that_is_forced_is_reported_as_forced() {
    let (report, status) = doctor(&[("HMM_ENGINE", "signal")]);
    assert_eq!((&report["engine"], &report["forced"]), (&"signal".into(), &true.into()));
    assert_eq!(status, 0, "{report}");
    assert!(report["reason"].as_str().unwrap().contains("HMM_ENGINE says so"), "{report}");
    let limitations = report["limitations"].to_string();
    assert!(limitations.contains("EFAULT") && limitations.contains("munmap"), "{limitations}");
    let advises = report["advice"].to_string().contains("unset HMM_ENGINE");
    let better = ["uffd", "uffd-inline"].iter().any(|name| engine(&report, name)["works"] == true);
    assert_eq!(advises, better, "{report}");
}

#[test]
fn an_unknown_engine_fails_with_a_clear_text() {
    let output = hmm().arg("doctor").env("HMM_ENGINE", "abacus").output().unwrap();
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    // Lines are broken between words.
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("HMM_ENGINE=abacus: unknown engine; use auto, uffd"), "{text}");
    assert!(words.contains("unset HMM_ENGINE"), "{text}");
    let (report, _) = doctor(&[("HMM_ENGINE", "abacus")]);
    assert_eq!((&report["engine"], &report["forced"]), (&Value::Null, &true.into()));
}

#[test]
fn without_events_signal_is_chosen_and_the_reason_said() {
    if let Err(reason) = hmm_core::engine::uffd::features() {
        eprintln!("skipped: {reason}");
        return;
    }
    let (report, status) = doctor(&[("HMM_UFFD_DISABLE", "events")]);
    assert_eq!((&report["engine"], status), (&"signal".into(), 0), "{report}");
    let reason = report["reason"].as_str().unwrap();
    assert!(reason.contains("uffd: ") && reason.contains("HMM_UFFD_DISABLE"), "{reason}");
    assert!(engine(&report, "uffd")["reason"].as_str().unwrap().contains("EVENT_REMAP"));
    let masked = report["userfaultfd"]["features"].as_array().unwrap().iter();
    let masked: Vec<_> =
        masked.filter(|one| one["masked"] == true).map(|one| &one["name"]).collect();
    assert_eq!(masked, ["events", "remap", "remove", "unmap"]);
    assert_eq!(report["advice"][0]["line"], "unset HMM_UFFD_DISABLE");
}

#[test]
fn people_get_a_page_without_colours_in_a_file() {
    let output = hmm().arg("doctor").env("TERM", "xterm").output().unwrap();
    let text = said(&output);
    assert!(text.starts_with("engine ") && text.lines().count() < 60, "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    for kind in EngineKind::ALL {
        assert!(text.contains(&format!("\n  {} ", kind.name())), "{text}");
    }
}

#[test]
fn the_program_explains_itself() {
    let run = |words: &[&str]| {
        let output = hmm().args(words).output().unwrap();
        let text = said(&output) + &String::from_utf8_lossy(&output.stderr);
        (output.status.code().unwrap(), text, output.stdout.is_empty())
    };
    let (status, text, _) = run(&["--version"]);
    assert_eq!((status, text), (0, format!("libhmm {}\n", env!("CARGO_PKG_VERSION"))));
    let (status, text, _) = run(&["--help"]);
    assert!(status == 0 && text.contains("doctor [--json]"), "{text}");
    let (status, text, silent) = run(&["diagnose"]);
    assert!(status == 2 && text.contains("diagnose") && silent, "{text}");
}
