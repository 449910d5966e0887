//! What a child of a lazy fork and its parent say to each other: one question and one answer for a page, by its number
//! in the order of the fork; and the file in which a parent that exits leaves the answers.

use crate::addr::PAGE_SIZE;
use crate::addr::VirtAddr;
use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags};
use std::time::Duration;

const HEAD: usize = 16;
/// How long a child waits for an answer before it asks again.
const PATIENCE: Duration = Duration::from_secs(1);
const GOOD: u64 = 1;
const LOST: u64 = 2;

/// An answer to give.
pub(super) enum Reply<'a> {
    Page(&'a [u8; PAGE_SIZE]),
    /// The device lost it.
    Lost,
}

/// An answer that was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Page,
    /// Nobody will ever have it.
    Lost,
    /// The parent does not answer now.
    Later,
}

/// The next question of a child; `None` when it is gone.
pub(super) fn next_question(socket: &OwnedFd) -> Option<usize> {
    let mut question = [0_u8; 8];
    loop {
        match rustix::net::recv(socket, &mut question[..], RecvFlags::empty()) {
            Ok((8, _)) => return usize::try_from(u64::from_ne_bytes(question)).ok(),
            Err(Errno::INTR) => {}
            _ => return None,
        }
    }
}

/// Answers. False when the child is gone.
pub(super) fn reply(socket: &OwnedFd, index: usize, reply: Reply<'_>) -> bool {
    let mut message = [0_u8; HEAD + PAGE_SIZE];
    message[..8].copy_from_slice(&(index as u64).to_ne_bytes());
    let (status, len) = match reply {
        Reply::Page(page) => {
            message[HEAD..].copy_from_slice(page);
            (GOOD, message.len())
        }
        Reply::Lost => (LOST, HEAD),
    };
    message[8..HEAD].copy_from_slice(&status.to_ne_bytes());
    loop {
        match rustix::net::send(socket, &message[..len], SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            done => return done.is_ok(),
        }
    }
}

/// Makes a socket a child's.
pub(super) fn prepare(socket: &OwnedFd) -> Result<()> {
    set_socket_timeout(socket, Timeout::Recv, Some(PATIENCE))
        .map_err(|errno| Error::os("setsockopt", VirtAddr::new(0), errno))
}

/// Asks for a page. Only one thread asks at a time.
pub(super) fn ask(socket: &OwnedFd, index: usize, out: &mut [u8; PAGE_SIZE]) -> Option<Answer> {
    let question = (index as u64).to_ne_bytes();
    if let Err(errno) = rustix::net::send(socket, &question, SendFlags::NOSIGNAL) {
        return (errno == Errno::INTR).then_some(Answer::Later);
    }
    let mut message = [0_u8; HEAD + PAGE_SIZE];
    loop {
        let len = match rustix::net::recv(socket, &mut message[..], RecvFlags::empty()) {
            Ok((len @ HEAD.., _)) => len,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => return Some(Answer::Later),
            _ => return None,
        };
        if message[..8] != question {
            // An answer that came too late.
            continue;
        }
        if message[8..HEAD] == GOOD.to_ne_bytes() && len == message.len() {
            out.copy_from_slice(&message[HEAD..]);
            return Some(Answer::Page);
        }
        return Some(Answer::Lost);
    }
}

/// Leaves one of `pages` pages in the file.
pub(super) fn store(file: &OwnedFd, index: usize, pages: usize, page: &[u8; PAGE_SIZE]) {
    let at = |offset: usize| offset as u64;
    if rustix::io::pwrite(file, page, at(index * PAGE_SIZE)) == Ok(PAGE_SIZE) {
        // Without the mark the page counts as lost.
        let _ = rustix::io::pwrite(file, &[1], at(pages * PAGE_SIZE + index));
    }
}

/// Looks into the file.
pub(super) fn look(
    file: &OwnedFd,
    index: usize,
    pages: usize,
    out: &mut [u8; PAGE_SIZE],
) -> Answer {
    let mut mark = [0];
    let marked = rustix::io::pread(file, &mut mark[..], (pages * PAGE_SIZE + index) as u64);
    let read = rustix::io::pread(file, &mut out[..], (index * PAGE_SIZE) as u64);
    if marked == Ok(1) && mark == [1] && read == Ok(PAGE_SIZE) {
        Answer::Page
    } else {
        Answer::Lost
    }
}

/// Whether somebody is at the other end.
pub(super) fn is_connected(socket: &OwnedFd) -> bool {
    let mut looked = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let _ = rustix::event::poll(&mut looked, Some(&now));
    !looked[0].revents().contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    #[test]
    fn pages_are_asked_for_by_number_and_late_answers_are_thrown_away() {
        let flags = SocketFlags::CLOEXEC;
        let (parent, child) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        prepare(&child).unwrap();
        let page = [7; PAGE_SIZE];
        assert!(reply(&parent, 3, Reply::Page(&[9; PAGE_SIZE])));
        assert!(reply(&parent, 5, Reply::Page(&page)));
        assert!(reply(&parent, 6, Reply::Lost));
        let mut out = [0; PAGE_SIZE];
        assert_eq!(ask(&child, 5, &mut out), Some(Answer::Page));
        assert_eq!(out, page);
        assert_eq!(ask(&child, 6, &mut out), Some(Answer::Lost));
        assert_eq!(next_question(&parent), Some(5));
        assert_eq!(next_question(&parent), Some(6));
        assert!(is_connected(&parent));
        drop(child);
        assert!(!is_connected(&parent));
        assert_eq!(next_question(&parent), None);
    }

    #[test]
    fn what_a_parent_left_is_found_and_the_rest_is_lost() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        store(&file, 2, 4, &[5; PAGE_SIZE]);
        let mut out = [0; PAGE_SIZE];
        assert_eq!(look(&file, 2, 4, &mut out), Answer::Page);
        assert_eq!(out, [5; PAGE_SIZE]);
        assert_eq!(look(&file, 1, 4, &mut out), Answer::Lost);
        assert_eq!(look(&file, 3, 4, &mut out), Answer::Lost);
    }
}
