//! What the tests, stress runs and benchmarks share: mapped regions, the kernel's own view of a page, and skipping
//! with a reason.

mod proc_view;
mod region;

pub use hmm_core::Capabilities;
pub use proc_view::{count_present, present, resident_bytes};
pub use region::Region;

use hmm_core::{AddrRange, Mm, PresentGuard};
use std::sync::Arc;

/// Ends the test with a printed reason. The runner counts a line that begins with `skipped: ` on standard error.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        eprintln!("skipped: {}", format_args!($($reason)*));
        return;
    }};
}

/// The mm of this process, or leaves the test as skipped with the reason that the library gives.
#[macro_export]
macro_rules! mm_or_skip {
    () => {
        match $crate::current_mm() {
            Ok(mm) => mm,
            Err(reason) => $crate::skip!("{reason}"),
        }
    };
}

/// Leaves the test as skipped when the engine lacks the capability (named as in [`Capabilities`]) that it is about.
#[macro_export]
macro_rules! needs {
    ($mm:expr, $capability:ident) => {
        if let Some(reason) = $crate::lack(&$mm, $crate::Capabilities::$capability) {
            $crate::skip!("{reason}");
        }
    };
}

/// By how much limits of time are longer where everything is slow (`HMM_TEST_PATIENCE`, which the matrix sets).
pub fn patience() -> u32 {
    let told = std::env::var("HMM_TEST_PATIENCE").ok().and_then(|told| told.parse().ok());
    told.unwrap_or(1).max(1)
}

/// Why the engine of an mm cannot show what needs a capability; `None` when it can.
pub fn lack(mm: &Mm, capability: Capabilities) -> Option<String> {
    const MEANINGS: [(Capabilities, &str); 4] = [
        (Capabilities::MOVE, "what is unmapped or moved while it migrates may be lost"),
        (Capabilities::KERNEL_FAULTS, "system calls on absent pages fail"),
        (Capabilities::EVENTS, "layout changes are not reported"),
        (Capabilities::PRIVATE_FILES, "private file mappings stay"),
    ];
    if mm.capabilities().contains(capability) {
        return None;
    }
    let names: Vec<_> = capability.iter_names().map(|(name, _)| name).collect();
    let meaning = MEANINGS.iter().find(|one| one.0 == capability).map_or("", |one| one.1);
    Some(format!("engine {} lacks {}: {meaning}", mm.engine_name(), names.join(" and ")))
}

/// Keeps a range present for what the kernel does to it, where the engine lacks the capability to serve that.
///
/// # Panics
/// When the range cannot be made present.
pub fn hold(
    mm: &Arc<Mm>,
    without: Capabilities,
    range: AddrRange,
    write: bool,
) -> Option<PresentGuard> {
    let is_needed = !mm.capabilities().contains(without);
    is_needed.then(|| mm.guard(range, write).expect("the range can be present"))
}

/// Opens the mm of this process. Only a machine on which no engine works is a reason to skip.
///
/// # Errors
/// The library's text when this kernel, or its settings, allow no engine.
///
/// # Panics
/// When opening fails for any other reason: that is a defect, not a reason to skip.
pub fn current_mm() -> Result<Arc<Mm>, String> {
    match Mm::current() {
        Ok(mm) => Ok(mm),
        Err(reason @ hmm_core::Error::Unsupported { .. }) => Err(reason.to_string()),
        Err(other) => panic!("the mm of this process cannot be opened: {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmm_core::PAGE_SIZE;

    #[test]
    fn a_touched_page_is_present_and_counted_in_rss() {
        let region = Region::new(1024);
        assert_eq!(count_present(region.addr(), region.pages()), 0);
        let before = resident_bytes();
        region.fill(1);
        assert!(present(region.page_addr(1023)));
        assert_eq!(count_present(region.addr(), region.pages()), 1024);
        assert!(resident_bytes() >= before + 1000 * PAGE_SIZE as u64);
    }

    #[test]
    fn words_keep_their_values() {
        let region = Region::new(2);
        region.word(513).store(7, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(region.word(513).load(std::sync::atomic::Ordering::Relaxed), 7);
        assert_eq!(region.word(512).load(std::sync::atomic::Ordering::Relaxed), 0);
    }

    #[test]
    fn an_aligned_region_can_be_written_to_its_last_byte() {
        let region = Region::aligned(512, 2 << 20);
        assert_eq!(region.addr() % (2 << 20), 0);
        region.write(region.len() - 3, &[1, 2, 3]);
        let mut out = [0; 4];
        region.read(region.len() - 4, &mut out);
        assert_eq!(out, [0, 1, 2, 3]);
    }
}
