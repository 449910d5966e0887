//! Everything at once on one region: CPU threads count, device threads count, system calls read and write, and pages
//! migrate both ways all the while. Every counter must end right.
//!
//! The short form runs in `make test`; `HMM_STRESS=long` asks for five million page migrations. What answers touches in
//! signal handlers is tried as well, in children of their own, with a million.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Variables, is_child, on_each};
use hmm_core::{AddrRange, Counters, Error, Mm, PAGE_SIZE};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use hmm_tests::{Capabilities, Region, hold, mm_or_skip};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const PAGES: usize = 2048;
const WORDS: usize = PAGE_SIZE / 8;
/// Words of each page, one for each kind of counter.
const SHARED: usize = 0;
const CPU: [usize; 2] = [8, 16];
const DEVICE: usize = 24;
const DEVICE_ATOMIC: usize = 32;
const SYSTEM_CALL: usize = 40;

struct Plan {
    migrations: u64,
    limit: Duration,
}

impl Plan {
    fn from_environment() -> Self {
        let is_long = std::env::var("HMM_STRESS").as_deref() == Ok("long");
        let (migrations, seconds) = match (is_long, is_child()) {
            (true, false) => (5_000_000, 900),
            (true, true) => (1_000_000, 900),
            (false, false) => (60_000, 60),
            (false, true) => (30_000, 60),
        };
        let patience = hmm_tests::patience();
        Self {
            migrations: migrations / u64::from(patience),
            limit: Duration::from_secs(seconds) * patience,
        }
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % limit
    }
}

fn word(region: &Region, page: usize, word: usize) -> &AtomicU64 {
    region.word(page * WORDS + word)
}

fn moved(counters: &Counters) -> u64 {
    counters.migrated_to_device + counters.migrated_to_system
}

/// Counts in a word of its own by plain loads and stores, and in one that others share by atomic adds.
fn count_on_cpu(region: &Region, own: usize, stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        for page in 0..PAGES {
            let mine = word(region, page, own);
            mine.store(mine.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            word(region, page, SHARED).fetch_add(1, Ordering::Relaxed);
        }
        rounds += 1;
    }
    rounds
}

fn count_on_device(device: &SoftDevice, region: &Region, stop: &AtomicBool) -> (u64, u64) {
    let (mut rounds, mut atomics, mut refused) = (0, 0, 0);
    let mut random = Random(7);
    while !stop.load(Ordering::Relaxed) {
        let addr = region.addr() + 8 * DEVICE as u64;
        let (count, stride) = (PAGES as u64, PAGE_SIZE as u64);
        device.run(Kernel::AddU64 { addr, count, stride, value: 1 }).unwrap();
        rounds += 1;
        for _ in 0..32 {
            let page = random.below(PAGES);
            let addr = region.page_addr(page) + 8 * DEVICE_ATOMIC as u64;
            // On a busy machine the CPU may take the page back for a whole second; nothing was added then.
            match device.run(Kernel::AtomicAddU64 { addr, value: 1 }) {
                Ok(_) => atomics += 1,
                Err(Error::Unsupported { .. }) => refused += 1,
                Err(other) => panic!("{other}"),
            }
            assert!(refused < 8 + atomics, "{refused} of {atomics} atomics were refused");
        }
    }
    (rounds, atomics)
}

fn temporary_file() -> OwnedFd {
    // SAFETY: the name is a terminated string; the result is checked, and owned by nobody else.
    unsafe {
        let fd = libc::memfd_create(c"stress".as_ptr(), 0);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    }
}

