//! How a device is made, and what can be changed while it runs.

use hmm_core::{Error, PAGE_SIZE, Result, VirtAddr};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Most pages that one CPU fault brings home, and that one device fault looks at.
pub(crate) const WINDOW_PAGES: usize = 512;
/// Most threads of one device.
const MAX_THREADS: u32 = 64;
/// Most memory of one device (a pfn window of the core).
const MAX_MEMORY: u64 = 1 << 38;
/// Shorter delays are spun, since a sleep would overshoot them.
const SPIN_BELOW: Duration = Duration::from_micros(200);

/// When pages move into device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Never: kernels work on system pages in place, `migrate` is refused, and so are atomic operations.
    Never,
    /// When [`crate::SoftDevice::migrate`] asks for it, and for atomic operations.
    #[default]
    OnRequest,
    /// Also when a kernel touches them; the oldest pages make room.
    OnTouch,
}

/// How to make a [`crate::SoftDevice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoftConfig {
    /// Device memory in bytes: whole pages, at least one, at most 256 GiB. It takes memory once it is used.
    pub memory: u64,
    /// When pages move.
    pub policy: Policy,
    /// Added once for each batch copied and for each device fault.
    pub latency: Duration,
    /// Bytes per second of the copy engine; 0 means as fast as memory is.
    pub bandwidth: u64,
    /// Most pages that one CPU fault brings home, `1..=512`. It starts with one and doubles on sequential touches.
    pub fault_around: u32,
    /// Device threads, `1..=64`: so many jobs run at once.
    pub threads: u32,
}

impl Default for SoftConfig {
    fn default() -> Self {
        Self {
            memory: 64 << 20,
            policy: Policy::default(),
            latency: Duration::ZERO,
            bandwidth: 0,
            fault_around: 16,
            threads: 1,
        }
    }
}

impl SoftConfig {
    /// # Errors
    /// `Invalid` when a field is outside what its documentation allows.
    pub(crate) fn validate(&self) -> Result<()> {
        let invalid = |what| Err(Error::Invalid { address: VirtAddr::new(0), what });
        if self.memory == 0 || !self.memory.is_multiple_of(PAGE_SIZE as u64) {
            return invalid("device memory must be a positive number of whole pages");
        }
        if self.memory > MAX_MEMORY {
            return invalid("device memory of more than 256 GiB");
        }
        if self.fault_around == 0 || self.fault_around as usize > WINDOW_PAGES {
            return invalid("fault_around must be 1..=512 pages");
        }
        if self.threads == 0 || self.threads > MAX_THREADS {
            return invalid("threads must be 1..=64");
        }
        Ok(())
    }

    pub(crate) fn pages(&self) -> usize {
        (self.memory / PAGE_SIZE as u64) as usize
    }
}

/// The settings that may change while jobs run.
#[derive(Debug)]
pub(crate) struct Settings {
    policy: AtomicU8,
    latency: AtomicU64,
    bandwidth: AtomicU64,
}

impl Settings {
    pub(crate) fn new(config: &SoftConfig) -> Self {
        let settings = Self {
            policy: AtomicU8::new(0),
            latency: AtomicU64::new(0),
            bandwidth: AtomicU64::new(config.bandwidth),
        };
        settings.set_policy(config.policy);
        settings.set_latency(config.latency);
        settings
    }

    pub(crate) fn policy(&self) -> Policy {
        match self.policy.load(Ordering::Relaxed) {
            0 => Policy::Never,
            1 => Policy::OnRequest,
            _ => Policy::OnTouch,
        }
    }

    pub(crate) fn set_policy(&self, policy: Policy) {
        let number = match policy {
            Policy::Never => 0,
            Policy::OnRequest => 1,
            Policy::OnTouch => 2,
        };
        self.policy.store(number, Ordering::Relaxed);
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latency.store(nanoseconds, Ordering::Relaxed);
    }

    pub(crate) fn set_bandwidth(&self, bandwidth: u64) {
        self.bandwidth.store(bandwidth, Ordering::Relaxed);
    }

    /// Takes the time that the configured device would need for one batch of `bytes`. Runs on service threads too:
    /// no lock held, nothing allocated.
    pub(crate) fn delay(&self, bytes: u64) {
        let mut nanoseconds = u128::from(self.latency.load(Ordering::Relaxed));
        let bandwidth = u128::from(self.bandwidth.load(Ordering::Relaxed));
        if let Some(transfer) = (u128::from(bytes) * 1_000_000_000).checked_div(bandwidth) {
            nanoseconds += transfer;
        }
        if nanoseconds == 0 {
            return;
        }
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        if time >= SPIN_BELOW {
            return std::thread::sleep(time);
        }
        let start = Instant::now();
        while start.elapsed() < time {
            std::hint::spin_loop();
        }
    }
}
