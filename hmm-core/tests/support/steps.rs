//! Random steps of a [`World`](super::world::World): what the program, its devices and the library's callers do.

use hmm_core::engine::model::PageCondition;
use proptest::prelude::*;

/// Pages of the area that a world plays in; larger than the shortest run that the library moves (64 pages).
pub(crate) const PAGES: usize = 144;
/// The page of it that begins a leaf.
pub(crate) const BOUNDARY: usize = 70;
/// Devices, the last of which is too small for the area.
pub(crate) const DEVICES: usize = 2;

/// Some pages of the area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first: usize,
    pub(crate) count: usize,
}

impl Span {
    pub(crate) fn pages(self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// Bytes of the area, and what is stored there: `seed`, `seed + 1`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) seed: u8,
}

/// What the process does to its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Map(Span),
    Unmap(Span),
    Drop(Span),
    Move { from: Span, to: usize },
    Protect { span: Span, writable: bool },
    Store(Bytes),
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    Change(Change),
    Load(Bytes),
    Add { word: usize, value: u64 },
    SystemRead(Bytes),
    SystemWrite(Bytes),
    DeviceLoad { device: usize, bytes: Bytes },
    DeviceStore { device: usize, bytes: Bytes },
    /// System pages go to a device, which leaves every `leave`-th.
    Migrate { device: usize, span: Span, leave: usize },
    /// A device's pages come home.
    Home { device: usize, span: Span },
    /// A device takes what the other one has.
    Pull { device: usize, span: Span },
    /// The process changes its memory while a migration to (or from) a device is under way.
    During { device: usize, span: Span, home: bool, change: Change },
    Snapshot { span: Span, owner: Option<usize> },
    RangeFault { span: Span, owner: Option<usize>, write: bool },
    MakePresent { span: Span, write: bool },
    Pin(Span),
    Unpin,
    FaultAround { device: usize, pages: usize },
    Condition { span: Span, condition: PageCondition },
    Trouble(bool),
}

fn span() -> impl Strategy<Value = Span> {
    let count = prop_oneof![6 => 1..=6_usize, 2 => 1..=PAGES, 2 => 64..=100_usize];
    (0..PAGES, count).prop_map(|(first, count)| Span { first, count: count.min(PAGES - first) })
}

fn bytes() -> impl Strategy<Value = Bytes> {
    const SIZE: usize = PAGES * hmm_core::PAGE_SIZE;
    let len = prop_oneof![4 => 1..=64_usize, 1 => 1..=3 * hmm_core::PAGE_SIZE];
    (0..SIZE, len, any::<u8>())
        .prop_map(|(at, len, seed)| Bytes { at, len: len.min(SIZE - at), seed })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        2 => span().prop_map(Change::Map),
        2 => span().prop_map(Change::Unmap),
        2 => span().prop_map(Change::Drop),
        3 => (span(), 0..PAGES).prop_map(|(from, to)| Change::Move { from, to }),
        2 => (span(), any::<bool>())
            .prop_map(|(span, writable)| Change::Protect { span, writable }),
        4 => bytes().prop_map(Change::Store),
    ]
}

fn migration() -> impl Strategy<Value = Step> {
    let device = || 0..DEVICES;
    let leave = || prop_oneof![3 => Just(0_usize), 1 => 2..5_usize];
    prop_oneof![
        5 => (device(), span(), leave())
            .prop_map(|(device, span, leave)| Step::Migrate { device, span, leave }),
        2 => (device(), span()).prop_map(|(device, span)| Step::Home { device, span }),
        1 => (device(), span()).prop_map(|(device, span)| Step::Pull { device, span }),
        3 => (device(), span(), any::<bool>(), change())
            .prop_map(|(device, span, home, change)| Step::During { device, span, home, change }),
    ]
}

fn look() -> impl Strategy<Value = Step> {
    let owner = || proptest::option::of(0..DEVICES);
    prop_oneof![
        2 => (span(), owner()).prop_map(|(span, owner)| Step::Snapshot { span, owner }),
        2 => (span(), owner(), any::<bool>())
            .prop_map(|(span, owner, write)| Step::RangeFault { span, owner, write }),
        1 => (span(), any::<bool>()).prop_map(|(span, write)| Step::MakePresent { span, write }),
    ]
}

fn condition() -> impl Strategy<Value = Step> {
    let condition = prop_oneof![
        Just(PageCondition::Shared),
        Just(PageCondition::Pinned),
        Just(PageCondition::Swapped),
        Just(PageCondition::Ordinary),
    ];
    (span(), condition).prop_map(|(span, condition)| Step::Condition { span, condition })
}

fn step() -> impl Strategy<Value = Step> {
    let device = || 0..DEVICES;
    prop_oneof![
        8 => migration(),
        6 => change().prop_map(Step::Change),
        2 => bytes().prop_map(Step::Load),
        1 => (0..PAGES * 512, any::<u64>()).prop_map(|(word, value)| Step::Add { word, value }),
        1 => bytes().prop_map(Step::SystemRead),
        1 => bytes().prop_map(Step::SystemWrite),
        2 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceLoad { device, bytes }),
        3 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceStore { device, bytes }),
        3 => look(),
        1 => prop_oneof![span().prop_map(Step::Pin), Just(Step::Unpin)],
        1 => (device(), 1..20_usize)
            .prop_map(|(device, pages)| Step::FaultAround { device, pages }),
        1 => condition(),
        1 => any::<bool>().prop_map(Step::Trouble),
    ]
}

/// Steps, printed one to a line.
#[derive(Clone)]
pub(crate) struct Sequence(pub(crate) Vec<Step>);

impl std::fmt::Debug for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().enumerate().try_for_each(|(number, step)| write!(f, "\n{number:4} {step:?}"))
    }
}

/// A sequence of up to `longest` steps.
pub(crate) fn sequences(longest: usize) -> impl Strategy<Value = Sequence> {
    proptest::collection::vec(step(), 1..=longest).prop_map(Sequence)
}
