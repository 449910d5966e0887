//! Copies that survive a fault: where ordinary code would be killed, they stop and tell how far they came.
//!
//! Each is one instruction (or a short loop) at a known address. The handler recognises the address and sends the thread
//! to the end of the routine; what is left is then still in a register.

use std::arch::global_asm;

// Two copies of one routine: the handler tells them apart by their addresses. Both return the bytes that are left.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".macro hmm_copy_routine name",
    ".hidden \\name, \\name\\()_access, \\name\\()_end",
    ".globl \\name, \\name\\()_access, \\name\\()_end",
    "\\name:",
    "mov rcx, rdx",
    "\\name\\()_access:",
    "rep movsb",
    "\\name\\()_end:",
    "mov rax, rcx",
    "ret",
    ".endm",
    "hmm_copy_routine hmm_copy_present",
    "hmm_copy_routine hmm_copy_faulting",
    ".purgem hmm_copy_routine",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".macro hmm_copy_routine name",
    ".hidden \\name, \\name\\()_access, \\name\\()_end",
    ".globl \\name, \\name\\()_access, \\name\\()_end",
    "\\name:",
    "cbz x2, \\name\\()_end",
    "\\name\\()_access:",
    "ldrb w3, [x1]",
    "strb w3, [x0]",
    "add x1, x1, #1",
    "add x0, x0, #1",
    "subs x2, x2, #1",
    "b.ne \\name\\()_access",
    "\\name\\()_end:",
    "mov x0, x2",
    "ret",
    ".endm",
    "hmm_copy_routine hmm_copy_present",
    "hmm_copy_routine hmm_copy_faulting",
    ".purgem hmm_copy_routine",
);

unsafe extern "C" {
    fn hmm_copy_present(to: *mut u8, from: *const u8, count: usize) -> usize;
    fn hmm_copy_present_access();
    fn hmm_copy_present_end();
    fn hmm_copy_faulting(to: *mut u8, from: *const u8, count: usize) -> usize;
    fn hmm_copy_faulting_access();
    fn hmm_copy_faulting_end();
}

/// Copies between memory that may be away. Returns the bytes copied before the first page that is not there.
///
/// # Safety
/// One side is the caller's own; the other is memory of the process that the caller was asked to read or write.
pub(in crate::engine) unsafe fn present(to: *mut u8, from: *const u8, count: usize) -> usize {
    // SAFETY: by the caller's promise; a fault ends the routine.
    count - unsafe { hmm_copy_present(to, from, count) }
}

/// As [`present`], but touches as ordinary code does: absent pages are waited for. Stops where nothing is mapped.
///
/// # Safety
/// As [`present`].
pub(in crate::engine) unsafe fn faulting(to: *mut u8, from: *const u8, count: usize) -> usize {
    // SAFETY: by the caller's promise; a fault that nobody serves ends the routine.
    count - unsafe { hmm_copy_faulting(to, from, count) }
}

fn between(
    instruction: usize,
    access: unsafe extern "C" fn(),
    end: unsafe extern "C" fn(),
) -> bool {
    (access as usize..end as usize).contains(&instruction)
}

/// Where a thread goes on that faulted in [`present`].
pub(super) fn end_of_present(instruction: usize) -> Option<usize> {
    between(instruction, hmm_copy_present_access, hmm_copy_present_end)
        .then_some(hmm_copy_present_end as *const () as usize)
}

/// Where a thread goes on that faulted in [`faulting`], where nobody serves the fault.
pub(super) fn end_of_faulting(instruction: usize) -> Option<usize> {
    between(instruction, hmm_copy_faulting_access, hmm_copy_faulting_end)
        .then_some(hmm_copy_faulting_end as *const () as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_copies_arrive() {
        let from: Vec<u8> = (0..10_000_u32).map(|byte| byte as u8).collect();
        let mut to = vec![0; from.len()];
        // SAFETY: both vectors are of this test, and equally long.
        assert_eq!(unsafe { present(to.as_mut_ptr(), from.as_ptr(), from.len()) }, from.len());
        assert_eq!(to, from);
        to.fill(0);
        // SAFETY: as above.
        assert_eq!(unsafe { faulting(to.as_mut_ptr(), from.as_ptr(), 7) }, 7);
        assert_eq!(to[..8], [0, 1, 2, 3, 4, 5, 6, 0]);
        // SAFETY: as above; nothing is copied.
        assert_eq!(unsafe { present(to.as_mut_ptr(), from.as_ptr(), 0) }, 0);
    }
}
