//! The kernels themselves. Each is a step function that works on at most a page-sized piece under the page table's
//! lock; everything that it keeps between steps lies on the device thread's stack.

use crate::access::{Cursor, Step, Touch, View};
use crate::kernel::{Kernel, WORD, node_word};
use crate::migrate::Driver;
use hmm_core::{Error, PAGE_SIZE, Result, VirtAddr};

/// Single words that one step works on at most: as many as a page holds.
const STEP_WORDS: usize = PAGE_SIZE / 8;
type Page = [u8; PAGE_SIZE];

impl Driver {
    /// Runs a validated kernel on the calling thread.
    ///
    /// # Errors
    /// `Fault` or `Permission` where memory is not mapped or protected; `Invalid` for a bad link or index; `Busy`,
    /// `Unsupported` and `Gone` as [`Driver::run`] says. What was done before stays done.
    pub(crate) fn execute(&self, kernel: &Kernel) -> Result<u64> {
        match *kernel {
            Kernel::Fill { dst, len, byte } => self.fill(Cursor::new(dst, len), byte),
            Kernel::Copy { dst, src, len } => {
                self.copy(Cursor::new(dst, len), Cursor::new(src, len))
            }
            Kernel::AxpyF64 { a, x, y, count } => {
                self.axpy(a, Cursor::new(x, count * WORD), Cursor::new(y, count * WORD))
            }
            Kernel::SumF64 { src, count } => {
                let add = |sum: f64, word| sum + f64::from_ne_bytes(word);
                self.sum(Cursor::new(src, count * WORD), 0.0, add).map(f64::to_bits)
            }
            Kernel::SumU64 { src, count } => {
                let add = |sum: u64, word| sum.wrapping_add(u64::from_ne_bytes(word));
                self.sum(Cursor::new(src, count * WORD), 0, add)
            }
            Kernel::GatherU64 { dst, src, index, count } => {
                let mut gather = Gather::new(dst, src, index, count);
                self.run(|view| gather.step(view)).map(|()| 0)
            }
            Kernel::Chase { head, next_offset, max_steps } => {
                let mut chase = Chase::new(head, next_offset, None, max_steps);
                self.run(|view| chase.step(view)).map(|()| chase.visited)
            }
            Kernel::ChaseSumU64 { head, next_offset, value_offset, max_steps } => {
                let mut chase = Chase::new(head, next_offset, Some(value_offset), max_steps);
                self.run(|view| chase.step(view)).map(|()| chase.sum)
            }
            Kernel::AtomicAddU64 { addr, value } => self.atomic_add(VirtAddr::new(addr), value),
            Kernel::AddU64 { addr, count, stride: WORD, value } => {
                self.add_dense(Cursor::new(addr, count * WORD), value)
            }
            Kernel::AddU64 { addr, count, stride, value } => {
                self.add_strided(addr, count, stride, value)
            }
        }
    }

    fn fill(&self, mut to: Cursor, byte: u8) -> Result<u64> {
        let page: Page = [byte; PAGE_SIZE];
        self.run(|view| {
            let (addr, len) = to.piece();
            Ok(if view.store(addr, &page[..len]) { to.advance(len) } else { to.miss(true) })
        })?;
        Ok(0)
    }

    fn copy(&self, mut to: Cursor, mut from: Cursor) -> Result<u64> {
        let mut held = Held::new();
        self.run(|view| {
            if held.is_empty() {
                return Ok(held.load(view, &mut from));
            }
            let (addr, room) = to.piece();
            let data = held.first(room);
            if !view.store(addr, data) {
                return Ok(to.miss(true));
            }
            let len = data.len();
            held.drop_first(len);
            Ok(to.advance(len))
        })?;
        Ok(0)
    }

