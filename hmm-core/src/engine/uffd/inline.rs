//! What answering in the toucher's handler of SIGBUS adds to a descriptor.

use super::service::Service;
use crate::addr::AddrRange;
use crate::arena::Shared;
use crate::engine::linux::{Mappings, memory};
use crate::engine::trap::{Access, Claim, Owner, Signal, Trap};
use crate::engine::{Mapping, VmaKind};
use crate::error::{Error, Result};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A trap with what stands behind it.
#[derive(Debug)]
pub(super) struct Inline {
    pub(super) trap: Shared<Trap>,
    /// Behind the trap.
    _owner: Shared<Toucher>,
}

/// Tells whose a SIGBUS is.
struct Toucher {
    mappings: Mappings,
    service: Service,
}

impl Owner for Toucher {
    /// Only userfaultfd makes an access to private anonymous memory end so.
    fn claim(&self, access: &Access) -> Claim {
        let page = access.addr.page();
        let is_mapped = |mapping: &Mapping| mapping.range.contains(page);
        match self.mappings.at(page) {
            _ if access.signal == Signal::Segv => Claim::Stranger,
            Ok(Some(mapping))
                if mapping.kind == VmaKind::Anonymous && mapping.range.contains(page) =>
            {
                Claim::Mine
            }
            // The kernel does not say: the access is made again.
            Err(_) => Claim::Settled,
            Ok(Some(mapping)) if is_mapped(&mapping) && was_registered(access) => Claim::Settled,
            Ok(_) => Claim::Stranger,
        }
    }

    fn drain(&self) {
        self.service.drain();
    }
}

/// Registrations under way.
static REGISTERING: AtomicUsize = AtomicUsize::new(0);

/// Held from before a registration until what should not have been registered is not any more: the program may have
/// mapped something else since the mapping was looked at.
pub(super) struct Registering(());

impl Registering {
    pub(super) fn begin() -> Self {
        REGISTERING.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for Registering {
    fn drop(&mut self) {
        REGISTERING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether a SIGBUS in other memory comes, or came, from such a registration. The program's own (behind the end of a file)
/// stays one.
fn was_registered(access: &Access) -> bool {
    let can_be_had = || memory::populate(AddrRange::page_of(access.addr), access.write).is_ok();
    // Twice: a registration may begin and end between two looks.
    (0..2).any(|_| REGISTERING.load(Ordering::SeqCst) > 0 || can_be_had())
}

impl Inline {
    pub(super) fn new(service: Service) -> Result<Self> {
        let no_memory = || Error::NoMemory { what: "the engine's state" };
        let toucher = Toucher { mappings: Mappings::open()?, service };
        let owner = Shared::new(toucher).ok_or_else(no_memory)?;
        let behind: NonNull<dyn Owner> = NonNull::from(&*owner);
        // SAFETY: the owner lies in the arena, and lives as long as this value, which outlives the trap's stop.
        let trap = unsafe { Trap::new(behind, &[Signal::Bus, Signal::Segv])? };
        Ok(Self { trap, _owner: owner })
    }
}

impl std::fmt::Debug for Toucher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Toucher")
    }
}

/// Whether every page of a range is private anonymous memory.
///
/// # Errors
/// `Invalid` at the first page that is not.
pub(super) fn check_anonymous(mappings: &Mappings, range: AddrRange) -> Result<()> {
    let mut next = range.start();
    while next < range.end() {
        let is_good = |one: &Mapping| one.range.contains(next) && one.kind == VmaKind::Anonymous;
        match mappings.at(next)?.filter(is_good) {
            Some(mapping) => next = mapping.range.end(),
            None => {
                let what = "only mapped, private anonymous memory can be answered inline";
                return Err(Error::Invalid { address: next, what });
            }
        }
    }
    Ok(())
}