/// One counter travels from page to page through a file: `pwrite` from a page, `pread` into the next.
fn count_by_system_calls(mm: &Arc<Mm>, region: &Region, stop: &AtomicBool) -> u64 {
    let file = temporary_file();
    let mut page = 0;
    let mut steps = 0;
    while !stop.load(Ordering::Relaxed) {
        let from = word(region, page, SYSTEM_CALL);
        from.store(from.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        page = (page + 7) % PAGES;
        let to = word(region, page, SYSTEM_CALL);
        let held = |word: &AtomicU64, write| {
            let addr = word.as_ptr().expose_provenance() as u64;
            let word = AddrRange::covering(addr, 8).unwrap();
            hold(mm, Capabilities::KERNEL_FAULTS, word, write)
        };
        let _held = [held(from, false), held(to, true)];
        // SAFETY: both pointers lead to 8 bytes of the region; only this thread uses these words.
        unsafe {
            assert_eq!(libc::pwrite(file.as_raw_fd(), from.as_ptr().cast(), 8, 0), 8);
            assert_eq!(libc::pread(file.as_raw_fd(), to.as_ptr().cast(), 8, 0), 8);
        }
        steps += 1;
    }
    assert_eq!(word(region, page, SYSTEM_CALL).load(Ordering::Relaxed), steps);
    steps
}

fn migrate_all_the_while(mm: &Mm, device: &SoftDevice, region: &Region, plan: &Plan) {
    let mut random = Random(1);
    let start = Instant::now();
    while moved(&mm.counters()) < plan.migrations {
        let elapsed = start.elapsed();
        assert!(elapsed < plan.limit, "after {elapsed:?} only {:?}", mm.counters());
        let largest = if random.below(4) == 0 { 700 } else { 40 };
        let count = 1 + random.below(largest);
        let range = region.part(random.below(PAGES - count), count);
        if random.below(3) == 0 {
            device.bring_home(range).unwrap();
        } else {
            device.migrate(range).unwrap();
        }
    }
}

fn sum(region: &Region, index: usize) -> u64 {
    (0..PAGES).map(|page| word(region, page, index).load(Ordering::Relaxed)).sum()
}

#[test]
fn every_counter_ends_right_while_pages_migrate() {
    stress();
}

fn stress_in_a_child(test: &str, variables: &Variables) {
    if is_child() {
        return stress();
    }
    let limit = Plan::from_environment().limit + Duration::from_secs(20);
    on_each(test, limit, &[variables], |ended| assert!(ended.is_good(), "{ended:?}"));
}

#[test]
fn every_counter_ends_right_in_a_stress_of_the_signal_engine() {
    let test = "every_counter_ends_right_in_a_stress_of_the_signal_engine";
    stress_in_a_child(test, &[("HMM_ENGINE", "signal")]);
}

#[test]
fn every_counter_ends_right_in_a_stress_of_inline_userfaultfd() {
    let test = "every_counter_ends_right_in_a_stress_of_inline_userfaultfd";
    stress_in_a_child(test, &[("HMM_ENGINE", "uffd-inline")]);
}

fn stress() {
    let mm: Arc<Mm> = mm_or_skip!();
    let plan = Plan::from_environment();
    let config = SoftConfig {
        memory: (PAGES * PAGE_SIZE) as u64,
        policy: Policy::OnRequest,
        threads: 2,
        ..SoftConfig::default()
    };
    let device = SoftDevice::new(&mm, config).unwrap();
    let region = Region::new(PAGES);
    region.fill(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (mm, region, stop, device) = (&mm, &region, &stop, &*device);
        let cpu = CPU.map(|own| (own, scope.spawn(move || count_on_cpu(region, own, stop))));
        let devices = scope.spawn(move || count_on_device(device, region, stop));
        let calls = scope.spawn(move || count_by_system_calls(mm, region, stop));
        migrate_all_the_while(mm, device, region, &plan);
        stop.store(true, Ordering::Relaxed);
        let mut shared = 0;
        for (own, thread) in cpu {
            let rounds = thread.join().unwrap();
            shared += rounds;
            assert_eq!(sum(region, own), rounds * PAGES as u64);
        }
        assert_eq!(sum(region, SHARED), shared * PAGES as u64);
        let (rounds, atomics) = devices.join().unwrap();
        assert_eq!(sum(region, DEVICE), rounds * PAGES as u64);
        assert_eq!(sum(region, DEVICE_ATOMIC), atomics);
        let steps = calls.join().unwrap();
        eprintln!(
            "cpu rounds {shared}, device rounds {rounds}, atomics {atomics}, system calls {steps}"
        );
    });
    eprintln!("{:?}\n{:?}", mm.counters(), device.counters());
    device.close().unwrap();
    assert_eq!(mm.counters().device_pages, 0);
    mm.close().unwrap();
}
