//! Why a page did not migrate: the numbers and texts of [`Stay`] for C.

use hmm_core::Stay;
use std::ffi::{c_char, c_ulong};

/// Why a page of a migration stayed where it was: hmm_migrate_reason() reads it from an entry of
/// src. Numbers are added, and never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub enum hmm_stay {
    /// It did not stay, or nothing was said.
    HMM_STAY_NONE = 0,
    /// It lies in a range that is pinned or guarded.
    HMM_STAY_PINNED = 1,
    /// Memory of the library itself.
    HMM_STAY_LIBRARY = 2,
    /// A migration under way needs it: its caller's stack, or its arrays.
    HMM_STAY_NEEDED = 3,
    /// Shared anonymous memory, memfd or tmpfs.
    HMM_STAY_SHARED = 4,
    /// A shared file mapping.
    HMM_STAY_SHARED_FILE = 5,
    /// A private file mapping, and an engine that cannot move its pages; or a page beyond the end
    /// of the file.
    HMM_STAY_FILE = 6,
    /// A mapping of a driver or of the kernel.
    HMM_STAY_SPECIAL = 7,
    /// hugetlbfs.
    HMM_STAY_HUGE = 8,
    /// The mapping is not readable and writable, or it is executable.
    HMM_STAY_PROTECTION = 9,
    /// mlock and its kin.
    HMM_STAY_LOCKED = 10,
    /// Another userfaultfd has the range.
    HMM_STAY_WATCHED = 11,
    /// Shared after a fork, or pinned by the kernel (direct I/O, io_uring, a device); or there was
    /// no saying which.
    HMM_STAY_BUSY = 12,
    /// Another migration holds it.
    HMM_STAY_MIGRATING = 13,
    /// It is where the request did not ask for pages: on a device, or in system memory.
    HMM_STAY_NOT_SELECTED = 14,
    /// A page of another owner's device.
    HMM_STAY_FOREIGN = 15,
    /// Its device lost it before.
    HMM_STAY_POISONED = 16,
    /// The program is dropping its contents (madvise).
    HMM_STAY_DROPPED = 17,
    /// The program unmapped, moved or replaced it meanwhile.
    HMM_STAY_CHANGING = 18,
    /// The driver named no destination.
    HMM_STAY_LEFT_OUT = 19,
    /// The destination that the driver named is no free page of a device, or not the page's frame.
    HMM_STAY_BAD_DESTINATION = 20,
    /// The driver said ERROR in dst: the contents are lost.
    HMM_STAY_LOST = 21,
    /// No frame, or no memory for one.
    HMM_STAY_NO_MEMORY = 22,
    /// The kernel refused, and gives no reason.
    HMM_STAY_REFUSED = 23,
    /// A hole, and its memory group is at its limit.
    HMM_STAY_LIMIT = 24,
}

/// Texts with the zero that C wants at their end, by number.
macro_rules! texts {
    ($($number:literal => $text:literal),* $(,)?) => {
        fn text_of(number: u64) -> &'static str {
            match number {
                $($number => concat!($text, "\0"),)*
                _ => "not a reason that this version knows\0",
            }
        }
    };
}

texts! {
    0 => "it migrated, or nothing was said",
    1 => "pinned or guarded: unpin the range, or drop the guard",
    2 => "memory of the library itself never migrates",
    3 => "the stack or the arrays of a thread that migrates: migrate them from another thread",
    4 => "shared memory is mirrored in place: only private memory migrates",
    5 => "a shared file mapping is mirrored in place: only private memory migrates",
    6 => "a file's page that this engine cannot move, or that lies beyond the end of the file",
    7 => "memory of a driver or of the kernel is never mirrored",
    8 => "hugetlb memory stays: use transparent huge pages",
    9 => "only mappings that are readable, writable and not executable migrate",
    10 => "locked in memory: munlock it",
    11 => "somebody else's userfaultfd has the range",
    12 => "shared with another process, or pinned by the kernel for I/O: try again later",
    13 => "another migration holds the page: try again",
    14 => "the page is not where the request selects pages from",
    15 => "on a device of another owner: bring it home first",
    16 => "its device lost the contents: a touch raises SIGBUS",
    17 => "the program is just dropping it: try again later",
    18 => "the program changes the mapping meanwhile: look again",
    19 => "the driver named no destination",
    20 => "the destination is no free device page, or not the page's own frame",
    21 => "the driver says that its contents are lost",
    22 => "no memory for its frame: try again later",
    23 => "the kernel refused to let go of the page, and says no more",
}

