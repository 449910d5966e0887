//! `make soak MINUTES=n`: everything that a program does to its memory, by several threads at once, while devices take
//! pages and give them back. Every word is known, and compared.
//!
//! `soak --seconds N` runs for so long on the engine that `HMM_ENGINE` names; `HMM_INJECT` lets calls fail meanwhile. Prints
//! its counters now and then, and at the end; the exit status is 0 when all was right.
#![allow(clippy::unwrap_used, reason = "a soak that cannot go on may stop")]
#![allow(clippy::print_stdout, reason = "it reports to people")]

mod calls;
mod counting;
mod devices;
mod forking;
mod slots;
mod world;

use std::process::ExitCode;
use std::time::{Duration, Instant};
use world::World;

/// So often it tells how far it is.
const REPORT: Duration = Duration::from_secs(30);
/// A worker that gets no further for so long is stuck.
const STUCK: Duration = Duration::from_secs(60);

fn seconds() -> Option<u64> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--seconds", number] => number.parse().ok(),
        [] => Some(10),
        _ => None,
    }
}

fn main() -> ExitCode {
    let Some(seconds) = seconds() else {
        eprintln!("usage: soak [--seconds N]");
        return ExitCode::from(2);
    };
    let world = match World::open() {
        Ok(world) => world,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    println!("engine {}, {seconds} seconds", world.mm.engine_name());
    std::thread::scope(|scope| {
        counting::start(scope, &world);
        slots::start(scope, &world);
        devices::start(scope, &world);
        forking::start(scope, &world);
        calls::start(scope, &world);
        watch(&world, Duration::from_secs(seconds));
        world.finish();
    });
    world.check();
    println!("{}", world.report());
    println!("all right");
    ExitCode::SUCCESS
}

/// Waits, reports, and ends the process with its state when a worker hangs.
fn watch(world: &World, time: Duration) {
    let start = Instant::now();
    let (mut reported, mut steps, mut since) = (start, world.steps(), start);
    while start.elapsed() < time {
        std::thread::sleep(Duration::from_millis(200));
        let now = world.steps();
        if now.iter().zip(&steps).all(|(now, before)| now > before) {
            (steps, since) = (now, Instant::now());
        }
        if since.elapsed() > STUCK {
            println!("stuck: {}", world.report());
            std::process::abort();
        }
        if reported.elapsed() > REPORT {
            println!("{:>6} s: {}", start.elapsed().as_secs(), world.report());
            reported = Instant::now();
        }
    }
}
