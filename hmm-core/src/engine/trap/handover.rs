//! Faults that the faulting thread must not answer itself are answered by a service thread.

use crate::addr::VirtAddr;
use crate::engine::{FaultEvent, Resolution};
use crate::sync::{Condvar, Mutex};
use std::time::Duration;

/// Faults that may wait for a service thread at once; further ones wait for a place.
const PLACES: usize = 64;
/// Sleepers look again now and then; nothing depends on it.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
enum Place {
    Free,
    Posted(FaultEvent),
    Taken,
    Answered(Resolution),
}

#[derive(Debug)]
struct Queue {
    places: [Place; PLACES],
    closed: bool,
}

/// Where faulting threads and service threads meet.
#[derive(Debug)]
pub(super) struct Handover {
    queue: Mutex<Queue>,
    posted: Condvar,
    answered: Condvar,
}

/// A fault that a service thread took.
pub(super) struct Task {
    place: usize,
    pub(super) fault: FaultEvent,
}

impl Handover {
    pub(super) fn new() -> Self {
        Self {
            queue: Mutex::new(Queue { places: [Place::Free; PLACES], closed: false }),
            posted: Condvar::new(),
            answered: Condvar::new(),
        }
    }

    /// Has a service thread answer; sleeps until it did. `Retry` when there is none any more.
    pub(super) fn ask(&self, fault: FaultEvent) -> Resolution {
        let mut queue = self.queue.lock();
        let place = loop {
            if queue.closed {
                return Resolution::Retry;
            }
            match queue.places.iter().position(|place| matches!(place, Place::Free)) {
                Some(place) => break place,
                None => queue = self.answered.wait_for(queue, LOOK_AGAIN),
            }
        };
        queue.places[place] = Place::Posted(fault);
        self.posted.notify_all();
        loop {
            if let Place::Answered(resolution) = queue.places[place] {
                queue.places[place] = Place::Free;
                self.answered.notify_all();
                return resolution;
            }
            queue = self.answered.wait_for(queue, LOOK_AGAIN);
        }
    }

    /// The next fault; sleeps until there is one. `None` when closed and empty.
    pub(super) fn take(&self) -> Option<Task> {
        let mut queue = self.queue.lock();
        loop {
            for place in 0..PLACES {
                if let Place::Posted(fault) = queue.places[place] {
                    queue.places[place] = Place::Taken;
                    return Some(Task { place, fault });
                }
            }
            if queue.closed {
                return None;
            }
            queue = self.posted.wait_for(queue, LOOK_AGAIN);
        }
    }

    /// The outcome of a task.
    pub(super) fn answer(&self, task: &Task, resolution: Resolution) {
        let mut queue = self.queue.lock();
        queue.places[task.place] = Place::Answered(resolution);
        self.answered.notify_all();
    }

    /// Nothing new is taken on; [`Handover::take`] ends.
    pub(super) fn close(&self) {
        self.queue.lock().closed = true;
        self.posted.notify_all();
        self.answered.notify_all();
    }

    /// The address of a fault that waits although no service thread takes it.
    pub(super) fn waiting(&self) -> Option<VirtAddr> {
        let queue = self.queue.lock();
        queue.places.iter().find_map(|place| match place {
            Place::Posted(fault) => Some(fault.addr),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_finds_the_one_who_asked() {
        let handover = Handover::new();
        let fault = |page: u64| FaultEvent {
            addr: VirtAddr::new(page * 4096),
            write: page.is_multiple_of(2),
            thread: 0,
            from_service_thread: false,
            inline: false,
        };
        std::thread::scope(|scope| {
            let service = scope.spawn(|| {
                let mut count = 0;
                while let Some(task) = handover.take() {
                    count += 1;
                    let resolution =
                        if task.fault.write { Resolution::Lost } else { Resolution::Resolved };
                    handover.answer(&task, resolution);
                }
                count
            });
            let askers: Vec<_> = (1..100)
                .map(|page| {
                    let handover = &handover;
                    scope.spawn(move || (page, handover.ask(fault(page))))
                })
                .collect();
            for asker in askers {
                let (page, resolution) = asker.join().unwrap();
                assert_eq!(resolution == Resolution::Lost, page % 2 == 0);
            }
            handover.close();
            assert_eq!(service.join().unwrap(), 99);
        });
        assert_eq!(handover.ask(fault(1)), Resolution::Retry);
    }
}
