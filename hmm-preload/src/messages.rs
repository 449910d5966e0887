//! Messages: headers that name further memory, one or many of them at once.

use crate::holds::{Holds, guarded, guarded_many};
use crate::hooks;
use crate::next::{errno, replace, set_errno};
use libc::{c_int, c_uint, mmsghdr, msghdr, ssize_t, syscall, timespec};
use std::cell::Cell;

/// `sendmmsg` takes no more messages at once, by itself.
const SEND_MAX: c_uint = 1024;
/// Headers that are held together.
const BATCH_MAX: c_uint = 256;

replace! {
    // `sendmsg(2)`.
    fn [sendmsg] (fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.message(message, false) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, message, flags),
                None => syscall(libc::SYS_sendmsg, fd, message, flags) as ssize_t,
            } },
        )
    }

    // `recvmsg(2)`. The kernel writes the header back.
    fn [recvmsg] (fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.message(message, true) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, message, flags),
                None => syscall(libc::SYS_recvmsg, fd, message, flags) as ssize_t,
            } },
        )
    }

    // `sendmmsg(2)`.
    fn [sendmmsg] (fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int = |next| {
        let call = |first: *mut mmsghdr, count: c_uint| {
            // SAFETY: as the caller, for a part of its messages.
            unsafe { match next.get() {
                Some(next) => next(fd, first, count, flags),
                None => syscall(libc::SYS_sendmmsg, fd, first, count, flags) as c_int,
            } }
        };
        if !hooks::is_attached() {
            return call(messages, count);
        }
        in_batches(messages, count.min(SEND_MAX), false, |_| (), |first, count, _| call(first, count))
    }

    // `recvmmsg(2)`.
    fn [recvmmsg] (
        fd: c_int, messages: *mut mmsghdr, count: c_uint, flags: c_int, timeout: *mut timespec
    ) -> c_int = |next| {
        let call = |first: *mut mmsghdr, count: c_uint, flags: c_int| {
            // SAFETY: as the caller, for a part of its messages.
            unsafe { match next.get() {
                Some(next) => next(fd, first, count, flags, timeout),
                None => syscall(libc::SYS_recvmmsg, fd, first, count, flags, timeout) as c_int,
            } }
        };
        if !hooks::is_attached() {
            return call(messages, count, flags);
        }
        let hold_timeout = |holds: &mut Holds<'_>| _ = holds.write(timeout.cast(), size_of::<timespec>());
        in_batches(messages, count, true, hold_timeout, |first, count, done| {
            let waits_for_one = done > 0 && flags & libc::MSG_WAITFORONE != 0;
            // SAFETY: the kernel has just written the time that is left there.
            let time_is_over = done > 0
                && unsafe { timeout.as_ref() }.is_some_and(|left| (left.tv_sec, left.tv_nsec) == (0, 0));
            if time_is_over {
                return 0;
            }
            call(first, count, if waits_for_one { flags | libc::MSG_DONTWAIT } else { flags })
        })
    }
}

/// Makes a call for many messages in as few calls as there is room to hold their memory: most often one. `call` gets
/// the first message, their number and how many are done, and returns how many it did.
///
/// The kernel keeps an error that meets it after the first message for the next call on the socket. An error that meets
/// a batch after the first stays unreported, as `sendmmsg` does it by itself.
fn in_batches(
    messages: *mut mmsghdr,
    count: c_uint,
    write: bool,
    also: impl Fn(&mut Holds<'_>),
    call: impl Fn(*mut mmsghdr, c_uint, c_uint) -> c_int,
) -> c_int {
    let before = errno();
    let mut done: c_uint = 0;
    loop {
        let first = messages.wrapping_add(done as usize);
        let left = count.wrapping_sub(done);
        let batch = Cell::new(left);
        let result = guarded_many(
            |holds| {
                also(holds);
                // SAFETY: as the caller.
                batch.set(unsafe { gather(holds, first, left, write) });
            },
            || call(first, batch.get(), done),
        );
        if result < 0 && done > 0 {
            set_errno(before);
            return done.cast_signed();
        }
        if result < 0 {
            return result;
        }
        done = done.wrapping_add(result.cast_unsigned());
        if result.cast_unsigned() < batch.get() || done >= count {
            return done.cast_signed();
        }
    }
}

/// Holds as many messages as there is room for. Returns how many, or all when they cannot be looked at.
///
/// # Safety
/// `first` is what the program passed to the system call, with `count` messages.
unsafe fn gather(holds: &mut Holds<'_>, first: *mut mmsghdr, count: c_uint, write: bool) -> c_uint {
    let batch = count.min(BATCH_MAX);
    // The kernel writes each message's length.
    if !holds.write(first.cast(), (batch as usize).wrapping_mul(size_of::<mmsghdr>())) {
        return count;
    }
    for index in 0..batch {
        let mark = holds.mark();
        let message = first.wrapping_add(index as usize);
        // SAFETY: the array is held, and has this message.
        unsafe { holds.parts(&raw const (*message).msg_hdr, write) };
        if holds.is_full() {
            holds.back_to(mark);
            return index;
        }
    }
    batch
}
