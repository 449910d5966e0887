//! Failures on request: system calls, allocations and callbacks that fail as they do on a machine in trouble, so that a
//! library, a driver, or a program can be tested on real memory. (The model engine has failures of its own.)
//!
//! `HMM_INJECT`, read when an mm of this process is opened, or [`configure`], takes rules with commas between them:
//!
//! | rule | meaning |
//! | --- | --- |
//! | `POINT/N` | one in N calls of the point fails, with the error that is most usual there |
//! | `POINT=ERRNO/N` | the same, with this error: `ENOMEM`, `EBUSY`, … |
//! | `POINT/N*COUNT` | no more than COUNT failures |
//! | `all/N` | every point that has no rule of its own |
//! | `seed=N` | where the random numbers begin: one thread's failures come again with the same seed |
//!
//! A failure that was asked for never costs data: pages stay, or the call is tried again. Without rules it costs one load.

use crate::error::{Error, Result};
use rustix::io::Errno;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident $name:literal $errno:ident,)*) => {
        /// Where a failure can be asked for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Point { $($(#[$doc])* $point,)* }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// Its name in a rule.
            pub fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)* }
            }

            fn usual(self) -> Errno {
                match self { $(Self::$point => Errno::$errno,)* }
            }
        }
    };
}

points! {
    /// `UFFDIO_MOVE`.
    Move "move" BUSY,
    /// `UFFDIO_COPY`.
    Copy "copy" AGAIN,
    /// `UFFDIO_ZEROPAGE`.
    Zero "zero" AGAIN,
    /// `UFFDIO_WRITEPROTECT`.
    WriteProtect "wp" AGAIN,
    /// `UFFDIO_REGISTER`.
    Register "register" NOMEM,
    /// `mprotect`, by the signal engine.
    Protect "mprotect" NOMEM,
    /// `mremap`, by the signal engine.
    Remap "mremap" NOMEM,
    /// Reads and writes through `/proc/self/mem`.
    Memory "mem" IO,
    /// `MADV_POPULATE` and its older ways.
    Populate "populate" NOMEM,
    /// Looking up mappings.
    Mappings "mappings" NOMEM,
    /// Looking up present pages.
    Scan "scan" NOMEM,
    /// The library's own memory.
    Arena "arena" NOMEM,
    /// Frames for pages under migration.
    Frames "frames" NOMEM,
    /// A driver's `fault` says that there is no memory; it is not called.
    Fault "fault" NOMEM,
    /// A driver's `alloc_and_copy` names no destination; it is not called.
    Allocate "alloc" NOMEM,
}

struct Rule {
    /// One call in so many fails; 0: none.
    one_in: AtomicU64,
    /// Failures that are left.
    left: AtomicU64,
    errno: AtomicI32,
    failed: AtomicU64,
}

static ARMED: AtomicBool = AtomicBool::new(false);
static NUMBER: AtomicU64 = AtomicU64::new(0);
static RULES: [Rule; Point::ALL.len()] = [const {
    Rule {
        one_in: AtomicU64::new(0),
        left: AtomicU64::new(0),
        errno: AtomicI32::new(0),
        failed: AtomicU64::new(0),
    }
}; Point::ALL.len()];

/// The error with which a call shall fail now, if it shall. Any thread, any signal handler.
pub(crate) fn fails(point: Point) -> Option<Errno> {
    if !ARMED.load(Ordering::Relaxed) {
        return None;
    }
    let rule = &RULES[point as usize];
    let one_in = rule.one_in.load(Ordering::Relaxed);
    if one_in == 0 || !random().is_multiple_of(one_in) {
        return None;
    }
    let less = |left: u64| left.checked_sub(1);
    rule.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
    rule.failed.fetch_add(1, Ordering::Relaxed);
    Some(Errno::from_raw_os_error(rule.errno.load(Ordering::Relaxed)))
}

/// A call that may be asked to fail.
pub(crate) fn checked(point: Point) -> std::result::Result<(), Errno> {
    fails(point).map_or(Ok(()), Err)
}

/// SplitMix64.
fn random() -> u64 {
    let mut word = NUMBER.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// How often a point was made to fail since the process began.
pub fn failures(point: Point) -> u64 {
    RULES[point as usize].failed.load(Ordering::Relaxed)
}

/// Replaces all rules; an empty text ends all failures.
///
/// # Errors
/// `Unsupported` that names the rule which makes no sense; nothing was changed then.
pub fn configure(text: &str) -> Result<()> {
    let mut rules = [None; Point::ALL.len()];
    let (mut seed, mut rest) = (None, None);
    for word in text.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        match parse(word).ok_or_else(|| nonsense(word))? {
            Word::Seed(number) => seed = Some(number),
            Word::All(one_in, left) => rest = Some((one_in, left)),
            Word::One(point, wanted) => rules[point as usize] = Some(wanted),
        }
    }
    ARMED.store(false, Ordering::Relaxed);
    if let Some(seed) = seed {
        NUMBER.store(seed, Ordering::Relaxed);
    }
    for (point, wanted) in Point::ALL.iter().zip(rules) {
        let usual = rest.map(|(one_in, left)| Wanted { one_in, left, errno: point.usual() });
        let wanted = wanted.or(usual).unwrap_or(Wanted { one_in: 0, left: 0, errno: Errno::INVAL });
        let rule = &RULES[*point as usize];
        rule.one_in.store(wanted.one_in, Ordering::Relaxed);
        rule.left.store(wanted.left, Ordering::Relaxed);
        rule.errno.store(wanted.errno.raw_os_error(), Ordering::Relaxed);
    }
    ARMED.store(!text.trim().is_empty(), Ordering::Relaxed);
    Ok(())
}

