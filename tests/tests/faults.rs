//! What the processor and the kernel do with pages that are on a device: loads, stores, system calls, protection,
//! locking, lost data, drivers that fail.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, child_of, is_child, on_device};
use hmm_core::engine::uffd::features;
use hmm_core::{
    Access, AddrRange, Error, Mm, PAGE_SIZE, PfnEntry, PfnFlags, RangeRequest, Residency, VirtAddr,
};
use hmm_soft::{SoftConfig, SoftDevice};
use hmm_tests::{Capabilities, Region, hold, lack, mm_or_skip, needs, present};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

const WORDS: usize = PAGE_SIZE / 8;

fn filled(pages: usize) -> Region {
    let region = Region::new(pages);
    (0..region.words()).for_each(|word| region.word(word).store(word as u64, Ordering::Relaxed));
    region
}

fn is_whole(region: &Region) -> bool {
    (0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == word as u64)
}

fn protect(region: &Region, first: usize, count: usize, protection: i32) {
    let start = region.page_addr(first) as *mut libc::c_void;
    // SAFETY: the pages lie in the region, to which nothing holds references.
    assert_eq!(unsafe { libc::mprotect(start, count * PAGE_SIZE, protection) }, 0);
}

fn last_errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// What a child says before the touch that ends it.
const TOUCHES: &str = "now it touches the page";

/// Runs the rest of a test in a child, which must end by itself (or by `signal`).
fn in_child(test: &str, signal: Option<i32>) {
    let ended = child_of(test, Duration::from_secs(4));
    match ended.skipped() {
        Some(reason) => eprintln!("skipped: {reason}"),
        None if signal.is_some() => {
            assert!(ended.stderr.contains(TOUCHES), "{ended:?}");
            assert_eq!(ended.signal(), signal, "{ended:?}");
        }
        None => assert!(ended.is_good(), "{ended:?}"),
    }
}

#[test]
fn many_threads_on_one_page_bring_it_home_once() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4), filled(1));
    for round in 0..20 {
        assert_eq!(card.all_to_device(region.range()), 1, "round {round}");
        let before = mm.counters().migrated_to_system;
        let barrier = Barrier::new(16);
        std::thread::scope(|scope| {
            for thread in 0..16 {
                let (barrier, region) = (&barrier, &region);
                scope.spawn(move || {
                    barrier.wait();
                    let word = thread * 17;
                    assert_eq!(region.word(word).load(Ordering::Relaxed), word as u64);
                });
            }
        });
        assert!(is_whole(&region));
        // A thread may see the page before the migration that brought it is over, and so counted.
        assert!(card.settles_at(0));
        // None: a message of the round before was answered late, and brought the page home before anybody touched it.
        assert!(mm.counters().migrated_to_system - before <= 1);
    }
    let counters = mm.counters();
    assert!(counters.migrated_to_device >= 20);
    assert_eq!(counters.migrated_to_device, counters.migrated_to_system);
    assert_eq!(card.driver.frees.load(Ordering::SeqCst) as u64, counters.migrated_to_device);
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
}

/// Each system call reads or writes one page of `region` that is on the device.
fn call_through_files(region: &Region) {
    // SAFETY: the name is a terminated string.
    let file = unsafe { libc::memfd_create(c"faults".as_ptr(), 0) };
    assert!(file >= 0);
    let page = |index: usize| region.page_addr(index) as *mut libc::c_void;
    // SAFETY: each pointer leads to a whole page of the region.
    unsafe {
        assert_eq!(libc::write(file, page(0), PAGE_SIZE), PAGE_SIZE as isize);
        assert_eq!(libc::pwrite(file, page(1), PAGE_SIZE, 4096), PAGE_SIZE as isize);
        assert_eq!(libc::lseek(file, 0, libc::SEEK_SET), 0);
        assert_eq!(libc::read(file, page(2), PAGE_SIZE), PAGE_SIZE as isize);
        assert_eq!(libc::pread(file, page(3), PAGE_SIZE, 4096), PAGE_SIZE as isize);
        libc::close(file);
    }
}

