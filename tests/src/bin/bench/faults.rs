//! Latency of one CPU read of a page that is on a device.

use crate::bare::BareLoop;
use crate::{Figure, ROUNDS, median};
use hmm_core::Mm;
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::Region;
use std::time::Instant;

const PAGES: usize = 2048;

/// Touches every page once, in an order without neighbours; the median time in nanoseconds.
fn touch_all(region: &Region, write: bool) -> f64 {
    let mut times = Vec::with_capacity(PAGES);
    for step in 0..PAGES {
        let page = step * 769 % PAGES;
        let word = region.word(page * 512);
        let start = Instant::now();
        if write {
            word.store(1, std::sync::atomic::Ordering::Relaxed);
        } else {
            word.load(std::sync::atomic::Ordering::Relaxed);
        }
        times.push(start.elapsed().as_nanos() as f64);
    }
    median(times)
}

fn bare(served: &BareLoop) -> f64 {
    let region = Region::new(PAGES);
    served.register(region.addr(), region.len() as u64);
    touch_all(&region, false)
}

fn native() -> f64 {
    touch_all(&Region::new(PAGES), true)
}

fn ours(device: &SoftDevice, region: &Region) -> f64 {
    assert_eq!(device.migrate(region.range()).unwrap(), PAGES);
    touch_all(region, false)
}

pub(crate) fn measure() -> Vec<Figure> {
    let mm = Mm::current().unwrap();
    let config = SoftConfig { fault_around: 1, ..SoftConfig::default() };
    let device = SoftDevice::new(&mm, config).unwrap();
    let served = BareLoop::new();
    let region = Region::new(PAGES);
    region.fill(3);
    let mut against_bare = Figure::new("fault_p50", "ns, against a bare uffd loop");
    let mut against_native = Figure::new("fault_p50_native", "ns, against a native first touch");
    let mut inline = Figure::new("fault_p50_inline", "ns, inline range, against a bare uffd loop");
    for _ in 0..ROUNDS {
        let can_be_inline = mm.blocking_range(region.range()).is_ok();
        let answered = ours(&device, &region);
        against_native.add(answered, native());
        let Some(bare) = served.as_ref().map(bare) else { continue };
        against_bare.add(answered, bare);
        if can_be_inline {
            mm.inline_range(region.range()).unwrap();
            inline.add(ours(&device, &region), bare);
        }
    }
    device.close().unwrap();
    let figures = [against_bare, against_native, inline];
    figures.into_iter().filter(|figure| !figure.ours.is_empty()).collect()
}
