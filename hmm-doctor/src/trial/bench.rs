//! One address space, one device, and what is done with them.

use super::memory::Memory;
use hmm_core::{AddrRange, InvalidateEvent, Invalidation, Mm, NotifierOps, PAGE_SIZE, Residency};
use hmm_soft::{Kernel, SoftConfig, SoftDevice};
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Pages of the test: 8 MiB.
const PAGES: usize = 2048;
/// Pages that are unmapped while they are away.
const UNMAPPED: usize = 64;
/// Pages that are touched one by one.
const TOUCHES: usize = 65;
/// Pages between two touches, so that nothing looks like a sequence.
const STRIDE: usize = 29;
/// Pages that the single steps use: none that is touched before.
const STORED: usize = 1900;
const CHANGED: usize = 1950;
const WRITTEN: usize = 2000;
/// Times that everything moves.
const ROUNDS: usize = 5;
/// A page may be busy for a moment; for so long nothing keeps one from leaving.
const PATIENCE: Duration = Duration::from_secs(2);
/// A mirror is told of a change at once, or not by itself.
const TOLD_WITHIN: Duration = Duration::from_millis(100);

/// The errno of a system call that cannot reach its memory.
const EFAULT: i32 = 14;

const _: () = assert!(TOUCHES * STRIDE < STORED && WRITTEN < PAGES);

/// What the steps share.
pub(super) struct Bench {
    mm: Arc<Mm>,
    device: Arc<SoftDevice>,
    memory: Memory,
    range: AddrRange,
}

/// Waits to be told of a munmap.
struct Mirror {
    range: AddrRange,
    told: AtomicBool,
}

impl NotifierOps for Mirror {
    fn invalidate(&self, update: &Invalidation) {
        if update.event == InvalidateEvent::Unmap && update.range.overlaps(self.range) {
            self.told.store(true, Ordering::Release);
        }
    }
}

/// An error with what was tried.
fn when<T>(what: &str, result: hmm_core::Result<T>) -> Result<T, String> {
    result.map_err(|error| format!("{what}: {error}"))
}

impl Bench {
    pub(super) fn new(mm: &Arc<Mm>) -> Result<Self, String> {
        // Every touch shall bring one page.
        let config = SoftConfig { fault_around: 1, ..SoftConfig::default() };
        let device = when("a device", SoftDevice::new(mm, config))?;
        let memory = Memory::filled(PAGES)?;
        let range = memory.range()?;
        Ok(Self { mm: Arc::clone(mm), device, memory, range })
    }

    fn away(&self, range: AddrRange) -> Result<usize, String> {
        let mut pages = vec![Residency::None; range.pages()];
        when("looking where pages are", self.mm.residency(range, &mut pages))?;
        Ok(pages.iter().filter(|page| matches!(page, Residency::Device(_))).count())
    }

