//! hmm.txt sections 1 to 3: ordinary memory on devices, what may not be assumed of hardware, who decides.

use crate::common::{
    WORDS, copy_all, filled, get, is_whole, map, memory_file, migrate, set, wait_for,
};
use crate::driver::{Card, on_device};
use crate::gpu::Gpu;
use hmm_core::{
    Access, AddrRange, CpuFault, Devmem, DevmemOps, Error, FaultError, MigrateBatch, MigrateFlags,
    MigrateOps, MigratePfn, MigrateRequest, OwnerId, PAGE_SIZE, Pfn, Residency, Select, VirtAddr,
};
use hmm_soft::{Kernel, Policy, SoftConfig, SoftDevice};
use hmm_tests::{Region, mm_or_skip, present};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn word_at(addr: u64) -> &'static AtomicU64 {
    // SAFETY: callers name aligned words of memory that stays mapped.
    unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(addr as usize)) }
}

fn bytes_from_malloc(bytes: usize) -> u64 {
    // SAFETY: the memory is never given back.
    unsafe { libc::malloc(bytes) }.expose_provenance() as u64
}

#[test]
fn promise_01_memory_of_every_allocator_works_by_its_pointer() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let (file, private) = (memory_file(8 * PAGE_SIZE), memory_file(8 * PAGE_SIZE));
    let anonymous = libc::MAP_ANONYMOUS;
    let mapped = |flags, file| map(8, READ_WRITE, flags, file).start().get();
    let kinds = [
        ("a few bytes of malloc", bytes_from_malloc(64), 8),
        ("malloc", bytes_from_malloc(1 << 20), 4096),
        ("private anonymous", mapped(libc::MAP_PRIVATE | anonymous, -1), 8 * WORDS),
        ("shared anonymous", mapped(libc::MAP_SHARED | anonymous, -1), 8 * WORDS),
        ("shared file", mapped(libc::MAP_SHARED, file.as_raw_fd()), 8 * WORDS),
        ("private file", mapped(libc::MAP_PRIVATE, private.as_raw_fd()), 8 * WORDS),
    ];
    for (kind, addr, words) in kinds {
        device.run(Kernel::Fill { dst: addr, len: words as u64 * 8, byte: 1 }).unwrap();
        let all = (0..words).all(|word| {
            word_at(addr + word as u64 * 8).load(Ordering::SeqCst) == 0x0101_0101_0101_0101
        });
        assert!(all, "{kind}");
        (0..words).for_each(|word| word_at(addr + word as u64 * 8).store(3, Ordering::SeqCst));
        let sum = device.run(Kernel::SumU64 { src: addr, count: words as u64 });
        assert_eq!(sum, Ok(3 * words as u64), "{kind}");
    }
}

#[test]
fn promise_02_linked_nodes_are_walked_with_the_same_pointers() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    // Nodes of two words, scattered over a region; the last is on the heap.
    let region = Region::new(64);
    let last = Box::new([AtomicU64::new(0), AtomicU64::new(1000)]);
    let last = std::ptr::from_ref(&*last).expose_provenance() as u64;
    let mut next = last;
    for node in 0..500 {
        let word = node * 331 % 16_000 * 2;
        set(&region, word, next);
        set(&region, word + 1, node as u64);
        next = region.addr() + word as u64 * 8;
    }
    let walk =
        Kernel::ChaseSumU64 { head: next, next_offset: 0, value_offset: 8, max_steps: 10_000 };
    let expected = 1000 + (0..500).sum::<u64>();
    assert_eq!(device.run(walk), Ok(expected));
    device.migrate(region.part(0, 32)).unwrap();
    assert_eq!(device.run(walk), Ok(expected));
}

