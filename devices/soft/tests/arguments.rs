//! Bad input, and the life of a device.

mod common;

use common::{Region, device, mm, sum_of};
use hmm_core::{Error, PAGE_SIZE, Residency, USER_END};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use std::time::Duration;

#[test]
fn bad_configurations_are_refused() {
    let mm = mm();
    let good = SoftConfig::default();
    let bad = [
        SoftConfig { memory: 0, ..good },
        SoftConfig { memory: PAGE_SIZE as u64 + 1, ..good },
        SoftConfig { memory: 1 << 39, ..good },
        SoftConfig { fault_around: 0, ..good },
        SoftConfig { fault_around: 513, ..good },
        SoftConfig { threads: 0, ..good },
        SoftConfig { threads: 65, ..good },
    ];
    for config in bad {
        let refused = SoftDevice::new(&mm, config);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{config:?}");
    }
}

#[test]
fn bad_arguments_change_nothing() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::counting(4, 1);
    let before = region.all_words();
    let (at, end) = (region.address(), USER_END);
    let bad = [
        Kernel::Fill { dst: 0, len: 8, byte: 1 },
        Kernel::Fill { dst: at, len: 0, byte: 1 },
        Kernel::Fill { dst: at, len: u64::MAX, byte: 1 },
        Kernel::Fill { dst: end - 8, len: 16, byte: 1 },
        Kernel::Copy { dst: at, src: 0, len: 8 },
        Kernel::Copy { dst: at, src: at + 4, len: 8 },
        Kernel::AxpyF64 { a: 1.0, x: at + 4, y: at + 64, count: 1 },
        Kernel::SumU64 { src: at + 1, count: 2 },
        Kernel::SumU64 { src: at, count: 1 << 61 },
        Kernel::GatherU64 { dst: at, src: at + 2, index: at + 64, count: 1 },
        Kernel::Chase { head: at, next_offset: 1, max_steps: 1 },
        Kernel::Chase { head: 0, next_offset: 0, max_steps: 1 },
        Kernel::AtomicAddU64 { addr: at + 4, value: 1 },
        Kernel::AddU64 { addr: at, count: 1, stride: 4, value: 1 },
    ];
    for kernel in bad {
        let refused = device.run(kernel);
        assert!(matches!(refused, Err(Error::Invalid { .. })), "{kernel:?}: {refused:?}");
    }
    assert_eq!(region.all_words(), before);
    assert_eq!((device.counters().jobs, device.counters().device_faults), (0, 0));
    device.close().unwrap();
}

#[test]
fn bad_links_and_indices_end_the_job() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::new(2);
    for (link, errno) in [(3, libc::EINVAL), (u64::MAX - 7, libc::EINVAL), (4096, libc::EFAULT)] {
        region.set(0, link);
        let kernel = Kernel::Chase { head: region.address(), next_offset: 0, max_steps: 9 };
        assert_eq!(device.run(kernel).unwrap_err().errno(), errno, "link {link:#x}");
        region.set(0, link / 8);
        let kernel = Kernel::GatherU64 {
            dst: region.word_address(600),
            src: 8,
            index: region.address(),
            count: 1,
        };
        assert!(device.run(kernel).is_err());
    }
    device.close().unwrap();
}

#[test]
fn policy_never_refuses_to_move_anything() {
    let mm = mm();
    let device = device(&mm, 64, Policy::Never);
    let region = Region::counting(4, 1);
    assert_eq!(device.migrate(region.range()).unwrap_err().errno(), libc::EOPNOTSUPP);
    let atomic = Kernel::AtomicAddU64 { addr: region.address(), value: 1 };
    assert_eq!(device.run(atomic).unwrap_err().errno(), libc::EOPNOTSUPP);
    device.run(sum_of(&region)).unwrap();
    assert_eq!((region.get(0), device.counters().pages_to_device), (1, 0));
    // The policy may change at any time.
    device.set_policy(Policy::OnTouch);
    assert_eq!(device.run(atomic).unwrap(), 1);
    device.run(Kernel::Fill { dst: region.address(), len: region.bytes(), byte: 0 }).unwrap();
    assert!(device.counters().pages_to_device > 0);
    device.close().unwrap();
}

