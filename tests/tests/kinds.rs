//! Kinds of memory: each migrates with its data, or stays where it is and says why, page by page.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, on_device};
use hmm_core::{PAGE_SIZE, Protection, Select, Stay, VirtAddr, VmaKind};
use hmm_tests::{lack, mm_or_skip, needs, skip};
use kind::{Memory, PRIVATE, READ_WRITE, check_migrates, check_stays, send, send_from};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGES: usize = 16;

/// A file in a folder, of so many pages of ones; without a name.
fn file_in(folder: &Path, pages: usize) -> Option<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("hmm-kinds-{}-{number}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).ok()?;
    std::fs::remove_file(path).unwrap();
    file.write_all_at(&vec![1; pages * PAGE_SIZE], 0).unwrap();
    Some(file)
}

fn memory_file(flags: u32) -> Option<File> {
    // SAFETY: the name is a C string; the new descriptor belongs to the file alone.
    unsafe {
        let descriptor = libc::memfd_create(c"hmm-kinds".as_ptr(), libc::MFD_CLOEXEC | flags);
        (descriptor >= 0).then(|| File::from_raw_fd(descriptor))
    }
}

#[test]
fn private_anonymous_memory_migrates() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    check_migrates(&card, &memory);
}

#[test]
fn shared_anonymous_memory_stays_and_says_so() {
    let mm = mm_or_skip!();
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let (card, memory) = (Card::new(&mm, PAGES), Memory::map(PAGES, READ_WRITE, flags, -1));
    memory.fill();
    check_stays(&card, &memory, Stay::Shared);
    assert_eq!(memory.wrong_pages(), 0);
}

#[test]
fn memory_files_stay_and_say_so() {
    let mm = mm_or_skip!();
    let Some(file) = memory_file(0) else { skip!("memfd_create is refused") };
    file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
    let card = Card::new(&mm, PAGES);
    let memory = Memory::map(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    memory.fill();
    check_stays(&card, &memory, Stay::Shared);
    assert_eq!(memory.wrong_pages(), 0);
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, PAGE_SIZE as u64).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), memory.word(1, 0).load(Ordering::Relaxed));
}

#[test]
fn files_in_memory_stay_and_say_so() {
    let mm = mm_or_skip!();
    let Some(file) = file_in(Path::new("/dev/shm"), PAGES) else { skip!("there is no /dev/shm") };
    let card = Card::new(&mm, PAGES);
    let memory = Memory::map(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    memory.fill();
    let vma = mm.vma_covering(memory.range()).unwrap();
    assert!(matches!(vma.kind, VmaKind::Shared | VmaKind::SharedFile), "{vma:?}");
    check_stays(&card, &memory, vma.stays().unwrap());
    assert_eq!(memory.wrong_pages(), 0);
}

#[test]
fn shared_files_stay_and_say_so() {
    let mm = mm_or_skip!();
    let Some(file) = file_in(&std::env::temp_dir(), PAGES) else { skip!("no temporary files") };
    let card = Card::new(&mm, PAGES);
    let memory = Memory::map(PAGES, READ_WRITE, libc::MAP_SHARED, file.as_raw_fd());
    memory.fill();
    let vma = mm.vma_covering(memory.range()).unwrap();
    // The temporary folder may be in memory.
    assert!(matches!(vma.kind, VmaKind::Shared | VmaKind::SharedFile), "{vma:?}");
    check_stays(&card, &memory, vma.stays().unwrap());
    assert_eq!(memory.wrong_pages(), 0);
}

#[test]
fn private_files_migrate_or_say_that_the_engine_cannot() {
    let mm = mm_or_skip!();
    let Some(file) = file_in(&std::env::temp_dir(), PAGES) else { skip!("no temporary files") };
    let card = Card::new(&mm, PAGES);
    let memory = Memory::map(PAGES, READ_WRITE, libc::MAP_PRIVATE, file.as_raw_fd());
    memory.fill();
    match lack(&mm, hmm_tests::Capabilities::PRIVATE_FILES) {
        Some(_) => check_stays(&card, &memory, Stay::File),
        None => check_migrates(&card, &memory),
    }
    let mut bytes = vec![0; PAGES * PAGE_SIZE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1), "the file changed");
}

