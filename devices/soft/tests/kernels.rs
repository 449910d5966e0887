//! Every kernel under every policy, with its data in system memory, on the device, and half and half, against the
//! same computation by the CPU.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{POLICIES, Region, WORDS, device, mm, scramble};
use hmm_soft::{Kernel, Policy, SoftDevice};

/// Calls `check` for each policy and each placement of what `place` is given to move.
fn everywhere(mut check: impl FnMut(&SoftDevice, &dyn Fn(&Region))) {
    let mm = mm();
    for policy in POLICIES {
        let device = device(&mm, 256, policy);
        for placement in 0..3 {
            let place = |region: &Region| {
                let pages = match placement {
                    _ if policy == Policy::Never => 0,
                    0 => 0,
                    1 => region.pages(),
                    _ => region.pages() / 2,
                };
                if pages > 0 {
                    assert_eq!(device.migrate(region.range().sub(0, pages)).unwrap(), pages);
                }
            };
            check(&device, &place);
        }
        device.close().unwrap();
    }
}

#[test]
fn fill_sets_exactly_the_bytes() {
    everywhere(|device, place| {
        let region = Region::counting(8, 5);
        let mut expected = region.all_bytes();
        place(&region);
        let (first, len) = (1000, 20_001);
        device.run(Kernel::Fill { dst: region.address() + first, len, byte: 0xa5 }).unwrap();
        expected[first as usize..(first + len) as usize].fill(0xa5);
        assert_eq!(region.all_bytes(), expected);
    });
}

#[test]
fn copy_moves_unaligned_bytes() {
    everywhere(|device, place| {
        let (from, to) = (Region::counting(6, 77), Region::counting(6, 1 << 40));
        let mut expected = to.all_bytes();
        expected[4091..4091 + 16_000].copy_from_slice(&from.all_bytes()[13..13 + 16_000]);
        place(&from);
        place(&to);
        let (dst, src) = (to.address() + 4091, from.address() + 13);
        device.run(Kernel::Copy { dst, src, len: 16_000 }).unwrap();
        assert_eq!(to.all_bytes(), expected);
    });
}

#[test]
fn axpy_gives_the_same_bits() {
    everywhere(|device, place| {
        let x = Region::floats(5, |index| index as f64 / 3.0);
        let y = Region::floats(5, |index| 1e6 - index as f64 * 0.7);
        let count = x.words() - 9;
        let plain = |index: usize| {
            let (x, y) = (f64::from_bits(x.get(index)), f64::from_bits(y.get(index + 5)));
            (y + 1.25 * x).to_bits()
        };
        let mut expected = y.all_words();
        let changed: Vec<_> = (0..count).map(plain).collect();
        expected[5..5 + count].copy_from_slice(&changed);
        place(&x);
        place(&y);
        let kernel =
            Kernel::AxpyF64 { a: 1.25, x: x.address(), y: y.word_address(5), count: count as u64 };
        device.run(kernel).unwrap();
        assert_eq!(y.all_words(), expected);
    });
}

#[test]
fn sums_are_those_of_a_plain_loop() {
    everywhere(|device, place| {
        let floats = Region::floats(7, |index| (index as f64).sin());
        let count = floats.words() as u64 - 3;
        let plain =
            (3..floats.words()).fold(0.0, |sum, index| sum + f64::from_bits(floats.get(index)));
        place(&floats);
        let bits = device.run(Kernel::SumF64 { src: floats.word_address(3), count }).unwrap();
        assert_eq!(bits, f64::to_bits(plain));

        let numbers = Region::counting(7, u64::MAX - 1000);
        let plain = numbers.all_words().into_iter().fold(0_u64, u64::wrapping_add);
        place(&numbers);
        assert_eq!(device.run(common::sum_of(&numbers)).unwrap(), plain);
    });
}

#[test]
fn gather_follows_the_indices() {
    everywhere(|device, place| {
        let src = Region::counting(9, 1 << 33);
        let (index, dst) = (Region::new(4), Region::new(5));
        let count = index.words();
        let choose = |at: usize| scramble(at as u64) % src.words() as u64;
        (0..count).for_each(|at| index.set(at, choose(at)));
        let expected: Vec<_> = (0..count).map(|at| (1 << 33) + choose(at)).collect();
        [&src, &index, &dst].into_iter().for_each(place);
        let kernel = Kernel::GatherU64 {
            dst: dst.word_address(7),
            src: src.address(),
            index: index.address(),
            count: count as u64,
        };
        device.run(kernel).unwrap();
        assert_eq!(dst.all_words()[7..7 + count], expected);
        assert_eq!((dst.get(6), dst.get(7 + count)), (0, 0));
    });
}

