//! libhmm in twenty lines: a vector goes to a device and comes home by itself.
#![expect(clippy::print_stdout, reason = "an example shows what happens")]

use hmm_core::{AddrRange, Mm, VirtAddr};
use hmm_soft::{Kernel, SoftConfig, SoftDevice};

fn main() -> hmm_core::Result<()> {
    let mm = Mm::current()?;
    let device = SoftDevice::new(&mm, SoftConfig::default())?;

    let mut numbers = vec![1_u64; 1 << 20];
    let address = VirtAddr::from_ptr(numbers.as_ptr()).get();
    let moved = device.migrate(AddrRange::covering(address, 8 << 20)?)?;
    println!("engine {}: {moved} pages moved to the device", mm.engine_name());

    // The device works through the vector's own address.
    let sum = device.run(Kernel::SumU64 { src: address, count: 1 << 20 })?;
    println!("the device's sum: {sum}");

    numbers[1000] = 7; // an ordinary store: the page comes home first
    let again = device.run(Kernel::SumU64 { src: address, count: 1 << 20 })?;
    println!("after the CPU's store: {again}");
    assert_eq!((sum, again), (1 << 20, (1 << 20) + 6));

    device.close()
}