#[test]
fn pages_beyond_the_end_of_a_file_say_so() {
    let mm = mm_or_skip!();
    needs!(mm, PRIVATE_FILES);
    let Some(file) = file_in(&std::env::temp_dir(), 4) else { skip!("no temporary files") };
    let card = Card::new(&mm, PAGES);
    let memory = Memory::map(8, READ_WRITE, libc::MAP_PRIVATE, file.as_raw_fd());
    (0..4).for_each(|page| memory.fill_page(page));
    assert_eq!(card.all_to_device(memory.part(0, 4)), 4);
    let said = send(&card, memory.range());
    assert!(said[4..].iter().all(|one| *one == Some(Stay::File)), "{said:?}");
    assert!((0..4).all(|page| memory.has_pattern(page)));
}

#[test]
fn the_heap_of_brk_migrates() {
    let mm = mm_or_skip!();
    let bytes = (PAGES + 1) * PAGE_SIZE;
    // SAFETY: the memory between the two ends is new, and malloc keeps away from what it did not ask for.
    let start = unsafe { libc::sbrk(bytes as isize) };
    if start.addr() == usize::MAX {
        skip!("brk is refused");
    }
    let addr = (start.expose_provenance() as u64).next_multiple_of(PAGE_SIZE as u64);
    let (card, memory) = (Card::new(&mm, PAGES), Memory::lent(addr, PAGES));
    check_migrates(&card, &memory);
    memory.fill();
    assert_eq!(card.all_to_device(memory.part(0, PAGES / 2)), PAGES / 2);
    card.to_system(memory.range()).unwrap();
    assert_eq!(memory.wrong_pages(), 0);
    // SAFETY: asks where the end is.
    let end = unsafe { libc::sbrk(0) };
    if end.addr() != start.addr() + bytes {
        skip!("malloc used brk meanwhile: it cannot shrink");
    }
    // What the program gives back is gone, also on the device, and comes back as zeros.
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    // SAFETY: these are the bytes from above.
    unsafe { libc::sbrk(-(bytes as isize)) };
    mm.sync();
    // SAFETY: as above.
    let again = unsafe { libc::sbrk(bytes as isize) };
    if again == start {
        assert!((0..PAGES).all(|page| memory.is_zero(page)));
    }
    assert!(card.settles_at(0));
}

#[test]
fn read_only_and_inaccessible_memory_stays_and_says_so() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let all = READ_WRITE | libc::PROT_EXEC;
    for protection in [libc::PROT_READ, libc::PROT_NONE, libc::PROT_READ | libc::PROT_EXEC, all] {
        memory.protect(protection);
        check_stays(&card, &memory, Stay::Protection);
        memory.protect(READ_WRITE);
        assert_eq!(memory.wrong_pages(), 0);
    }
    check_migrates(&card, &memory);
    let fresh = Memory::map(PAGES, libc::PROT_NONE, PRIVATE, -1);
    check_stays(&card, &fresh, Stay::Protection);
}

#[test]
fn memory_of_the_kernel_stays_and_says_so() {
    let mm = mm_or_skip!();
    // SAFETY: asks for a number.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if vdso == 0 {
        skip!("this kernel maps no vdso");
    }
    let (card, memory) = (Card::new(&mm, PAGES), Memory::lent(vdso, 1));
    check_stays(&card, &memory, Stay::Special);
}