#[test]
fn pinned_pages_are_used_in_place() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnTouch);
    let region = Region::counting(4, 1);
    mm.pin_range(region.page(2)).unwrap();
    assert_eq!(device.migrate(region.range()).unwrap(), 3);
    assert_eq!(device.migrate(region.range()).unwrap(), 0);
    let sum = device.run(sum_of(&region)).unwrap();
    assert_eq!(region.pages_on_devices(&mm), 3);
    assert_eq!(sum, region.all_words().iter().sum());
    let atomic = Kernel::AtomicAddU64 { addr: region.page(2).start().get(), value: 1 };
    assert_eq!(device.run(atomic).unwrap_err().errno(), libc::EOPNOTSUPP);
    mm.unpin_range(region.page(2)).unwrap();
    assert_eq!(device.run(atomic).unwrap(), 2 * 512 + 1);
    device.close().unwrap();
}

#[test]
fn pinning_brings_device_pages_home() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::counting(4, 1);
    assert_eq!(device.migrate(region.range()).unwrap(), 4);
    mm.pin_range(region.page(2)).unwrap();
    // The pinned page, and its neighbour by fault-around.
    assert_eq!(region.residency(&mm)[2], Residency::System);
    assert_eq!(region.pages_on_devices(&mm), 2);
    assert_eq!(device.migrate(region.range()).unwrap(), 1);
    assert_eq!(region.get(2 * 512 + 3), 2 * 512 + 4);
    mm.unpin_range(region.page(2)).unwrap();
    device.close().unwrap();
}

#[test]
fn a_closed_device_refuses_everything_and_keeps_nothing() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::counting(32, 1);
    assert_eq!(device.migrate(region.range()).unwrap(), 32);
    device.close().unwrap();
    assert_eq!(region.pages_on_devices(&mm), 0);
    assert_eq!(device.close(), Ok(()));
    let gone = |errno: Option<i32>| assert_eq!(errno, Some(libc::ENODEV));
    gone(device.run(sum_of(&region)).err().map(|error| error.errno()));
    gone(device.migrate(region.range()).err().map(|error| error.errno()));
    gone(device.bring_home(region.range()).err().map(|error| error.errno()));
    assert!(region.all_words().iter().enumerate().all(|(at, word)| *word == at as u64 + 1));
}

#[test]
fn dropping_a_device_brings_its_pages_home() {
    let mm = mm();
    let region = Region::counting(32, 1);
    for _ in 0..70 {
        // More often than there are pfn windows.
        let device = device(&mm, 64, Policy::OnRequest);
        assert_eq!(device.migrate(region.range()).unwrap(), 32);
        drop(device);
        assert_eq!(region.pages_on_devices(&mm), 0);
    }
    assert!(region.all_words().iter().enumerate().all(|(at, word)| *word == at as u64 + 1));
}

#[test]
fn closing_lets_queued_jobs_end() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::new(16);
    let add = Kernel::AddU64 {
        addr: region.address(),
        count: region.words() as u64,
        stride: 8,
        value: 1,
    };
    let jobs: Vec<_> = (0..50).map(|_| device.submit(add).unwrap()).collect();
    device.close().unwrap();
    for job in jobs {
        assert_eq!(job.wait(Duration::ZERO), Ok(0));
    }
    assert!(region.all_words().iter().all(|word| *word == 50));
}

#[test]
fn waiting_for_a_slow_job_ends_at_its_deadline() {
    let mm = mm();
    let config = SoftConfig { latency: Duration::from_millis(300), ..SoftConfig::default() };
    let device = SoftDevice::new(&mm, config).unwrap();
    let region = Region::counting(1, 1);
    let job = device.submit(sum_of(&region)).unwrap();
    assert!(matches!(job.wait(Duration::from_millis(10)), Err(Error::Busy { .. })));
    device.close().unwrap();
    assert_eq!(device.counters().jobs, 1);
}