    fn send_range(&self, range: AddrRange) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            when("migrating to the device", self.device.migrate(range))?;
            let away = self.away(range)?;
            if away == range.pages() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("only {away} of {} pages leave", range.pages()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends everything away, and sees that it is away.
    pub(super) fn send(&self) -> Result<(), String> {
        self.send_range(self.range)
    }

    /// One page that must be away now.
    fn require_away(&self, page: usize) -> Result<(), String> {
        match self.away(self.range.sub(page, 1))? {
            1 => Ok(()),
            _ => Err(format!("page {page} came home before anybody touched it")),
        }
    }

    fn require_home(&self, page: usize) -> Result<(), String> {
        match self.away(self.range.sub(page, 1))? {
            0 => Ok(()),
            _ => Err(format!("page {page} was touched and is still away")),
        }
    }

    /// Touches pages: each comes home with its bytes. Returns the median time in microseconds.
    pub(super) fn touch(&self) -> Result<f64, String> {
        let mut times = Vec::with_capacity(TOUCHES);
        for page in (0..TOUCHES).map(|touch| touch * STRIDE) {
            self.require_away(page)?;
            let word = Memory::word_of(page);
            let start = Instant::now();
            let value = self.memory.load(word);
            times.push(start.elapsed().as_secs_f64() * 1e6);
            if value != self.memory.expected(word) {
                return Err(format!("a load from page {page} reads {value:#x}, which is wrong"));
            }
            self.require_home(page)?;
            self.memory.check_page(page)?;
        }
        Ok(median(times))
    }

    /// A store is the first touch, and keeps the other bytes.
    pub(super) fn store(&mut self) -> Result<(), String> {
        self.require_away(STORED)?;
        self.memory.store(Memory::word_of(STORED), 1);
        self.require_home(STORED)?;
        self.memory.check_page(STORED)
    }

    /// What the device changed is what the processor reads afterwards.
    pub(super) fn device_store(&mut self) -> Result<(), String> {
        self.require_away(CHANGED)?;
        let word = Memory::word_of(CHANGED);
        let (old, value) = (self.memory.expected(word), 3_u64);
        let kernel = Kernel::AtomicAddU64 { addr: self.memory.address(word), value };
        let found = when("a kernel of the device", self.device.run(kernel))?;
        if found != old {
            return Err(format!("the device reads {found:#x} instead of {old:#x}"));
        }
        self.require_away(CHANGED)?;
        self.memory.expect(word, old.wrapping_add(value));
        self.memory.check_page(CHANGED)
    }

    /// Whether write(2) can read a page that is away.
    pub(super) fn system_call(&self) -> Result<bool, String> {
        self.require_away(WRITTEN)?;
        let pipe = std::io::pipe().map_err(|error| format!("a pipe: {error}"))?;
        let (mut reader, mut writer) = pipe;
        match writer.write(self.memory.page(WRITTEN)) {
            Ok(count) => {
                let mut copy = [0; PAGE_SIZE];
                let copy = copy.get_mut(..count).ok_or("more was written than there was")?;
                reader.read_exact(copy).map_err(|error| format!("read: {error}"))?;
                self.memory.check_bytes(WRITTEN, copy)?;
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(EFAULT) => Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => self.system_call(),
            Err(error) => Err(format!("write(2) of a page that is away: {error}")),
        }
    }

    /// Medians of all pages out and home, in MiB a second.
    pub(super) fn transfer(&self) -> Result<(f64, f64), String> {
        let (mut out, mut home) = (Vec::new(), Vec::new());
        when("bringing pages home", self.device.bring_home(self.range))?;
        for _ in 0..ROUNDS {
            out.push(rate("migrating out", || self.device.migrate(self.range))?);
            home.push(rate("bringing pages home", || self.device.bring_home(self.range))?);
        }
        Ok((median(out), median(home)))
    }

    /// Everything is as it was, but for what was changed on purpose.
    pub(super) fn check(&self) -> Result<(), String> {
        (0..self.memory.pages()).try_for_each(|page| self.memory.check_page(page))
    }

    /// Whether a mirror is told of a munmap, without asking the library.
    pub(super) fn unmap(&self) -> Result<bool, String> {
        let memory = Memory::filled(UNMAPPED)?;
        let mirror = Arc::new(Mirror { range: memory.range()?, told: AtomicBool::new(false) });
        let ops: Arc<dyn NotifierOps> = Arc::clone(&mirror) as _;
        let subscription = when("a mirror", self.mm.mirror_register(ops))?;
        self.send_range(mirror.range)?;
        drop(memory);
        let deadline = Instant::now() + TOLD_WITHIN;
        while !mirror.told.load(Ordering::Acquire) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        when("unregistering a mirror", subscription.remove())?;
        Ok(mirror.told.load(Ordering::Acquire))
    }

    pub(super) fn close(self) -> Result<(), String> {
        when("closing the device", self.device.close())?;
        when("closing the address space", self.mm.close())?;
        self.check()
    }
}

fn rate(what: &str, pages: impl FnOnce() -> hmm_core::Result<usize>) -> Result<f64, String> {
    let start = Instant::now();
    let pages = when(what, pages())?;
    let seconds = start.elapsed().as_secs_f64();
    if pages == 0 {
        return Err(format!("{what}: no page moves"));
    }
    Ok((pages * PAGE_SIZE) as f64 / f64::from(1 << 20) / seconds)
}

/// The middle one, rounded to what a person reads.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied().unwrap_or_default();
    (middle * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![9.0, 1.0, 2.04]), 2.0);
        assert_eq!(median(Vec::new()), 0.0);
    }
}
