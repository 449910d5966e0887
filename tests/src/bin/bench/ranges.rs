//! Bulk migration, snapshots, and what watching costs present pages.

use crate::{Figure, ROUNDS};
use hmm_core::{Mm, PfnEntry, RangeRequest};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::Region;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

const PAGES: usize = 16 << 10;
const PIECE: usize = 512;
const GIGABYTE: f64 = 1e9;

fn gigabytes_per_second(pages: usize, start: Instant) -> f64 {
    (pages * 4096) as f64 / start.elapsed().as_secs_f64() / GIGABYTE
}

fn copy_in_pieces(to: &Region, from: &Region) -> f64 {
    let start = Instant::now();
    for first in (0..PAGES).step_by(PIECE) {
        let offset = first * 4096;
        // SAFETY: both regions have PAGES pages, and do not overlap.
        unsafe {
            let (from, to) = (from.as_ptr().add(offset), to.as_ptr().add(offset));
            std::ptr::copy_nonoverlapping(from, to, PIECE * 4096);
        }
    }
    gigabytes_per_second(PAGES, start)
}

fn in_pieces(mut work: impl FnMut(usize) -> usize) -> f64 {
    let start = Instant::now();
    for first in (0..PAGES).step_by(PIECE) {
        assert_eq!(work(first), PIECE);
    }
    gigabytes_per_second(PAGES, start)
}

fn migration(mm: &Arc<Mm>, figures: &mut Vec<Figure>) {
    let memory = (PAGES * 4096) as u64;
    let device = SoftDevice::new(mm, SoftConfig { memory, ..SoftConfig::default() }).unwrap();
    let region = Region::aligned(PAGES, 2 << 20);
    let (from, to) = (Region::new(PAGES), Region::new(PAGES));
    [&region, &from, &to].into_iter().for_each(|one| one.fill(1));
    let mut out = Figure::new("migrate_out_2m", "GB/s, against memcpy");
    let mut back = Figure::new("migrate_back_2m", "GB/s, against memcpy");
    for _ in 0..ROUNDS {
        let copied = copy_in_pieces(&to, &from);
        out.add(in_pieces(|first| device.migrate(region.part(first, PIECE)).unwrap()), copied);
        let copied = copy_in_pieces(&to, &from);
        back.add(in_pieces(|first| device.bring_home(region.part(first, PIECE)).unwrap()), copied);
    }
    device.close().unwrap();
    figures.extend([out, back]);
}

/// `None` where the baseline cannot be had.
fn snapshot(mm: &Arc<Mm>) -> Option<Figure> {
    let region = Region::new(PAGES);
    region.fill(1);
    let file = std::fs::File::open("/proc/self/pagemap").ok()?;
    let mut words = vec![0_u8; PAGES * 8];
    let mut pfns = vec![PfnEntry::default(); PAGES];
    let request = RangeRequest { range: region.range(), owner: None };
    let mut figure = Figure::new("snapshot_dense", "ns/page, against reading pagemap");
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let tracker = mm.track(region.range()).unwrap();
        let number = tracker.begin().unwrap();
        mm.snapshot(&request, &mut pfns).unwrap();
        assert!(!tracker.changed(number));
        drop(tracker);
        let ours = start.elapsed().as_nanos() as f64 / PAGES as f64;
        let start = Instant::now();
        file.read_exact_at(&mut words, region.addr() / 4096 * 8).unwrap();
        figure.add(ours, start.elapsed().as_nanos() as f64 / PAGES as f64);
    }
    Some(figure)
}

fn access(region: &Region) -> f64 {
    const COUNT: usize = 1 << 20;
    let mut at = 1_usize;
    let start = Instant::now();
    for _ in 0..COUNT {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let word = region.word((at >> 33) % region.words());
        at ^= word.load(Ordering::Relaxed) as usize;
    }
    start.elapsed().as_nanos() as f64 / COUNT as f64
}

fn present_access(mm: &Arc<Mm>) -> Figure {
    // Neighbours that were mapped in one call differ in the watch alone.
    let watched = Region::new(PAGES);
    let plain = Region::new(PAGES);
    watched.fill(0);
    plain.fill(0);
    let config = SoftConfig { memory: 64 << 20, ..SoftConfig::default() };
    let device = SoftDevice::new(mm, config).unwrap();
    device.migrate(watched.part(0, 64)).unwrap();
    device.bring_home(watched.part(0, 64)).unwrap();
    let mut figure = Figure::new("present_access", "ns, against an unwatched range");
    for _ in 0..ROUNDS {
        figure.add(access(&watched), access(&plain));
    }
    device.close().unwrap();
    figure
}

pub(crate) fn measure() -> Vec<Figure> {
    let mm = Mm::current().unwrap();
    let mut figures = Vec::new();
    migration(&mm, &mut figures);
    figures.extend(snapshot(&mm));
    figures.push(present_access(&mm));
    figures
}
