"""Arrays go to the device where they lie, and come home."""

import array
import ctypes
import mmap
import os
import hmm
import numpy as np
import pytest
from pages import address_of, needs, on_device, page_aligned, present_pages, private, send

pytestmark = pytest.mark.isolated(60)

MIB = 1 << 20
PAGE = hmm.PAGE_SIZE


def test_pages_leave_the_page_table_and_come_home_by_a_touch():
    x = page_aligned(MIB)
    x[:] = np.arange(MIB)
    pages = x.nbytes // PAGE
    with hmm.SoftDevice(memory=16 * MIB) as device:
        assert device.migrate(x) == pages
        assert hmm.residency(x) == bytes([hmm.Residency.DEVICE]) * pages
        assert hmm.residency_map(x) == "#" * 64
        assert present_pages(x) == 0
        assert x[5] == 5.0
        assert 0 < present_pages(x) < pages
        # The touch returns when the page is there; the migration may still be finishing.
        assert hmm.residency(x)[0] in (hmm.Residency.SYSTEM, hmm.Residency.MIGRATING)
        assert np.array_equal(x, np.arange(MIB))
        assert present_pages(x) == pages and on_device(x) == 0


def test_stores_survive_both_ways():
    x = page_aligned(64 * 512)
    with hmm.SoftDevice() as device:
        for value in range(1, 20):
            send(device, x)
            x[::512] += 1.0  # one store a page, each brings its page home
            send(device, x)
            device.add(x.view("u8"), 0)
            assert on_device(x) == 64
            assert (x[::512] == value).all()
    assert x.sum() == 64 * 19


def test_bring_home_counts_and_counters_agree():
    x = page_aligned(100 * 512)
    x[:] = 1.0
    before = hmm.counters()
    with hmm.SoftDevice() as device:
        assert device.migrate(x) == 100
        assert hmm.counters()["device_pages"] == before["device_pages"] + 100
        assert device.bring_home(x[: 30 * 512]) == 30
        assert on_device(x) == 70
        assert device.bring_home(x) == 70
        assert device.bring_home(x) == 0
        assert hmm.make_present(x) == 0
    after = hmm.counters()
    assert after["migrated_to_device"] == before["migrated_to_device"] + 100
    assert after["migrated_to_system"] == before["migrated_to_system"] + 100
    assert after["cpu_faults"] == before["cpu_faults"], "no touch should have faulted"


def test_rss_falls_as_pages_leave():
    # rss of the anonymous memory of this array alone: the device's own memory is another mapping.
    store = private(32 * MIB)
    x = np.frombuffer(store, "float64")
    x[:] = 2.0
    with hmm.SoftDevice(memory=64 * MIB) as device:
        assert rss_of(address_of(x), x.nbytes) >= 32 * MIB
        assert device.migrate(x) == 32 * MIB // PAGE
        assert rss_of(address_of(x), x.nbytes) == 0
        assert device.sum(x) == 2.0 * len(x)
    assert x.sum() == 2.0 * len(x)
    del x


def rss_of(start: int, size: int) -> int:
    """Bytes of the range that are in core, over all mappings inside it (/proc/self/smaps)."""
    inside, total = False, 0
    with open("/proc/self/smaps") as maps:
        for line in maps:
            word = line.split()[0]
            if "-" in word:
                low, high = (int(part, 16) for part in word.split("-"))
                inside = start <= low and high <= start + size
            elif inside and word == "Rss:":
                total += int(line.split()[1]) * 1024
    return total


SIZE = 8 * PAGE
SEVENS = b"\7" * SIZE