fn call_futex(word: &AtomicU64) {
    // SAFETY: the word is mapped; its value is another, so the call returns at once.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, u32::MAX, 0) };
    assert_eq!((result, last_errno()), (-1, libc::EAGAIN));
}

fn read_remotely(addr: u64, out: &mut [u8]) -> isize {
    let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    let remote = libc::iovec { iov_base: addr as *mut libc::c_void, iov_len: out.len() };
    // SAFETY: `local` is `out`; the kernel checks the other side.
    unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) }
}

#[test]
fn system_calls_on_pages_of_a_device_work_as_ever() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(6));
    for _ in 0..10 {
        (0..region.words()).for_each(|at| region.word(at).store(at as u64, Ordering::Relaxed));
        assert_eq!(card.all_to_device(region.range()), 6);
        let _held = hold(&mm, Capabilities::KERNEL_FAULTS, region.range(), true);
        call_through_files(&region);
        call_futex(region.word(4 * WORDS));
        let mut out = [0; PAGE_SIZE];
        assert_eq!(read_remotely(region.page_addr(5), &mut out), PAGE_SIZE as isize);
        assert_eq!(out[..8], (5 * WORDS as u64).to_ne_bytes());
        assert_eq!(on_device(&mm, region.range()), 0);
        for word in 0..2 * WORDS {
            let copied = region.word(2 * WORDS + word).load(Ordering::Relaxed);
            assert_eq!(copied, word as u64);
        }
    }
}

/// As `write`, past every library that would prepare the buffer.
fn write_directly(file: i32, addr: u64, len: usize) -> libc::c_long {
    // SAFETY: the kernel only reads there, or says that it cannot.
    unsafe { libc::syscall(libc::SYS_write, file, addr, len) }
}

#[test]
fn a_system_call_that_cannot_wait_fails_and_changes_nothing() {
    let mm = mm_or_skip!();
    if lack(&mm, Capabilities::KERNEL_FAULTS).is_none() {
        hmm_tests::skip!("engine {} serves system calls", mm.engine_name());
    }
    let (card, region) = (Card::new(&mm, 4), filled(4));
    // SAFETY: the name is a terminated string.
    let file = unsafe { libc::memfd_create(c"faults".as_ptr(), 0) };
    assert_eq!(card.all_to_device(region.part(1, 3)), 3);
    let written = write_directly(file, region.page_addr(1), 8);
    assert_eq!((written, last_errno()), (-1, libc::EFAULT));
    // What is there goes out; the rest is no zeros.
    let written = write_directly(file, region.addr(), 2 * PAGE_SIZE);
    assert!(written == PAGE_SIZE as i64 || written == -1, "{written} bytes were written");
    assert_eq!(on_device(&mm, region.range()), 3);
    let held = mm.guard(region.range(), false).unwrap();
    assert_eq!(write_directly(file, region.addr(), region.len()), region.len() as i64);
    assert_eq!((on_device(&mm, region.range()), card.to_device(region.range()).unwrap()), (0, 0));
    drop(held);
    assert_eq!(card.all_to_device(region.range()), 4);
    assert!(is_whole(&region));
    // SAFETY: the descriptor is this test's.
    unsafe { libc::close(file) };
}