#[test]
fn pinned_memory_and_memory_of_the_library_say_which() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    mm.pin_range(memory.part(2, 1)).unwrap();
    let guard = mm.guard(memory.part(5, 2), true).unwrap();
    let said = send(&card, memory.range());
    for (page, said) in said.iter().enumerate() {
        let kept = [2, 5, 6].contains(&page);
        assert_eq!(*said, kept.then_some(Stay::Pinned), "page {page}");
    }
    drop(guard);
    mm.unpin_range(memory.part(2, 1)).unwrap();
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    assert_eq!(memory.wrong_pages(), 0);
    let core = std::sync::Arc::as_ptr(&mm) as u64;
    let object = Memory::lent(VirtAddr::new(core).page().get(), 1);
    assert_eq!(send(&card, object.range()), [Some(Stay::Library)]);
}

#[test]
fn a_request_says_what_it_did_not_select_and_what_belongs_to_others() {
    let mm = mm_or_skip!();
    let (card, other) = (Card::new(&mm, PAGES), Card::new(&mm, PAGES));
    let memory = Memory::filled(PAGES);
    assert_eq!(card.all_to_device(memory.part(0, 4)), 4);
    assert_eq!(other.all_to_device(memory.part(4, 4)), 4);
    let said = send(&card, memory.part(0, 8));
    assert!(said.iter().all(|one| *one == Some(Stay::NotSelected)), "{said:?}");
    let said = send_from(&card, memory.part(0, 8), Select::DEVICE);
    assert_eq!(said[..4], [None; 4]);
    assert_eq!(said[4..], [Some(Stay::Foreign); 4]);
    let said = send_from(&card, memory.part(8, 2), Select::DEVICE);
    assert_eq!(said, [Some(Stay::NotSelected); 2]);
    assert_eq!(memory.wrong_pages(), 0);
}

#[test]
fn the_driver_s_own_doing_is_told_from_the_rest() {
    let mm = mm_or_skip!();
    // Room for four pages: the driver leaves out the others.
    let (card, memory) = (Card::new(&mm, 4), Memory::filled(PAGES));
    let said = send(&card, memory.range());
    assert_eq!(said.iter().filter(|one| one.is_none()).count(), 4, "{said:?}");
    assert_eq!(said.iter().filter(|one| **one == Some(Stay::LeftOut)).count(), PAGES - 4);
    *card.driver.lost.lock().unwrap() = Some(memory.part(0, 1).start().get());
    assert!(mm.make_present(memory.part(0, 1), false).is_err());
    assert_eq!(send(&card, memory.part(0, 1)), [Some(Stay::Poisoned)]);
    *card.driver.lost.lock().unwrap() = None;
    assert!((1..PAGES).all(|page| memory.has_pattern(page)));
}

#[test]
fn the_stack_of_the_caller_stays_and_says_so() {
    let mm = mm_or_skip!();
    let card = Card::new(&mm, PAGES);
    let here = AtomicU64::new(77);
    let page = VirtAddr::new((&raw const here).expose_provenance() as u64).page();
    let memory = Memory::lent(page.get(), 1);
    assert_eq!(send(&card, memory.range()), [Some(Stay::Needed)]);
    assert_eq!(here.load(Ordering::Relaxed), 77);
}

/// What a thread with a stack of the test's own does: it calls itself, and each call counts in its own frame.
struct Deep {
    stop: AtomicBool,
    rounds: AtomicU64,
    wrong: AtomicU64,
    /// The lowest address of what the system keeps at the top of the stack.
    top: AtomicU64,
    ready: AtomicBool,
    signal_stack: Memory,
}

fn descend(deep: &Deep, depth: u64) -> u64 {
    let mut words = [depth; 400];
    std::hint::black_box(&mut words);
    let below = if depth == 0 { 0 } else { descend(deep, depth - 1) };
    let sum: u64 = std::hint::black_box(&words).iter().sum();
    if sum != depth * 400 || below != depth.saturating_sub(1) * 400 && depth > 0 {
        deep.wrong.fetch_add(1, Ordering::Relaxed);
    }
    sum
}