/// What a reason means, and what to do about it.
///
/// @param reason  Of hmm_migrate_reason().
/// @return A constant text of one line in English; for a number that this version does not know, one
/// that says so.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub extern "C" fn hmm_stay_text(reason: c_ulong) -> *const c_char {
    text_of(reason).as_ptr().cast()
}

// The numbers are the core's.
const _: () = {
    assert!(hmm_stay::HMM_STAY_PINNED as u64 == Stay::Pinned as u64);
    assert!(hmm_stay::HMM_STAY_LIBRARY as u64 == Stay::Library as u64);
    assert!(hmm_stay::HMM_STAY_NEEDED as u64 == Stay::Needed as u64);
    assert!(hmm_stay::HMM_STAY_SHARED as u64 == Stay::Shared as u64);
    assert!(hmm_stay::HMM_STAY_SHARED_FILE as u64 == Stay::SharedFile as u64);
    assert!(hmm_stay::HMM_STAY_FILE as u64 == Stay::File as u64);
    assert!(hmm_stay::HMM_STAY_SPECIAL as u64 == Stay::Special as u64);
    assert!(hmm_stay::HMM_STAY_HUGE as u64 == Stay::Huge as u64);
    assert!(hmm_stay::HMM_STAY_PROTECTION as u64 == Stay::Protection as u64);
    assert!(hmm_stay::HMM_STAY_LOCKED as u64 == Stay::Locked as u64);
    assert!(hmm_stay::HMM_STAY_WATCHED as u64 == Stay::Watched as u64);
    assert!(hmm_stay::HMM_STAY_BUSY as u64 == Stay::Busy as u64);
    assert!(hmm_stay::HMM_STAY_MIGRATING as u64 == Stay::Migrating as u64);
    assert!(hmm_stay::HMM_STAY_NOT_SELECTED as u64 == Stay::NotSelected as u64);
    assert!(hmm_stay::HMM_STAY_FOREIGN as u64 == Stay::Foreign as u64);
    assert!(hmm_stay::HMM_STAY_POISONED as u64 == Stay::Poisoned as u64);
    assert!(hmm_stay::HMM_STAY_DROPPED as u64 == Stay::Dropped as u64);
    assert!(hmm_stay::HMM_STAY_CHANGING as u64 == Stay::Changing as u64);
    assert!(hmm_stay::HMM_STAY_LEFT_OUT as u64 == Stay::LeftOut as u64);
    assert!(hmm_stay::HMM_STAY_BAD_DESTINATION as u64 == Stay::BadDestination as u64);
    assert!(hmm_stay::HMM_STAY_LOST as u64 == Stay::Lost as u64);
    assert!(hmm_stay::HMM_STAY_NO_MEMORY as u64 == Stay::NoMemory as u64);
    assert!(hmm_stay::HMM_STAY_REFUSED as u64 == Stay::Refused as u64);
    assert!(hmm_stay::HMM_STAY_LIMIT as u64 == Stay::Limit as u64);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_of_the_core() {
        for why in Stay::ALL {
            assert_eq!(text_of(*why as u64).strip_suffix('\0'), Some(why.text()));
        }
        assert!(text_of(Stay::ALL.len() as u64 + 1).starts_with("not a reason"));
    }
}