    fn axpy(&self, a: f64, mut x: Cursor, mut y: Cursor) -> Result<u64> {
        let mut held = Held::new();
        let mut words: Page = [0; PAGE_SIZE];
        self.run(|view| {
            if held.is_empty() {
                return Ok(held.load(view, &mut x));
            }
            let (addr, room) = y.piece();
            let factors = held.first(room);
            let len = factors.len();
            let updated = view.update(addr, &mut words[..len], |words| {
                for (y, x) in words.as_chunks_mut().0.iter_mut().zip(factors.as_chunks().0) {
                    *y = (f64::from_ne_bytes(*y) + a * f64::from_ne_bytes(*x)).to_ne_bytes();
                }
            });
            if !updated {
                return Ok(y.miss(true));
            }
            held.drop_first(len);
            Ok(y.advance(len))
        })?;
        Ok(0)
    }

    fn sum<T: Copy>(&self, mut from: Cursor, zero: T, add: impl Fn(T, [u8; 8]) -> T) -> Result<T> {
        let mut page: Page = [0; PAGE_SIZE];
        let mut sum = zero;
        self.run(|view| {
            let (addr, len) = from.piece();
            if !view.load(addr, &mut page[..len]) {
                return Ok(from.miss(false));
            }
            sum = page[..len].as_chunks().0.iter().fold(sum, |sum, word| add(sum, *word));
            Ok(from.advance(len))
        })?;
        Ok(sum)
    }

    fn atomic_add(&self, addr: VirtAddr, value: u64) -> Result<u64> {
        let mut old = 0;
        self.run(|view| match view.fetch_add(addr, value) {
            Some(found) => {
                old = found;
                Ok(Step::Done)
            }
            None => Ok(Step::Miss(Touch { device: true, ..Touch::word(addr, true) })),
        })?;
        Ok(old)
    }

    /// Words without gaps: a piece is written back as a whole.
    fn add_dense(&self, mut at: Cursor, value: u64) -> Result<u64> {
        let mut page: Page = [0; PAGE_SIZE];
        self.run(|view| {
            let (addr, len) = at.piece();
            let added = view.update(addr, &mut page[..len], |words| {
                words.as_chunks_mut().0.iter_mut().for_each(|word| add_to(word, value));
            });
            Ok(if added { at.advance(len) } else { at.miss(true) })
        })?;
        Ok(0)
    }

    /// Words with gaps, which belong to someone else: word by word.
    fn add_strided(&self, start: u64, count: u64, stride: u64, value: u64) -> Result<u64> {
        let end = start + (count - 1) * stride + WORD;
        let mut done = 0;
        self.run(|view| {
            for step in 0..STEP_WORDS {
                if done == count {
                    return Ok(Step::Done);
                }
                let addr = VirtAddr::new(start + done * stride);
                let mut word = [0; 8];
                if !view.update(addr, &mut word, |word| add_all(word, value)) {
                    let touch = Touch::word(addr, true);
                    // Pages between far words are none of our business.
                    let end = if stride <= PAGE_SIZE as u64 { end } else { touch.end };
                    return Ok(more_or(step, Touch { end, ..touch }));
                }
                done += 1;
            }
            Ok(Step::More)
        })?;
        Ok(0)
    }
}

fn add_to(word: &mut [u8; 8], value: u64) {
    *word = u64::from_ne_bytes(*word).wrapping_add(value).to_ne_bytes();
}

fn add_all(words: &mut [u8], value: u64) {
    words.as_chunks_mut().0.iter_mut().for_each(|word| add_to(word, value));
}

/// A miss, unless the step got further before it.
fn more_or(progress: usize, touch: Touch) -> Step {
    if progress > 0 { Step::More } else { Step::Miss(touch) }
}

/// Bytes on their way from one place to another.
#[derive(Debug)]
struct Held {
    page: Page,
    start: usize,
    end: usize,
}

impl Held {
    fn new() -> Self {
        Self { page: [0; PAGE_SIZE], start: 0, end: 0 }
    }
    fn is_empty(&self) -> bool {
        self.start == self.end
    }
    /// Takes the next piece of `from`.
    fn load(&mut self, view: &View<'_>, from: &mut Cursor) -> Step {
        let (addr, len) = from.piece();
        if !view.load(addr, &mut self.page[..len]) {
            return from.miss(false);
        }
        (self.start, self.end) = (0, len);
        from.advance(len);
        Step::More
    }
    /// At most `room` bytes from the front.
    fn first(&self, room: usize) -> &[u8] {
        &self.page[self.start..self.end.min(self.start + room)]
    }
    fn drop_first(&mut self, len: usize) {
        self.start += len;
    }
}

