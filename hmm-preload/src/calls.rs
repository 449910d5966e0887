//! Reading and writing: plain buffers, vectors, and the forms that a fortified compilation calls.

use crate::holds::{guarded, length};
use crate::next::replace;
use libc::{c_int, c_void, iovec, off_t, size_t, sockaddr, socklen_t, ssize_t, syscall};

/// The end of a fortified call whose buffer is too small: libc's function says so when it is there to be called.
fn check(wanted: size_t, room: size_t) {
    if wanted > room {
        // SAFETY: ends the process.
        unsafe { libc::abort() };
    }
}

/// What a fortified call needs held: nothing when it will end the process.
fn checked(wanted: size_t, room: size_t) -> size_t {
    if wanted > room { 0 } else { wanted }
}

// In all of them the system call, or libc's function, gets exactly what the program passed, under the same promises;
// that is what the SAFETY comments mean by "as the caller".
replace! {
    // `read(2)`; libc exports it under both names.
    fn [read __read] (fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count),
                None => syscall(libc::SYS_read, fd, buffer, count) as ssize_t,
            } },
        )
    }

    // `write(2)`.
    fn [write __write] (fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.read(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count),
                None => syscall(libc::SYS_write, fd, buffer, count) as ssize_t,
            } },
        )
    }

    // `pread(2)`: `off_t` has 64 bits, so all names are one function.
    fn [pread pread64 __pread64] (
        fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, offset),
                None => syscall(libc::SYS_pread64, fd, buffer, count, offset) as ssize_t,
            } },
        )
    }

    // `pwrite(2)`.
    fn [pwrite pwrite64 __pwrite64] (
        fd: c_int, buffer: *const c_void, count: size_t, offset: off_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.read(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, offset),
                None => syscall(libc::SYS_pwrite64, fd, buffer, count, offset) as ssize_t,
            } },
        )
    }

    // `readv(2)`.
    fn [readv] (fd: c_int, vector: *const iovec, count: c_int) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), true) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count),
                None => syscall(libc::SYS_readv, fd, vector, i64::from(count)) as ssize_t,
            } },
        )
    }

    // `writev(2)`.
    fn [writev] (fd: c_int, vector: *const iovec, count: c_int) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), false) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count),
                None => syscall(libc::SYS_writev, fd, vector, i64::from(count)) as ssize_t,
            } },
        )
    }

    // `preadv(2)`. The system call takes an offset of two halves, of which the lower has room for all of it.
    fn [preadv preadv64] (fd: c_int, vector: *const iovec, count: c_int, offset: off_t) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), true) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count, offset),
                None => {
                    syscall(libc::SYS_preadv, fd, vector, i64::from(count), offset, 0_i64) as ssize_t
                }
            } },
        )
    }

    // `pwritev(2)`.
    fn [pwritev pwritev64] (fd: c_int, vector: *const iovec, count: c_int, offset: off_t) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), false) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count, offset),
                None => {
                    syscall(libc::SYS_pwritev, fd, vector, i64::from(count), offset, 0_i64) as ssize_t
                }
            } },
        )
    }

    // `preadv2(2)`.
    fn [preadv2 preadv64v2] (
        fd: c_int, vector: *const iovec, count: c_int, offset: off_t, flags: c_int
    ) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), true) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count, offset, flags),
                None => {
                    let count = i64::from(count);
                    syscall(libc::SYS_preadv2, fd, vector, count, offset, 0_i64, flags) as ssize_t
                }
            } },
        )
    }

    // `pwritev2(2)`.
    fn [pwritev2 pwritev64v2] (
        fd: c_int, vector: *const iovec, count: c_int, offset: off_t, flags: c_int
    ) -> ssize_t = |next| {
        guarded(
            // SAFETY: as the caller.
            |holds| unsafe { holds.vector(vector, length(count), false) },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, vector, count, offset, flags),
                None => {
                    let count = i64::from(count);
                    syscall(libc::SYS_pwritev2, fd, vector, count, offset, 0_i64, flags) as ssize_t
                }
            } },
        )
    }

    // `send(2)`.
    fn [send __send] (fd: c_int, buffer: *const c_void, count: size_t, flags: c_int) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.read(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, flags),
                None => syscall(libc::SYS_sendto, fd, buffer, count, flags, 0_i64, 0_i64) as ssize_t,
            } },
        )
    }

    // `recv(2)`.
    fn [recv] (fd: c_int, buffer: *mut c_void, count: size_t, flags: c_int) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, count),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, flags),
                None => syscall(libc::SYS_recvfrom, fd, buffer, count, flags, 0_i64, 0_i64) as ssize_t,
            } },
        )
    }

    // `sendto(2)`.
    fn [sendto] (
        fd: c_int, buffer: *const c_void, count: size_t, flags: c_int, to: *const sockaddr, size: socklen_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| {
                holds.read(buffer, count);
                holds.read(to.cast(), size as size_t);
            },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, flags, to, size),
                None => syscall(libc::SYS_sendto, fd, buffer, count, flags, to, size) as ssize_t,
            } },
        )
    }

    // `recvfrom(2)`. The kernel reads the size of the room for the address and writes it back.
    fn [recvfrom] (
        fd: c_int, buffer: *mut c_void, count: size_t, flags: c_int, from: *mut sockaddr, size: *mut socklen_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| {
                holds.write(buffer, count);
                if !from.is_null() && holds.write(size.cast(), size_of::<socklen_t>()) {
                    // SAFETY: it is held, so it is mapped and readable.
                    let size = unsafe { size.read() };
                    holds.write(from.cast(), size as size_t);
                }
            },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, flags, from, size),
                None => syscall(libc::SYS_recvfrom, fd, buffer, count, flags, from, size) as ssize_t,
            } },
        )
    }

    // `read` of a fortified program, which knows how much room there is.
    fn [__read_chk] (fd: c_int, buffer: *mut c_void, count: size_t, room: size_t) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, checked(count, room)),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, room),
                None => {
                    check(count, room);
                    syscall(libc::SYS_read, fd, buffer, count) as ssize_t
                }
            } },
        )
    }

    // `pread` of a fortified program.
    fn [__pread_chk __pread64_chk] (
        fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t, room: size_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, checked(count, room)),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, offset, room),
                None => {
                    check(count, room);
                    syscall(libc::SYS_pread64, fd, buffer, count, offset) as ssize_t
                }
            } },
        )
    }

    // `recv` of a fortified program. The room comes before the flags.
    fn [__recv_chk] (
        fd: c_int, buffer: *mut c_void, count: size_t, room: size_t, flags: c_int
    ) -> ssize_t = |next| {
        guarded(
            |holds| _ = holds.write(buffer, checked(count, room)),
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, room, flags),
                None => {
                    check(count, room);
                    recv(fd, buffer, count, flags)
                }
            } },
        )
    }

    // `recvfrom` of a fortified program.
    fn [__recvfrom_chk] (
        fd: c_int, buffer: *mut c_void, count: size_t, room: size_t, flags: c_int, from: *mut sockaddr, size: *mut socklen_t
    ) -> ssize_t = |next| {
        guarded(
            |holds| {
                holds.write(buffer, checked(count, room));
                if !from.is_null() && holds.write(size.cast(), size_of::<socklen_t>()) {
                    // SAFETY: it is held, so it is mapped and readable.
                    let size = unsafe { size.read() };
                    holds.write(from.cast(), size as size_t);
                }
            },
            // SAFETY: as the caller.
            || unsafe { match next.get() {
                Some(next) => next(fd, buffer, count, room, flags, from, size),
                None => {
                    check(count, room);
                    syscall(libc::SYS_recvfrom, fd, buffer, count, flags, from, size) as ssize_t
                }
            } },
        )
    }
}