#[test]
fn protection_that_changed_meanwhile_holds_for_pages_that_come_home() {
    if !is_child() {
        let test = "protection_that_changed_meanwhile_holds_for_pages_that_come_home";
        return in_child(test, Some(libc::SIGSEGV));
    }
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, region) = (Card::new(&mm, 256), filled(256));
    for protection in [libc::PROT_READ, libc::PROT_NONE] {
        assert_eq!(card.all_to_device(region.range()), 256);
        protect(&region, 0, 256, protection);
        if protection == libc::PROT_READ {
            assert!(is_whole(&region));
        } else {
            card.to_system(region.range()).unwrap();
            let mut out = [0; 8];
            assert_eq!(read_remotely(region.addr(), &mut out), -1);
        }
        // As a system call would: the kernel may not write there either.
        assert!(mm.write(VirtAddr::new(region.addr()), &[1]).is_err());
        protect(&region, 0, 256, libc::PROT_READ | libc::PROT_WRITE);
        assert!(is_whole(&region));
    }
    assert_eq!(card.all_to_device(region.range()), 256);
    protect(&region, 0, 256, libc::PROT_READ);
    assert!(is_whole(&region));
    eprintln!("{TOUCHES}");
    region.word(0).store(1, Ordering::Relaxed); // SIGSEGV
}

#[test]
fn a_device_does_not_learn_that_it_may_write_what_became_read_only() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, region) = (Card::new(&mm, 2), filled(2));
    assert_eq!(card.all_to_device(region.range()), 2);
    protect(&region, 0, 2, libc::PROT_READ);
    let request = RangeRequest { range: region.range(), owner: Some(card.driver.owner) };
    let mut entries = [PfnEntry::default(); 2];
    mm.range_fault(&request, Access::Read, &mut entries).unwrap();
    assert!(entries.iter().all(|entry| entry.flags().contains(PfnFlags::DEVICE)));
    assert!(entries.iter().all(|entry| !entry.flags().contains(PfnFlags::WRITE)), "{entries:?}");
}

#[test]
fn a_poke_that_begins_in_writable_memory_ends_at_its_border() {
    let mm = mm_or_skip!();
    let region = Region::new(2);
    region.fill(7);
    protect(&region, 1, 1, libc::PROT_READ);
    assert!(!mm.poke(VirtAddr::new(region.page_addr(1) - 4), &[9; 8]));
    let mut out = [0; 4];
    region.read(PAGE_SIZE, &mut out);
    assert_eq!(out, [7; 4], "read-only memory was written");
}

#[test]
fn locking_memory_brings_it_home_and_keeps_it() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 16), filled(16));
    assert_eq!(card.all_to_device(region.range()), 16);
    let start = region.as_ptr().cast();
    let held = hold(&mm, Capabilities::KERNEL_FAULTS, region.range(), true);
    // SAFETY: the region is mapped.
    if unsafe { libc::mlock(start, region.len()) } != 0 {
        hmm_tests::skip!("mlock is refused with errno {}", last_errno());
    }
    drop(held);
    assert!((0..16).all(|page| present(region.page_addr(page))));
    assert_eq!(card.to_device(region.range()).unwrap(), 0);
    assert!(is_whole(&region));
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(start, region.len()) }, 0);
    assert_eq!(card.all_to_device(region.range()), 16);
    assert!(is_whole(&region));
}

/// Whether the kernel itself knows of lost pages. Without that, system calls on them end as touches do.
fn can_poison(mm: &Mm) -> bool {
    let features = features().unwrap_or_default();
    let poison = features.into_iter().find(|feature| feature.name == "poison");
    !mm.serves_kernel() || poison.is_some_and(|poison| poison.offered && !poison.masked)
}

