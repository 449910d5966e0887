//! Children look at memory that is on devices.

use crate::world::{Worker, World, constant_word};
use std::sync::atomic::Ordering;
use std::thread::Scope;
use std::time::{Duration, Instant};

/// A child takes no longer, even on a busy machine.
const LIMIT: Duration = Duration::from_secs(40);

pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, world: &'scope World) {
    scope.spawn(move || {
        while world.goes_on() {
            fork_once(world);
            world.step(Worker::Forks);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
}

fn fork_once(world: &World) {
    // SAFETY: the child only reads memory and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let region = &world.constant;
        let is_right =
            |word: &usize| region.word(*word).load(Ordering::Relaxed) == constant_word(*word);
        let right = (0..region.words()).step_by(17).all(|word| is_right(&word));
        // SAFETY: ends this process without running anything else of it.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    assert!(child > 0, "fork fails");
    let (deadline, mut status) = (Instant::now() + LIMIT, 0);
    // SAFETY: the status is a variable of this function.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        assert!(Instant::now() < deadline, "the child {child} hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Where pages can neither come home nor be left out, a child is ended rather than shown zeros.
    let is_ended =
        world.fails && libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT;
    assert!(status == 0 || is_ended, "the child did not see what the parent has: {status:#x}");
}
