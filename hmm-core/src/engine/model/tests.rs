//! The model alone, with a sink that records, and answers as told.

use super::*;
use crate::addr::LEAF_SIZE;
use crate::engine::{FaultEvent, MapEvent, MapTicket, Resolution, Stop, VmaKind};
use crate::flags::Protection;
use std::sync::{Mutex as StdMutex, OnceLock, Weak};
use std::time::{Duration, Instant};

const PAGE: u64 = PAGE_SIZE as u64;

fn read_write() -> Protection {
    Protection::READ | Protection::WRITE
}

/// How faults are answered.
#[derive(Clone, Copy, Default)]
enum Answer {
    /// With a page of zeros.
    #[default]
    Zero,
    /// With the contents of a frame.
    Give(VirtAddr),
    /// Not at all: somebody else will.
    Park,
}

/// Notes what it is told; answers faults as told.
#[derive(Default)]
struct Recorder {
    engine: OnceLock<Weak<ModelEngine>>,
    answer: StdMutex<Answer>,
    faults: StdMutex<Vec<FaultEvent>>,
    events: StdMutex<Vec<MapEvent>>,
    finished: StdMutex<usize>,
}

impl FaultSink for Recorder {
    fn on_fault(&self, fault: FaultEvent) -> Resolution {
        self.faults.lock().unwrap().push(fault);
        let engine = self.engine.get().unwrap().upgrade().unwrap();
        assert!(engine.is_service_thread());
        let _still = engine.layout().hold();
        let page = AddrRange::page_of(fault.addr);
        let progress = match *self.answer.lock().unwrap() {
            Answer::Give(frame) => {
                let progress = engine.give(page, frame, Give::Move);
                engine.wake(page);
                progress
            }
            Answer::Zero => engine.zero(fault.addr, fault.write),
            Answer::Park => return Resolution::Resolved,
        };
        match progress.stop {
            Stop::Done => Resolution::Resolved,
            Stop::Retry => Resolution::Retry,
            stop => panic!("{stop:?}"),
        }
    }
    fn on_map_event(&self, event: MapEvent) -> MapTicket {
        self.events.lock().unwrap().push(event);
        MapTicket(self.events.lock().unwrap().len())
    }
    fn on_idle(&self) {}
    fn must_stay(&self, _: AddrRange) -> bool {
        false
    }
    fn on_own_memory(&self, _: AddrRange) {}
    fn finish_map_event(&self, _: MapTicket) {
        let engine = self.engine.get().unwrap().upgrade().unwrap();
        drop(engine.layout().change()); // Nobody holds it any more.
        *self.finished.lock().unwrap() += 1;
    }
}

fn started(config: ModelConfig) -> (Arc<ModelEngine>, Arc<Recorder>) {
    let engine = ModelEngine::new(config);
    let sink = Arc::new(Recorder::default());
    sink.engine.set(Arc::downgrade(&engine)).unwrap();
    engine.start(sink.clone()).unwrap();
    (engine, sink)
}

fn mapped(engine: &ModelEngine, pages: usize) -> AddrRange {
    engine.mmap(pages, read_write(), VmaKind::Anonymous).unwrap()
}

#[test]
fn cpu_accesses_cross_pages_and_stop_at_edges() {
    let engine = ModelEngine::new(ModelConfig::default());
    let range = mapped(&engine, 2);
    let edge = VirtAddr::new(range.start().get() + PAGE - 3);
    engine.cpu_write(edge, b"across").unwrap();
    let mut out = [0; 8];
    engine.cpu_read(edge, &mut out).unwrap();
    assert_eq!(&out, b"across\0\0");
    assert_eq!(engine.cpu_fetch_add(range.start(), 5).unwrap(), 0);
    assert_eq!(engine.cpu_fetch_add(range.start(), 5).unwrap(), 5);

    let last = VirtAddr::new(range.end().get() - 2);
    assert!(matches!(engine.cpu_write(last, b"xyz"), Err(Error::Fault { .. })));
    assert_eq!(engine.write(last, b"xyz").unwrap(), 2);
    assert!(engine.read(range.end(), &mut out).is_err());

    engine.mprotect(range, Protection::READ).unwrap();
    assert!(matches!(engine.cpu_write(range.start(), b"x"), Err(Error::Permission { .. })));
    assert!(!engine.poke(range.start(), b"x"));
    assert!(engine.peek(range.start(), &mut out));
}

