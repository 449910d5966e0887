"""A thread that touches migrated memory with the GIL held must never hang."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

import hmm
import numpy as np
import pytest
from pages import address_of, page_aligned, send

pytestmark = pytest.mark.isolated(90)

PAGES = 64
ROUNDS = 200


def element(array: np.ndarray) -> Callable[[int], int]:
    """numpy's element access: a plain load with the GIL held."""
    return lambda page: int(array[page * 512])


def view(array: np.ndarray) -> Callable[[int], int]:
    window = memoryview(array)
    return lambda page: window[page * 512]


def foreign(array: np.ndarray) -> Callable[[int], int]:
    start = address_of(array)
    return lambda page: ctypes.c_uint64.from_address(start + page * hmm.PAGE_SIZE).value


def pydll(array: np.ndarray) -> Callable[[int], int]:
    """A C function called without giving up the GIL."""
    memcmp = ctypes.PyDLL(None).memcmp
    start = address_of(array)

    def read(page: int) -> int:
        wanted = page.to_bytes(8, "little")
        return page if memcmp(ctypes.c_void_p(start + page * hmm.PAGE_SIZE), wanted, 8) == 0 else -1

    return read


READERS = {"numpy": element, "memoryview": view, "ctypes": foreign, "pydll": pydll}


def numbered() -> np.ndarray:
    array = page_aligned(PAGES * 512, "u8")
    array[::512] = np.arange(PAGES)
    return array


@pytest.mark.parametrize("reader", READERS)
def test_a_touch_with_the_gil_held_is_answered(reader):
    array = numbered()
    with hmm.SoftDevice() as device:
        read = READERS[reader](array)
        for _ in range(ROUNDS):
            send(device, array)
            assert [read(page) for page in range(PAGES)] == list(range(PAGES))


@pytest.mark.parametrize("reader", READERS)
def test_a_touch_with_the_gil_held_while_other_threads_migrate(reader):
    """The faulting thread holds the GIL; the migrating ones come back for it in the middle of their calls."""
    array = numbered()
    stop = threading.Event()
    sys.setswitchinterval(1e-5)
    with hmm.SoftDevice(fault_around=1) as device:

        def migrate() -> None:
            while not stop.is_set():
                device.migrate(array)
                hmm.residency(array)
                hmm.counters()

        movers = [threading.Thread(target=migrate) for _ in range(3)]
        read = READERS[reader](array)
        for mover in movers:
            mover.start()
        end = time.monotonic() + 2.0
        touches = 0
        while time.monotonic() < end:
            for page in range(PAGES):
                assert read(page) == page
            touches += PAGES
        stop.set()
        for mover in movers:
            mover.join(30)
            assert not mover.is_alive()
    assert touches >= PAGES and hmm.counters()["device_faults"] > 0


def test_a_slow_device_holds_up_the_gil_but_not_for_ever():
    array = numbered()
    with hmm.SoftDevice(latency=0.02, fault_around=1) as device:
        device.migrate(array)
        ticks = []
        ticker = threading.Thread(target=lambda: [ticks.append(time.monotonic()) for _ in range(10_000)])
        ticker.start()
        for page in range(8):
            assert array[page * 512] == page
        ticker.join(30)
    assert len(ticks) == 10_000


def test_a_call_that_waits_lets_other_threads_run():
    """migrate() on a slow device is detached: this thread counts meanwhile."""
    array = numbered()
    with hmm.SoftDevice(latency=0.5) as device:
        worker = threading.Thread(target=device.migrate, args=(array,))
        worker.start()
        turns = 0
        while worker.is_alive():
            turns += 1
            time.sleep(0.001)
        worker.join()
    assert turns > 50


def test_many_threads_touch_and_compute():
    """Threads add to their own column with the GIL held, others run device kernels on the same pages."""
    threads, rounds = 8, 40
    cells = page_aligned(PAGES * 512, "u8").reshape(PAGES, 512)
    failures: list[BaseException] = []

    with hmm.SoftDevice(threads=2, fault_around=4) as device:

        def touch(column: int) -> None:
            for _ in range(rounds):
                for page in range(PAGES):
                    cells[page, column] += np.uint64(1)

        def compute(column: int) -> None:
            for round_number in range(rounds):
                device.migrate(cells[round_number % PAGES :])
                for page in range(0, PAGES, 8):
                    device.atomic_add(cells[page], 1, index=column)

        def guarded(work: Callable[[int], None], column: int) -> None:
            try:
                work(column)
            except BaseException as error:
                failures.append(error)

        jobs = [(touch, column) for column in range(threads)] + [(compute, 100), (compute, 101), (compute, 100)]
        workers = [threading.Thread(target=guarded, args=job) for job in jobs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(80)
            assert not worker.is_alive()
    assert not failures, failures
    assert (cells[:, :threads] == rounds).all()
    assert (cells[::8, 100] == 2 * rounds).all() and (cells[::8, 101] == rounds).all()
    assert cells.sum() == threads * rounds * PAGES + 3 * rounds * PAGES // 8


def test_collections_and_stack_switches_while_pages_are_away():
    """Garbage collections and profiling visit every thread and object while one thread faults again and again."""
    array = numbered()
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            rubbish: list[object] = []
            rubbish.append(rubbish)
            del rubbish
            gc.collect()

    collector = threading.Thread(target=collect)
    collector.start()
    with hmm.SoftDevice(fault_around=1) as device:
        for _ in range(50):
            device.migrate(array)
            assert sum(int(array[page * 512]) for page in range(PAGES)) == PAGES * (PAGES - 1) // 2
    stop.set()
    collector.join(30)
    assert not collector.is_alive()
