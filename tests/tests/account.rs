//! Promises 75 to 79 and 82 on real memory: what a process uses, and who pays for it, does not depend on where its pages
//! are.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may stop")]

mod driver;

use driver::{Card, away, home, on_device};
use hmm_core::{GroupStat, LEAF_SIZE, MemoryGroup, Mm, PAGE_SIZE, Rss};
use hmm_tests::{Capabilities, Region, lack, mm_or_skip};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pages that other parts of the process may gain or lose meanwhile: page tables of the library, the heap.
const UNRELATED: i64 = 128;

/// Pages of stacks that threads of a second address space need, and the like.
const STACKS: u64 = 1500;

fn filled(pages: usize) -> Region {
    let region = Region::aligned(pages, LEAF_SIZE);
    region.fill(7);
    region
}

fn pages(bytes: u64) -> u64 {
    bytes / PAGE_SIZE as u64
}

fn group_below_root() -> MemoryGroup {
    MemoryGroup::create(&MemoryGroup::root()).unwrap()
}

/// Pages charged, and of these on a device.
fn charged(group: &MemoryGroup) -> (u64, u64) {
    let GroupStat { anon, device } = group.stat();
    assert_eq!(anon, group.current());
    (pages(anon), pages(device))
}

/// Waits until no other thread of the process runs: one that begins makes its stack present.
fn others_sleep() {
    let is_asleep = |task: std::io::Result<std::fs::DirEntry>| {
        let task = task.unwrap();
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        let is_own = task.file_name().to_str() == Some(&driver::thread_id().to_string());
        is_own || stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"))
    };
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut quiet = 0;
    while quiet < 5 && Instant::now() < deadline {
        let all = std::fs::read_dir("/proc/self/task").unwrap().all(is_asleep);
        quiet = if all { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Has the library allocate what it allocates once: pages migrate that nothing is said about.
fn settled(card: &Card, pages: usize) -> Region {
    let region = filled(pages);
    away(card, region.range());
    others_sleep();
    region
}

/// How many pages of each kind there are more than before, nearly.
fn assert_grown(what: &str, mm: &Mm, before: Rss, expected: [i64; 3]) {
    let now = mm.rss().unwrap();
    let kinds = |rss: Rss| [rss.anon, rss.file, rss.shmem].map(|bytes| pages(bytes) as i64);
    let grown: Vec<_> = kinds(now).into_iter().zip(kinds(before)).map(|(a, b)| a - b).collect();
    eprintln!("{what}: {grown:?} pages more (anon, file, shmem)");
    let is_near = |(grown, expected): (&i64, i64)| (grown - expected).abs() < UNRELATED;
    assert!(grown.iter().zip(expected).all(is_near), "{what}: {now:?} after {before:?}");
}

#[test]
fn promise_75_rss_does_not_change_by_migration() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2 * 4096), filled(4096));
    let _other = settled(&card, 4096);
    let before = mm.rss().unwrap();
    for round in 0..3 {
        away(&card, region.range());
        assert_grown(&format!("round {round}, away"), &mm, before, [0, 0, 0]);
        home(&card, region.range());
        // The frames of both ways are idle now, and full.
        assert_grown(&format!("round {round}, home"), &mm, before, [0, 0, 0]);
    }
    away(&card, region.part(1000, 64));
    (1000..1064).for_each(|page| assert_ne!(region.word(page * 512).load(Ordering::Relaxed), 0));
    assert_grown("after CPU faults", &mm, before, [0, 0, 0]);
    drop(region);
    mm.sync();
    assert_grown("unmapped", &mm, before, [-4096, 0, 0]);
}

#[test]
fn promise_75_a_page_of_a_file_becomes_anonymous_when_it_leaves() {
    let mm = mm_or_skip!();
    if let Some(reason) = lack(&mm, Capabilities::PRIVATE_FILES) {
        hmm_tests::skip!("{reason}");
    }
    let (card, pages) = (Card::new(&mm, 1024), 512);
    // SAFETY: a new file in memory, and a new private mapping of it; both end with the process.
    let start = unsafe {
        let file = libc::memfd_create(c"account".as_ptr(), 0);
        assert_eq!(libc::ftruncate(file, (pages * PAGE_SIZE) as i64), 0);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        libc::mmap(std::ptr::null_mut(), pages * PAGE_SIZE, protection, flags, file, 0)
    };
    assert_ne!(start, libc::MAP_FAILED);
    let range = hmm_core::AddrRange::covering(start.addr() as u64, 512 * 4096).unwrap();
    let touch = |page: usize| {
        // SAFETY: a word of the mapping above, which nothing refers to.
        let word = unsafe {
            std::sync::atomic::AtomicU64::from_ptr(start.byte_add(page * PAGE_SIZE).cast())
        };
        word.fetch_add(1, Ordering::Relaxed)
    };
    let _other = settled(&card, 512);
    away(&card, range.sub(0, 1));
    others_sleep();
    let before = mm.rss().unwrap();
    (1..512).for_each(|page| assert_eq!(touch(page), 0));
    assert_grown("written", &mm, before, [511, 0, 0]);
    away(&card, range.sub(1, 511));
    assert_grown("away", &mm, before, [511, 0, 0]);
    (1..512).for_each(|page| assert_eq!(touch(page), 1));
    assert_grown("home", &mm, before, [511, 0, 0]);
}

