//! Trouble on purpose: which calls stop early, and where, drawn from a seed.

use crate::engine::Stop;

/// What the model lets go wrong. Each rate is "one call in so many"; 0 is never, 1 is always.
///
/// With one thread and one seed, the same calls get the same trouble.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelFaults {
    /// `take`, `give` and `zero` say [`Stop::Retry`], and go on saying it until someone drains, as the kernel does
    /// while a layout event waits to be read.
    pub retry: u32,
    /// `take` says [`Stop::Busy`].
    pub busy: u32,
    /// Copying `give`, `zero`, `fill_frame`, `watch` and `reserve_frames` find no memory.
    pub no_memory: u32,
    /// A call that does several pages is cut after some of them (with [`Stop::Retry`] when nothing else is wrong).
    pub partial: u32,
    /// One `madvise_dontneed` in so many drops the contents a few milliseconds after its event was finished. The kernel may
    /// always be that late: it lets the caller go on, and drop, as soon as the event is read.
    pub late_drop: u32,
    /// After so many calls in a row that were made to fail, one is left alone; 0: no such mercy.
    pub streak: u32,
}

/// What a mutator is about to do, as far as it decides what can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    /// `take`.
    Take,
    /// `give` by moving: needs no memory.
    Move,
    /// `give` by copying, `zero`.
    Fill,
}

/// The verdict on one call: do at most `pages`, then say `stop`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) pages: usize,
    pub(super) stop: Stop,
}

/// splitmix64 (Steele, Lea, Flood 2014): tiny, and good enough to draw trouble from.
#[derive(Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    /// A number below `bound`, which is not 0. The bias is far below what a test could see.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Draws the verdicts.
#[derive(Debug)]
pub(super) struct Chaos {
    faults: ModelFaults,
    random: SplitMix64,
    failed_in_a_row: u32,
    undrained: bool,
}

impl Chaos {
    pub(super) fn new(seed: u64, faults: ModelFaults) -> Self {
        Self { faults, random: SplitMix64(seed), failed_in_a_row: 0, undrained: false }
    }

    /// Other rates from now on; the sequence of random numbers goes on.
    pub(super) fn set(&mut self, faults: ModelFaults) {
        self.faults = faults;
        self.failed_in_a_row = 0;
        self.undrained = false;
    }

    /// The layout events that `Retry` stood for have been read.
    pub(super) fn drained(&mut self) {
        self.undrained = false;
    }

    /// What becomes of a call that wants to change `pages` pages.
    pub(super) fn judge(&mut self, verb: Verb, pages: usize) -> Verdict {
        if self.undrained {
            return Verdict { pages: 0, stop: Stop::Retry };
        }
        let retry = self.hits(self.faults.retry);
        let busy = self.hits(self.faults.busy) && verb == Verb::Take;
        let no_memory = self.hits(self.faults.no_memory) && verb == Verb::Fill;
        let partial = self.hits(self.faults.partial) && pages > 1;
        let stop = match (retry || partial, busy, no_memory) {
            (_, true, _) => Stop::Busy,
            (_, _, true) => Stop::NoMemory,
            (true, ..) => Stop::Retry,
            _ => Stop::Done,
        };
        if !self.lets_fail(stop != Stop::Done) {
            return Verdict { pages, stop: Stop::Done };
        }
        self.undrained = stop == Stop::Retry;
        let some = if partial { 1 + self.random.below(pages as u64 - 1) as usize } else { 0 };
        Verdict { pages: some, stop }
    }

    /// Whether a call that only needs memory finds none.
    pub(super) fn out_of_memory(&mut self) -> bool {
        let hit = self.hits(self.faults.no_memory);
        self.lets_fail(hit)
    }

    /// Whether this `madvise_dontneed` drops late.
    pub(super) fn drops_late(&mut self) -> bool {
        self.hits(self.faults.late_drop)
    }

    fn hits(&mut self, one_in: u32) -> bool {
        one_in != 0 && self.random.below(u64::from(one_in)) == 0
    }

    /// Keeps the count of failures in a row; false when a failure must be forgone.
    fn lets_fail(&mut self, fail: bool) -> bool {
        let spared = self.faults.streak != 0 && self.failed_in_a_row >= self.faults.streak;
        let fails = fail && !spared;
        self.failed_in_a_row = if fails { self.failed_in_a_row + 1 } else { 0 };
        fails
    }
}
