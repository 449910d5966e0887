//! What a signal's context tells about the access that raised it, and how the access is skipped.

/// The interrupted state of a thread, as the kernel hands it to a signal handler.
#[derive(Debug)]
pub(super) struct Context(*mut libc::ucontext_t);

impl Context {
    /// # Safety
    /// `raw` is the third argument of a signal handler that is still running.
    pub(super) unsafe fn new(raw: *mut libc::c_void) -> Self {
        Self(raw.cast())
    }

    /// A signal that this thread must not have blocked when it goes on.
    pub(super) fn unblock(&mut self, signal: i32) {
        // SAFETY: the context lives as long as the handler runs (`new`), and its mask is a valid set.
        unsafe { libc::sigdelset(&raw mut (*self.0).uc_sigmask, signal) };
    }
}

#[cfg(target_arch = "x86_64")]
impl Context {
    /// Bit of the page fault's error code.
    const ERROR_WRITE: i64 = 1 << 1;

    fn register(&self, number: i32) -> i64 {
        // SAFETY: the context lives as long as the handler runs (`new`).
        unsafe { (*self.0).uc_mcontext.gregs[number as usize] }
    }

    /// Address of the instruction.
    pub(super) fn instruction(&self) -> usize {
        self.register(libc::REG_RIP) as usize
    }

    /// Whether the access was a write.
    pub(super) fn is_write(&self) -> bool {
        self.register(libc::REG_ERR) & Self::ERROR_WRITE != 0
    }

    /// The thread goes on at another instruction.
    pub(super) fn go_to(&mut self, instruction: usize) {
        // SAFETY: the context lives as long as the handler runs (`new`).
        unsafe { (*self.0).uc_mcontext.gregs[libc::REG_RIP as usize] = instruction as i64 };
    }
}

#[cfg(target_arch = "aarch64")]
impl Context {
    /// Head of the record that holds the fault's syndrome register, and its bit for writes.
    const ESR_MAGIC: u32 = 0x4553_5201;
    const ESR_WRITE: u64 = 1 << 6;
    /// Records follow the registers: 16-byte aligned, each with magic and size, ended by a zero magic.
    const RECORDS: usize = 4096;

    /// Address of the instruction.
    pub(super) fn instruction(&self) -> usize {
        // SAFETY: the context lives as long as the handler runs (`new`).
        unsafe { (*self.0).uc_mcontext.pc as usize }
    }

    /// Whether the access was a write.
    pub(super) fn is_write(&self) -> bool {
        // SAFETY: as above; only an address is computed.
        let after = unsafe { (&raw const (*self.0).uc_mcontext.pstate).add(1) };
        let mut record: *const u8 = after.cast();
        record = record.wrapping_add(record.align_offset(16));
        let end = record.wrapping_add(Self::RECORDS);
        while record < end {
            // SAFETY: the kernel's records lie within `RECORDS` bytes and are 16-byte aligned.
            let (magic, size) = unsafe { (*record.cast::<u32>(), *record.cast::<u32>().add(1)) };
            if magic == Self::ESR_MAGIC {
                // SAFETY: this record holds the register behind its head.
                return unsafe { *record.cast::<u64>().add(1) } & Self::ESR_WRITE != 0;
            }
            if magic == 0 || size == 0 {
                break;
            }
            record = record.wrapping_add(size as usize);
        }
        // Unknown: a write asks for more, and is never wrong.
        true
    }

    /// The thread goes on at another instruction.
    pub(super) fn go_to(&mut self, instruction: usize) {
        // SAFETY: as above.
        unsafe { (*self.0).uc_mcontext.pc = instruction as u64 };
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("the signal engine knows the contexts of x86-64 and aarch64");
