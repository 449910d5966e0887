//! Device memory that is too small, and what is left of it afterwards.

mod common;

use common::{Region, device, mm, sum_of};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use std::time::{Duration, Instant};

#[test]
fn a_full_device_takes_what_fits() {
    let mm = mm();
    let device = device(&mm, 10, Policy::OnRequest);
    let region = Region::counting(25, 3);
    assert_eq!(device.migrate(region.range()).unwrap(), 10);
    assert_eq!(device.migrate(region.range()).unwrap(), 0);
    assert_eq!(region.pages_on_devices(&mm), 10);
    let sum = (0..region.words() as u64).map(|index| index + 3).sum::<u64>();
    assert_eq!(device.run(sum_of(&region)).unwrap(), sum);
    // A page comes home: another finds room.
    assert_eq!(device.bring_home(region.page(0)).unwrap(), 1);
    assert_eq!(device.migrate(region.page(20)).unwrap(), 1);
    assert_eq!(region.all_words().iter().sum::<u64>(), sum);
    assert_eq!(device.counters().evictions, 0);
    device.close().unwrap();
}

#[test]
fn arrays_larger_than_device_memory_work_on_touch() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnTouch);
    let x = Region::floats(300, |index| index as f64);
    let y = Region::floats(300, |index| 0.5 * index as f64);
    let count = x.words() as u64;
    for round in 1..=3 {
        let kernel = Kernel::AxpyF64 { a: 2.0, x: x.address(), y: y.address(), count };
        device.run(kernel).unwrap();
        assert!(x.pages_on_devices(&mm) + y.pages_on_devices(&mm) <= 64);
        for index in (0..x.words()).step_by(500) {
            let expected = (0.5 + 2.0 * f64::from(round)) * index as f64;
            assert_eq!(f64::from_bits(y.get(index)), expected);
        }
    }
    let counters = device.counters();
    assert!(counters.evictions > 1000, "{counters:?}");
    assert!(counters.pages_to_device > 1500, "{counters:?}");
    device.close().unwrap();
}

#[test]
fn a_device_of_one_page_still_finishes() {
    let mm = mm();
    let device = device(&mm, 1, Policy::OnTouch);
    let (from, to) = (Region::counting(6, 9), Region::new(6));
    let (dst, src, len) = (to.address() + 100, from.address() + 4, from.bytes() - 100);
    device.run(Kernel::Copy { dst, src, len }).unwrap();
    assert_eq!(to.all_bytes()[100..], from.all_bytes()[4..from.all_bytes().len() - 96]);
    for index in 0..to.words() {
        let addr = to.word_address(index);
        if index % 100 == 0 {
            device.run(Kernel::AtomicAddU64 { addr, value: 1 }).unwrap();
        }
    }
    device.close().unwrap();
}

#[test]
fn atomics_make_room_for_their_page() {
    let mm = mm();
    let device = device(&mm, 2, Policy::OnRequest);
    let region = Region::counting(5, 0);
    assert_eq!(device.migrate(region.range()).unwrap(), 2);
    for page in (0..5).chain(0..5) {
        let addr = region.page(page).start().get();
        device.run(Kernel::AtomicAddU64 { addr, value: 1 << 20 }).unwrap();
    }
    for page in 0..5 {
        assert_eq!(region.get(page * 512), page as u64 * 512 + (2 << 20));
    }
    assert!(device.counters().evictions > 0);
    device.close().unwrap();
}

#[test]
fn pages_of_unmapped_memory_are_free_again() {
    let mm = mm();
    let device = device(&mm, 32, Policy::OnRequest);
    for round in 0..20 {
        let region = Region::counting(32, round);
        assert_eq!(device.migrate(region.range()).unwrap(), 32, "round {round}");
        drop(region);
        mm.sync();
    }
    assert_eq!(device.counters().pages_to_system, 0);
    device.close().unwrap();
}

#[test]
fn a_range_of_several_mappings_with_holes_migrates() {
    let mm = mm();
    let device = device(&mm, 4096, Policy::OnRequest);
    let region = Region::counting(3000, 1);
    region.unmap_pages(100, 5);
    region.make_read_only(1000, 1);
    let moved = device.migrate(region.range()).unwrap();
    // Read-only memory may stay.
    assert!(moved == 2994 || moved == 2995, "{moved}");
    assert_eq!(device.bring_home(region.range()).unwrap(), moved);
    assert_eq!(region.get(512 * 2999), 512 * 2999 + 1);
    device.close().unwrap();
}

#[test]
fn bandwidth_and_latency_take_their_time() {
    let mm = mm();
    let config = SoftConfig {
        latency: Duration::from_millis(5),
        bandwidth: 100 << 20,
        ..SoftConfig::default()
    };
    let device = SoftDevice::new(&mm, config).unwrap();
    let region = Region::counting(256, 0);
    let start = Instant::now();
    assert_eq!(device.migrate(region.range()).unwrap(), 256);
    let slow = start.elapsed();
    assert!(slow >= Duration::from_millis(14), "{slow:?}");
    device.set_latency(Duration::ZERO);
    device.set_bandwidth(0);
    let start = Instant::now();
    assert_eq!(device.bring_home(region.range()).unwrap(), 256);
    assert!(start.elapsed() < slow, "{:?}", start.elapsed());
    device.close().unwrap();
}