def exporters() -> dict[str, object]:
    anonymous = private(SIZE)
    anonymous[:] = SEVENS
    return {
        "numpy": np.full(SIZE, 7, "uint8"),
        "numpy 3d": np.full((8, PAGE // 2, 2), 7, "uint8"),
        "numpy structured": np.frombuffer(bytearray(SEVENS), [("a", "u4"), ("b", "u4")]),
        "bytearray": bytearray(SEVENS),
        "bytes": bytes(bytearray(SEVENS)),
        "memoryview": memoryview(bytearray(SEVENS * 2))[PAGE : PAGE + SIZE],
        "array": array.array("B", SEVENS),
        "ctypes": (ctypes.c_ubyte * SIZE).from_buffer_copy(SEVENS),
        "mmap": anonymous,
    }


def test_everything_with_a_buffer_migrates():
    with hmm.SoftDevice() as device:
        for name, memory in exporters().items():
            device.migrate(memory)
            # What shares the pages at the edges may be touched at any time.
            assert on_device(memory) >= SIZE // PAGE - 1, name
            assert bytes(memory) == SEVENS, name


def test_an_address_and_a_length_name_memory():
    x = page_aligned(8 * 512)
    with hmm.SoftDevice() as device:
        assert device.migrate((address_of(x) + 2 * PAGE + 5, PAGE)) == 2
        states = hmm.residency((address_of(x), x.nbytes))
        assert [page for page, state in enumerate(states) if state == hmm.Residency.DEVICE] == [2, 3]


def test_a_full_device_takes_what_fits():
    x = page_aligned(MIB)
    x[:] = 3.0
    with hmm.SoftDevice(memory=2 * MIB) as device:
        moved = device.migrate(x)
        assert 0 < moved <= 2 * MIB // PAGE
        assert on_device(x) == moved
        assert device.sum(x) == 3.0 * MIB
        assert (x == 3.0).all()


def test_two_devices_share_an_array():
    x = page_aligned(200 * 512)
    x[:] = 1.0
    half = 100 * 512
    with hmm.SoftDevice() as first, hmm.SoftDevice() as second:
        assert first.migrate(x[:half]) == 100
        assert second.migrate(x[half:]) == 100
        assert on_device(x) == 200
        assert first.sum(x) == second.sum(x) == len(x)  # each reads the other's pages, which come home
        first.axpy(1.0, x[half:], x[:half])
        assert second.sum(x) == 3 * half
    assert (x[:half] == 2.0).all() and (x[half:] == 1.0).all()


def test_make_present_brings_home_and_populates():
    x = page_aligned(50 * 512)
    x[:] = 4.0
    with hmm.SoftDevice() as device:
        device.migrate(x)
        assert hmm.make_present(x, write=True) == 50
        assert present_pages(x) == 50 and on_device(x) == 0
    fresh = private(20 * PAGE)
    view = np.frombuffer(fresh, "uint8")
    assert present_pages(view) == 0
    assert hmm.make_present(fresh, write=True) == 0
    assert present_pages(view) == 20
    del view


def test_pinned_memory_stays_home():
    x = page_aligned(20 * 512)
    x[:] = 5.0
    with hmm.SoftDevice() as device:
        device.migrate(x)
        with hmm.pin(x) as pinned:
            assert on_device(x) == 0
            assert device.migrate(x) == 0
            assert "hmm.Pin" in repr(pinned)
        assert device.migrate(x) == 20

        first, second = hmm.pin(x), hmm.pin(x[:512])  # pins are counted
        first.unpin()
        first.unpin()
        assert device.migrate(x) == 19
        hmm.unpin(second)
        assert device.migrate(x) == 1
        third = hmm.pin(x)
        del third
        assert device.migrate(x) == 20


def test_a_pin_keeps_its_buffer():
    memory = bytearray(4 * PAGE)
    with hmm.pin(memory), pytest.raises(BufferError):
        memory.extend(b"more")
    memory.extend(b"more")


def test_system_calls_on_migrated_memory(tmp_path):
    needs("KERNEL_FAULTS")
    data = np.random.default_rng(1).integers(0, 256, 64 * PAGE, "uint8")
    path = tmp_path / "data"
    with hmm.SoftDevice() as device:
        plain = data.tobytes()
        device.migrate(data)
        path.write_bytes(data)  # write() reads migrated pages
        assert path.read_bytes() == plain
        target = np.zeros_like(data)
        device.migrate(target)
        with open(path, "rb", buffering=0) as file:
            assert file.readinto(target) == len(target)  # read() writes them
        assert target.tobytes() == plain
        device.migrate(target)
        with open(path, "rb") as file:
            assert os.preadv(file.fileno(), [target[PAGE:]], 0) == len(target) - PAGE
        assert target[PAGE:].tobytes() == plain[:-PAGE]


def test_unmapped_memory_frees_its_device_pages():
    with hmm.SoftDevice(memory=8 * MIB) as device:
        for value in range(1, 30):  # 4 MiB each: together far more than the device holds
            store = private(4 * MIB)
            store[:] = bytes([value]) * len(store)
            send(device, store)
            assert device.sum(np.frombuffer(store, "u8")) == value * 0x0101010101010101 * (MIB // 2) % (1 << 64)
            store.close()
            fresh = private(4 * MIB)
            assert not any(fresh[::PAGE]), "stale device data in a new mapping"
            fresh.close()
        hmm.current().sync()
        assert hmm.counters()["device_pages"] == 0


def test_freed_arrays_leave_no_data_behind():
    with hmm.SoftDevice() as device:
        for value in range(1, 30):
            x = np.full(MIB // 2, float(value))
            device.migrate(x)  # not all: malloc's own words share the pages at the edges
            assert device.sum(x) == value * len(x)
            del x
            assert not np.zeros(MIB // 2).any()


def test_shared_memory_stays_and_the_device_works_on_it_in_place():
    shared = mmap.mmap(-1, 16 * PAGE)
    shared[:] = b"\1" * len(shared)
    with hmm.SoftDevice() as device:
        assert device.migrate(shared) == 0
        device.fill(memoryview(shared)[PAGE : 2 * PAGE], 2)
    assert shared[:] == b"\1" * PAGE + b"\2" * PAGE + b"\1" * 14 * PAGE


def test_python_objects_survive_the_migration_of_their_own_memory():
    # The object's header, reference count included, lies on the first page: the interpreter itself faults.
    data = os.urandom(MIB)
    copy = bytes(bytearray(data))
    words = [f"word{number}" for number in range(1 << 16)]
    backwards = words[::-1]
    with hmm.SoftDevice() as device:
        for _ in range(20):
            assert device.migrate((id(data), MIB)) > 200
            assert data == copy
            device.migrate((id(words), 64))
            for number in range(0, 1 << 16, 1 << 10):
                device.migrate((id(words[number]), 64))
            words.reverse()
            words.reverse()
            assert words[::-1] == backwards


def test_what_stays_says_why():
    reasons = hmm.stay_reasons()
    assert "munlock" in reasons["locked"] and all(reasons.values())
    x, shared = page_aligned(8 * 512), mmap.mmap(-1, 4 * PAGE)
    shared.write(b"x" * 4 * PAGE)
    with hmm.SoftDevice(memory=MIB) as device, hmm.pin((address_of(x), 2 * PAGE)):
        moved, stayed = device.migrate_explained(x)
        assert stayed.pop("pinned") == 2
        assert moved + sum(stayed.values()) == 6 and set(stayed) <= set(reasons)
        assert device.migrate_explained(shared) == (0, {"shared": 4})
        large = page_aligned(4 * MIB // 8)
        moved, stayed = device.migrate_explained(large)
        assert moved < large.nbytes // PAGE and stayed["left_out"] > 0
    assert shared[-1] == ord("x")
