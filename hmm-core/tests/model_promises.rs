//! Promises of hmm.txt on the model engine, by number: those that it can show, and swap, which only it has always.
//! docs/PROMISES.md lists them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelConfig, ModelEngine, PageCondition};
use hmm_core::{
    Access, AddrRange, Error, Mm, PfnEntry, PfnFlags, Protection, RangeRequest, Residency,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use support::device::Device;

const READ_WRITE: Protection = Protection::READ.union(Protection::WRITE);
const READABLE: PfnFlags = PfnFlags::VALID.union(PfnFlags::READ);

/// A program's memory, each page beginning with its number, and a device that mirrors it.
struct Scene {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    device: Device,
    range: AddrRange,
}

impl Scene {
    fn new(pages: usize) -> Self {
        let engine = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(engine.clone()).unwrap();
        let range = engine.mmap(pages, READ_WRITE, VmaKind::Anonymous).unwrap();
        (0..pages).for_each(|page| engine.cpu_write(range.page_at(page), &[page as u8]).unwrap());
        let device = Device::new(&mm, range, pages).unwrap();
        Self { engine, mm, device, range }
    }

    /// The same, with all pages on the device.
    fn away(pages: usize) -> Self {
        let scene = Self::new(pages);
        assert_eq!(scene.device.migrate(scene.range, 0), Ok(pages));
        scene
    }

    fn byte(&self, page: usize) -> u8 {
        let mut byte = [0];
        self.engine.cpu_read(self.range.page_at(page), &mut byte).unwrap();
        byte[0]
    }

    fn places(&self) -> Vec<Residency> {
        let mut places = vec![Residency::None; self.range.pages()];
        self.mm.residency(self.range, &mut places).unwrap();
        places
    }

    fn away_now(&self) -> usize {
        self.places().iter().filter(|place| matches!(place, Residency::Device(_))).count()
    }

    fn snapshot(&self, range: AddrRange) -> Vec<PfnEntry> {
        let mut pfns = vec![PfnEntry::default(); range.pages()];
        self.mm.snapshot(&RangeRequest { range, owner: None }, &mut pfns).unwrap();
        pfns
    }

    fn fault(&self, range: AddrRange, access: Access) -> Result<Vec<PfnEntry>, Error> {
        let mut pfns = vec![PfnEntry::default(); range.pages()];
        self.mm.range_fault(&RangeRequest { range, owner: None }, access, &mut pfns)?;
        Ok(pfns)
    }

    fn map_on_device(&self, page: usize) -> u8 {
        let mut byte = [0];
        self.device.load(self.range.page_at(page), &mut byte).unwrap();
        byte[0]
    }

    fn is_mapped_on_device(&self, page: usize) -> bool {
        self.device.mirrored().contains_key(&self.range.page_at(page).get())
    }

    /// Every page is as it was, all are home, and no rule was broken.
    fn end(self) {
        let pages = self.range.pages();
        assert!((0..pages).all(|page| self.byte(page) == page as u8));
        self.close();
    }

    fn close(self) {
        self.mm.close().unwrap();
        assert_eq!((self.device.pages_in_use(), self.device.breaches()), (0, vec![]));
        self.device.remove().unwrap();
    }
}

#[test]
fn promise_15_every_access_of_the_cpu_brings_the_page_home() {
    let scene = Scene::away(4);
    assert_eq!(scene.byte(1), 1);
    scene.engine.cpu_write(scene.range.page_at(2), &[2]).unwrap();
    scene.engine.cpu_fetch_add(scene.range.page_at(3), 0).unwrap();
    assert_eq!(scene.away_now(), 1);
    scene.end();
}

#[test]
fn promise_21_every_change_is_told() {
    let scene = Scene::new(8);
    let (engine, range) = (&scene.engine, scene.range);
    let place = engine.mmap(1, READ_WRITE, VmaKind::Anonymous).unwrap();
    let forgets = |page: usize, what: &str, change: &dyn Fn()| {
        scene.map_on_device(page);
        assert!(scene.is_mapped_on_device(page));
        change();
        assert!(!scene.is_mapped_on_device(page), "{what}");
    };
    forgets(0, "munmap", &|| engine.munmap(range.sub(0, 1)));
    forgets(1, "madvise", &|| engine.madvise_dontneed(range.sub(1, 1)).unwrap());
    forgets(2, "mremap", &|| engine.mremap(range.sub(2, 1), place.start()).unwrap());
    forgets(3, "a touch", &|| {
        scene.device.migrate(range.sub(3, 1), 0).unwrap();
        assert!(scene.is_mapped_on_device(3));
        assert_eq!(scene.byte(3), 3);
    });
    scene.map_on_device(5);
    scene.mm.close().unwrap();
    assert!(scene.device.mirrored().is_empty(), "the end of the address space");
    scene.device.remove().unwrap();
}

#[test]
fn promise_23_the_cpus_side_waits_for_the_callbacks() {
    let scene = Scene::new(2);
    // The callbacks are over when munmap and madvise return: nothing is left to wait for.
    assert_eq!((scene.map_on_device(0), scene.map_on_device(1)), (0, 1));
    scene.engine.munmap(scene.range.sub(0, 1));
    assert!(!scene.is_mapped_on_device(0) && scene.is_mapped_on_device(1));
    scene.engine.madvise_dontneed(scene.range.sub(1, 1)).unwrap();
    assert!(!scene.is_mapped_on_device(1));
    scene.close();
}

#[test]
fn promise_26_a_look_reports_what_is_there_and_changes_nothing() {
    let scene = Scene::new(4);
    scene.engine.madvise_dontneed(scene.range.sub(0, 1)).unwrap();
    scene.engine.set_condition(scene.range.sub(1, 1), PageCondition::Swapped);
    scene.mm.sync();
    assert_eq!(scene.device.migrate(scene.range.sub(3, 1), 0), Ok(1));
    let looks = [scene.snapshot(scene.range), scene.snapshot(scene.range)];
    assert_eq!(looks[0], looks[1]);
    assert_eq!(looks[0][0].flags(), PfnFlags::EMPTY);
    assert_eq!(looks[0][1].pfn(), None, "it was swapped in");
    assert_eq!(looks[0][2].flags(), READABLE | PfnFlags::WRITE);
    assert_eq!(looks[0][3].flags(), READABLE | PfnFlags::WRITE | PfnFlags::DEVICE);
    assert_eq!((scene.byte(0), scene.byte(1)), (0, 1));
    scene.close();
}

#[test]
fn promise_27_a_fault_makes_pages_present_as_an_access_would() {
    let scene = Scene::new(3);
    scene.engine.set_condition(scene.range.sub(0, 1), PageCondition::Swapped);
    scene.engine.madvise_dontneed(scene.range.sub(1, 1)).unwrap();
    scene.mm.sync();
    let pfns = scene.fault(scene.range, Access::Write).unwrap();
    assert!(pfns.iter().all(|pfn| pfn.flags() == READABLE | PfnFlags::WRITE), "{pfns:?}");
    assert_eq!([scene.byte(0), scene.byte(1), scene.byte(2)], [0, 0, 2]);
    scene.close();
}

#[test]
fn promise_29_a_write_without_permission_fails_and_writes_nothing() {
    let scene = Scene::new(2);
    scene.engine.mprotect(scene.range, Protection::READ).unwrap();
    let refused = scene.fault(scene.range, Access::Write);
    assert!(matches!(refused, Err(Error::Permission { .. })), "{refused:?}");
    assert!(scene.device.store(scene.range.start(), &[9]).is_err());
    scene.end();
}

#[test]
fn promise_30_without_permission_to_read_nothing_is_told() {
    let scene = Scene::new(2);
    scene.engine.mprotect(scene.range, Protection::empty()).unwrap();
    let mut pfns = [PfnEntry(1); 2];
    let request = RangeRequest { range: scene.range, owner: None };
    let refused = scene.mm.snapshot(&request, &mut pfns);
    assert!(matches!(refused, Err(Error::Permission { .. })), "{refused:?}");
    assert_eq!(pfns, [PfnEntry::default(); 2]);
    scene.engine.mprotect(scene.range, READ_WRITE).unwrap();
    scene.end();
}

#[test]
fn promise_33_special_mappings_are_never_mirrored() {
    let scene = Scene::new(1);
    for kind in [VmaKind::Special, VmaKind::Huge] {
        let range = scene.engine.mmap(2, READ_WRITE, kind).unwrap();
        let mut pfns = [PfnEntry::default(); 2];
        let request = RangeRequest { range, owner: None };
        assert!(scene.mm.snapshot(&request, &mut pfns).is_err());
        assert_eq!(pfns, [PfnEntry::bare(PfnFlags::SPECIAL); 2]);
    }
    scene.end();
}

#[test]
fn promise_34_device_pages_are_reported_as_such_and_stay() {
    let scene = Scene::away(3);
    let all = READABLE | PfnFlags::WRITE | PfnFlags::DEVICE;
    let looks = [scene.snapshot(scene.range), scene.fault(scene.range, Access::Write).unwrap()];
    assert!(looks.iter().flatten().all(|pfn| pfn.flags() == all));
    assert_eq!((scene.away_now(), scene.device.frees()), (3, 0));
    scene.end();
}

#[test]
fn promise_35_the_page_of_zeros_is_read_only_until_a_write_replaces_it() {
    let scene = Scene::new(1);
    let range = scene.engine.mmap(1, READ_WRITE, VmaKind::Anonymous).unwrap();
    assert_eq!(scene.fault(range, Access::Read).unwrap()[0].flags(), READABLE);
    let pfns = scene.fault(range, Access::Write).unwrap();
    assert_eq!(pfns[0].flags(), READABLE | PfnFlags::WRITE);
    scene.end();
}

#[test]
fn promise_36_a_change_inside_makes_a_look_stale() {
    let scene = Scene::new(4);
    let tracker = scene.mm.track(scene.range).unwrap();
    let stale = |change: &dyn Fn()| {
        let sequence = tracker.begin().unwrap();
        scene.snapshot(scene.range);
        assert!(!tracker.changed(sequence));
        change();
        tracker.changed(sequence)
    };
    assert!(stale(&|| _ = scene.device.migrate(scene.range.sub(3, 1), 0).unwrap()));
    assert!(stale(&|| assert_eq!(scene.byte(3), 3)));
    assert!(stale(&|| scene.engine.madvise_dontneed(scene.range.sub(0, 1)).unwrap()));
    assert!(stale(&|| scene.engine.munmap(scene.range.sub(1, 1))));
    drop(tracker);
    scene.close();
}

#[test]
fn promise_37_changes_before_or_outside_do_not_count() {
    let scene = Scene::new(4);
    scene.engine.madvise_dontneed(scene.range.sub(1, 1)).unwrap();
    let tracker = scene.mm.track(scene.range.sub(1, 2)).unwrap();
    let sequence = tracker.begin().unwrap();
    scene.engine.munmap(scene.range.sub(0, 1));
    scene.engine.madvise_dontneed(scene.range.sub(3, 1)).unwrap();
    assert!(!tracker.changed(sequence));
    drop(tracker);
    scene.close();
}

#[test]
fn promise_48_free_runs_once() {
    let scene = Scene::away(6);
    scene.device.bring_home(scene.range.sub(0, 2)).unwrap();
    assert_eq!((scene.byte(2), scene.device.frees()), (2, 3));
    scene.engine.madvise_dontneed(scene.range.sub(3, 1)).unwrap();
    scene.engine.munmap(scene.range.sub(4, 1));
    assert_eq!(scene.device.frees(), 5);
    scene.mm.close().unwrap();
    assert_eq!((scene.device.frees(), scene.device.breaches()), (6, vec![]));
    scene.device.remove().unwrap();
}

#[test]
fn promise_52_lost_data_is_sigbus_at_its_page_only() {
    let scene = Scene::away(3);
    scene.device.lose(scene.range.page_at(1));
    let lost = scene.engine.cpu_read(scene.range.page_at(1), &mut [0]);
    assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    assert_eq!((scene.byte(0), scene.byte(2)), (0, 2));
    scene.device.driver.short_of_memory.store(3, Ordering::Relaxed);
    assert_eq!(scene.device.migrate(scene.range.sub(0, 1), 0), Ok(1));
    assert_eq!(scene.byte(0), 0, "asked again until there was memory");
    scene.close();
}

#[test]
fn promise_58_pages_that_cannot_go_are_left_out() {
    let scene = Scene::new(6);
    scene.engine.set_condition(scene.range.sub(1, 2), PageCondition::Pinned);
    scene.mm.pin_range(scene.range.sub(4, 1)).unwrap();
    assert_eq!(scene.device.migrate(scene.range, 0), Ok(3));
    let away = scene
        .places()
        .iter()
        .map(|place| matches!(place, Residency::Device(_)))
        .collect::<Vec<_>>();
    assert_eq!(away, [true, false, false, true, false, true]);
    scene.end();
}

#[test]
fn promise_60_a_page_without_a_destination_stays_as_it_was() {
    let scene = Scene::new(6);
    assert_eq!(scene.device.migrate(scene.range, 2), Ok(3));
    assert_eq!(scene.away_now(), 3);
    scene.engine.cpu_write(scene.range.page_at(0), &[0]).unwrap();
    assert_eq!(scene.device.frees(), 0);
    scene.end();
}

#[test]
fn promise_62_finalize_is_told_exactly_what_moved() {
    let scene = Scene::new(4);
    // A page is unmapped after the copy: it did not move, and its destination comes back.
    let (engine, range) = (Arc::clone(&scene.engine), scene.range);
    let unmap = Box::new(move || engine.munmap(range.sub(2, 1)));
    *scene.device.driver.interruption.lock() = Some(unmap);
    assert_eq!(scene.device.migrate(scene.range, 0), Ok(3));
    assert_eq!((scene.away_now(), scene.device.frees(), scene.device.pages_in_use()), (3, 1, 3));
    assert!(!scene.is_mapped_on_device(2) && scene.is_mapped_on_device(1));
    scene.close();
}

#[test]
fn promise_65_holes_can_be_filled_on_the_device() {
    let scene = Scene::new(1);
    let range = scene.engine.mmap(2, READ_WRITE, VmaKind::Anonymous).unwrap();
    scene.engine.cpu_read(range.page_at(1), &mut [1]).unwrap();
    let other = Device::new(&scene.mm, range, 2).unwrap();
    assert_eq!(other.migrate(range, 0), Ok(2));
    let mut bytes = [1; 2];
    scene.engine.cpu_read(range.start(), &mut bytes[..1]).unwrap();
    scene.engine.cpu_read(range.page_at(1), &mut bytes[1..]).unwrap();
    assert_eq!(bytes, [0; 2]);
    scene.end();
    other.remove().unwrap();
}

#[test]
fn promise_66_pinned_pages_stay() {
    let scene = Scene::new(4);
    scene.engine.set_condition(scene.range.sub(0, 2), PageCondition::Pinned);
    scene.mm.pin_range(scene.range.sub(2, 1)).unwrap();
    assert_eq!(scene.device.migrate(scene.range, 0), Ok(1));
    assert_eq!(scene.places()[..3], [Residency::System; 3]);
    scene.end();
}

#[test]
fn promise_67_shared_and_file_memory_is_refused_page_by_page() {
    let scene = Scene::new(1);
    let range = scene.engine.mmap(2, READ_WRITE, VmaKind::Shared).unwrap();
    scene.engine.cpu_write(range.start(), &[5]).unwrap();
    assert_eq!(scene.device.migrate(range, 0), Ok(0));
    let pfns = scene.fault(range, Access::Write).unwrap();
    assert!(pfns.iter().all(|pfn| pfn.flags() == READABLE | PfnFlags::WRITE), "{pfns:?}");
    scene.end();
}

#[test]
fn promise_68_the_permission_to_write_follows_the_page() {
    let scene = Scene::away(2);
    let writable = |page| {
        let pfns = scene.snapshot(scene.range.sub(page, 1));
        pfns[0].flags().contains(PfnFlags::WRITE)
    };
    assert!(writable(0));
    assert_eq!(scene.byte(0), 0);
    assert!(writable(0));
    scene.engine.mprotect(scene.range.sub(1, 1), Protection::READ).unwrap();
    assert!(!writable(1));
    assert_eq!(scene.byte(1), 1);
    assert!(!writable(1));
    assert!(scene.engine.cpu_write(scene.range.page_at(1), &[9]).is_err());
    scene.end();
}

#[test]
fn promise_69_a_page_shared_with_a_child_can_migrate() {
    let scene = Scene::new(2);
    scene.engine.set_condition(scene.range, PageCondition::Shared);
    assert_eq!(scene.device.migrate(scene.range, 0), Ok(2));
    scene.end();
}
