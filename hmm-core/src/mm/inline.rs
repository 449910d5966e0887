//! Ranges whose touches the toucher answers itself.

use super::Mm;
use crate::addr::AddrRange;
use crate::arena;
use crate::error::{Error, Result};
use crate::ops::{InvalidateEvent, Invalidation};
use std::sync::atomic::Ordering;

impl Mm {
    /// Lets whoever touches an absent page of a range bring it home itself, in a handler of SIGBUS, instead of waiting for
    /// a service thread: the fastest way there is. For memory that the program never hands to the kernel while pages of it
    /// may be away, on an engine that otherwise serves the kernel ([`Mm::serves_kernel`]).
    ///
    /// On such a range, from now on:
    /// - system calls on absent pages (also on holes, once pages of the range have migrated) fail with `EFAULT`: keep what
    ///   they use present with [`Mm::guard`];
    /// - the device's `fault` runs in the toucher if it says that it is safe there ([`crate::DevmemOps::is_signal_safe`]),
    ///   else in a thread of the library while the toucher sleeps;
    /// - threads that touch it must not block SIGBUS, and the program must not replace the handler: pages stop leaving
    ///   when it does so again and again. A program's own handler, installed before, gets what is not the library's.
    ///
    /// Exactly this range changes: nothing that the kernel joined to it, which may be somebody else's. The kernel cuts the
    /// mapping at the borders: `mremap` moves what lies between two borders, not across one. What `mremap` moves or
    /// enlarges stays inline; what is unmapped, or mapped over, is forgotten. A child of `fork` has ordinary memory.
    ///
    /// Pages on devices come home first, and mirrors are invalidated. Idempotent. Where everything is inline anyway
    /// (engine `uffd-inline`) only the arguments are checked.
    ///
    /// # Errors
    /// `Invalid` when the range is not all mapped, private and anonymous, or holds the library's own memory; `Busy` when a
    /// page does not come home, another userfaultfd of the process has the range, or the layout keeps changing; `Lost`;
    /// `NoMemory`; `Deadlock` from a callback; `Gone`; `Unsupported` with the reason on engines without userfaultfd, and
    /// when the program ignores SIGBUS or SIGSEGV. Of a longer range, a part may have changed then.
    pub fn inline_range(&self, range: AddrRange) -> Result<()> {
        self.answer_inline(range, true)
    }

    /// Undoes [`Mm::inline_range`] on a range, or a part of one: touches are answered as the engine answers by itself, so
    /// that system calls wait for absent pages again where the engine serves them.
    ///
    /// # Errors
    /// As [`Mm::inline_range`].
    pub fn blocking_range(&self, range: AddrRange) -> Result<()> {
        self.answer_inline(range, false)
    }

    fn answer_inline(&self, range: AddrRange, inline: bool) -> Result<()> {
        self.check_not_closing()?;
        if self.engine.is_service_thread() || self.notifiers.in_callback() {
            let what = "a range is made inline or blocking from inside a callback";
            return Err(Error::Deadlock { what });
        }
        let mut is_own = self.frames.area().overlaps(range);
        arena::each_own(|own| is_own |= own.overlaps(range));
        if is_own {
            let what = "the range holds memory of the library";
            return Err(Error::Invalid { address: range.start(), what });
        }
        // Nothing of it leaves meanwhile.
        self.pins.insert(range)?;
        let done = self.bring_home(range).and_then(|_| self.change_answerer(range, inline));
        let _ = self.pins.remove(range);
        done
    }

    fn change_answerer(&self, range: AddrRange, inline: bool) -> Result<()> {
        // Nothing is opened that a close would not close.
        let _open = self.close_lock.lock();
        self.check_not_closing()?;
        // For a moment the range is watched by nobody: what mirrors know of it must not outlive that.
        let update = Invalidation { range, event: InvalidateEvent::Clear, owner: None };
        let _invalid = self.notifiers.invalidate(update);
        self.engine.answer_inline(range, inline)?;
        for leaf in self.table.leaves(range) {
            leaf.absence_watched.store(false, Ordering::Release);
        }
        Ok(())
    }
}
