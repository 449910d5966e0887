//! The kernel's ABI of userfaultfd: structures, numbers, thin ioctl calls.
//!
//! Written from the headers' facts rather than taken from the system, whose headers may be older than its kernel.

use crate::inject::{self, Point};
use rustix::fd::{AsFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, Updater, opcode};
use std::ffi::c_void;

pub(super) const API: u64 = 0xAA;

pub(super) mod feature {
    pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    pub(crate) const EVENT_REMAP: u64 = 1 << 2;
    pub(crate) const EVENT_REMOVE: u64 = 1 << 3;
    pub(crate) const EVENT_UNMAP: u64 = 1 << 6;
    pub(crate) const SIGBUS: u64 = 1 << 7;
    pub(crate) const THREAD_ID: u64 = 1 << 8;
    pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
    pub(crate) const POISON: u64 = 1 << 14;
    pub(crate) const WP_ASYNC: u64 = 1 << 15;
    pub(crate) const MOVE: u64 = 1 << 16;
}

pub(super) const REGISTER_MISSING: u64 = 1 << 0;
pub(super) const REGISTER_WP: u64 = 1 << 1;
pub(super) const DONT_WAKE: u64 = 1 << 0;
pub(super) const MOVE_ALLOW_SRC_HOLES: u64 = 1 << 1;
pub(super) const WRITEPROTECT_WP: u64 = 1 << 0;
pub(super) const FAULT_WRITE: u64 = 1 << 0;

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_REMAP: u8 = 0x14;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
#[derive(Default)]
pub(super) struct ApiRequest {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct Register {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

/// `done` is signed: the kernel stores `-errno` there when it stops before the first page.
#[repr(C)]
#[derive(Default)]
pub(super) struct Transfer {
    pub(super) destination: u64,
    pub(super) source: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) done: i64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct Fill {
    pub(super) range: Range,
    pub(super) mode: u64,
    pub(super) done: i64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct Protect {
    pub(super) range: Range,
    pub(super) mode: u64,
}

/// `struct uffd_msg`: the event's arguments as three words.
#[repr(C)]
#[derive(Default, Clone, Copy)]
pub(super) struct Message {
    pub(super) event: u8,
    reserved: [u8; 7],
    pub(super) argument: [u64; 3],
}

const _: () = {
    assert!(size_of::<ApiRequest>() == 24);
    assert!(size_of::<Register>() == 32);
    assert!(size_of::<Transfer>() == 40);
    assert!(size_of::<Fill>() == 32);
    assert!(size_of::<Protect>() == 24);
    assert!(size_of::<Message>() == 32);
};

const UFFD: u8 = 0xAA;
const UFFDIO_API: Opcode = opcode::read_write::<ApiRequest>(UFFD, 0x3F);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(UFFD, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<Range>(UFFD, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<Range>(UFFD, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<Transfer>(UFFD, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<Fill>(UFFD, 0x04);
const UFFDIO_MOVE: Opcode = opcode::read_write::<Transfer>(UFFD, 0x05);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<Protect>(UFFD, 0x06);
const UFFDIO_POISON: Opcode = opcode::read_write::<Fill>(UFFD, 0x08);

macro_rules! call {
    ($(#[$doc:meta])* $name:ident, $opcode:ident, $request:ty $(, $point:ident)?) => {
        $(#[$doc])*
        pub(super) fn $name(fd: impl AsFd, request: &mut $request) -> Result<(), Errno> {
            $(inject::checked(Point::$point)?;)?
            // SAFETY: the number belongs to this structure (its size is part of it), which lives during the call; the
            // kernel checks every address in it.
            unsafe { ioctl::ioctl(fd, Updater::<'_, { $opcode }, $request>::new(request)) }
        }
    };
}

call!(/// Negotiates features; once per descriptor.
    api, UFFDIO_API, ApiRequest);
call!(register, UFFDIO_REGISTER, Register, Register);
call!(unregister, UFFDIO_UNREGISTER, Range);
call!(wake, UFFDIO_WAKE, Range);
call!(copy, UFFDIO_COPY, Transfer, Copy);
call!(zero_page, UFFDIO_ZEROPAGE, Fill, Zero);
call!(poison, UFFDIO_POISON, Fill);
call!(write_protect, UFFDIO_WRITEPROTECT, Protect, WriteProtect);

/// `UFFDIO_MOVE`; `move` is a word of the language.
pub(super) fn move_pages(fd: impl AsFd, request: &mut Transfer) -> Result<(), Errno> {
    inject::checked(Point::Move)?;
    // SAFETY: as in `call!`; the callers pass ranges that they may empty and fill.
    unsafe { ioctl::ioctl(fd, Updater::<'_, { UFFDIO_MOVE }, Transfer>::new(request)) }
}

/// `USERFAULTFD_IOC_NEW`: a userfaultfd from `/dev/userfaultfd`.
struct NewDescriptor(usize);

// SAFETY: the argument is passed by value, and the result is a new descriptor that nobody else owns.
unsafe impl Ioctl for NewDescriptor {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;
    fn opcode(&self) -> Opcode {
        opcode::none(UFFD, 0x00)
    }
    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }
    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: a successful call returns a fresh descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

/// Opens a userfaultfd through the device node.
pub(super) fn new_descriptor(node: impl AsFd, flags: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: `node` is /dev/userfaultfd, to which the number belongs.
    unsafe { ioctl::ioctl(node, NewDescriptor(flags as usize)) }
}