#[test]
fn promise_03_what_a_library_hands_out_can_be_used_without_its_knowing() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    // libc allocates, and knows of no device.
    // SAFETY: the text is a C string, and the copy is never given back.
    let text = unsafe { libc::strdup(c"memory of somebody else".as_ptr()) };
    let (src, result) = (text.expose_provenance() as u64, Region::new(1));
    device.run(Kernel::Copy { dst: result.addr(), src, len: 23 }).unwrap();
    let mut out = [0; 23];
    result.read(0, &mut out);
    assert_eq!(&out, b"memory of somebody else");
}

#[test]
fn promise_04_the_cpu_finds_the_result_at_the_same_address() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = filled(16);
    device.migrate(region.range()).unwrap();
    let add = |page: usize| Kernel::AddU64 {
        addr: region.page_addr(page),
        count: WORDS as u64,
        stride: 8,
        value: 1,
    };
    (0..16).for_each(|page| assert_eq!(device.run(add(page)), Ok(0)));
    assert!((0..region.words()).all(|word| get(&region, word) == word as u64 + 1));
}

#[test]
fn promise_05_one_call_serves_memory_wherever_it_is() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let region = filled(16);
    let sum = Kernel::SumU64 { src: region.addr(), count: region.words() as u64 };
    let expected = (0..region.words() as u64).sum::<u64>();
    // In system memory, half of it on the device, all of it there: the same call.
    for away in [0, 8, 16] {
        if away > 0 {
            device.migrate(region.part(0, away)).unwrap();
        }
        assert_eq!((on_device(&mm, region.range()), device.run(sum)), (away, Ok(expected)));
    }
}

/// A device whose memory has no address: only its copy engine reaches it.
struct Unreachable {
    memory: File,
    next: AtomicUsize,
    first: OnceLock<Pfn>,
    owner: OwnerId,
}

impl Unreachable {
    fn offset(&self, page: Pfn) -> u64 {
        (page.get() - self.first.get().unwrap().get()) * PAGE_SIZE as u64
    }

    fn move_pages(
        &self,
        mm: &Arc<hmm_core::Mm>,
        range: AddrRange,
        select: Select,
    ) -> Result<(), Error> {
        let mut src = vec![MigratePfn::default(); range.pages()];
        let mut dst = src.clone();
        let request = MigrateRequest { range, select, owner: Some(self.owner), fault_page: None };
        mm.migrate(&request, &mut Transfer(self), &mut src, &mut dst)
    }
}

struct Transfer<'a>(&'a Unreachable);

impl Transfer<'_> {
    fn copy(&self, batch: &mut MigrateBatch<'_>, index: usize) -> MigratePfn {
        let source = batch.src[index].pfn().unwrap();
        let mut bytes = [0; PAGE_SIZE];
        if source.is_device() {
            let to = batch.alloc_system_page(batch.range.page_at(index)).unwrap();
            self.0.memory.read_exact_at(&mut bytes, self.0.offset(source)).unwrap();
            // SAFETY: the frame belongs to the running migration alone.
            unsafe { to.to_addr().unwrap().as_ptr().copy_from(bytes.as_ptr(), PAGE_SIZE) };
            return MigratePfn::new(to, MigrateFlags::LOCKED);
        }
        // SAFETY: as above.
        unsafe { source.to_addr().unwrap().as_ptr().copy_to(bytes.as_mut_ptr(), PAGE_SIZE) };
        let number = self.0.next.fetch_add(1, Ordering::SeqCst) as u64;
        let page = Pfn::new(self.0.first.get().unwrap().get() + number);
        self.0.memory.write_all_at(&bytes, self.0.offset(page)).unwrap();
        MigratePfn::new(page, MigrateFlags::LOCKED | MigrateFlags::DEVICE)
    }
}

impl MigrateOps for Transfer<'_> {
    fn alloc_and_copy(&mut self, batch: &mut MigrateBatch<'_>) {
        for index in 0..batch.src.len() {
            if batch.src[index].migrates() {
                batch.dst[index] = self.copy(batch, index);
            }
        }
    }
    fn finalize_and_map(&mut self, _: &MigrateBatch<'_>) {}
}

