//! Why a page stayed where it was: what an entry of `src[]` says that does not migrate.

use crate::flags::{MigrateFlags, MigratePfn};
use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $word:literal, $text:literal;)*) => {
        /// Why a page was not migrated. Read per page with [`MigratePfn::reason`]; the numbers are those of C's
        /// `enum hmm_stay`, and never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Stay {
            $($(#[$doc])* $name = $value,)*
        }

        impl Stay {
            /// Every reason, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The reason with a number.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($value => Some(Self::$name),)*
                    _ => None,
                }
            }
            /// One word for it, as Python's dictionaries have it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)*
                }
            }
            /// What it means and what to do about it, in one line.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// It lies in a range that is pinned or guarded.
    Pinned = 1, "pinned", "pinned or guarded: unpin the range, or drop the guard";
    /// Memory of the library itself.
    Library = 2, "library", "memory of the library itself never migrates";
    /// A migration under way needs it: its caller's stack, or its arrays.
    Needed = 3, "needed", "the stack or the arrays of a thread that migrates: migrate them from another thread";
    /// Shared anonymous memory, memfd or tmpfs.
    Shared = 4, "shared", "shared memory is mirrored in place: only private memory migrates";
    /// A shared file mapping.
    SharedFile = 5, "shared_file", "a shared file mapping is mirrored in place: only private memory migrates";
    /// A private file mapping, and an engine that cannot move its pages; or a page beyond the end of the file.
    File = 6, "file", "a file's page that this engine cannot move, or that lies beyond the end of the file";
    /// A mapping of a driver or of the kernel.
    Special = 7, "special", "memory of a driver or of the kernel is never mirrored";
    /// hugetlbfs.
    Huge = 8, "huge", "hugetlb memory stays: use transparent huge pages";
    /// The mapping is not readable and writable, or it is executable.
    Protection = 9, "protection", "only mappings that are readable, writable and not executable migrate";
    /// `mlock` and its kin.
    Locked = 10, "locked", "locked in memory: munlock it";
    /// Another userfaultfd has the range.
    Watched = 11, "watched", "somebody else's userfaultfd has the range";
    /// Shared after a fork, or pinned by the kernel (direct I/O, io_uring, a device); or there was no saying which.
    Busy = 12, "busy", "shared with another process, or pinned by the kernel for I/O: try again later";
    /// Another migration holds it.
    Migrating = 13, "migrating", "another migration holds the page: try again";
    /// It is where the request did not ask for pages: on a device, or in system memory.
    NotSelected = 14, "not_selected", "the page is not where the request selects pages from";
    /// A page of another owner's device.
    Foreign = 15, "foreign", "on a device of another owner: bring it home first";
    /// Its device lost it before.
    Poisoned = 16, "poisoned", "its device lost the contents: a touch raises SIGBUS";
    /// The program is dropping its contents (`madvise`).
    Dropped = 17, "dropped", "the program is just dropping it: try again later";
    /// The program unmapped, moved or replaced it meanwhile.
    Changing = 18, "changing", "the program changes the mapping meanwhile: look again";
    /// The driver named no destination.
    LeftOut = 19, "left_out", "the driver named no destination";
    /// The destination that the driver named is no free page of a device, or not the page's frame.
    BadDestination = 20, "bad_destination", "the destination is no free device page, or not the page's own frame";
    /// The driver said `ERROR` in `dst`: the contents are lost.
    Lost = 21, "lost", "the driver says that its contents are lost";
    /// No frame, or no memory for one.
    NoMemory = 22, "no_memory", "no memory for its frame: try again later";
    /// The kernel refused, and gives no reason.
    Refused = 23, "refused", "the kernel refused to let go of the page, and says no more";
    /// A hole, and its memory group is at its limit.
    Limit = 24, "limit", "its memory group is at its limit: a hole is not filled on a device";
}

impl fmt::Display for Stay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl MigratePfn {
    /// Position of the reason, above the pfn. The kernel leaves these bits alone.
    pub const REASON_SHIFT: u32 = 58;
    /// Bits below the reason.
    pub(crate) const BELOW_REASON: u64 = (1 << Self::REASON_SHIFT) - 1;

    /// An entry of a page that stays, without a pfn.
    pub const fn stays(why: Stay) -> Self {
        Self((why as u64) << Self::REASON_SHIFT)
    }
    /// The same entry, for a page that stays after all.
    pub const fn but_stays(self, why: Stay) -> Self {
        let kept = self.0 & Self::BELOW_REASON & !MigrateFlags::MIGRATE.bits();
        Self(kept | Self::stays(why).0)
    }
    /// Why the page stayed where it was; `None` when it migrates, and where nothing was said.
    pub const fn reason(self) -> Option<Stay> {
        if self.migrates() { None } else { Stay::from_number(self.0 >> Self::REASON_SHIFT) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pfn;

    #[test]
    fn reasons_travel_above_the_pfn() {
        let page = Pfn::new(Pfn::DEVICE_BASE + 5);
        let entry = MigratePfn::new(page, MigrateFlags::MIGRATE | MigrateFlags::DEVICE);
        assert_eq!(entry.reason(), None);
        for (number, why) in (1..).zip(Stay::ALL) {
            assert_eq!(Stay::from_number(number), Some(*why));
            assert_eq!(MigratePfn::stays(*why).reason(), Some(*why));
            assert_eq!((MigratePfn::stays(*why).pfn(), *why as u64), (None, number));
            let stayed = entry.but_stays(*why);
            assert_eq!((stayed.reason(), stayed.pfn()), (Some(*why), Some(page)));
            assert!(!stayed.migrates() && stayed.flags().contains(MigrateFlags::DEVICE));
        }
        assert_eq!(MigratePfn::default().reason(), None);
        // All numbers fit above the pfn.
        assert!(Stay::ALL.len() < 1 << (u64::BITS - MigratePfn::REASON_SHIFT));
    }

    #[test]
    fn names_are_words_that_differ() {
        for (index, one) in Stay::ALL.iter().enumerate() {
            assert!(one.name().chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'));
            assert!(Stay::ALL[..index].iter().all(|other| other.name() != one.name()));
        }
    }
}
