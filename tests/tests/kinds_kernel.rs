//! Memory that the kernel has a hand in: locked, pinned for I/O, watched by another userfaultfd, lazily freed, merged,
//! swapped out, of huge pages. Each migrates with its data, or stays where it is and says why, page by page.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, on_device};
use hmm_core::{PAGE_SIZE, Stay, VmaKind};
use hmm_tests::{Capabilities, hold, mm_or_skip, needs, skip};
use kind::{
    Memory, PRIVATE, READ_WRITE, Setting, WORDS, check_migrates, check_stays, number_in, send,
    stay_because,
};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAGES: usize = 16;

#[test]
fn locked_memory_stays_and_says_so_until_it_is_unlocked() {
    let mm = mm_or_skip!();
    const ON_FAULT: u32 = 1;
    for flags in [0, ON_FAULT] {
        let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
        let part = memory.part(4, 8);
        let start: *mut libc::c_void =
            std::ptr::with_exposed_provenance_mut(part.start().get() as usize);
        // SAFETY: the pages are the test's.
        if unsafe { libc::syscall(libc::SYS_mlock2, start, part.len(), flags) } != 0 {
            skip!("mlock2 is refused: {}", std::io::Error::last_os_error());
        }
        let said = stay_because(&card, part, Stay::Locked);
        assert!(said.iter().all(|one| *one == Some(Stay::Locked)), "{said:?}");
        // Its neighbours are another mapping to the kernel, and leave.
        assert_eq!(card.all_to_device(memory.part(0, 4)), 4);
        assert_eq!(on_device(&mm, memory.range()), 4);
        assert_eq!(memory.wrong_pages(), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(start, part.len() as usize) }, 0);
        check_migrates(&card, &memory);
    }
}

#[test]
fn memory_that_is_locked_while_it_is_away_comes_home_with_its_data() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    const ON_FAULT: u32 = 1;
    // SAFETY: the pages are the test's. Nothing is made present: that is what the flag is for.
    if unsafe { libc::syscall(libc::SYS_mlock2, memory.as_ptr(), memory.len(), ON_FAULT) } != 0 {
        skip!("mlock2 is refused: {}", std::io::Error::last_os_error());
    }
    assert_eq!(card.to_system(memory.part(0, 4)).unwrap(), 4);
    assert_eq!(memory.wrong_pages(), 0);
    assert!(card.settles_at(0));
    check_stays(&card, &memory, Stay::Locked);
}

/// A ring of io_uring, for nothing but registering buffers.
fn new_ring() -> Result<OwnedFd, std::io::Error> {
    // Of 120 bytes, zero where they are not used.
    let mut parameters = [0_u32; 30];
    // SAFETY: the kernel writes to the parameters.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    if ring < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(ring as i32) })
}

/// Pins memory for as long as the ring lives, or until `None` is registered.
fn register_buffer(ring: &OwnedFd, memory: Option<&Memory>) -> std::io::Result<()> {
    let (register, unregister) = (0, 1);
    let vector =
        memory.map(|memory| libc::iovec { iov_base: memory.as_ptr(), iov_len: memory.len() });
    let (what, list) = match &vector {
        Some(vector) => (register, std::ptr::from_ref(vector)),
        None => (unregister, std::ptr::null()),
    };
    let count = i64::from(vector.is_some());
    // SAFETY: the kernel reads the one vector; its memory is the test's.
    let done =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), what, list, count) };
    if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
fn buffers_registered_with_io_uring_stay_and_say_so() {
    let mm = mm_or_skip!();
    needs!(mm, MOVE);
    let ring = match new_ring() {
        Ok(ring) => ring,
        Err(error) => skip!("io_uring is refused: {error}"),
    };
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let held = hold(&mm, Capabilities::KERNEL_FAULTS, memory.range(), true);
    if let Err(error) = register_buffer(&ring, Some(&memory)) {
        skip!("io_uring registers no buffers: {error}");
    }
    drop(held);
    check_stays(&card, &memory, Stay::Busy);
    assert_eq!(memory.wrong_pages(), 0);
    register_buffer(&ring, None).unwrap();
    // The kernel lets go of the pages a moment later.
    let deadline = Instant::now() + Duration::from_secs(5);
    while card.all_to_device(memory.range()) < PAGES && Instant::now() < deadline {}
    assert_eq!(on_device(&mm, memory.range()), PAGES);
    check_migrates(&card, &memory);
}