#[test]
fn taken_contents_come_back_at_the_touch() {
    let (engine, sink) = started(ModelConfig::default());
    let range = mapped(&engine, 3);
    let frames = engine.reserve_frames(LEAF_SIZE).unwrap();
    assert_eq!(frames.start().get() % LEAF_SIZE, 0);
    engine.cpu_write(range.start(), b"payload").unwrap();
    engine.populate(range.sub(1, 1), false).unwrap();
    engine.watch(range, Watch::Absence).unwrap();

    let all = engine.take(range, frames.start());
    assert_eq!(all, Progress { pages: 3, stop: Stop::Done });
    let mut out = [0; 7];
    assert!(!engine.peek(range.start(), &mut out));
    let mut runs = Vec::new();
    engine.scan(frames.sub(0, 3), &mut |run, present| runs.push((run, present))).unwrap();
    assert_eq!(
        runs,
        [
            (frames.sub(0, 1), Present::Page),
            (frames.sub(1, 1), Present::Zero),
            (frames.sub(2, 1), Present::None),
        ],
        "holes stay holes"
    );
    assert_eq!(engine.take(range, frames.start()).pages, 0, "the slot is not empty");

    *sink.answer.lock().unwrap() = Answer::Give(frames.start());
    engine.cpu_read(range.start(), &mut out).unwrap();
    assert_eq!(&out, b"payload");
    let faults = sink.faults.lock().unwrap().clone();
    assert_eq!(faults.len(), 1);
    assert_eq!((faults[0].addr, faults[0].write), (range.start(), false));
    assert_eq!(engine.take(range.sub(0, 1), frames.start()).stop, Stop::Done, "it was moved away");
    assert!(engine.fill_frame(frames.start()), "it has a page already");
    assert!(!engine.fill_frame(frames.end()), "that is no frame");
}

#[test]
fn what_is_not_writable_is_copied_into_and_not_taken_from() {
    let engine = ModelEngine::new(ModelConfig::default());
    let range = mapped(&engine, 2);
    let frames = engine.reserve_frames(LEAF_SIZE).unwrap();
    engine.cpu_write(range.start(), b"payload").unwrap();
    assert_eq!(engine.take(range.sub(0, 1), frames.start()).stop, Stop::Done);
    engine.mprotect(range, Protection::READ).unwrap();
    let page = range.sub(0, 1);
    assert_eq!(engine.give(page, frames.start(), Give::Move).stop, Stop::Done);
    let mut held = Present::None;
    engine.scan(frames.sub(0, 1), &mut |_, present| held = present).unwrap();
    assert_eq!(held, Present::Page, "it was copied: the frame has its page still");
    assert_eq!(engine.take(page, frames.page_at(1)).stop, Stop::Refused);
    let mut out = [0; PAGE_SIZE];
    assert!(engine.inspect(range.start(), &mut out) && out.starts_with(b"payload"));
    assert!(!engine.inspect(range.page_at(1), &mut out));
}

#[test]
fn a_parked_fault_sleeps_until_the_page_is_touched() {
    let (engine, sink) = started(ModelConfig::default());
    let range = mapped(&engine, 2);
    engine.watch(range, Watch::Absence).unwrap();
    *sink.answer.lock().unwrap() = Answer::Park;
    let toucher = {
        let engine = engine.clone();
        std::thread::spawn(move || engine.cpu_fetch_add(range.start(), 1))
    };
    let faults = || sink.faults.lock().unwrap().len();
    let wait_for_faults = |count| {
        let deadline = Instant::now() + Duration::from_secs(5);
        while faults() < count && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(faults(), count);
    };
    wait_for_faults(1);
    engine.wake(range.sub(1, 1));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(faults(), 1, "that was the neighbour");
    engine.wake(range);
    wait_for_faults(2); // It tried again, and found nothing.
    let _still = engine.layout().hold();
    assert_eq!(engine.zero(range.start(), true).stop, Stop::Done);
    assert_eq!(engine.zero(range.start(), true).stop, Stop::Exists);
    assert_eq!(toucher.join().unwrap().unwrap(), 0);
}