/// A list through all nodes of four words in a scattered order: node `i` holds `i * 3` and leads on.
fn list(pages: usize) -> (Region, u64, u64) {
    let region = Region::new(pages);
    let nodes = region.words() as u64 / 4;
    // A full cycle through a power of two: x -> 5x + 3.
    let next = |node: u64| (5 * node + 3) % nodes;
    let mut node = 0;
    for _ in 0..nodes {
        let at = node as usize * 4;
        region.set(at + 1, node * 3);
        let link = if next(node) == 0 { 0 } else { region.word_address(next(node) as usize * 4) };
        region.set(at + 2, link);
        node = next(node);
    }
    (region, nodes, 3 * nodes * (nodes - 1) / 2)
}

#[test]
fn chases_visit_every_node_by_the_cpus_own_pointers() {
    everywhere(|device, place| {
        let (region, nodes, sum) = list(8);
        place(&region);
        let head = region.address();
        let chase = |max_steps| Kernel::Chase { head, next_offset: 16, max_steps };
        assert_eq!(device.run(chase(u64::MAX)).unwrap(), nodes);
        assert_eq!(device.run(chase(nodes / 3)).unwrap(), nodes / 3);
        let kernel =
            Kernel::ChaseSumU64 { head, next_offset: 16, value_offset: 8, max_steps: nodes };
        assert_eq!(device.run(kernel).unwrap(), sum);
    });
}

#[test]
fn add_changes_only_its_words() {
    everywhere(|device, place| {
        for stride in [1, 3, WORDS + 2] {
            let region = Region::counting(9, 50);
            let mut expected = region.all_words();
            let count = (region.words() - 4).div_ceil(stride);
            place(&region);
            let kernel = Kernel::AddU64 {
                addr: region.word_address(4),
                count: count as u64,
                stride: 8 * stride as u64,
                value: u64::MAX - 6,
            };
            device.run(kernel).unwrap();
            for word in expected[4..].iter_mut().step_by(stride) {
                *word = word.wrapping_sub(7);
            }
            assert_eq!(region.all_words(), expected, "stride {stride}");
        }
    });
}

#[test]
fn atomic_add_returns_the_old_value() {
    let mm = mm();
    for policy in [Policy::OnRequest, Policy::OnTouch] {
        let device = device(&mm, 16, policy);
        let region = Region::counting(3, 1000);
        for round in 0..5 {
            let kernel = Kernel::AtomicAddU64 { addr: region.word_address(600), value: 11 };
            assert_eq!(device.run(kernel).unwrap(), 1600 + 11 * round);
        }
        assert_eq!(region.pages_on_devices(&mm), 1);
        assert_eq!(region.get(600), 1655);
        device.close().unwrap();
    }
}

#[test]
fn untouched_memory_reads_as_zeros_on_the_device() {
    everywhere(|device, place| {
        // Dirty the device's pages first.
        let dirty = Region::counting(16, 1 << 50);
        place(&dirty);
        drop(dirty);
        let region = Region::new(16);
        place(&region);
        assert_eq!(device.run(common::sum_of(&region)).unwrap(), 0);
        assert!(region.all_words().iter().all(|word| *word == 0));
    });
}

#[test]
fn a_read_only_mapping_can_be_read_and_not_written() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnTouch);
    let region = Region::map(2, libc::MAP_PRIVATE, libc::PROT_READ);
    assert_eq!(device.run(common::sum_of(&region)).unwrap(), 0);
    let kernel = Kernel::Fill { dst: region.address(), len: 8, byte: 1 };
    assert_eq!(device.run(kernel).unwrap_err().errno(), libc::EPERM);
    assert_eq!(region.get(0), 0);
    device.close().unwrap();
}

#[test]
fn shared_memory_is_used_in_place() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnTouch);
    let region = Region::map(4, libc::MAP_SHARED, libc::PROT_READ | libc::PROT_WRITE);
    (0..region.words()).for_each(|index| region.set(index, 3));
    let kernel = Kernel::AddU64 { addr: region.address(), count: 100, stride: 8, value: 4 };
    device.run(kernel).unwrap();
    assert_eq!(device.run(common::sum_of(&region)).unwrap(), 3 * region.words() as u64 + 400);
    assert_eq!(region.pages_on_devices(&mm), 0);
    let kernel = Kernel::AtomicAddU64 { addr: region.address(), value: 1 };
    assert_eq!(device.run(kernel).unwrap_err().errno(), libc::EOPNOTSUPP);
    device.close().unwrap();
}

#[test]
fn a_kernel_at_an_unmapped_address_faults() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::new(3);
    region.unmap_pages(1, 1);
    assert_eq!(device.run(common::sum_of(&region)).unwrap_err().errno(), libc::EFAULT);
    assert_eq!(device.migrate(region.page(1)).unwrap_err().errno(), libc::EFAULT);
    assert_eq!(device.migrate(region.range()).unwrap(), 2);
    device.close().unwrap();
}