extern "C" fn live_on_own_stack(deep: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the test keeps it until the thread has ended.
    let deep = unsafe { &*deep.cast::<Deep>() };
    let stack = libc::stack_t {
        ss_sp: deep.signal_stack.as_ptr(),
        ss_flags: 0,
        ss_size: deep.signal_stack.len(),
    };
    // SAFETY: the signal stack is mapped as long as the thread runs.
    unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
    // SAFETY: asks for an address.
    let thread = unsafe { libc::pthread_self() } as u64;
    // SAFETY: asks for an address; what is local to the thread lies around it.
    let local = unsafe { libc::__errno_location() }.expose_provenance() as u64;
    deep.top.store(thread.min(local), Ordering::Release);
    deep.ready.store(true, Ordering::Release);
    while !deep.stop.load(Ordering::Relaxed) {
        descend(deep, 20);
        deep.rounds.fetch_add(1, Ordering::Relaxed);
    }
    std::ptr::null_mut()
}

#[test]
fn stacks_of_other_threads_migrate() {
    let mm = mm_or_skip!();
    let (card, stack) = (Card::new(&mm, 64), Memory::map(64, READ_WRITE, PRIVATE, -1));
    let deep = Deep {
        stop: AtomicBool::new(false),
        rounds: AtomicU64::new(0),
        wrong: AtomicU64::new(0),
        top: AtomicU64::new(0),
        ready: AtomicBool::new(false),
        signal_stack: Memory::map(16, READ_WRITE, PRIVATE, -1),
    };
    mm.pin_range(deep.signal_stack.range()).unwrap();
    // SAFETY: all zeros is a place to initialise.
    let (mut thread, mut attributes) = unsafe { std::mem::zeroed::<(libc::pthread_t, _)>() };
    let argument = (&raw const deep).cast_mut().cast();
    // SAFETY: the stack is mapped, and lives until the thread is joined.
    let started = unsafe {
        libc::pthread_attr_init(&mut attributes);
        libc::pthread_attr_setstack(&mut attributes, stack.as_ptr(), stack.len());
        libc::pthread_create(&mut thread, &attributes, live_on_own_stack, argument)
    };
    assert_eq!(started, 0);
    while !deep.ready.load(Ordering::Acquire) {
        std::thread::yield_now();
    }
    // What the kernel writes to by itself (rseq, at the top) must not be away where it cannot wait.
    let top = deep.top.load(Ordering::Acquire);
    let first = ((top - stack.addr()) as usize / PAGE_SIZE).saturating_sub(2);
    let kept = stack.part(first, stack.pages() - first);
    mm.pin_range(kept).unwrap();
    let (mut left, before) = (0, deep.rounds.load(Ordering::Relaxed));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    for _ in 0..50 {
        left += send(&card, stack.range()).iter().filter(|one| one.is_none()).count();
    }
    while deep.rounds.load(Ordering::Relaxed) < before + 100 {
        assert!(std::time::Instant::now() < deadline, "the thread hangs");
        std::thread::yield_now();
    }
    deep.stop.store(true, Ordering::Relaxed);
    // SAFETY: the thread was started above, and is joined once.
    unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
    assert_eq!(deep.wrong.load(Ordering::Relaxed), 0);
    assert!(left > 0, "no page of the stack left");
    card.to_system(stack.range()).unwrap();
    mm.unpin_range(kept).unwrap();
    mm.unpin_range(deep.signal_stack.range()).unwrap();
    assert_eq!(on_device(&mm, stack.range()), 0);
}

#[test]
fn a_mapping_says_beforehand_what_a_migration_would() {
    let mm = mm_or_skip!();
    let memory = Memory::filled(2);
    let vma = || mm.vma_covering(memory.range()).unwrap();
    assert!(vma().can_migrate() && vma().stays().is_none());
    memory.protect(libc::PROT_READ);
    assert!(!vma().can_migrate() && vma().protection == Protection::READ);
    assert_eq!(vma().stays(), Some(Stay::Protection));
}