impl DevmemOps for Unreachable {
    fn free(&self, _: &Devmem, page: Pfn) {
        self.memory.write_all_at(&[0xee; PAGE_SIZE], self.offset(page)).unwrap();
    }
    fn fault(&self, _: &Devmem, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        let page = AddrRange::covering(fault.addr.get(), 1).unwrap();
        self.move_pages(fault.mm, page, Select::DEVICE).map_err(|_| FaultError::SigBus)
    }
}

#[test]
fn promise_06_device_memory_need_not_have_an_address() {
    let mm = mm_or_skip!();
    let device = Arc::new(Unreachable {
        memory: memory_file(32 * PAGE_SIZE),
        next: AtomicUsize::new(0),
        first: OnceLock::new(),
        owner: OwnerId::unique(),
    });
    let devmem = Devmem::add(device.clone(), device.owner, 32).unwrap();
    device.first.set(devmem.pfn_first()).unwrap();
    let region = filled(32);
    device.move_pages(&mm, region.range(), Select::SYSTEM).unwrap();
    assert_eq!(on_device(&mm, region.range()), 32);
    assert!(is_whole(&region));
    devmem.remove().unwrap();
}

#[test]
fn promise_07_a_device_with_a_cache_of_its_own_is_in_step_at_callbacks() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let gpu = Gpu::new(&mm, region.range());
    gpu.map(region.range(), Access::Write).unwrap();
    // A store that is still in the device's cache: memory does not have it, and nobody else sees it.
    let cached = Arc::new(AtomicU64::new(777));
    assert_eq!(get(&region, 0), 0);
    let (cache, memory, addr) = (Arc::clone(&cached), Arc::clone(&mm), region.addr());
    gpu.table.in_callbacks(move || {
        let value = cache.swap(0, Ordering::SeqCst);
        if value != 0 {
            assert!(memory.poke(VirtAddr::new(addr), &value.to_ne_bytes()));
        }
    });
    // Migration, for another device, does not lose it: the cache is written back before the copy.
    assert_eq!(card.all_to_device(region.range()), 4);
    assert_eq!((cached.load(Ordering::SeqCst), get(&region, 0)), (0, 777));
    assert!((1..region.words()).all(|word| get(&region, word) == word as u64));
}

#[test]
fn promise_08_a_device_without_atomics_is_enough() {
    let mm = mm_or_skip!();
    let config = SoftConfig { policy: Policy::Never, ..SoftConfig::default() };
    let (device, region) = (SoftDevice::new(&mm, config).unwrap(), filled(4));
    // It has none for system memory, and everything else works by plain loads and stores.
    let atomic = device.run(Kernel::AtomicAddU64 { addr: region.addr(), value: 1 });
    assert!(atomic.is_err(), "{atomic:?}");
    let count = region.words() as u64;
    device.run(Kernel::AddU64 { addr: region.addr(), count, stride: 8, value: 5 }).unwrap();
    let (card, gpu) = (Card::new(&mm, 4), Gpu::new(&mm, region.range()));
    assert_eq!(card.all_to_device(region.range()), 4);
    gpu.write(region.page_addr(1), 9).unwrap();
    assert_eq!(gpu.read(region.page_addr(2)), Ok(2 * WORDS as u64 + 5));
    assert_eq!((get(&region, 0), get(&region, WORDS)), (5, 9));
}

