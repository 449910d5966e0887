//! The functions that this library stands before: the next ones of the same name, libc's in the end.

use libc::c_void;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The next function of a name. `F` is its type, a function pointer.
pub(crate) struct Next<F> {
    /// Ends with a NUL.
    name: &'static str,
    found: AtomicPtr<c_void>,
    function: PhantomData<F>,
}

impl<F: Copy> Next<F> {
    pub(crate) const fn new(name: &'static str) -> Self {
        assert!(size_of::<F>() == size_of::<*mut c_void>(), "not a function pointer");
        assert!(matches!(name.as_bytes().last(), Some(0)), "the name does not end with a NUL");
        Self { name, found: AtomicPtr::new(ptr::null_mut()), function: PhantomData }
    }

    /// Looks it up. It may allocate and take the loader's lock: not for signal handlers.
    pub(crate) fn look_up(&self) {
        // SAFETY: the name ends with a NUL (`new`).
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr().cast()) };
        self.found.store(found, Ordering::Release);
    }

    /// The function, if it was looked up and libc has it.
    ///
    /// Until the loader has run `look_up` there is none, and the wrappers make the system call themselves. Looking up
    /// on demand would be wrong: it could come from a signal handler, or from the allocator that `dlsym` calls.
    pub(crate) fn get(&self) -> Option<F> {
        let found = self.found.load(Ordering::Acquire);
        if found.is_null() {
            return None;
        }
        // SAFETY: `F` is a function pointer (`new`), and the wrapper that has this gives it libc's type.
        Some(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&found) })
    }

    /// As [`Next::get`], looking it up now if need be.
    pub(crate) fn get_or_look_up(&self) -> Option<F> {
        self.get().or_else(|| {
            self.look_up();
            self.get()
        })
    }
}

/// The calling thread's errno.
pub(crate) fn errno() -> i32 {
    // SAFETY: libc's errno is the calling thread's own.
    unsafe { *libc::__errno_location() }
}

pub(crate) fn set_errno(value: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value };
}

/// Defines functions that replace those of libc, under each of their names, and `look_up` for the ones that they replace.
/// Inside, `next` is the replaced function of the same name.
///
/// The ABI is `C-unwind` because a thread that is cancelled in a system call is unwound through these frames.
macro_rules! replace {
    ($(fn [$($name:ident)+] $arguments:tt -> $result:ty = |$next:ident| $body:block)*) => {
        $($(crate::next::replace_one! { $name $arguments $result, $next, $body })+)*

        /// Looks up what this file replaces.
        pub(crate) fn look_up() {
            $($(next::$name.look_up();)+)*
        }

        #[expect(non_upper_case_globals, reason = "they bear the names of what they find")]
        mod next {
            use super::*;
            $($(crate::next::replaced! { $name $arguments $result })+)*
        }
    };
}

macro_rules! replace_one {
    ($name:ident ($($argument:ident: $type:ty),*) $result:ty, $next:ident, $body:block) => {
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($argument: $type),*) -> $result {
            let $next = &next::$name;
            $body
        }
    };
}

macro_rules! replaced {
    ($name:ident ($($argument:ident: $type:ty),*) $result:ty) => {
        pub(super) static $name: crate::next::Next<
            unsafe extern "C-unwind" fn($($argument: $type),*) -> $result,
        > = crate::next::Next::new(concat!(stringify!($name), "\0"));
    };
}

pub(crate) use {replace, replace_one, replaced};
