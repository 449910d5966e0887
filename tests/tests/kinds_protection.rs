//! mprotect in all directions while pages are on a device: what comes home has its data and the protection of its mapping
//! at that time, and a device is refused what the mapping forbids.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;
mod kind;

use driver::{Card, child_of, is_child, on_device};
use hmm_core::{Access, Error, Mm, PfnEntry, PfnFlags, RangeRequest, Stay};
use hmm_soft::{Kernel, SoftConfig, SoftDevice};
use hmm_tests::{mm_or_skip, needs};
use kind::{Memory, PRIVATE, READ_WRITE, check_migrates, check_stays, send};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PAGES: usize = 16;
const READ: i32 = libc::PROT_READ;
const NONE: i32 = libc::PROT_NONE;

/// What a device gets that asks for a range.
fn fault(mm: &Mm, memory: &Memory, access: Access) -> Result<Vec<PfnEntry>, Error> {
    let mut pfns = vec![PfnEntry::default(); memory.pages()];
    let request = RangeRequest { range: memory.range(), owner: None };
    mm.range_fault(&request, access, &mut pfns).map(|()| pfns)
}

fn is_refused<T>(done: Result<T, Error>) -> bool {
    matches!(done, Err(Error::Permission { .. }))
}

/// All pages on the device of a card.
fn away(mm: &Arc<Mm>) -> (Card, Memory) {
    let (card, memory) = (Card::new(mm, PAGES), Memory::filled(PAGES));
    assert_eq!(card.all_to_device(memory.range()), PAGES);
    (card, memory)
}

#[test]
fn memory_made_read_only_comes_home_read_only() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, memory) = away(&mm);
    memory.protect(READ);
    assert_eq!(on_device(&mm, memory.range()), PAGES);
    assert!(is_refused(fault(&mm, &memory, Access::Write)));
    let pfns = fault(&mm, &memory, Access::Read).unwrap();
    assert!(pfns.iter().all(|entry| !entry.flags().contains(PfnFlags::WRITE)), "{pfns:?}");
    // By touches, and on request.
    assert!((0..PAGES / 2).all(|page| memory.has_pattern(page)));
    card.to_system(memory.range()).unwrap();
    assert_eq!(memory.wrong_pages(), 0);
    assert!(card.settles_at(0));
    assert!(is_refused(fault(&mm, &memory, Access::Write)));
    assert!(is_refused(mm.make_present(memory.range(), true)));
    assert_eq!(send(&card, memory.range()), [Some(Stay::Protection); PAGES]);
    memory.protect(READ_WRITE);
    memory.word(3, 3).store(1, Ordering::Relaxed);
    check_migrates(&card, &memory);
}

#[test]
fn memory_made_writable_again_comes_home_writable() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, memory) = away(&mm);
    memory.protect(READ);
    memory.protect(READ_WRITE);
    fault(&mm, &memory, Access::Write).unwrap();
    for page in 0..PAGES {
        memory.word(page, 5).fetch_add(page as u64 + 1, Ordering::Relaxed);
        memory.word(page, 5).fetch_sub(page as u64 + 1, Ordering::Relaxed);
    }
    assert_eq!(memory.wrong_pages(), 0);
    assert!(card.settles_at(0));
    check_migrates(&card, &memory);
}

#[test]
fn data_survives_while_nobody_may_touch_it() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    for (home_while_closed, last) in [(false, READ_WRITE), (true, READ_WRITE), (true, READ)] {
        let (card, memory) = away(&mm);
        memory.protect(NONE);
        assert!(is_refused(fault(&mm, &memory, Access::Read)));
        assert!(is_refused(fault(&mm, &memory, Access::Write)));
        assert_eq!(on_device(&mm, memory.range()), PAGES);
        if home_while_closed {
            card.to_system(memory.range()).unwrap();
            assert!(card.settles_at(0));
            assert_eq!(send(&card, memory.range()), [Some(Stay::Protection); PAGES]);
        }
        memory.protect(last);
        assert_eq!(memory.wrong_pages(), 0);
        memory.protect(READ_WRITE);
        check_migrates(&card, &memory);
    }
}

#[test]
fn each_part_comes_home_with_its_own_protection() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (card, memory) = away(&mm);
    memory.protect_part(4, 4, READ);
    memory.protect_part(8, 4, NONE);
    // One request is about one mapping.
    for first in [0, 4, 8, 12] {
        assert_eq!(card.to_system(memory.part(first, 4)).unwrap(), 4, "pages from {first} on");
    }
    assert!(card.settles_at(0));
    let pages = |first: usize| Memory::lent(memory.part(first, 4).start().get(), 4);
    assert!(fault(&mm, &pages(0), Access::Write).is_ok());
    assert!(is_refused(fault(&mm, &pages(4), Access::Write)));
    assert!(is_refused(fault(&mm, &pages(8), Access::Read)));
    assert!(fault(&mm, &pages(12), Access::Write).is_ok());
    memory.protect(READ_WRITE);
    assert_eq!(memory.wrong_pages(), 0);
    check_migrates(&card, &memory);
}

#[test]
fn closing_the_mm_brings_pages_home_whatever_their_protection() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let (_card, memory) = away(&mm);
    memory.protect_part(4, 4, READ);
    memory.protect_part(8, 4, NONE);
    mm.close().unwrap();
    memory.protect(READ_WRITE);
    assert_eq!(memory.wrong_pages(), 0);
}