#[test]
fn poisoned_pages_kill_until_dropped() {
    let (engine, _sink) = started(ModelConfig::default());
    let range = mapped(&engine, 1);
    assert!(engine.poison(range.start()));
    assert!(!engine.poison(range.start()));
    assert!(matches!(engine.cpu_read(range.start(), &mut [0]), Err(Error::Lost { .. })));
    assert!(matches!(engine.read(range.start(), &mut [0]), Err(Error::Fault { .. })));
    engine.madvise_dontneed(range).unwrap();
    engine.cpu_read(range.start(), &mut [0]).unwrap();

    let without = ModelConfig { without: Capabilities::POISON, ..ModelConfig::default() };
    assert!(!ModelEngine::new(without).poison(range.start()));
}

#[test]
fn shared_pages_are_busy_until_written_and_pinned_ones_for_ever() {
    let engine = ModelEngine::new(ModelConfig::default());
    let range = mapped(&engine, 1);
    let frames = engine.reserve_frames(LEAF_SIZE).unwrap();
    engine.populate(range, true).unwrap();
    engine.set_condition(range, PageCondition::Shared);
    assert_eq!(engine.take(range, frames.start()).stop, Stop::Busy);
    engine.populate(range, false).unwrap();
    assert_eq!(engine.take(range, frames.start()).stop, Stop::Busy);
    engine.set_condition(range, PageCondition::Pinned);
    engine.populate(range, true).unwrap();
    assert_eq!(engine.take(range, frames.start()).stop, Stop::Busy);
    engine.set_condition(range, PageCondition::Swapped);
    assert!(!engine.peek(range.start(), &mut [0]));
    engine.populate(range, false).unwrap();
    assert_eq!(engine.take(range, frames.start()).stop, Stop::Done);
}

#[test]
fn layout_changes_are_reported_in_the_order_of_the_kernel() {
    let (engine, sink) = started(ModelConfig::default());
    let (all, elsewhere) = (mapped(&engine, 12), AddrRange::new(1 << 45, (1 << 45) + 4 * PAGE));
    let elsewhere = elsewhere.unwrap();
    engine.mmap_fixed(elsewhere, read_write(), VmaKind::Anonymous);
    engine.watch(all.sub(0, 6), Watch::Changes).unwrap();

    engine.madvise_dontneed(all.sub(4, 4)).unwrap();
    engine.munmap(all.sub(5, 2));
    engine.munmap(all.sub(8, 2));
    engine.cpu_write(all.page_at(1), b"moves").unwrap();
    engine.mremap(all.sub(0, 4), elsewhere.start()).unwrap();
    assert_eq!(engine.watched(elsewhere.start()), Some(Watch::Changes));
    engine.mremap(all.sub(4, 1), elsewhere.start()).unwrap();
    engine.mmap_fixed(elsewhere.sub(3, 1), read_write(), VmaKind::Anonymous);

    let expected = [
        MapEvent::Remove(all.sub(4, 2)),
        MapEvent::Unmap(all.sub(5, 2)),
        MapEvent::Remap { from: all.sub(0, 4), to: elsewhere.start() },
        MapEvent::Unmap(all.sub(0, 4)),
        MapEvent::Unmap(elsewhere.sub(0, 1)),
        MapEvent::Remap { from: all.sub(4, 1), to: elsewhere.start() },
        MapEvent::Unmap(all.sub(4, 1)),
        MapEvent::Unmap(elsewhere.sub(3, 1)),
    ];
    assert_eq!(*sink.events.lock().unwrap(), expected);
    assert_eq!(*sink.finished.lock().unwrap(), expected.len());
    let mut out = [0; 5];
    engine.cpu_read(elsewhere.page_at(1), &mut out).unwrap();
    assert_eq!(&out, b"moves");
    assert!(engine.mremap(elsewhere, elsewhere.page_at(1)).is_err());
    assert!(engine.madvise_dontneed(all).is_err());
}