/// A file whose reads go past the page cache into the reader's own pages.
fn direct_file() -> std::io::Result<File> {
    let path = std::env::temp_dir().join(format!("hmm-direct-{}", std::process::id()));
    let words = (0..PAGES * WORDS).flat_map(|word| (word as u64).to_ne_bytes());
    std::fs::write(&path, words.collect::<Vec<_>>())?;
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    std::fs::remove_file(&path)?;
    file
}

#[test]
fn direct_reads_into_memory_that_migrates_lose_nothing() {
    let mm = mm_or_skip!();
    needs!(mm, MOVE);
    needs!(mm, KERNEL_FAULTS);
    let file = match direct_file() {
        Ok(file) => file,
        Err(error) => skip!("temporary files have no O_DIRECT: {error}"),
    };
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    let stop = AtomicBool::new(false);
    let (reads, wrong) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut reads, mut wrong) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                for page in 0..PAGES {
                    memory.word(page, 3).store(u64::MAX, Ordering::Relaxed);
                }
                // SAFETY: the buffer is the test's, and as long as that.
                let read =
                    unsafe { libc::pread(file.as_raw_fd(), memory.as_ptr(), memory.len(), 0) };
                assert_eq!(read, memory.len() as isize, "{}", std::io::Error::last_os_error());
                let is_wrong = |index: &usize| {
                    let word = memory.word(index / WORDS, index % WORDS);
                    word.load(Ordering::Relaxed) != *index as u64
                };
                wrong += (0..PAGES * WORDS).filter(is_wrong).count();
                reads += 1;
            }
            (reads, wrong)
        });
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            send(&card, memory.range());
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(reads > 0);
    assert_eq!(wrong, 0, "words of {reads} reads");
}

/// Another userfaultfd, which watches absent pages of a part of memory, as somebody else in the process would.
struct Stranger(OwnedFd);

impl Stranger {
    const API: libc::Ioctl = 0xc018_aa3f;
    const REGISTER: libc::Ioctl = 0xc020_aa00;
    const UNREGISTER: libc::Ioctl = 0x8010_aa01;
    const NEW: libc::Ioctl = 0xaa00;

    fn descriptor() -> Option<OwnedFd> {
        const USER_MODE_ONLY: i32 = 1;
        // SAFETY: a new descriptor, or an error.
        let called =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
        if called >= 0 {
            // SAFETY: nobody else has it.
            return Some(unsafe { OwnedFd::from_raw_fd(called as i32) });
        }
        let device = File::open("/dev/userfaultfd").ok()?;
        // SAFETY: as above.
        let made = unsafe { libc::ioctl(device.as_raw_fd(), Self::NEW, libc::O_CLOEXEC) };
        // SAFETY: nobody else has it.
        (made >= 0).then(|| unsafe { OwnedFd::from_raw_fd(made) })
    }

    fn open() -> Option<Self> {
        let descriptor = Self::descriptor()?;
        let mut api = [0xaa_u64, 0, 0];
        // SAFETY: the kernel reads and writes three words.
        let done = unsafe { libc::ioctl(descriptor.as_raw_fd(), Self::API, api.as_mut_ptr()) };
        (done == 0).then_some(Self(descriptor))
    }

