//! Handing a descriptor from the command's side to the supervisor.

use crate::checked;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Room for the control message with one descriptor, aligned as its head wants it.
type Room = [u64; 4];

/// Calls `work` with a message of one byte and room for one descriptor.
fn with_message<T>(room: &mut Room, work: impl FnOnce(&mut libc::msghdr) -> T) -> T {
    let mut byte = [0u8; 1];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: zero is a valid value of every field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = room.as_mut_ptr().cast();
    // SAFETY: computes a length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as _;
    work(&mut message)
}

/// Sends a descriptor.
pub(crate) fn send(socket: &UnixStream, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let mut room: Room = [0; 4];
    with_message(&mut room, |message| {
        // SAFETY: the message has room for one control message, which is filled in here.
        unsafe {
            let head = libc::CMSG_FIRSTHDR(message);
            (*head).cmsg_level = libc::SOL_SOCKET;
            (*head).cmsg_type = libc::SCM_RIGHTS;
            (*head).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(descriptor.as_raw_fd());
        }
        // SAFETY: everything that the message names lives until the call returns.
        checked(unsafe { libc::sendmsg(socket.as_raw_fd(), message, libc::MSG_NOSIGNAL) })
    })?;
    Ok(())
}

/// Receives a descriptor. `None`: the other side ended, or said nothing for so long.
pub(crate) fn receive(socket: &UnixStream, limit: Duration) -> io::Result<Option<OwnedFd>> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    if checked(unsafe { libc::poll(&raw mut poll, 1, limit.as_millis() as i32) })? == 0 {
        return Ok(None);
    }
    let mut room: Room = [0; 4];
    with_message(&mut room, |message| {
        let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
        // SAFETY: everything that the message names lives until the call returns.
        checked(unsafe { libc::recvmsg(socket.as_raw_fd(), message, flags) })?;
        // SAFETY: the kernel filled the room in, and says how much of it.
        let head = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() };
        let Some(head) = head.filter(|head| head.cmsg_type == libc::SCM_RIGHTS) else {
            return Ok(None);
        };
        // SAFETY: a message of this kind carries descriptors, of which the sender put one.
        let descriptor = unsafe { libc::CMSG_DATA(head).cast::<RawFd>().read_unaligned() };
        // SAFETY: the kernel made it for this call.
        Ok(Some(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn a_descriptor_arrives_and_an_end_is_seen() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        send(&theirs, File::open("/proc/self/comm").expect("a file").as_fd()).expect("sent");
        let limit = Duration::from_secs(5);
        let arrived = receive(&ours, limit).expect("no error").expect("a descriptor");
        let mut text = String::new();
        File::from(arrived).read_to_string(&mut text).expect("it can be read");
        assert!(!text.is_empty());
        drop(theirs);
        assert!(receive(&ours, limit).expect("no error").is_none());
    }

    #[test]
    fn silence_is_not_awaited_for_ever() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        assert!(receive(&ours, Duration::from_millis(20)).expect("no error").is_none());
    }
}