#[test]
fn lost_data_gives_sigbus_at_its_page_and_nowhere_else() {
    if !is_child() {
        let test = "lost_data_gives_sigbus_at_its_page_and_nowhere_else";
        return in_child(test, Some(libc::SIGBUS));
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 3), filled(3));
    assert_eq!(card.all_to_device(region.range()), 3);
    *card.driver.lost.lock().unwrap() = Some(region.page_addr(1));
    assert_eq!(region.word(0).load(Ordering::Relaxed), 0);
    assert_eq!(region.word(2 * WORDS).load(Ordering::Relaxed), 2 * WORDS as u64);
    // On request it is an error, of the library's as of the kernel's.
    let lost = mm.make_present(region.part(1, 1), false);
    assert!(matches!(lost, Err(Error::Lost { .. })), "{lost:?}");
    if can_poison(&mm) {
        let read = read_remotely(region.page_addr(1), &mut [0; 8]);
        assert_eq!((read, last_errno()), (-1, libc::EFAULT));
    }
    let mut places = [Residency::None; 3];
    mm.residency(region.range(), &mut places).unwrap();
    assert_eq!(places, [Residency::System, Residency::Poisoned, Residency::System]);
    assert!(card.settles_at(0));
    assert_eq!(mm.counters().poisoned, 1);
    assert_eq!(card.driver.free_pages(), 3);
    assert_eq!(card.all_to_device(region.range()), 2);
    assert_eq!(region.word(0).load(Ordering::Relaxed), 0);
    eprintln!("{TOUCHES}");
    region.word(WORDS).load(Ordering::Relaxed); // SIGBUS
}

#[test]
fn a_driver_that_names_no_destination_changes_nothing() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    card.driver.refuses.store(true, Ordering::SeqCst);
    assert_eq!(card.to_device(region.range()).unwrap(), 0);
    assert!((0..64).all(|page| present(region.page_addr(page))));
    assert!(is_whole(&region));
    card.driver.refuses.store(false, Ordering::SeqCst);
    assert_eq!(card.all_to_device(region.range()), 64);
    card.driver.refuses.store(true, Ordering::SeqCst);
    assert_eq!(card.to_system(region.range()).unwrap(), 0);
    assert_eq!(on_device(&mm, region.range()), 64);
    card.driver.refuses.store(false, Ordering::SeqCst);
    assert!(is_whole(&region));
    assert!(card.settles_at(0));
    assert_eq!(card.driver.free_pages(), 64);
}

#[test]
fn a_panic_in_the_copy_restores_every_page() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 256), filled(128));
    card.when_copying(|| panic!("on purpose"));
    assert!(catch_unwind(AssertUnwindSafe(|| card.to_device(region.range()))).is_err());
    assert!(is_whole(&region));
    assert!(card.settles_at(0));
    card.calm();
    assert_eq!(card.all_to_device(region.range()), 128);
    card.when_copying(|| panic!("on purpose"));
    assert!(catch_unwind(AssertUnwindSafe(|| card.to_system(region.range()))).is_err());
    assert_eq!(on_device(&mm, region.range()), 128);
    card.calm();
    assert!(is_whole(&region));
    assert!(card.settles_at(0));
}

#[test]
fn a_copy_callback_that_touches_its_own_batch_is_named_and_does_not_hang_in_silence() {
    let test = "a_copy_callback_that_touches_its_own_batch_is_named_and_does_not_hang_in_silence";
    if !is_child() {
        let ended = child_of(test, Duration::from_secs(3));
        let named = ended.stderr.contains("libhmm: ");
        assert!(ended.skipped().is_some() || named, "{ended:?}");
        return;
    }
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), Arc::new(filled(8)));
    let own = Arc::clone(&region);
    card.when_copying(move || _ = own.word(5).load(Ordering::Relaxed));
    let _ = card.to_device(region.range());
}

#[test]
fn the_heap_on_which_the_library_lives_may_be_asked_for() {
    if !is_child() {
        return in_child("the_heap_on_which_the_library_lives_may_be_asked_for", None);
    }
    let mm = mm_or_skip!();
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let probe = Box::new([1_u8; 64]);
    // What malloc has given to this thread so far, the library's own objects among it.
    let page = VirtAddr::from_ptr(&*probe).page();
    let vma = mm.find_vma(page).unwrap().unwrap().range;
    let around = AddrRange::new(page.get() & !((64 << 20) - 1), page.get() + 4096).unwrap();
    let range = around.intersect(vma).unwrap();
    for _ in 0..20 {
        match device.migrate(range) {
            Ok(_) | Err(Error::Busy { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        drop(mm.track(range).unwrap());
    }
    assert_eq!(*probe, [1; 64]);
    device.close().unwrap();
}
