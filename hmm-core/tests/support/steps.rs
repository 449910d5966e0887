//! Random steps of a [`World`](super::world::World): what the program, its devices and the library's callers do.

use hmm_core::PAGE_SIZE;
use hmm_core::engine::model::PageCondition;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

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
    Move {
        from: Span,
        to: usize,
    },
    /// Moves, and stores a byte at the new place.
    MoveAndStore {
        from: Span,
        to: usize,
        seed: u8,
    },
    Protect {
        span: Span,
        writable: bool,
    },
    Store(Bytes),
}

/// What can be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Load { page: usize },
    DeviceLoad { device: usize, page: usize },
    Migrate { device: usize, span: Span },
    Home { device: usize, span: Span },
    Pull { device: usize, span: Span },
    RangeFault { span: Span, owner: Option<usize>, write: bool },
    MakePresent { span: Span, write: bool },
    Pin(Span),
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    Change(Change),
    Load(Bytes),
    Add {
        word: usize,
        value: u64,
    },
    SystemRead(Bytes),
    SystemWrite(Bytes),
    DeviceLoad {
        device: usize,
        bytes: Bytes,
    },
    DeviceStore {
        device: usize,
        bytes: Bytes,
    },
    /// System pages go to a device, which leaves every `leave`-th.
    Migrate {
        device: usize,
        span: Span,
        leave: usize,
    },
    /// A device's pages come home.
    Home {
        device: usize,
        span: Span,
    },
    /// A device takes what the other one has.
    Pull {
        device: usize,
        span: Span,
    },
    /// The process changes its memory while a migration to (or from) a device is under way.
    During {
        device: usize,
        span: Span,
        home: bool,
        /// After its outcome was decided, not before.
        late: bool,
        change: Change,
    },
    /// The driver panics in the middle of a migration.
    Panic {
        device: usize,
        span: Span,
        home: bool,
        late: bool,
    },
    /// The process changes its memory while the library is at the `calls`-th call of its engine.
    Interrupted {
        calls: usize,
        change: Change,
        verb: Verb,
    },
    Snapshot {
        span: Span,
        owner: Option<usize>,
    },
    RangeFault {
        span: Span,
        owner: Option<usize>,
        write: bool,
    },
    MakePresent {
        span: Span,
        write: bool,
    },
    Pin(Span),
    Unpin,
    /// Nothing happens for a moment.
    Idle,
    FaultAround {
        device: usize,
        pages: usize,
    },
    Condition {
        span: Span,
        condition: PageCondition,
    },
    Trouble(bool),
    /// A child is forked, and compares every byte.
    Fork,
}

/// The whole area.
const ALL: Span = Span { first: 0, count: PAGES };

/// A page, half the time one of a few around the boundary: steps must meet to matter.
fn page() -> impl Strategy<Value = usize> {
    prop_oneof![2 => BOUNDARY - 6..BOUNDARY + 6, 1 => Just(0), 2 => 0..PAGES]
}

fn span() -> impl Strategy<Value = Span> {
    let count = prop_oneof![5 => 1..=8_usize, 2 => 1..=PAGES, 3 => 64..=100_usize];
    (page(), count).prop_map(|(first, count)| Span { first, count: count.min(PAGES - first) })
}

