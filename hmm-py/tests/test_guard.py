"""Guards: system calls on memory that is on a device, on every engine; and what the engine says it can do."""

import errno
import os
import threading

import hmm
import numpy as np
import pytest
from pages import address_of, needs, on_device, page_aligned, present_pages, private, send

pytestmark = pytest.mark.isolated(60)

PAGE = hmm.PAGE_SIZE
PAGES = 64


def filled() -> np.ndarray:
    array = page_aligned(PAGES * PAGE, "u1")
    array[:] = np.arange(PAGES * PAGE) % 251
    return array


def test_system_calls_work_on_guarded_memory(tmp_path):
    source, target = filled(), page_aligned(PAGES * PAGE, "u1")
    path = tmp_path / "data"
    with hmm.SoftDevice() as device:
        send(device, source)
        with hmm.guard(source, write=False), open(path, "wb", buffering=0) as file:
            assert file.write(source[100:-100]) == PAGES * PAGE - 200
        send(device, target)
        with hmm.guard(target), open(path, "rb", buffering=0) as file:
            assert file.readinto(target[100:-100]) == PAGES * PAGE - 200
            assert on_device(target) == 0
        assert np.array_equal(source[100:-100], target[100:-100])
        assert not target[:100].any() and not target[-100:].any()
        send(device, target)
        first, second = target[: 3 * PAGE + 5], target[3 * PAGE + 5 :]
        with hmm.guard(first), hmm.guard(second), open(path, "rb") as file:
            assert os.preadv(file.fileno(), [first, second], 0) == PAGES * PAGE - 200
        assert np.array_equal(source[100:-100], target[:-200])


def test_without_a_guard_the_engine_fails_as_its_capabilities_say(tmp_path):
    source = filled()
    path = tmp_path / "data"
    with hmm.SoftDevice() as device, open(path, "wb", buffering=0) as file:
        send(device, source)
        if "KERNEL_FAULTS" in hmm.current().capabilities:
            assert file.write(source) == len(source)
        else:
            with pytest.raises(OSError) as caught:
                file.write(source)
            assert caught.value.errno == errno.EFAULT
    assert np.array_equal(source, filled())


def test_guarded_memory_stays_home():
    x = filled()
    with hmm.SoftDevice(fault_around=1) as device:
        send(device, x)
        with hmm.guard(x[PAGE - 1 : PAGE + 1]) as guard:
            assert "hmm.Guard" in repr(guard)
            assert [on_device(x[page * PAGE : (page + 1) * PAGE]) for page in range(3)] == [0, 0, 1]
            assert device.migrate(x) == 0
            with hmm.guard(x[: 4 * PAGE], write=False):
                assert on_device(x) == PAGES - 4
            assert device.migrate(x) == 2
        assert device.migrate(x) == 2
        assert on_device(x) == PAGES
    assert np.array_equal(x, filled())


def test_a_guard_lets_go_once():
    x = filled()
    with hmm.SoftDevice() as device:
        guard = hmm.current().guard(x)
        again = hmm.guard(x)
        guard.release()
        guard.release()
        with guard:  # holds nothing any more
            assert device.migrate(x) == 0
        again.release()
        assert device.migrate(x) == PAGES
        forgotten = hmm.guard(x)
        assert device.migrate(x) == 0
        del forgotten
        assert device.migrate(x) == PAGES
        with pytest.raises(LookupError), hmm.guard(x):
            raise LookupError
        assert device.migrate(x) == PAGES


def test_a_guard_populates_and_keeps_its_buffer():
    store = private(8 * PAGE)
    view = np.frombuffer(store, "u1")
    with hmm.guard(store):
        assert present_pages(view) == 8
    del view
    memory = bytearray(4 * PAGE)
    with hmm.guard(memory), pytest.raises(BufferError):
        memory.extend(b"more")
    memory.extend(b"more")