#[test]
fn promise_76_a_charge_stays_with_its_group_both_ways() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 600), filled(600));
    let (root, one, two) = (MemoryGroup::root(), group_below_root(), group_below_root());
    mm.set_group(&one).unwrap();
    assert_eq!(mm.group(), one);
    away(&card, region.range());
    assert_eq!((charged(&one), charged(&two), charged(&root)), ((600, 600), (0, 0), (600, 600)));
    // The process goes to another group; its charges do not.
    mm.set_group(&two).unwrap();
    home(&card, region.part(0, 100));
    assert_ne!(region.word(100 * 512).load(Ordering::Relaxed), 0);
    assert!(card.settles_at(499));
    assert_eq!((charged(&one), charged(&two), charged(&root)), ((600, 499), (0, 0), (600, 499)));
    away(&card, region.part(0, 101));
    assert_eq!((charged(&one), charged(&two)), ((600, 600), (0, 0)));
    assert_eq!(pages(one.peak()), 600);
    // Between devices, too.
    let second = Card::new(&mm, 50);
    assert_eq!(second.to_device(region.part(0, 50)).unwrap(), 0);
    home(&card, region.part(0, 50));
    away(&second, region.part(0, 50));
    assert_eq!((charged(&one), charged(&root)), ((600, 600), (600, 600)));
    // Only when asked for.
    assert_eq!(mm.move_charges().unwrap(), 600);
    assert_eq!((charged(&one), charged(&two), charged(&root)), ((0, 0), (600, 600), (600, 600)));
    two.set_max(Some(0)).unwrap();
    mm.set_group(&one).unwrap();
    one.set_max(Some(450 * PAGE_SIZE as u64)).unwrap();
    assert_eq!(mm.move_charges().unwrap(), 450);
    assert_eq!((charged(&one).0, charged(&two).0, one.events().max), (450, 150, 150));
}

#[test]
fn promise_77_a_limit_never_keeps_a_page_from_leaving_or_coming_home() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let group = group_below_root();
    group.set_max(Some(16 * PAGE_SIZE as u64)).unwrap();
    mm.set_group(&group).unwrap();
    // The process has this memory already: it leaves although the group has no room for it.
    away(&card, region.range());
    assert_eq!((charged(&group), pages(group.peak()), group.events().max), ((64, 64), 64, 48));
    group.set_max(Some(0)).unwrap();
    (0..32).for_each(|page| assert_ne!(region.word(page * 512).load(Ordering::Relaxed), 0));
    home(&card, region.range());
    assert!(card.settles_at(0));
    assert_eq!((charged(&group), group.events().max), ((64, 0), 48));
}

#[test]
fn promise_78_a_hole_filled_on_a_device_is_charged_or_stays_a_hole() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), Region::aligned(64, LEAF_SIZE));
    let (parent, root) = (group_below_root(), MemoryGroup::root());
    let group = MemoryGroup::create(&parent).unwrap();
    parent.set_max(Some(40 * PAGE_SIZE as u64)).unwrap();
    mm.set_group(&group).unwrap();
    assert_eq!(card.to_device(region.range()).unwrap(), 40);
    assert_eq!(on_device(&mm, region.range()), 40);
    assert_eq!((charged(&group), charged(&parent), charged(&root)), ((40, 40), (40, 40), (40, 40)));
    // The limit that was hit is the parent's.
    assert_eq!((group.events().max, parent.events().max), (0, 24));
    assert_eq!((card.devmem.in_use(), card.driver.free_pages()), (40, 24));
    // What stayed a hole is one: the kernel gives it a page of its own, and charges it.
    assert!((0..region.words()).all(|word| region.word(word).load(Ordering::Relaxed) == 0));
    region.fill(5);
    assert!(card.settles_at(0));
    assert_eq!((charged(&group), group.max(), parent.max()), ((40, 0), None, Some(40 << 12)));
    // With contents it leaves.
    away(&card, region.range());
    assert_eq!((charged(&parent), parent.events().max), ((64, 64), 48));
    parent.set_max(None).unwrap();
    let more = Region::aligned(8, LEAF_SIZE);
    let second = Card::new(&mm, 8);
    assert_eq!(second.to_device(more.range()).unwrap(), 8);
    assert_eq!(charged(&group), (72, 72));
}

