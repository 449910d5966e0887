//! Memory of one system call: held before it, released after it.

use crate::cleanup;
use crate::hooks::{self, Held, Hooks};
use crate::next::{errno, set_errno};
use libc::{c_int, c_void, iovec, msghdr, size_t};
use std::mem::MaybeUninit;

/// Pieces for which every call has room: an array of iovecs and a dozen elements. More need a larger frame, which a
/// small signal stack has no room for, so it is used only then.
const FEW: usize = 16;
/// Elements that the kernel takes at most (`IOV_MAX`).
const IOV_MAX: usize = 1024;
/// Room for one message with everything that belongs to it.
const MANY: usize = IOV_MAX + 8;
/// A call that fails although everything was held is made again so often.
const RETRIES: usize = 8;

#[derive(Clone, Copy)]
struct Piece {
    address: *const c_void,
    length: size_t,
}

type Pieces = [MaybeUninit<Piece>];

/// The pieces held for one system call. Fixed room, in the caller's frame.
pub(crate) struct Holds<'a> {
    hooks: &'static Hooks,
    pieces: &'a mut Pieces,
    count: usize,
    /// A piece cannot be had: making the call again would not help.
    refused: bool,
    /// There was no room for a piece.
    full: bool,
}

impl Holds<'_> {
    /// Holds memory that the kernel reads. Whether it may be looked at now.
    pub(crate) fn read(&mut self, address: *const c_void, length: size_t) -> bool {
        self.piece(address, length, false)
    }

    /// Holds memory that the kernel writes. Whether it may be looked at now.
    pub(crate) fn write(&mut self, address: *const c_void, length: size_t) -> bool {
        self.piece(address, length, true)
    }

    /// NULL and nothing are the kernel's business.
    fn piece(&mut self, address: *const c_void, length: size_t, write: bool) -> bool {
        if address.is_null() || length == 0 || self.full {
            return false;
        }
        let Some(place) = self.pieces.get_mut(self.count) else {
            self.full = true;
            return false;
        };
        let held = self.hooks.hold(address, length, write);
        if held == Held::Yes {
            place.write(Piece { address, length });
            self.count = self.count.wrapping_add(1);
        }
        self.refused |= held == Held::No;
        held == Held::Yes
    }

    /// Holds an array of iovecs and what it names. The array is read here, so it must be there: what cannot be held
    /// goes to the kernel, which reads it without risk.
    ///
    /// # Safety
    /// `array` is what the program passed to the system call, with `count` elements.
    pub(crate) unsafe fn vector(&mut self, array: *const iovec, count: usize, write: bool) {
        if count > IOV_MAX || !self.read(array.cast(), count.wrapping_mul(size_of::<iovec>())) {
            return;
        }
        for index in 0..count {
            // SAFETY: the array is held, so it is mapped and readable, and has this element.
            let element = unsafe { array.add(index).read() };
            self.piece(element.iov_base, element.iov_len, write);
        }
    }

    /// Holds a message header and everything that it names.
    ///
    /// # Safety
    /// `message` is what the program passed to the system call.
    pub(crate) unsafe fn message(&mut self, message: *const msghdr, write: bool) {
        if self.piece(message.cast(), size_of::<msghdr>(), write) {
            // SAFETY: it is held, so it is mapped and readable.
            unsafe { self.parts(message, write) };
        }
    }

    /// Holds what a message header names; the header is held.
    ///
    /// # Safety
    /// `message` is held.
    pub(crate) unsafe fn parts(&mut self, message: *const msghdr, write: bool) {
        // SAFETY: by the caller's promise.
        let message = unsafe { message.read() };
        self.piece(message.msg_name, message.msg_namelen as size_t, write);
        self.piece(message.msg_control, message.msg_controllen as size_t, write);
        // SAFETY: the program passed it.
        unsafe { self.vector(message.msg_iov, message.msg_iovlen, write) };
    }

    /// How many pieces are held.
    pub(crate) fn mark(&self) -> usize {
        self.count
    }

    /// Whether a piece found no room.
    pub(crate) fn is_full(&self) -> bool {
        self.full
    }

    /// Lets go of what was held after a mark; then there is room again.
    pub(crate) fn back_to(&mut self, mark: usize) {
        while self.count > mark {
            // Counted first: if a signal handler jumps out of here, no piece is released twice.
            self.count = self.count.wrapping_sub(1);
            if let Some(piece) = self.pieces.get(self.count) {
                // SAFETY: all pieces below the count were written.
                let piece = unsafe { piece.assume_init() };
                self.hooks.release(piece.address, piece.length);
            }
        }
        self.full = false;
    }
}

