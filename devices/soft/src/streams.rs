//! How many pages a CPU fault brings home: one at first, twice as many each time that the next fault comes where the
//! last window ended. Several threads that walk through memory at once are told apart by where they are expected next.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const STREAMS: usize = 16;
const WINDOW_BITS: u32 = 16;
const WINDOW_MASK: u64 = (1 << WINDOW_BITS) - 1;

/// The walks seen last; each word holds the page expected next, and the window before it.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    expected: [AtomicU64; STREAMS],
    oldest: AtomicUsize,
}

impl Streams {
    /// The window for a fault on a page (by number), `1..=limit` pages. Wait-free, allocates nothing.
    pub(crate) fn window(&self, page: u64, limit: u64) -> u64 {
        for slot in &self.expected {
            let word = slot.load(Ordering::Relaxed);
            if word >> WINDOW_BITS != page {
                continue;
            }
            let window = ((word & WINDOW_MASK) * 2).clamp(1, limit.max(1));
            let next = pack(page, window);
            if slot.compare_exchange(word, next, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return window;
            }
        }
        let oldest = self.oldest.fetch_add(1, Ordering::Relaxed) % STREAMS;
        if let Some(slot) = self.expected.get(oldest) {
            slot.store(pack(page, 1), Ordering::Relaxed);
        }
        1
    }
}

fn pack(page: u64, window: u64) -> u64 {
    ((page + window) << WINDOW_BITS) | window
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequential_faults_double_the_window_up_to_the_limit() {
        let streams = Streams::default();
        let mut page = 1000;
        let mut windows = Vec::new();
        for _ in 0..6 {
            let window = streams.window(page, 16);
            windows.push(window);
            page += window;
        }
        assert_eq!(windows, [1, 2, 4, 8, 16, 16]);
        assert_eq!(streams.window(5, 16), 1);
    }

    #[test]
    fn two_walks_do_not_disturb_each_other() {
        let streams = Streams::default();
        assert_eq!((streams.window(100, 8), streams.window(900, 8)), (1, 1));
        assert_eq!((streams.window(101, 8), streams.window(901, 8)), (2, 2));
        assert_eq!((streams.window(103, 8), streams.window(903, 8)), (4, 4));
    }
}