    fn watch(&self, range: hmm_core::AddrRange) {
        const MISSING: u64 = 1;
        let mut register = [range.start().get(), range.len(), MISSING, 0];
        // SAFETY: the kernel reads and writes four words.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), Self::REGISTER, register.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    fn forget(&self, range: hmm_core::AddrRange) {
        let mut words = [range.start().get(), range.len()];
        // SAFETY: the kernel reads two words.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), Self::UNREGISTER, words.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}

#[test]
fn ranges_of_another_userfaultfd_stay_and_say_so() {
    let mm = mm_or_skip!();
    let Some(stranger) = Stranger::open() else { skip!("userfaultfd is refused") };
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    stranger.watch(memory.part(4, 8));
    let said = send(&card, memory.range());
    for (page, said) in said.iter().enumerate() {
        let is_theirs = (4..12).contains(&page);
        assert_eq!(*said, is_theirs.then_some(Stay::Watched), "page {page}");
    }
    assert_eq!(memory.wrong_pages(), 0);
    assert!(card.settles_at(0));
    stranger.forget(memory.part(4, 8));
    check_migrates(&card, &memory);
}

#[test]
fn what_was_lazily_freed_is_old_or_zero_and_what_was_written_since_is_kept() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::map(PAGES, READ_WRITE, PRIVATE, -1));
    for round in 0..20 {
        memory.fill();
        // On even rounds a half of the pages is away when the contents are given up.
        if round % 2 == 0 {
            assert_eq!(card.all_to_device(memory.part(0, PAGES / 2)), PAGES / 2);
        }
        if !memory.advise(libc::MADV_FREE) {
            skip!("MADV_FREE is refused: {}", std::io::Error::last_os_error());
        }
        for page in (0..PAGES).filter(|page| page % 3 == 0) {
            memory.word(page, 9).store(round + 1, Ordering::Relaxed);
        }
        card.all_to_device(memory.range());
        for page in 0..PAGES {
            let word = memory.word(page, 9);
            if page % 3 == 0 {
                assert_eq!(word.load(Ordering::Relaxed), round + 1, "page {page}: a store is lost");
                word.store(0x5eed_0000_0000_0000 | (page as u64) << 16 | 9, Ordering::Relaxed);
                let mixed = memory.word(page, 0).load(Ordering::Relaxed);
                assert!(mixed == 0 || memory.has_pattern(page), "page {page} is a mixture");
            } else {
                assert!(memory.is_zero(page) || memory.has_pattern(page), "page {page}");
            }
        }
    }
    check_migrates(&card, &memory);
}

#[test]
fn merged_pages_migrate_with_their_data() {
    let mm = mm_or_skip!();
    const RUN: &str = "/sys/kernel/mm/ksm/run";
    const MERGED: &str = "/proc/self/ksm_merging_pages";
    if number_in(MERGED).is_none() {
        skip!("this kernel does not tell of merged pages");
    }
    let (card, memory) = (Card::new(&mm, PAGES), Memory::map(PAGES, READ_WRITE, PRIVATE, -1));
    for page in 0..PAGES {
        (0..WORDS).for_each(|word| memory.word(page, word).store(word as u64, Ordering::Relaxed));
    }
    if !memory.advise(libc::MADV_MERGEABLE) {
        skip!("MADV_MERGEABLE is refused: {}", std::io::Error::last_os_error());
    }
    let Some(running) = Setting::change(RUN, |_| 1) else { skip!("{RUN} cannot be changed") };
    let fast = Setting::change("/sys/kernel/mm/ksm/sleep_millisecs", |_| 1);
    let deadline = Instant::now() + Duration::from_secs(15);
    while number_in(MERGED) < Some(PAGES as u64) {
        if Instant::now() >= deadline {
            skip!("the kernel merged {:?} pages in 15 seconds", number_in(MERGED));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    drop((fast, running));
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    memory.word(3, 5).store(1, Ordering::Relaxed);
    for page in 0..PAGES {
        let is_right = (0..WORDS).all(|word| {
            let expected = if (page, word) == (3, 5) { 1 } else { word as u64 };
            memory.word(page, word).load(Ordering::Relaxed) == expected
        });
        assert!(is_right, "page {page}");
    }
    assert!(memory.advise(libc::MADV_UNMERGEABLE));
    check_migrates(&card, &memory);
}

#[test]
fn hugetlb_memory_stays_and_says_so() {
    let mm = mm_or_skip!();
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";
    let pages = (2 << 20) / PAGE_SIZE;
    let flags = PRIVATE | libc::MAP_HUGETLB;
    let reserved = Setting::change(COUNT, |count| count + 1);
    let Some(memory) = Memory::try_map(pages, READ_WRITE, flags, -1) else {
        skip!("no hugetlb page can be had ({reserved:?})")
    };
    if mm.vma_covering(memory.range()).unwrap().kind != VmaKind::Huge {
        skip!("the text of /proc/self/maps does not tell hugetlb memory from files");
    }
    let card = Card::new(&mm, PAGES);
    memory.fill();
    check_stays(&card, &memory, Stay::Huge);
    assert_eq!(memory.wrong_pages(), 0);
    // Unmapped before the reservation goes.
    drop(memory);
}
