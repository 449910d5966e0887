//! hmm.txt section 7: who pays for device memory, and its end.

use crate::common::{end_of, filled, fork, is_whole, memory_file};
use crate::driver::Card;
use hmm_core::Mm;
use hmm_tests::mm_or_skip;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

#[test]
fn promise_81_the_end_of_an_address_space_frees_all_device_memory() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    assert_eq!(card.all_to_device(region.range()), 64);
    mm.close().unwrap();
    assert_eq!((card.devmem.in_use(), card.driver.free_pages()), (0, 64));
    assert_eq!(card.driver.frees.load(Ordering::SeqCst), 64);
    assert!(is_whole(&region));
}

/// Takes a file for the caller's own use until its descriptors are closed, as a process takes a device.
fn take(device: &File) -> bool {
    // SAFETY: a lock on a descriptor that is open.
    unsafe { libc::flock(device.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// The same file, opened anew.
fn opened(file: &File) -> File {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn promise_81_a_killed_process_gives_back_what_it_had_of_a_device() {
    drop(mm_or_skip!());
    let (device, region) = (memory_file(4096), filled(16));
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = fork(|| {
        // The driver of a device that outlives the process: here a file that it has for itself.
        let mine = opened(&device);
        let mm = Mm::current().unwrap();
        let card = Card::new(&mm, 16);
        let away = card.all_to_device(region.range());
        // SAFETY: writes one byte.
        unsafe { libc::write(ends[1], [u8::from(take(&mine) && away == 16)].as_ptr().cast(), 1) };
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    });
    let (mut ready, again) = ([0_u8], opened(&device));
    // SAFETY: reads one byte, for which the child has 10 seconds.
    unsafe {
        let mut poll = libc::pollfd { fd: ends[0], events: libc::POLLIN, revents: 0 };
        assert_eq!(libc::poll(&raw mut poll, 1, 10_000), 1);
        libc::read(ends[0], ready.as_mut_ptr().cast(), 1);
    }
    assert!(ready == [1] && !take(&again), "the child has it, with pages away");
    // SAFETY: ends the child just made.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert!(!end_of(child));
    assert!(take(&again), "it is free");
}
