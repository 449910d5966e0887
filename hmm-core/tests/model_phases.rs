//! Today's interface on the model engine: migration in three calls, coherent and exclusive pages, eviction by page number,
//! in random order beside a plain copy of what the program wrote.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod support;

use hmm_core::engine::VmaKind;
use hmm_core::engine::model::{ModelConfig, ModelEngine};
use hmm_core::{
    AddrRange, CpuFault, Devmem, DevmemOps, FaultError, HmmPfn, MigrateFlags, MigratePfn,
    MigrateRequest, Mm, OwnerId, Pfn, Protection, RangeFault, Select, unlock_exclusive,
};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use support::device::Device;

const FLAGS: Protection = Protection::READ.union(Protection::WRITE);
const PAGES: usize = 24;

/// A device that the CPU reaches; its free pages.
#[derive(Default)]
struct Reached(Mutex<Vec<Pfn>>);

impl DevmemOps for Reached {
    fn free(&self, _: &Devmem, page: Pfn) {
        let mut free = self.0.lock().unwrap();
        assert!(!free.contains(&page), "freed twice");
        free.push(page);
    }
    fn fault(&self, _: &Devmem, _: &CpuFault<'_>) -> Result<(), FaultError> {
        Err(FaultError::SigBus)
    }
}

struct Scene {
    engine: Arc<ModelEngine>,
    mm: Arc<Mm>,
    device: Device,
    reached: Arc<Reached>,
    coherent: Arc<Devmem>,
    area: AddrRange,
    written: [u8; PAGES],
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u8),
    ToDevice(usize, usize),
    ToCoherent(usize, usize),
    FromCoherent(usize, usize),
    Evict(usize),
    Exclusive(usize, Option<u8>),
    Undone(usize, usize),
    Drop(usize, usize),
    Look,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let run = || (0..PAGES, 1..PAGES / 2);
    let step = prop_oneof![
        (0..PAGES, 1..255_u8).prop_map(|(page, byte)| Step::Write(page, byte)),
        run().prop_map(|(first, count)| Step::ToDevice(first, count)),
        run().prop_map(|(first, count)| Step::ToCoherent(first, count)),
        run().prop_map(|(first, count)| Step::FromCoherent(first, count)),
        (1..PAGES).prop_map(Step::Evict),
        (0..PAGES, prop::option::of(1..255_u8))
            .prop_map(|(page, byte)| Step::Exclusive(page, byte)),
        run().prop_map(|(first, count)| Step::Undone(first, count)),
        run().prop_map(|(first, count)| Step::Drop(first, count)),
        Just(Step::Look),
    ];
    prop::collection::vec(step, 1..60)
}

impl Scene {
    fn new() -> Self {
        let engine = ModelEngine::new(ModelConfig::default());
        let mm = Mm::with_engine(engine.clone()).unwrap();
        let area = engine.mmap(PAGES, FLAGS, VmaKind::Anonymous).unwrap();
        let device = Device::new(&mm, area, PAGES).unwrap();
        let reached = Arc::new(Reached::default());
        let coherent = Devmem::add_coherent(reached.clone(), OwnerId::unique(), PAGES).unwrap();
        let first = coherent.pfn_first().get();
        *reached.0.lock().unwrap() = (0..PAGES as u64).map(|page| Pfn::new(first + page)).collect();
        Self { engine, mm, device, reached, coherent, area, written: [0; PAGES] }
    }

    fn part(&self, first: usize, count: usize) -> AddrRange {
        self.area.sub(first, count.min(PAGES - first))
    }

    fn setup(&self, range: AddrRange, select: Select) -> (hmm_core::Migration, Vec<MigratePfn>) {
        let mut src = vec![MigratePfn::default(); range.pages()];
        let request = MigrateRequest { range, select, owner: None, fault_page: None };
        (self.mm.migrate_setup(&request, &mut src).unwrap(), src)
    }

    fn to_coherent(&self, range: AddrRange) {
        let (mut migration, mut src) = self.setup(range, Select::SYSTEM);
        let mut free = std::mem::take(&mut *self.reached.0.lock().unwrap());
        let name = |page: &MigratePfn| match page.migrates().then(|| free.pop()).flatten() {
            Some(page) => MigratePfn::new(page, MigrateFlags::LOCKED),
            None => MigratePfn::default(),
        };
        let dst: Vec<_> = src.iter().map(name).collect();
        self.reached.0.lock().unwrap().extend(free);
        migration.pages(&mut src, &dst).unwrap();
        migration.finalize(&src);
    }

