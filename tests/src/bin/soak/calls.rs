//! System calls on memory that migrates.

use crate::world::{Random, Worker, World, constant_word};
use hmm_core::{AddrRange, Capabilities, PAGE_SIZE};
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::thread::Scope;

const WORDS: usize = PAGE_SIZE / 8;

pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, world: &'scope World) {
    scope.spawn(move || {
        // SAFETY: the name is a terminated string; the result is checked, and owned by nobody else.
        let file = unsafe {
            let fd = libc::memfd_create(c"soak".as_ptr(), 0);
            assert!(fd >= 0);
            File::from_raw_fd(fd)
        };
        let mut random = Random(77);
        while world.goes_on() {
            write_and_compare(world, &file, random.below(world.constant.pages()));
            world.step(Worker::Calls);
        }
    });
}

/// The kernel reads a page that may be away.
fn write_and_compare(world: &World, file: &File, page: usize) {
    let addr = world.constant.page_addr(page);
    let range = AddrRange::covering(addr, PAGE_SIZE as u64).unwrap();
    let serves = world.mm.capabilities().contains(Capabilities::KERNEL_FAULTS);
    // Where failures are injected, a guard may find no memory.
    let guard = if serves { None } else { world.mm.guard(range, false).ok() };
    if serves || guard.is_some() {
        let start = std::ptr::with_exposed_provenance::<u8>(addr as usize);
        // SAFETY: the page is mapped, and its contents never change.
        let bytes = unsafe { std::slice::from_raw_parts(start, PAGE_SIZE) };
        file.write_all_at(bytes, 0).unwrap();
        let mut copy = [0_u8; PAGE_SIZE];
        file.read_exact_at(&mut copy, 0).unwrap();
        for (word, bytes) in copy.as_chunks::<8>().0.iter().enumerate() {
            assert_eq!(u64::from_ne_bytes(*bytes), constant_word(page * WORDS + word));
        }
    }
}
