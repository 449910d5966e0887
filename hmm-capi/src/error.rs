//! The text and number of each thread's last error, in fixed memory.
//!
//! Not in thread-local storage: its first use on a thread may call `malloc`, and the thread may be one that answers
//! CPU faults. Entries are found by thread instead, and only the reader's copy is thread-local.

use crate::handle::{lock, pages_of};
use hmm_core::{AddrRange, Error, Result};
use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int};
use std::fmt::{self, Write};
use std::sync::Mutex;

/// Threads whose last error is kept.
const THREADS: usize = 256;
/// Bytes of text kept for each, the final NUL included.
const TEXT: usize = 480;

#[derive(Clone, Copy)]
struct Entry {
    thread: usize,
    errno: i32,
    len: usize,
    text: [u8; TEXT],
}

static ENTRIES: Mutex<[Entry; THREADS]> =
    Mutex::new([Entry { thread: 0, errno: 0, len: 0, text: [0; TEXT] }; THREADS]);

impl Write for Entry {
    /// Keeps what fits and drops the rest.
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = TEXT - 1 - self.len;
        let bytes = &part.as_bytes()[..part.len().min(room)];
        self.text[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self.text[self.len] = 0;
        Ok(())
    }
}

/// The calling thread, without thread-local storage.
pub(crate) fn this_thread() -> usize {
    // SAFETY: pthread_self has no preconditions.
    unsafe { libc::pthread_self() as usize }
}

/// The thread's own entry, a free one, or (when all are taken) one that is lost to it.
fn entry_of(entries: &mut [Entry; THREADS], thread: usize) -> &mut Entry {
    let home = (thread >> 6).wrapping_mul(0x9e37_79b9) % THREADS;
    let at = (0..THREADS)
        .map(|step| (home + step) % THREADS)
        .find(|at| entries[*at].thread == thread || entries[*at].thread == 0);
    let entry = &mut entries[at.unwrap_or(home)];
    if entry.thread != thread {
        *entry = Entry { thread, errno: 0, len: 0, text: [0; TEXT] };
    }
    entry
}

/// The pages that hold the entries, for pinning.
pub(crate) fn pages() -> Result<AddrRange> {
    pages_of(&ENTRIES)
}

/// Remembers an error for [`hmm_last_error`] and [`hmm_last_errno`].
pub(crate) fn record(error: &Error) {
    let mut entries = lock(&ENTRIES);
    let entry = entry_of(&mut entries, this_thread());
    (entry.errno, entry.len) = (error.errno(), 0);
    // Writing to an entry cannot fail: it cuts what does not fit.
    let _ = write!(entry, "{error}");
}

/// Remembers the outcome of a function that, like its kernel model, returns nothing.
pub(crate) fn record_outcome(outcome: Result<()>) {
    match outcome {
        Ok(()) => entry_of(&mut lock(&ENTRIES), this_thread()).errno = 0,
        Err(error) => record(&error),
    }
}

/// The text of the calling thread's last error.
///
/// It says what was wrong, at which address, and often what to do about it: "invalid argument at
/// 0x7f0012345001: range is not page aligned". Every function that returns an error leaves one; a
/// success leaves the text as it is.
///
/// @return A NUL-terminated string, empty when no call of this thread failed yet. It belongs to the
/// library and stays as it is until this thread calls hmm_last_error() again. Never NULL.
///
/// Context: any thread, but not inside a callback (the first call on a thread may allocate).
/// Source: ours.
#[unsafe(no_mangle)]
pub extern "C" fn hmm_last_error() -> *const c_char {
    thread_local! {
        static COPY: UnsafeCell<[u8; TEXT]> = const { UnsafeCell::new([0; TEXT]) };
    }
    let text = entry_of(&mut lock(&ENTRIES), this_thread()).text;
    COPY.with(|copy| {
        // SAFETY: only this thread reaches its copy, and no reference to it lives outside this closure.
        unsafe { *copy.get() = text };
        copy.get().cast::<c_char>().cast_const()
    })
}

/// The errno of the calling thread's last failure, or of the last function that returns nothing.
///
/// Some functions return nothing because their kernel models do: hmm_mirror_unregister(),
/// hmm_devmem_remove(), hmm_device_put(), hmm_devmem_page_set_drvdata(),
/// mmu_interval_notifier_remove(), migrate_vma_pages(), memunmap_pages() and others. They leave
/// their outcome here: 0 when they did what was asked, else the error. So do hmm_find_vma(),
/// hmm_vma_alloc_locked_page() and hmm_migrate_alloc_page(), whose NULL has several reasons, and
/// mmu_interval_read_begin() and mmu_interval_read_retry() when they fail.
///
/// @return 0, or a negative errno such as -EINVAL.
///
/// Context: any thread, callbacks included; does not block.
/// Source: ours.
#[unsafe(no_mangle)]
pub extern "C" fn hmm_last_errno() -> c_int {
    -entry_of(&mut lock(&ENTRIES), this_thread()).errno
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handle::invalid;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: hmm_last_error returns a NUL-terminated string that lives until its next call on this thread.
        unsafe { CStr::from_ptr(hmm_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn each_thread_has_its_own_text() {
        record(&invalid(0x1000, "first"));
        assert_eq!(
            (hmm_last_errno(), text().as_str()),
            (-libc::EINVAL, "invalid argument at 0x1000: first")
        );
        let other = std::thread::spawn(|| (hmm_last_errno(), text()));
        assert_eq!(other.join().unwrap(), (0, String::new()));
        record_outcome(Ok(()));
        assert_eq!(hmm_last_errno(), 0);
    }

    #[test]
    fn long_texts_are_cut() {
        record(&Error::Unsupported { what: "x".repeat(1000) });
        assert_eq!(text().len(), TEXT - 1);
    }
}