fn bytes() -> impl Strategy<Value = Bytes> {
    let len = prop_oneof![4 => 1..=64_usize, 1 => 1..=3 * PAGE_SIZE];
    (page(), 0..PAGE_SIZE, len, any::<u8>()).prop_map(|(page, offset, len, seed)| {
        let at = page * PAGE_SIZE + offset;
        Bytes { at, len: len.min(PAGES * PAGE_SIZE - at), seed }
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => span().prop_map(Change::Map),
        2 => Just(Change::Map(ALL)),
        3 => Just(Change::Protect { span: ALL, writable: true }),
        1 => span().prop_map(Change::Unmap),
        2 => span().prop_map(Change::Drop),
        3 => (span(), page()).prop_map(|(from, to)| Change::Move { from, to }),
        1 => (span(), any::<bool>())
            .prop_map(|(span, writable)| Change::Protect { span, writable }),
        4 => bytes().prop_map(Change::Store),
    ]
}

/// A change of pages that lie in `span`.
fn change_inside(span: Span) -> impl Strategy<Value = Change> {
    let part = (span.pages(), 1..=span.count)
        .prop_map(move |(first, count)| Span { first, count: count.min(span.pages().end - first) });
    let bytes = (span.pages(), 0..PAGE_SIZE, any::<u8>()).prop_map(|(page, offset, seed)| Bytes {
        at: page * PAGE_SIZE + offset,
        len: 1,
        seed,
    });
    (part, page(), bytes, 0..9_u8).prop_map(|(part, to, bytes, which)| match which {
        0 => Change::Map(part),
        1 => Change::Unmap(part),
        2 => Change::Drop(part),
        3 => Change::Protect { span: part, writable: false },
        4 => Change::Move { from: part, to },
        5 => Change::MoveAndStore { from: part, to, seed: bytes.seed },
        _ => Change::Store(bytes),
    })
}

/// Something on `span` that can be interrupted.
fn verb(span: Span) -> impl Strategy<Value = Verb> {
    let some = (span.pages(), 0..DEVICES, proptest::option::of(0..DEVICES), any::<bool>());
    (some, 0..12_u8).prop_map(move |((page, device, owner, write), which)| match which {
        0..3 => Verb::Load { page },
        3 => Verb::DeviceLoad { device, page },
        4..7 => Verb::Migrate { device, span },
        7 => Verb::Home { device, span },
        8 => Verb::Pull { device, span },
        9 => Verb::RangeFault { span, owner, write },
        10 => Verb::MakePresent { span, write },
        _ => Verb::Pin(span),
    })
}

fn interrupted() -> impl Strategy<Value = Step> {
    span().prop_flat_map(|span| {
        (0..24_usize, change_inside(span), verb(span))
            .prop_map(|(calls, change, verb)| Step::Interrupted { calls, change, verb })
    })
}

fn migration() -> impl Strategy<Value = Step> {
    let device = || 0..DEVICES;
    let leave = || prop_oneof![3 => Just(0_usize), 1 => 2..5_usize];
    prop_oneof![
        5 => (device(), span(), leave())
            .prop_map(|(device, span, leave)| Step::Migrate { device, span, leave }),
        2 => (device(), span()).prop_map(|(device, span)| Step::Home { device, span }),
        1 => (device(), span()).prop_map(|(device, span)| Step::Pull { device, span }),
        5 => interrupted(),
        1 => (device(), span(), any::<bool>(), any::<bool>())
            .prop_map(|(device, span, home, late)| Step::Panic { device, span, home, late }),
        2 => (device(), span(), any::<bool>(), change())
            .prop_map(|(device, span, home, change)| {
                Step::During { device, span, home, late: false, change }
            }),
        3 => (device(), span(), any::<bool>()).prop_flat_map(|(device, span, home)| {
            (any::<bool>(), change_inside(span))
                .prop_map(move |(late, change)| Step::During { device, span, home, late, change })
        }),
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
        12 => migration(),
        6 => change().prop_map(Step::Change),
        2 => bytes().prop_map(Step::Load),
        1 => (page(), 0..512_usize, any::<u64>())
            .prop_map(|(page, word, value)| Step::Add { word: page * 512 + word, value }),
        1 => bytes().prop_map(Step::SystemRead),
        1 => bytes().prop_map(Step::SystemWrite),
        2 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceLoad { device, bytes }),
        3 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceStore { device, bytes }),
        3 => look(),
        1 => prop_oneof![span().prop_map(Step::Pin), Just(Step::Unpin), Just(Step::Idle)],
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

/// A sequence of at most `longest` steps.
pub(crate) fn sequences(longest: usize) -> impl Strategy<Value = Sequence> {
    proptest::collection::vec(step(), 1..=longest).prop_map(Sequence)
}

/// What a single thread does on any engine: nothing happens at the same time, and nothing fails by design. Faults bring
/// no neighbours home: how far a mapping reaches, at which a driver stops, differs (the kernel joins few that moved).
fn plain_step() -> impl Strategy<Value = Step> {
    let device = || 0..DEVICES;
    let leave = || prop_oneof![3 => Just(0_usize), 1 => 2..5_usize];
    let migration = prop_oneof![
        6 => (device(), span(), leave())
            .prop_map(|(device, span, leave)| Step::Migrate { device, span, leave }),
        2 => (device(), span()).prop_map(|(device, span)| Step::Home { device, span }),
        1 => (device(), span()).prop_map(|(device, span)| Step::Pull { device, span }),
    ];
    prop_oneof![
        8 => migration,
        8 => change().prop_map(Step::Change),
        3 => bytes().prop_map(Step::Load),
        1 => (page(), 0..512_usize, any::<u64>())
            .prop_map(|(page, word, value)| Step::Add { word: page * 512 + word, value }),
        1 => bytes().prop_map(Step::SystemRead),
        1 => bytes().prop_map(Step::SystemWrite),
        2 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceLoad { device, bytes }),
        3 => (device(), bytes()).prop_map(|(device, bytes)| Step::DeviceStore { device, bytes }),
        3 => look(),
        1 => prop_oneof![span().prop_map(Step::Pin), Just(Step::Unpin)],
        1 => Just(Step::Fork),
    ]
}

/// The sequence of `length` plain steps that belongs to a seed.
pub(crate) fn plain_sequence(seed: u64, length: usize) -> Sequence {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), random);
    let steps = proptest::collection::vec(plain_step(), length).new_tree(&mut runner);
    Sequence(steps.unwrap().current())
}