#[test]
fn promise_09_memory_migrates_while_devices_and_processors_use_it() {
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let (region, stop) = (Region::new(32), AtomicBool::new(false));
    region.fill(0);
    let stride = PAGE_SIZE as u64;
    let (mut jobs, mut adds) = (0, 0);
    std::thread::scope(|scope| {
        let processor = scope.spawn(|| {
            let mut rounds = 0;
            while !stop.load(Ordering::SeqCst) {
                (0..32).for_each(|page| {
                    _ = region.word(page * WORDS + 1).fetch_add(1, Ordering::SeqCst)
                });
                rounds += 1;
            }
            rounds
        });
        for round in 0..40 {
            let add = Kernel::AddU64 { addr: region.addr(), count: 32, stride, value: 1 };
            let job = device.submit(add).unwrap();
            if round % 3 == 0 {
                device.bring_home(region.range()).unwrap();
            } else {
                device.migrate(region.range()).unwrap();
            }
            job.wait(std::time::Duration::from_secs(10)).unwrap();
            jobs += 1;
        }
        stop.store(true, Ordering::SeqCst);
        adds = processor.join().unwrap();
    });
    for page in 0..32 {
        assert_eq!(get(&region, page * WORDS + 1), adds, "page {page}");
        assert_eq!(get(&region, page * WORDS), jobs, "page {page}");
    }
}

#[test]
fn promise_10_many_pages_go_in_one_call() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2000), filled(2000));
    let (mut copies, mut ends) = (0, 0);
    let copy = |batch: &mut MigrateBatch<'_>| {
        copies += 1;
        copy_all(&card, batch);
    };
    let lists = migrate(&card, region.range(), Select::SYSTEM, copy, |_| ends += 1);
    assert_eq!(lists.moved(), on_device(&mm, region.range()));
    // Once for all of them, but for a few that something held for a moment.
    assert!(lists.moved() >= 1900 && copies == ends && copies < 10, "{copies}");
    assert!(is_whole(&region));
}

#[test]
fn promise_11_the_devices_table_resolves_to_the_same_pages() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(16));
    let gpu = Gpu::of(&card, region.range());
    assert_eq!(card.all_to_device(region.part(8, 8)), 8);
    gpu.map(region.range(), Access::Write).unwrap();
    let mut places = [Residency::None; 16];
    mm.residency(region.range(), &mut places).unwrap();
    for (page, place) in places.iter().enumerate() {
        let addr = region.page_addr(page);
        let expected = match place {
            Residency::Device(pfn) => *pfn,
            _ => Pfn::of_addr(VirtAddr::new(addr)),
        };
        assert_eq!(gpu.table.entry(addr).pfn(), Some(expected), "page {page}");
        assert_eq!(gpu.load(addr), Some((page * WORDS) as u64), "page {page}");
    }
    // One page, not two: each side sees the other's stores at once.
    set(&region, 3, 33);
    assert_eq!(gpu.load(region.addr() + 24), Some(33));
    assert!(gpu.store(region.addr() + 32, 44));
    assert_eq!(get(&region, 4), 44);
}

#[test]
fn promise_12_only_the_driver_writes_the_devices_table() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    let gpu = Gpu::of(&card, region.range());
    gpu.map(region.range(), Access::Read).unwrap();
    let before = gpu.table.entries.lock().unwrap().clone();
    // A driver that does nothing in its callbacks finds the table as it left it, whatever happened to the pages.
    gpu.table.is_lazy.store(true, Ordering::SeqCst);
    assert_eq!(card.all_to_device(region.range()), 16);
    assert!(is_whole(&region));
    wait_for("callbacks", || gpu.table.running.load(Ordering::SeqCst) == 0);
    assert!(gpu.table.calls.load(Ordering::SeqCst) > 0);
    assert_eq!(*gpu.table.entries.lock().unwrap(), before);
}

#[test]
fn promise_13_each_device_page_has_a_descriptor_and_is_as_if_swapped_out() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    let (first, last) = (card.devmem.pfn_first().get(), card.devmem.pfn_last().get());
    assert_eq!(last - first, 16);
    (first..last).for_each(|pfn| card.devmem.set_drvdata(Pfn::new(pfn), !pfn));
    assert!((first..last).all(|pfn| card.devmem.drvdata(Pfn::new(pfn)) == !pfn));
    assert_eq!(card.all_to_device(region.range()), 16);
    assert!((0..16).all(|page| !present(region.page_addr(page))));
    // An access faults, and has the contents then.
    assert_eq!(get(&region, 5 * WORDS), 5 * WORDS as u64);
    assert_eq!(card.driver.faults.load(Ordering::SeqCst), 1);
    assert!(present(region.page_addr(5)));
}