def test_read_only_memory_is_guarded_for_reading(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(2 * PAGE))
    fixed = np.memmap(path, "u1", "r")
    data = bytes(bytearray(b"x" * 20 * PAGE))
    with hmm.SoftDevice() as device, hmm.guard(fixed), open(path, "wb", buffering=0) as file:
        assert device.migrate((id(data) + PAGE, 16 * PAGE)) > 0
        with hmm.guard(data):
            assert file.write(data) == len(data)
    with pytest.raises(hmm.Error) as caught:
        hmm.guard((address_of(fixed), PAGE))  # nothing is known of it: for writing
    assert caught.value.errno == errno.EPERM


def test_bad_arguments():
    calls = [
        (TypeError, lambda: hmm.guard(5)),
        (TypeError, lambda: hmm.guard(np.zeros(8), True)),
        (BufferError, lambda: hmm.guard(np.zeros((8, 8))[:, 1])),
    ]
    for number, (kind, call) in enumerate(calls):
        with pytest.raises(kind):
            call()
            pytest.fail(f"call {number} was taken")
    for memory, number in (((0, PAGE), errno.EINVAL), (((1 << 64) - 1, 2), errno.EINVAL), ((0x1000, PAGE), errno.EFAULT)):
        with pytest.raises(hmm.Error) as caught:
            hmm.guard(memory)
        assert caught.value.errno == number
    with hmm.guard(np.zeros(0)) as nothing:
        assert "nothing" in repr(nothing)


def test_a_guard_outlives_its_mm():
    x = filled()
    guard = hmm.guard(x)
    hmm.current().close()
    guard.release()
    with hmm.current() as mm:
        with pytest.raises(hmm.Error) as caught:
            mm.close()
            mm.guard(x)
        assert caught.value.errno == errno.ENODEV
    with hmm.SoftDevice() as device:
        assert device.migrate(x) == PAGES


def test_guards_hold_while_others_migrate(tmp_path):
    x = filled()
    stop = threading.Event()
    with hmm.SoftDevice(fault_around=1) as device:

        def migrate() -> None:
            while not stop.is_set():
                device.migrate(x)

        mover = threading.Thread(target=migrate)
        mover.start()
        try:
            with open(tmp_path / "data", "w+b", buffering=0) as file:
                for number in range(300):
                    part = x[number % 50 * PAGE : (number % 50 + 5) * PAGE]
                    with hmm.guard(part):
                        assert os.pwrite(file.fileno(), part, 0) == len(part)
                        assert os.preadv(file.fileno(), [part], 0) == len(part)
        finally:
            stop.set()
            mover.join(30)
    assert np.array_equal(x, filled())


def test_the_engine_says_what_it_can_do():
    mm = hmm.current()
    can = set(mm.capabilities)
    assert can <= {"MISSING_FAULTS", "MOVE", "KERNEL_FAULTS", "POISON", "EVENTS", "PRIVATE_FILES", "ORDERED"}
    assert mm.engine in ("uffd", "uffd-inline", "signal") and mm.engine in repr(mm)
    assert ("KERNEL_FAULTS" in can) == (mm.engine == "uffd")
    assert ("EVENTS" in can) == (mm.engine != "signal")


def test_changes_of_device_memory_are_noticed_by_a_sync():
    with hmm.SoftDevice() as device:
        store = private(PAGES * PAGE)
        store[:] = b"1" * len(store)
        send(device, store)
        assert hmm.counters()["device_pages"] == PAGES
        store.close()
        hmm.current().sync()
        assert hmm.counters()["device_pages"] == 0


def test_changes_are_noticed_as_they_are_made():
    needs("EVENTS")
    before = hmm.counters()["map_events"]
    with hmm.SoftDevice(policy="never") as device:
        store = private(PAGES * PAGE)
        device.fill(store, 1)
        store.close()
        hmm.current().sync()
        assert hmm.counters()["map_events"] > before
