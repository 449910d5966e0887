"""Memory groups, and resident memory by kind."""

import errno

import hmm
import numpy as np
import pytest
from pages import on_device, page_aligned, private, send

PAGES = 64
SIZE = PAGES * hmm.PAGE_SIZE


@pytest.fixture
def group():
    """A group that the address space is in."""
    group = hmm.MemoryGroup()
    hmm.current().set_group(group)
    yield group
    hmm.current().set_group(None)


def charged(group: hmm.MemoryGroup) -> tuple[int, int]:
    """Pages charged, and of these on a device."""
    stat = group.stat()
    assert stat["anon"] == group.current
    return stat["anon"] // hmm.PAGE_SIZE, stat["device"] // hmm.PAGE_SIZE


@pytest.mark.isolated(60)
def test_a_charge_stays_with_its_group(group):
    mm = hmm.current()
    assert mm.group == group and group.parent == hmm.MemoryGroup.root()
    x = page_aligned(SIZE // 8)
    x[:] = 1
    other = hmm.MemoryGroup(parent=group)
    with hmm.SoftDevice() as device:
        send(device, x)
        assert charged(group) == (PAGES, PAGES)
        mm.set_group(other)
        assert device.bring_home(x) == PAGES
        assert x.sum() == x.size
        assert (charged(group), charged(other)) == ((PAGES, 0), (0, 0))
        assert mm.move_charges() == PAGES
        assert (charged(group), charged(other)) == ((PAGES, 0), (PAGES, 0))
        assert other.peak == SIZE
    mm.settle_charges()
    assert charged(other) == (PAGES, 0)


@pytest.mark.isolated(60)
def test_a_limit_keeps_holes_and_nothing_else(group):
    group.set_max(10 * hmm.PAGE_SIZE + 1)
    assert group.max == 10 * hmm.PAGE_SIZE and group.events() == {"max": 0}
    with hmm.SoftDevice() as device, private(SIZE) as memory:
        device.migrate(memory)
        assert on_device(memory) == 10
        assert group.events()["max"] >= PAGES - 10
        memory[:] = b"x" * SIZE
        send(device, memory)
        assert charged(group) == (PAGES, PAGES)
        group.set_max(0)
        assert memory[:] == b"x" * SIZE
    group.set_max(None)
    assert group.max is None


@pytest.mark.isolated(60)
def test_resident_memory_does_not_change_by_migration():
    x = page_aligned(1 << 18)
    with hmm.SoftDevice() as device:
        x[:] = 1
        send(device, x)
        assert device.bring_home(x) == x.nbytes // hmm.PAGE_SIZE
        before = hmm.rss()
        send(device, x)
        after = hmm.rss()
        assert before.keys() == {"anon", "file", "shmem"}
        total = sum(after.values()) - sum(before.values())
        assert abs(total) < 128 * hmm.PAGE_SIZE, (before, after)
        assert np.all(x == 1)


def test_arguments():
    with pytest.raises(hmm.Error) as caught:
        hmm.MemoryGroup.root().set_max(1)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OverflowError):
        hmm.MemoryGroup(max=-1)
    with pytest.raises(TypeError):
        hmm.MemoryGroup(hmm.MemoryGroup.root())
    one, two = hmm.MemoryGroup(max=8192), hmm.MemoryGroup()
    assert one != two and one.parent == two.parent == hmm.MemoryGroup.root()
    assert repr(one) == "<hmm.MemoryGroup 0 bytes, of 8192>"
    assert hmm.MemoryGroup.root().parent is None
