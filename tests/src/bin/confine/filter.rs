//! The seccomp filter: rules made into a program for the kernel's classic BPF machine, and its installation.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// When a rule applies to a call of its number. Only the lower half of an argument is looked at: all arguments that
/// the rules know are of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Every time.
    Always,
    /// An argument, counted from 0, has this value.
    Equals { argument: u32, value: u32 },
    /// An argument has at least one of these bits.
    AnyBit { argument: u32, bits: u32 },
}

/// What becomes of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It fails.
    Errno(i32),
    /// The supervisor decides.
    Ask,
}

/// One rule; the first that applies to a call decides, and a call without a rule goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    /// Number of the system call.
    pub(crate) call: libc::c_long,
    /// When.
    pub(crate) when: When,
    /// What.
    pub(crate) then: Then,
}

/// The kernel's name for the architecture that this program was built for: the machine's number in ELF files, with
/// marks for 64 bits and little endian.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Option<u32> = Some(0xC000_0000 | libc::EM_X86_64 as u32);
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Option<u32> = Some(0xC000_0000 | libc::EM_AARCH64 as u32);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: Option<u32> = None;

/// On x86-64, numbers from here on belong to the x32 interface: the same calls by other numbers.
const X32: u32 = 0x4000_0000;

/// Where things stand in the kernel's `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const IF_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn instruction(code: u32, value: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k: value }
}

/// Goes on with the next instruction when the condition holds, and otherwise after `skip` more.
fn unless_skip(code: u32, value: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: skip, k: value }
}

/// The program for these rules, for a process of this architecture.
fn program(rules: &[Rule], architecture: u32) -> Vec<libc::sock_filter> {
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE_AT),
        // Numbers mean other calls elsewhere: such a process would not be confined.
        libc::sock_filter { code: IF_EQUAL as u16, jt: 1, jf: 0, k: architecture },
        instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(LOAD, NUMBER_AT),
    ];
    if cfg!(target_arch = "x86_64") {
        program.push(unless_skip(IF_AT_LEAST, X32, 1));
        program.push(instruction(RETURN, errno(libc::ENOSYS)));
    }
    for rule in rules {
        let decision = match rule.then {
            Then::Errno(number) => errno(number),
            Then::Ask => libc::SECCOMP_RET_USER_NOTIF,
        };
        let number = rule.call as u32;
        let test = match rule.when {
            When::Always => None,
            When::Equals { argument, value } => Some((IF_EQUAL, argument, value)),
            When::AnyBit { argument, bits } => Some((IF_BIT, argument, bits)),
        };
        match test {
            None => program.push(unless_skip(IF_EQUAL, number, 1)),
            Some((code, argument, value)) => {
                program.push(unless_skip(IF_EQUAL, number, 4));
                program.push(instruction(LOAD, ARGUMENTS_AT + 8 * argument));
                program.push(unless_skip(code, value, 1));
            }
        }
        program.push(instruction(RETURN, decision));
        if test.is_some() {
            program.push(instruction(LOAD, NUMBER_AT));
        }
    }
    program.push(instruction(RETURN, libc::SECCOMP_RET_ALLOW));
    program
}

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | (number as u32 & libc::SECCOMP_RET_DATA)
}

/// Installs the rules for this thread, and all that it will start, for good. Returns the descriptor on which a
/// supervisor is asked, if a rule asks. No program gains rights by being run afterwards: the kernel wants it so.
pub(crate) fn install(rules: &[Rule]) -> io::Result<Option<OwnedFd>> {
    let Some(architecture) = ARCHITECTURE else {
        return Err(io::Error::other("no filter is known for this architecture"));
    };
    let mut program = program(rules, architecture);
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let description = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: the call has no pointers.
    crate::checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    if !rules.iter().any(|rule| rule.then == Then::Ask) {
        return set_filter(&description, 0).map(|_| None);
    }
    let listens = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // Where the kernel can (5.19), only a deadly signal ends the wait for an answer, so that opens are not interrupted
    // more often than they would be without us.
    let patient = listens | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    let descriptor = match set_filter(&description, patient) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            set_filter(&description, listens)?
        }
        other => other?,
    };
    // SAFETY: the kernel made the descriptor for this call, and nobody else knows of it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

fn set_filter(program: &libc::sock_fprog, flags: libc::c_ulong) -> io::Result<RawFd> {
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    let pointer = std::ptr::from_ref(program);
    // SAFETY: the description and the instructions behind it live until the call returns; the kernel copies them.
    let descriptor =
        crate::checked(unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, pointer) })?;
    RawFd::try_from(descriptor).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: u32 = 7;

    /// What the kernel's machine would answer, for the instructions that we use.
    fn answer(rules: &[Rule], architecture: u32, number: u32, arguments: [u32; 6]) -> u32 {
        let program = program(rules, HERE);
        let (mut at, mut value) = (0, 0);
        loop {
            let one = program[at];
            let jump = |holds: bool| usize::from(if holds { one.jt } else { one.jf });
            at += 1;
            match u32::from(one.code) {
                LOAD if one.k == NUMBER_AT => value = number,
                LOAD if one.k == ARCHITECTURE_AT => value = architecture,
                LOAD => value = arguments[(one.k - ARGUMENTS_AT) as usize / 8],
                IF_EQUAL => at += jump(value == one.k),
                IF_AT_LEAST => at += jump(value >= one.k),
                IF_BIT => at += jump(value & one.k != 0),
                RETURN => return one.k,
                other => panic!("no such instruction: {other:#x}"),
            }
        }
    }

    fn rule(call: libc::c_long, when: When, then: Then) -> Rule {
        Rule { call, when, then }
    }

    #[test]
    fn calls_without_a_rule_go_on_and_others_get_their_errno() {
        let rules =
            [rule(5, When::Always, Then::Errno(libc::EPERM)), rule(6, When::Always, Then::Ask)];
        assert_eq!(answer(&rules, HERE, 4, [0; 6]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(&rules, HERE, 5, [0; 6]), errno(libc::EPERM));
        assert_eq!(answer(&rules, HERE, 6, [0; 6]), libc::SECCOMP_RET_USER_NOTIF);
    }

    #[test]
    fn arguments_decide_and_later_rules_still_see_the_number() {
        let rules = [
            rule(5, When::Equals { argument: 1, value: 9 }, Then::Errno(1)),
            rule(5, When::AnyBit { argument: 0, bits: 6 }, Then::Errno(2)),
            rule(8, When::Always, Then::Errno(3)),
        ];
        assert_eq!(answer(&rules, HERE, 5, [0, 9, 0, 0, 0, 0]), errno(1));
        assert_eq!(answer(&rules, HERE, 5, [4, 0, 0, 0, 0, 0]), errno(2));
        assert_eq!(answer(&rules, HERE, 5, [1, 8, 9, 9, 9, 9]), libc::SECCOMP_RET_ALLOW);
        assert_eq!(answer(&rules, HERE, 8, [0, 9, 0, 0, 0, 0]), errno(3));
    }

    #[test]
    fn another_architecture_is_killed_and_the_x32_numbers_are_not_there() {
        assert_eq!(answer(&[], HERE + 1, 1, [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
        if cfg!(target_arch = "x86_64") {
            assert_eq!(answer(&[], HERE, X32 | 1, [0; 6]), errno(libc::ENOSYS));
        }
    }

    #[test]
    fn the_architecture_is_the_kernels_number() {
        let expected = if cfg!(target_arch = "x86_64") { 0xC000_003E } else { 0xC000_00B7 };
        assert_eq!(ARCHITECTURE, Some(expected));
    }
}
