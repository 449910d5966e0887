//! Threads of the CPU and of a device count in the same pages.

use crate::world::{Random, Worker, World};
use hmm_core::{Error, PAGE_SIZE};
use hmm_soft::Kernel;
use std::sync::atomic::Ordering;
use std::thread::Scope;

const WORDS: usize = PAGE_SIZE / 8;
/// Words of each page: one for the CPU's threads, one for the device.
const CPU: usize = 5;
const DEVICE: usize = 77;

pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, world: &'scope World) {
    scope.spawn(move || {
        let threads = [1, 2].map(|seed| scope.spawn(move || count(world, seed)));
        let kernels = scope.spawn(move || run_kernels(world));
        let counted: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
        let sum = |word: usize| -> u64 {
            let pages = 0..world.counted.pages();
            pages.map(|page| world.counted.word(page * WORDS + word).load(Ordering::Relaxed)).sum()
        };
        let added = kernels.join().unwrap();
        assert_eq!(sum(CPU), counted, "counts of the CPU");
        assert_eq!(sum(DEVICE), added, "counts of the device");
    });
}

fn count(world: &World, seed: u64) -> u64 {
    let (mut random, mut total) = (Random(seed), 0);
    while world.goes_on() {
        for _ in 0..1000 {
            let page = random.below(world.counted.pages());
            world.counted.word(page * WORDS + CPU).fetch_add(1, Ordering::Relaxed);
            total += 1;
        }
        world.step(Worker::Cpu);
    }
    total
}

fn run_kernels(world: &World) -> u64 {
    let mut total = 0;
    while world.goes_on() {
        let (count, stride) = (world.counted.pages() as u64, PAGE_SIZE as u64);
        let addr = world.counted.addr() + 8 * DEVICE as u64;
        let gate = world.migrating();
        match world.devices[0].run(Kernel::AddU64 { addr, count, stride, value: 1 }) {
            Ok(_) => total += count,
            Err(error) => panic!("a kernel that adds may not stop half-way: {error}"),
        }
        let addr = addr + (total / count % count) * stride;
        match world.devices[0].run(Kernel::AtomicAddU64 { addr, value: 1 }) {
            Ok(_) => total += 1,
            // The CPU took the page back for a whole second; nothing was added.
            Err(Error::Unsupported { .. }) => {}
            Err(error) => panic!("{error}"),
        }
        drop(gate);
        world.step(Worker::Kernels);
    }
    total
}