#[test]
fn neighbours_join_and_what_was_unmapped_is_mapped_again_first() {
    let engine = ModelEngine::new(ModelConfig::default());
    let (first, second) = (mapped(&engine, 4), mapped(&engine, 4));
    let joined = engine.mapping_at(second.start()).unwrap().unwrap();
    assert_eq!(joined.range, first.hull(second));
    engine.watch(first.sub(1, 2), Watch::Changes).unwrap();
    let piece = engine.mapping_at(first.page_at(1)).unwrap().unwrap();
    assert_eq!(piece.range, first.sub(1, 2));
    engine.watch(first.sub(1, 2), Watch::Absence).unwrap();
    engine.watch(first.sub(1, 2), Watch::Changes).unwrap();
    assert_eq!(engine.watched(first.page_at(1)), Some(Watch::Absence));

    engine.munmap(first);
    let above = engine.mapping_at(first.start()).unwrap().unwrap();
    assert_eq!(above.range, second);
    assert!(engine.watch(first, Watch::Changes).is_err());
    assert_eq!(mapped(&engine, 2), first.sub(0, 2));
    assert_eq!(mapped(&engine, 3).start(), second.end());
    let file = engine.mmap(1, read_write(), VmaKind::SharedFile).unwrap();
    let other = engine.mmap(1, read_write(), VmaKind::SharedFile).unwrap();
    let identity = |range: AddrRange| engine.mapping_at(range.start()).unwrap().unwrap().identity;
    assert_ne!(identity(file), identity(other));
}

/// Runs the same calls; returns every progress they reported.
fn troubled_run(seed: u64) -> Vec<Progress> {
    let faults = ModelFaults {
        retry: 3,
        busy: 3,
        no_memory: 3,
        partial: 3,
        streak: 2,
        ..ModelFaults::default()
    };
    let engine = ModelEngine::new(ModelConfig { seed, faults, ..ModelConfig::default() });
    let range = mapped(&engine, 32);
    engine.populate(range, true).unwrap();
    let Ok(frames) = engine.reserve_frames(LEAF_SIZE) else { return Vec::new() };
    let mut seen = Vec::new();
    for how in [Give::Move, Give::Copy, Give::Move] {
        let mut done = 0;
        while done < range.pages() {
            let rest = range.sub(done, range.pages() - done);
            let progress = engine.take(rest, frames.page_at(done));
            done += progress.pages;
            seen.push(progress);
            engine.drain();
        }
        done = 0;
        while done < range.pages() {
            let rest = range.sub(done, range.pages() - done);
            let progress = engine.give(rest, frames.page_at(done), how);
            done += progress.pages;
            seen.push(progress);
            engine.drain();
        }
        if how == Give::Copy {
            engine.empty_frames(frames);
        }
    }
    seen
}

#[test]
fn the_same_seed_makes_the_same_trouble() {
    let runs: Vec<_> = (0..20).map(troubled_run).collect();
    assert_eq!(runs, (0..20).map(troubled_run).collect::<Vec<_>>());
    let stops: Vec<Stop> = runs.iter().flatten().map(|progress| progress.stop).collect();
    for stop in [Stop::Done, Stop::Retry, Stop::Busy, Stop::NoMemory] {
        assert!(stops.contains(&stop), "{stop:?}");
    }
    assert!(runs.iter().flatten().any(|one| one.pages > 0 && one.stop == Stop::Retry));
}

#[test]
fn retry_stays_until_drained() {
    let faults = ModelFaults { retry: 1, streak: 1, ..ModelFaults::default() };
    let engine = ModelEngine::new(ModelConfig { faults, ..ModelConfig::default() });
    let range = mapped(&engine, 1);
    for _ in 0..3 {
        assert_eq!(engine.zero(range.start(), true).stop, Stop::Retry);
    }
    engine.drain();
    assert_eq!(engine.zero(range.start(), true).stop, Stop::Done);
}

#[test]
fn a_stopped_engine_answers_no_faults_and_watches_nothing() {
    let (engine, sink) = started(ModelConfig::default());
    let range = mapped(&engine, 1);
    engine.watch(range, Watch::Absence).unwrap();
    engine.stop();
    engine.cpu_read(range.start(), &mut [0]).unwrap();
    engine.munmap(range);
    assert!(sink.faults.lock().unwrap().is_empty() && sink.events.lock().unwrap().is_empty());
    assert_eq!(Arc::strong_count(&sink), 1);
}