#[test]
fn promise_79_each_charge_goes_with_its_page() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    let group = group_below_root();
    mm.set_group(&group).unwrap();
    away(&card, region.range());
    home(&card, region.part(0, 32));
    let advise = |first: usize, count: usize| {
        let start = region.page_addr(first) as *mut libc::c_void;
        // SAFETY: the pages lie in the region, to which nothing holds references.
        assert_eq!(unsafe { libc::madvise(start, count << 12, libc::MADV_DONTNEED) }, 0);
    };
    // Eight at home, eight away.
    advise(0, 8);
    advise(56, 8);
    mm.sync();
    mm.settle_charges().unwrap();
    assert_eq!(charged(&group), (48, 24));
    drop(region);
    mm.sync();
    mm.settle_charges().unwrap();
    assert_eq!((charged(&group), pages(group.peak())), ((0, 0), 64));
    // What is left when the address space ends is no charge any more.
    let region = filled(8);
    assert!(card.settles_at(0));
    away(&card, region.range());
    mm.close().unwrap();
    assert_eq!(charged(&group), (0, 0));
}

/// Runs `work` in a child; true when it says so.
fn in_child(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let status = i32::from(!work());
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(status) }
        }
        child => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

#[test]
fn promise_79_both_processes_count_after_a_fork() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 4096), filled(4096));
    let group = group_below_root();
    mm.set_group(&group).unwrap();
    away(&card, region.range());
    others_sleep();
    let parents = mm.rss().unwrap();
    let same = |rss: Rss| pages(rss.anon).abs_diff(pages(parents.anon)) < STACKS;
    let inherited = group.clone();
    assert!(in_child(|| {
        // Nothing of the child's is charged yet; its memory is as large as the parent's.
        let nothing = charged(&inherited) == (0, 0) && charged(&MemoryGroup::root()) == (0, 0);
        let mine = Mm::current().unwrap();
        let card = Card::new(&mine, 4096);
        others_sleep();
        let own_memory = pages(mine.rss().unwrap().anon) - 4096;
        mine.set_group(&MemoryGroup::create(&inherited).unwrap()).unwrap();
        let moved = card.all_to_device(region.range());
        eprintln!("child: {:?} after {parents:?}, {moved} pages moved", mine.rss().unwrap());
        nothing
            && own_memory.abs_diff(pages(parents.anon)) < STACKS
            && charged(&inherited) == (moved as u64, moved as u64)
            && mine.check_accounts().is_ok()
    }));
    // What the child did is nothing to the parent.
    assert_eq!(charged(&group), (4096, 0));
    assert!(same(mm.rss().unwrap()));
    away(&card, region.range());
    assert_eq!(charged(&group), (4096, 4096));
}

#[test]
fn promise_82_device_memory_counts_towards_the_size_of_the_process() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 2 * 2048), Region::aligned(2048, LEAF_SIZE));
    let _other = settled(&card, 2048);
    let before = mm.rss().unwrap();
    away(&card, region.range());
    // Holes, filled there: promise 78, too.
    assert_grown("on a device", &mm, before, [2048, 0, 0]);
    assert_eq!(pages(MemoryGroup::root().stat().device), 2 * 2048);
    card.devmem.remove().unwrap();
    assert_grown("evicted", &mm, before, [2048, 0, 0]);
}

#[test]
fn accounts_that_contradict_one_another_are_found() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 8), filled(8));
    away(&card, region.range());
    mm.check_accounts().unwrap();
    // Another process's pages, as it were.
    let stranger = hmm_core::engine::model::ModelEngine::new(Default::default());
    let other = Mm::with_engine(stranger).unwrap();
    other.check_accounts().unwrap();
    mm.check_accounts().unwrap();
    other.close().unwrap();
    mm.check_accounts().unwrap();
    // A migration under way.
    let (mine, found) = (Arc::clone(&mm), Arc::new(std::sync::Mutex::new(None)));
    let seen = Arc::clone(&found);
    card.when_copying(move || *seen.lock().unwrap() = Some(mine.check_accounts()));
    home(&card, region.part(0, 1));
    let said = found.lock().unwrap().take().unwrap().unwrap_err();
    assert_eq!(said.errno(), libc::EUCLEAN, "{said}");
    card.calm();
    mm.check_accounts().unwrap();
}
