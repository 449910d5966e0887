"""Children of a process whose arrays are on a device: they see the data, or have no mapping, and never zeros."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import hmm
import numpy as np
import pytest
from pages import on_device, page_aligned, present_pages, send

pytestmark = pytest.mark.isolated(120)

PAGES = 64
WORDS = PAGES * hmm.PAGE_SIZE // 8
# Where functions find the array in children that have the parent's memory.
array: np.ndarray


@pytest.fixture
def device():
    with hmm.SoftDevice() as device:
        yield device


def away(device: hmm.SoftDevice, start: float = 1.0) -> np.ndarray:
    """An array, all of which is on the device."""
    global array
    array = page_aligned(WORDS)
    array[:] = np.arange(start, start + WORDS)
    send(device, array)
    return array


def total() -> float:
    return float(array.sum())


def expected(start: float = 1.0) -> float:
    return float(np.arange(start, start + WORDS).sum())


def in_fork(work) -> int:
    """Runs `work` in a child; the wait status."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if work() else 1)
    return os.waitpid(pid, 0)[1]


def test_forked_children_see_the_data_and_the_parent_goes_on(device):
    assert hmm.current().fork_mode == "home"
    for start in (1.0, 5.0):
        data = away(device, start)
        assert in_fork(lambda start=start: total() == expected(start)) == 0
        assert on_device(data) == 0
        assert total() == expected(start)


def test_memory_on_a_device_can_be_left_out_of_children(device):
    hmm.current().fork_mode = "dont-copy"
    data = away(device)
    status = in_fork(lambda: total() == expected())
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
    assert on_device(data) == PAGES
    assert in_fork(lambda: True) == 0
    assert total() == expected()


def test_an_unknown_mode_is_refused():
    mm = hmm.current()
    with pytest.raises(ValueError, match="dont-copy"):
        mm.fork_mode = "copy"
    assert mm.fork_mode == "home"


def test_a_child_opens_an_mm_of_its_own(device):
    inherited = hmm.current()
    away(device)

    def work() -> bool:
        try:
            device.migrate(array)
            return False
        except hmm.Error as error:
            gone = error.errno == errno.ENODEV
        mine = hmm.current()
        with hmm.SoftDevice() as own:
            send(own, array)
            same = total() == expected()
        mine.close()
        device.close()
        inherited.close()
        return gone and same

    assert in_fork(work) == 0
    assert total() == expected()


@pytest.mark.parametrize("options", [{}, {"close_fds": False}, {"preexec_fn": os.getpid}, {"start_new_session": True}])
@pytest.mark.parametrize("mode", ["home", "dont-copy"])
def test_subprocesses_run(device, options, mode):
    hmm.current().fork_mode = mode
    away(device)
    command = [sys.executable, "-c", "import sys; sys.exit(9 if sys.stdin.read() == 'well' else 1)"]
    done = subprocess.run(command, input="well", text=True, timeout=60, **options)
    assert done.returncode == 9
    assert os.waitstatus_to_exitcode(os.system("exit 3")) == 3
    with os.popen("echo well") as pipe:
        assert pipe.read() == "well\n"
    assert total() == expected()


def double(number: int) -> int:
    return 2 * number


def work_of(queue: multiprocessing.Queue) -> None:
    queue.put(total())


def test_multiprocessing_forks(device):
    away(device)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=work_of, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [expected()] * 3
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    with context.Pool(2) as pool:
        assert pool.map(double, range(20)) == [2 * number for number in range(20)]
    assert total() == expected()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing_starts_other_children(device, method):
    data = away(device)
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.map(double, [4, 5]) == [8, 10]
        assert pool.apply(float, (total(),)) == expected()
    send(device, data)
    assert present_pages(data) == 0
    assert total() == expected()


def test_forks_while_other_threads_migrate_and_touch(device):
    data = away(device)
    stop = threading.Event()
    wrong = []

    def migrate() -> None:
        while not stop.is_set():
            device.migrate(data)

    def touch() -> None:
        while not stop.is_set():
            if total() != expected():
                wrong.append(True)

    threads = [threading.Thread(target=work) for work in (migrate, touch)]
    for thread in threads:
        thread.start()
    try:
        ends = [in_fork(lambda: total() == expected()) for _ in range(10)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ends == [0] * 10
    assert not wrong
