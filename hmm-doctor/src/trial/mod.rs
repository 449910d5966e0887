//! The child's side: opens an engine, uses it as a program would, and tells what it saw.

mod bench;
mod memory;

use crate::message::{Chosen, Message, Proof};
use bench::Bench;
use hmm_core::engine::Engine;
use hmm_core::engine::signal::SignalEngine;
use hmm_core::{AddrRange, Capabilities, EngineKind, Mm, VirtAddr, open_engine};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::io::Write;
use std::sync::Arc;

/// The name that stands for the engine that a program gets.
pub(crate) const AUTO: &str = "auto";

/// Tries an engine, or makes the choice among them, and prints what there is to say. False for a name that is none.
pub(crate) fn run(name: &str) -> bool {
    // Whoever started this process has a time limit; when it is gone, nobody would end a process that hangs.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let last = if name == AUTO {
        step("looking at /proc/self");
        // Why it does not work is said when the engine is tried.
        say(&Message::Ways(ways().unwrap_or_default()));
        Message::Chosen(choose())
    } else if let Some(kind) = EngineKind::ALL.into_iter().find(|kind| kind.name() == name) {
        prove(kind)
    } else {
        return false;
    };
    say(&last);
    true
}

fn say(message: &Message) {
    if let Ok(mut line) = serde_json::to_string(message) {
        line.push('\n');
        // Nobody reads any more: there is nobody to tell.
        let _ = std::io::stdout().write_all(line.as_bytes());
    }
}

fn step(what: &str) {
    say(&Message::Step(what.into()));
}

/// What the library finds in `/proc/self`. The signal engine knows once it has looked at a page; none is taken away.
fn ways() -> hmm_core::Result<Vec<String>> {
    let engine = SignalEngine::open()?;
    let here = AddrRange::covering(VirtAddr::from_ptr(&raw const engine).get(), 1)?;
    engine.mapping_at(here.start())?;
    engine.scan(here, &mut |_, _| {})?;
    Ok(engine.ways().iter().map(|way| (*way).to_owned()).collect())
}

/// As a program chooses; opened to the end, since an engine may refuse only when it is started.
fn choose() -> Chosen {
    step("choosing an engine");
    let none = |forced, reason| Chosen { engine: None, forced, reason };
    let (engine, choice) = match open_engine() {
        Ok(opened) => opened,
        Err(error) => {
            let wish = std::env::var("HMM_ENGINE").unwrap_or_default();
            return none(!matches!(wish.as_str(), "" | "auto"), error.to_string());
        }
    };
    drop(engine);
    let name = choice.engine.name();
    match Mm::current().and_then(|mm| mm.close()) {
        Ok(()) => {
            let (engine, forced) = (Some(name.to_owned()), choice.forced);
            Chosen { engine, forced, reason: choice.to_string() }
        }
        Err(error) => {
            let others =
                choice.refused.iter().map(|(kind, why)| format!("; {}: {why}", kind.name()));
            let others: String = others.collect();
            none(choice.forced, format!("{name} opens but does not start: {error}{others}"))
        }
    }
}

fn prove(kind: EngineKind) -> Message {
    step("opening the engine");
    // Only for the engine's own words: it is opened again as a program does it, with all that belongs to that.
    let opened = kind.open().map(drop);
    step("starting the engine");
    let mm = match opened.and_then(|()| Mm::current()) {
        Ok(mm) => mm,
        Err(error) => return Message::Refused(error.to_string()),
    };
    if mm.engine_name() != kind.name() {
        return Message::Failed(format!("HMM_ENGINE leads to the engine {}", mm.engine_name()));
    }
    exercise(&mm).map_or_else(Message::Failed, Message::Proven)
}

/// Everything that is tried, in order. What an engine claims must hold; what it does not claim may.
fn exercise(mm: &Arc<Mm>) -> Result<Proof, String> {
    let claims = mm.capabilities();
    step("making a device");
    let mut bench = Bench::new(mm)?;
    step("migrating pages to the device");
    bench.send()?;
    step("touching pages that are away");
    let touch_us = bench.touch()?;
    step("writing to a page that is away");
    bench.store()?;
    step("letting the device change a page");
    bench.device_store()?;
    step("making a system call on a page that is away");
    let system_calls = bench.system_call()?;
    require(claims, Capabilities::KERNEL_FAULTS, system_calls, "a system call fails with EFAULT")?;
    step("moving 8 MiB out and home");
    let (out_mib_per_s, home_mib_per_s) = bench.transfer()?;
    step("comparing all pages");
    bench.check()?;
    step("unmapping pages that are away");
    let layout_changes = bench.unmap()?;
    require(claims, Capabilities::EVENTS, layout_changes, "a mirror is not told of munmap")?;
    step("closing the device and the address space");
    bench.close()?;
    let capabilities = claims.iter_names().map(|(name, _)| name.to_owned()).collect();
    Ok(Proof {
        capabilities,
        system_calls,
        layout_changes,
        touch_us,
        out_mib_per_s,
        home_mib_per_s,
    })
}

fn require(
    claims: Capabilities,
    claim: Capabilities,
    is_true: bool,
    seen: &str,
) -> Result<(), String> {
    if is_true || !claims.contains(claim) {
        return Ok(());
    }
    Err(format!("the engine says {claim:?}, but {seen}"))
}