/// Makes a system call with its memory held. `gather` holds it, `call` makes the call and fails with -1 and errno.
///
/// Memory is held *before* the call, in both directions, rather than after an `EFAULT`:
///
/// - What the kernel hands out once, it has taken off the queue by the time the copy to the program fails. A datagram
///   (UDP, local) is dropped; the count of an eventfd or timerfd is already reset; a signalfd has already dequeued
///   its signal, an inotify descriptor its event. Pipes, stream sockets and files keep what they could not hand over.
/// - A write or a stream read that meets an absent page half-way does not fail: it returns a short count, and programs
///   that never expected one on this kind of descriptor go on with half of the data.
///
/// So `EFAULT` means a page that went although it was held, a call that began before libhmm was attached, or a bad
/// address. Only the last comes again, and `hold` says so; everything else is tried again.
#[inline]
pub(crate) fn guarded<R: Copy + PartialEq + From<i8>>(
    gather: impl Fn(&mut Holds<'_>),
    call: impl Fn() -> R,
) -> R {
    if !hooks::is_attached() {
        let result = call();
        if !is_fault(result) || !hooks::is_attached() {
            return result;
        }
    }
    let mut room = [const { MaybeUninit::uninit() }; FEW];
    attempt(&mut room, &gather, &call).unwrap_or_else(|| guarded_many(gather, call))
}

/// As [`guarded`], with room for many pieces from the beginning.
#[inline(never)]
pub(crate) fn guarded_many<R: Copy + PartialEq + From<i8>>(
    gather: impl Fn(&mut Holds<'_>),
    call: impl Fn() -> R,
) -> R {
    let mut room = [const { MaybeUninit::uninit() }; MANY];
    // What is still too much goes to the kernel as it is.
    attempt(&mut room, &gather, &call).unwrap_or_else(call)
}

fn is_fault<R: PartialEq + From<i8>>(result: R) -> bool {
    result == R::from(-1) && errno() == libc::EFAULT
}

/// `None`: there was not enough room, and the call was not made.
#[inline(never)]
fn attempt<R: Copy + PartialEq + From<i8>>(
    room: &mut Pieces,
    gather: &impl Fn(&mut Holds<'_>),
    call: &impl Fn() -> R,
) -> Option<R> {
    let before = errno();
    let mut tries: usize = 0;
    loop {
        let Some(hooks) = hooks::usable() else { return Some(call()) };
        let mut holds = Holds { hooks, pieces: &mut *room, count: 0, refused: false, full: false };
        let list: *mut Holds<'_> = &raw mut holds;
        let work = || {
            // SAFETY: the holds are this frame's; nobody else looks at them unless this never returns.
            let holds = unsafe { &mut *list };
            gather(holds);
            if holds.full {
                return None;
            }
            set_errno(before);
            Some(call())
        };
        // SAFETY: `release_all` gets the holds of this frame.
        let result = unsafe { cleanup::covered(release_all, list.cast(), work) };
        let after = errno();
        let hopeless = holds.refused || holds.count == 0;
        holds.back_to(0);
        set_errno(if result.is_some() { after } else { before });
        tries = tries.wrapping_add(1);
        match result {
            Some(result) if is_fault(result) && !hopeless && tries <= RETRIES => {}
            other => return other,
        }
    }
}

/// For a call that never returned.
extern "C" fn release_all(holds: *mut c_void) {
    let before = errno();
    // SAFETY: `attempt` passes its own holds, and its frame is still there when libc runs this.
    unsafe { &mut *holds.cast::<Holds<'_>>() }.back_to(0);
    set_errno(before);
}

/// An array's length as the program passed it; what is negative is the kernel's business.
pub(crate) fn length(count: c_int) -> usize {
    usize::try_from(count).unwrap_or(0)
}