/// What the environment asks for.
pub(crate) fn configure_from_environment() -> Result<()> {
    match std::env::var("HMM_INJECT") {
        Ok(text) => configure(&text),
        Err(_) => Ok(()),
    }
}

#[derive(Clone, Copy)]
struct Wanted {
    one_in: u64,
    left: u64,
    errno: Errno,
}

enum Word {
    Seed(u64),
    All(u64, u64),
    One(Point, Wanted),
}

fn parse(word: &str) -> Option<Word> {
    if let Some(number) = word.strip_prefix("seed=") {
        return number.parse().ok().map(Word::Seed);
    }
    let (what, how_often) = word.split_once('/')?;
    let (one_in, left) = match how_often.split_once('*') {
        Some((one_in, left)) => (one_in.parse().ok()?, left.parse().ok()?),
        None => (how_often.parse().ok()?, u64::MAX),
    };
    if one_in == 0 {
        return None;
    }
    if what == "all" {
        return Some(Word::All(one_in, left));
    }
    let (name, errno) =
        what.split_once('=').map_or((what, None), |(name, errno)| (name, Some(errno)));
    let point = *Point::ALL.iter().find(|point| point.name() == name)?;
    let errno = errno.map_or(Some(point.usual()), errno_of)?;
    Some(Word::One(point, Wanted { one_in, left, errno }))
}

fn errno_of(name: &str) -> Option<Errno> {
    const NAMES: [(&str, Errno); 12] = [
        ("EAGAIN", Errno::AGAIN),
        ("EBUSY", Errno::BUSY),
        ("EEXIST", Errno::EXIST),
        ("EFAULT", Errno::FAULT),
        ("EINTR", Errno::INTR),
        ("EINVAL", Errno::INVAL),
        ("EIO", Errno::IO),
        ("ENOENT", Errno::NOENT),
        ("ENOMEM", Errno::NOMEM),
        ("ENOSPC", Errno::NOSPC),
        ("EPERM", Errno::PERM),
        ("ESRCH", Errno::SRCH),
    ];
    NAMES.iter().find(|one| one.0 == name).map(|one| one.1)
}

fn nonsense(word: &str) -> Error {
    let names: Vec<&str> = Point::ALL.iter().map(|point| point.name()).collect();
    let what = format!(
        "the rule {word:?} of HMM_INJECT: it has the form POINT/N, POINT=ERRNO/N, POINT/N*COUNT, all/N or seed=N; \
         points are {}",
        names.join(" ")
    );
    Error::Unsupported { what }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules are the process's: one test, so that no two change them at the same time.
    #[test]
    fn rules_say_what_fails_how_often_and_how() {
        configure("copy=EIO/1*3, zero/2, seed=7").unwrap();
        let copies: Vec<_> = (0..5).map(|_| fails(Point::Copy)).collect();
        assert_eq!(copies, [Some(Errno::IO), Some(Errno::IO), Some(Errno::IO), None, None]);
        assert_eq!(failures(Point::Copy), 3);
        let zeros = (0..1000).filter(|_| fails(Point::Zero) == Some(Errno::AGAIN)).count();
        assert!((400..600).contains(&zeros), "{zeros}");
        assert_eq!((0..1000).find_map(|_| fails(Point::Move)), None);
        let draw = || (0..64).map(|_| fails(Point::Zero).is_some()).collect::<Vec<_>>();
        configure("zero/3,seed=9").unwrap();
        let first = draw();
        configure("zero/3,seed=9").unwrap();
        assert_eq!(draw(), first);
        for bad in
            ["copy", "copy/0", "moon/3", "copy=EMOON/3", "copy/x", "copy/3*", "seed=x", "all=EIO/3"]
        {
            let error = configure(bad).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("populate"), "{error}");
        }
        assert_eq!(draw().len(), 64);
        configure("all/1,copy/5").unwrap();
        assert!(fails(Point::Arena).is_some());
        configure(" ").unwrap();
        assert!(Point::ALL.iter().all(|point| fails(*point).is_none()));
    }
}