/// `dst[i] = src[index[i]]`, a page of indices at a time.
#[derive(Debug)]
struct Gather {
    src: u64,
    index: Cursor,
    dst: Cursor,
    indices: Held,
    values: Held,
}

impl Gather {
    fn new(dst: u64, src: u64, index: u64, count: u64) -> Self {
        let (index, dst) = (Cursor::new(index, count * WORD), Cursor::new(dst, count * WORD));
        Self { src, index, dst, indices: Held::new(), values: Held::new() }
    }

    fn step(&mut self, view: &View<'_>) -> Result<Step> {
        if !self.indices.is_empty() {
            return self.fetch(view);
        }
        if self.values.is_empty() {
            self.values = Held::new();
            return Ok(self.indices.load(view, &mut self.index));
        }
        let (addr, room) = self.dst.piece();
        let data = self.values.first(room);
        if !view.store(addr, data) {
            return Ok(self.dst.miss(true));
        }
        let len = data.len();
        self.values.drop_first(len);
        Ok(self.dst.advance(len))
    }

    /// Turns indices into values; both lists are at most a page long.
    fn fetch(&mut self, view: &View<'_>) -> Result<Step> {
        for step in 0..STEP_WORDS {
            let Some(index) = self.indices.first(8).first_chunk() else { break };
            let addr = element(self.src, u64::from_ne_bytes(*index))?;
            let Some(value) = view.load_word(addr) else {
                return Ok(more_or(step, Touch::word(addr, false)));
            };
            let end = self.values.end;
            self.values.page[end..end + 8].copy_from_slice(&value.to_ne_bytes());
            self.values.end += 8;
            self.indices.drop_first(8);
        }
        Ok(Step::More)
    }
}

/// Address of an element, for an index that comes from memory.
fn element(array: u64, index: u64) -> Result<VirtAddr> {
    let address = index.checked_mul(WORD).and_then(|offset| array.checked_add(offset));
    let address = address.filter(|address| *address < hmm_core::USER_END);
    address.map(VirtAddr::new).ok_or(Error::Invalid {
        address: VirtAddr::new(array),
        what: "an index leads out of the address space",
    })
}

/// A walk along a linked list.
#[derive(Debug)]
struct Chase {
    node: u64,
    next_offset: u64,
    value_offset: Option<u64>,
    max_steps: u64,
    visited: u64,
    sum: u64,
}

impl Chase {
    fn new(node: u64, next_offset: u64, value_offset: Option<u64>, max_steps: u64) -> Self {
        Self { node, next_offset, value_offset, max_steps, visited: 0, sum: 0 }
    }

    fn step(&mut self, view: &View<'_>) -> Result<Step> {
        for step in 0..STEP_WORDS {
            if self.node == 0 || self.visited == self.max_steps {
                return Ok(Step::Done);
            }
            match self.visit(view)? {
                Ok(()) => {}
                Err(missing) => return Ok(more_or(step, Touch::word(missing, false))),
            }
        }
        Ok(Step::More)
    }

    /// Visits one node as a whole, or says which word of it is missing.
    fn visit(&mut self, view: &View<'_>) -> Result<std::result::Result<(), VirtAddr>> {
        let mut value = 0;
        if let Some(offset) = self.value_offset {
            let addr = node_word(self.node, offset)?;
            match view.load_word(addr) {
                Some(word) => value = word,
                None => return Ok(Err(addr)),
            }
        }
        let addr = node_word(self.node, self.next_offset)?;
        let Some(next) = view.load_word(addr) else { return Ok(Err(addr)) };
        self.sum = self.sum.wrapping_add(value);
        self.visited += 1;
        self.node = next;
        Ok(Ok(()))
    }
}