#[test]
fn kernels_of_a_device_cannot_write_what_became_read_only() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    let device = SoftDevice::new(&mm, SoftConfig::default()).unwrap();
    let memory = Memory::filled(PAGES);
    assert_eq!(device.migrate(memory.range()).unwrap(), PAGES);
    memory.protect(READ);
    let (dst, len) = (memory.addr(), memory.len() as u64);
    let fill = |byte| device.run(Kernel::Fill { dst, len, byte });
    assert!(fill(1).is_err(), "the device wrote to memory that is read-only");
    assert_eq!(memory.wrong_pages(), 0);
    memory.protect(READ_WRITE);
    fill(1).unwrap();
    assert_eq!(memory.word(PAGES - 1, 1).load(Ordering::Relaxed), 0x0101_0101_0101_0101);
}

/// The signal that ends a child which does something forbidden to memory that is away.
fn killed_by(test: &str, access: impl Fn(&Memory)) -> Option<i32> {
    if !is_child() {
        let ended = child_of(test, Duration::from_secs(20));
        if let Some(reason) = ended.skipped() {
            eprintln!("skipped: {reason}");
            return None;
        }
        return Some(ended.signal().unwrap_or_else(|| panic!("{ended:?}")));
    }
    let mm = match hmm_tests::current_mm() {
        Ok(mm) => mm,
        Err(reason) => {
            eprintln!("skipped: {reason}");
            return None;
        }
    };
    if let Some(reason) = hmm_tests::lack(&mm, hmm_tests::Capabilities::EVENTS) {
        eprintln!("skipped: {reason}");
        return None;
    }
    if mm.engine_name() == "uffd" {
        // SAFETY: sets the default action, without the words of Rust's own handler.
        unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
    }
    let (_card, memory) = away(&mm);
    access(&memory);
    std::process::exit(3);
}

#[test]
fn a_store_to_what_became_read_only_is_a_segmentation_fault() {
    let name = "a_store_to_what_became_read_only_is_a_segmentation_fault";
    let signal = killed_by(name, |memory| {
        memory.protect(READ);
        assert!(memory.has_pattern(0));
        memory.word(1, 0).store(1, Ordering::Relaxed);
    });
    assert!(signal.is_none_or(|signal| signal == libc::SIGSEGV), "{signal:?}");
}

#[test]
fn a_touch_of_what_became_inaccessible_is_a_segmentation_fault() {
    let name = "a_touch_of_what_became_inaccessible_is_a_segmentation_fault";
    let signal = killed_by(name, |memory| {
        memory.protect(NONE);
        std::hint::black_box(memory.word(1, 0).load(Ordering::Relaxed));
    });
    assert!(signal.is_none_or(|signal| signal == libc::SIGSEGV), "{signal:?}");
}

#[test]
fn protections_that_change_under_migration_lose_no_store() {
    let mm = mm_or_skip!();
    needs!(mm, EVENTS);
    needs!(mm, MOVE);
    let (card, memory) = (Card::new(&mm, PAGES), Memory::map(PAGES, READ_WRITE, PRIVATE, -1));
    let stop = AtomicBool::new(false);
    let (rounds, wrong) = std::thread::scope(|scope| {
        let program = scope.spawn(|| {
            let (mut rounds, mut wrong) = (0_u64, 0);
            while !stop.load(Ordering::Relaxed) {
                for page in 0..PAGES {
                    wrong += usize::from(memory.word(page, 8).load(Ordering::Relaxed) != rounds);
                    memory.word(page, 8).store(rounds + 1, Ordering::Relaxed);
                }
                rounds += 1;
                let part = (rounds % 4) as usize * 4;
                memory.protect_part(part, 4, if rounds % 3 == 0 { NONE } else { READ });
                if rounds % 3 != 0 {
                    for page in part..part + 4 {
                        let word = memory.word(page, 8).load(Ordering::Relaxed);
                        wrong += usize::from(word != rounds);
                    }
                }
                std::thread::yield_now();
                memory.protect_part(part, 4, READ_WRITE);
            }
            (rounds, wrong)
        });
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            // The range may be several mappings at this moment: then it is refused, and nothing happens.
            for first in (0..PAGES).step_by(4) {
                let part = memory.part(first, 4);
                assert!(matches!(card.to_device(part), Ok(_) | Err(Error::Invalid { .. })));
                assert!(matches!(card.to_system(part), Ok(_) | Err(Error::Invalid { .. })));
                card.to_device(part).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        program.join().unwrap()
    });
    assert_eq!(wrong, 0, "words of {rounds} rounds");
    assert!(rounds > 0);
    assert_eq!(card.driver.double_frees.load(Ordering::SeqCst), 0);
    check_migrates(&card, &memory);
}

#[test]
fn what_the_driver_refuses_says_so() {
    let mm = mm_or_skip!();
    let (card, memory) = (Card::new(&mm, PAGES), Memory::filled(PAGES));
    card.driver.refuses.store(true, Ordering::SeqCst);
    check_stays(&card, &memory, Stay::LeftOut);
    assert_eq!(memory.wrong_pages(), 0);
}
