//! Why pages did not move to the device, counted.

use hmm_core::{MigratePfn, Stay};

/// Numbers of reasons are below this.
const REASONS: usize = 64;

/// How many pages of a request stayed where they were, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stays([usize; REASONS]);

impl Default for Stays {
    fn default() -> Self {
        Self([0; REASONS])
    }
}

impl Stays {
    /// The pages that stayed for one reason.
    pub fn count(&self, why: Stay) -> usize {
        self.0[why as usize % REASONS]
    }

    /// Every reason that some page had, with its pages.
    pub fn iter(&self) -> impl Iterator<Item = (Stay, usize)> + '_ {
        Stay::ALL.iter().map(|why| (*why, self.count(*why))).filter(|(_, pages)| *pages > 0)
    }

    pub(crate) fn add(&mut self, why: Stay, pages: usize) {
        self.0[why as usize % REASONS] += pages;
    }

    /// The entries of a migration from system memory. What it did not select is on a device already.
    pub(crate) fn add_entries(&mut self, entries: &[MigratePfn]) {
        let reasons = entries.iter().filter_map(|entry| entry.reason());
        reasons.filter(|why| *why != Stay::NotSelected).for_each(|why| self.add(why, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_counted_one_by_one() {
        let mut stays = Stays::default();
        let entries = [Stay::Shared, Stay::NotSelected, Stay::Locked, Stay::Shared];
        stays.add_entries(&entries.map(MigratePfn::stays));
        stays.add_entries(&[MigratePfn::default()]);
        stays.add(Stay::LeftOut, 5);
        let expected = [(Stay::Shared, 2), (Stay::Locked, 1), (Stay::LeftOut, 5)];
        assert_eq!(stays.iter().collect::<Vec<_>>(), expected);
    }
}
