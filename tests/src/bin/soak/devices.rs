//! Pages go to devices and come home; a third device comes and goes; ranges are pinned, guarded and looked at.

use crate::world::{Random, Worker, World};
use hmm_core::{AddrRange, PfnEntry, RangeRequest, Residency};
use hmm_soft::{SoftConfig, SoftDevice};
use std::thread::Scope;
use std::time::Duration;

pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, world: &'scope World) {
    for seed in [11, 12] {
        scope.spawn(move || migrate(world, &mut Random(seed)));
    }
    scope.spawn(move || come_and_go(world));
}

/// A random part of a range.
fn part(range: AddrRange, random: &mut Random) -> AddrRange {
    let first = random.below(range.pages());
    range.sub(first, 1 + random.below((range.pages() - first).min(64)))
}

fn migrate(world: &World, random: &mut Random) {
    while world.goes_on() {
        let ranges = world.ranges();
        let range = part(ranges[random.below(ranges.len())], random);
        let gate = world.migrating();
        // Slots change all the while: a range may lie in two mappings, or in none.
        let _ = match random.below(8) {
            0..=4 => world.devices[random.below(2)].migrate(range).map(drop),
            5 | 6 => world.devices[random.below(2)].bring_home(range).map(drop),
            _ => look(world, range, random),
        };
        drop(gate);
        world.step(Worker::Migrations);
    }
}

fn look(world: &World, range: AddrRange, random: &mut Random) -> hmm_core::Result<()> {
    match random.below(3) {
        0 => {
            let mut pfns = vec![PfnEntry::default(); range.pages()];
            let tracker = world.mm.track(range)?;
            tracker.begin()?;
            world.mm.snapshot(&RangeRequest { range, owner: None }, &mut pfns)
        }
        1 => {
            world.mm.pin_range(range)?;
            std::thread::sleep(Duration::from_micros(200));
            world.mm.unpin_range(range)
        }
        _ => world.mm.residency(range, &mut vec![Residency::None; range.pages()]),
    }
}

fn come_and_go(world: &World) {
    let mut random = Random(31);
    while world.goes_on() {
        let config = SoftConfig { memory: 64 * 4096, ..SoftConfig::default() };
        // Under injected failures there may be no memory for it now.
        if let Ok(device) = SoftDevice::new(&world.mm, config) {
            let gate = world.migrating();
            for _ in 0..4 {
                let _ = device.migrate(part(world.constant.range(), &mut random));
            }
            drop(gate);
            device.close().unwrap();
        }
        world.step(Worker::Devices);
        std::thread::sleep(Duration::from_millis(20));
    }
}