    fn leave_coherent(&self, range: AddrRange) {
        let (mut migration, mut src) = self.setup(range, Select::COHERENT);
        let name = |index: usize| match migration.system_page(index) {
            Some(page) if index % 3 != 2 => MigratePfn::new(page, MigrateFlags::LOCKED),
            _ => MigratePfn::default(),
        };
        let dst: Vec<_> = (0..src.len()).map(name).collect();
        migration.pages(&mut src, &dst).unwrap();
        migration.finalize(&src);
    }

    /// Every page of a part of the coherent memory that got a destination is free.
    fn evict(&self, count: usize) {
        let first = self.coherent.pfn_first();
        let mut src = vec![MigratePfn::default(); count];
        let mut migration = self.coherent.migrate_setup(first, &mut src).unwrap();
        let name = |index| match migration.system_page(index) {
            Some(page) => MigratePfn::new(page, MigrateFlags::LOCKED),
            None => MigratePfn::default(),
        };
        let dst: Vec<_> = (0..count).map(name).collect();
        migration.pages(&mut src, &dst).unwrap();
        migration.finalize();
        let free = self.reached.0.lock().unwrap();
        let all_free = (0..count as u64).all(|page| free.contains(&Pfn::new(first.get() + page)));
        assert!(all_free, "some page did not come home");
    }

    fn exclusive(&mut self, page: usize, write: Option<u8>) {
        let owner = OwnerId::from_word(0x1234_5000);
        let got = self.mm.make_exclusive(self.area.page_at(page), owner, false).unwrap();
        let byte = got.to_addr().unwrap().as_ptr();
        // SAFETY: the page is exclusive and locked: this test has it alone.
        unsafe {
            assert_eq!(byte.read(), self.written[page]);
            if let Some(write) = write {
                byte.write(write);
                self.written[page] = write;
            }
        }
        assert!(unlock_exclusive(got));
    }

    fn look(&self) {
        let mut hmm_pfns = vec![HmmPfn::default(); PAGES];
        let (range, owner) = (self.area, OwnerId::from_word(0));
        let (default_flags, pfn_flags_mask) = (HmmPfn::VALID | HmmPfn::WRITE, 0);
        let mut fault =
            RangeFault { range, owner, default_flags, pfn_flags_mask, hmm_pfns: &mut hmm_pfns };
        self.mm.hmm_range_fault(&mut fault, &|| true).unwrap();
        assert!(hmm_pfns.iter().all(|entry| entry.is_writable()));
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(page, byte) => {
                self.engine.cpu_write(self.area.page_at(page), &[byte]).unwrap();
                self.written[page] = byte;
            }
            Step::ToDevice(first, count) => {
                self.device.migrate(self.part(first, count), 0).unwrap();
            }
            Step::ToCoherent(first, count) => self.to_coherent(self.part(first, count)),
            Step::FromCoherent(first, count) => self.leave_coherent(self.part(first, count)),
            Step::Evict(count) => self.evict(count),
            Step::Exclusive(page, write) => self.exclusive(page, write),
            Step::Undone(first, count) => {
                let select = Select::SYSTEM | Select::DEVICE | Select::COHERENT;
                drop(self.setup(self.part(first, count), select));
            }
            Step::Drop(first, count) => {
                let part = self.part(first, count);
                self.engine.munmap(part);
                self.engine.mmap_fixed(part, FLAGS, VmaKind::Anonymous);
                self.written[first..first + part.pages()].fill(0);
            }
            Step::Look => self.look(),
        }
        self.mm.check_accounts().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_in_any_order(steps in steps()) {
        let mut scene = Scene::new();
        for step in &steps {
            scene.step(step);
        }
        let mut byte = [0];
        for page in 0..PAGES {
            scene.engine.cpu_read(scene.area.page_at(page), &mut byte).unwrap();
            prop_assert_eq!(byte[0], scene.written[page], "page {}", page);
        }
        scene.coherent.remove().unwrap();
        prop_assert_eq!(scene.reached.0.lock().unwrap().len(), PAGES);
        scene.device.remove().unwrap();
        scene.mm.close().unwrap();
    }
}