#[test]
fn promise_14_the_cpu_never_maps_a_device_page() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(4));
    let lists =
        migrate(&card, region.range(), Select::SYSTEM, |batch| copy_all(&card, batch), |_| ());
    assert_eq!(lists.moved(), 4);
    let pages: Vec<Pfn> = lists.dst.iter().map(|dst| dst.pfn().unwrap()).collect();
    assert!(pages.iter().all(|page| page.to_addr().is_none()));
    assert!((0..4).all(|page| !present(region.page_addr(page))));
    // What the processor stores goes to a page of its own; the device's keeps what it had.
    (0..4).for_each(|page| set(&region, page * WORDS, 99));
    for (index, page) in pages.iter().enumerate() {
        let frame = card.driver.frame(*page).cast::<u64>();
        // SAFETY: the word lies in the card's memory, and nobody writes it now.
        assert_eq!(unsafe { frame.read() }, (index * WORDS) as u64);
    }
}

#[test]
fn promise_15_every_access_of_the_cpu_brings_the_page_home() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(region.range()), 8);
    let at = |page: usize| page * WORDS + 7;
    std::thread::scope(|scope| {
        let load = scope.spawn(|| assert_eq!(get(&region, at(0)), at(0) as u64));
        let store = scope.spawn(|| set(&region, at(1), 1));
        let add = scope.spawn(|| _ = region.word(at(2)).fetch_add(1, Ordering::SeqCst));
        [load, store, add].into_iter().for_each(|thread| thread.join().unwrap());
    });
    let mut bytes = [0; 8];
    let addr = VirtAddr::new(region.page_addr(3) + 56);
    assert_eq!(mm.read(addr, &mut bytes), Ok(8));
    assert_eq!(u64::from_ne_bytes(bytes), at(3) as u64);
    assert_eq!(on_device(&mm, region.range()), 4);
    assert_eq!(get(&region, at(1)), 1);
    assert_eq!(get(&region, at(2)), at(2) as u64 + 1);
    let others = (0..region.words()).filter(|word| ![at(1), at(2)].contains(word));
    others.for_each(|word| assert_eq!(get(&region, word), word as u64));
    assert_eq!(on_device(&mm, region.range()), 0);
}

#[test]
fn promise_16_nothing_migrates_to_a_device_by_itself() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let gpu = Gpu::of(&card, region.range());
    for page in 0..64 {
        gpu.write(region.page_addr(page), 1).unwrap();
        assert_eq!(gpu.read(region.page_addr(page)), Ok(1));
        set(&region, page * WORDS, 2);
    }
    mm.make_present(region.range(), true).unwrap();
    mm.sync();
    assert_eq!((mm.counters().migrated_to_device, card.driver.free_pages()), (0, 64));
    assert_eq!(on_device(&mm, region.range()), 0);
}

#[test]
fn promise_17_mirrors_and_migration_do_without_one_another() {
    let mm = mm_or_skip!();
    // A mirror, and no device memory anywhere.
    let region = filled(8);
    let gpu = Gpu::new(&mm, region.range());
    gpu.write(region.addr(), 5).unwrap();
    assert_eq!((get(&region, 0), gpu.read(region.addr() + 8)), (5, Ok(1)));
    gpu.notifier.remove().unwrap();
    // Device memory, and no mirror.
    let (card, other) = (Card::new(&mm, 8), filled(8));
    assert_eq!(card.all_to_device(other.range()), 8);
    assert!(is_whole(&other));
}
