"""Device kernels against plain numpy, wherever the pages are."""

import ctypes
import itertools

import hmm
import numpy as np
import pytest
from pages import on_device, page_aligned

pytestmark = pytest.mark.isolated(60)

COUNT = 40_000
POLICIES = ("never", "on_request", "on_touch")
MASK = (1 << 64) - 1


@pytest.fixture
def generator():
    return np.random.default_rng(7)


def arrange(device: hmm.SoftDevice, policy: str, *arrays: np.ndarray) -> None:
    """Half of each array to the device where the policy allows it, so that kernels meet both kinds of page."""
    if policy == "on_request":
        for array in arrays:
            device.migrate(array[len(array) // 4 : 3 * len(array) // 4])


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_compute_what_numpy_computes(policy, generator):
    x, y = generator.integers(-1000, 1000, (2, COUNT)).astype("f8")
    index = generator.integers(0, COUNT, COUNT)
    out, counts = np.zeros(COUNT), generator.integers(0, 99, COUNT).astype("u8")
    plain_y, plain_counts = y + 3.0 * x, counts.copy()
    plain_counts[::7] += np.uint64(5)
    with hmm.SoftDevice(policy=policy, threads=2) as device:
        arrange(device, policy, x, y, index, out, counts)
        device.axpy(3.0, x, y)
        assert device.sum(y) == plain_y.sum()
        device.add(counts, 5, stride=7)
        assert device.sum(counts) == int(plain_counts.sum())
        device.gather(out, y, index)
        arrange(device, policy, out)
        assert np.array_equal(y, plain_y)
        assert np.array_equal(counts, plain_counts)
        assert np.array_equal(out, plain_y[index])
        device.copy(out, x)
        assert np.array_equal(out, x)
        device.fill(out[100:200], 0xAB)
        assert out[100:200].tobytes() == b"\xab" * 800
        assert np.array_equal(out[:100], x[:100]) and np.array_equal(out[200:], x[200:])


def test_policies_decide_where_pages_are_afterwards():
    for policy, expected in (("never", 0), ("on_request", 0), ("on_touch", 64)):
        x = page_aligned(64 * 512)
        x[:] = 1.0
        with hmm.SoftDevice(policy=policy) as device:
            assert device.sum(x) == len(x)
            assert on_device(x) == expected, policy


def test_the_policy_never_refuses_migration_and_can_be_changed():
    x = page_aligned(512)
    x[:] = 1.0
    with hmm.SoftDevice(policy="never") as device:
        with pytest.raises(hmm.Error):
            device.migrate(x)
        device.set_policy("on_request")
        assert device.migrate(x) == 1


def test_integer_sums_wrap_and_keep_their_sign():
    signed = np.array([-5, 3], "i8")
    unsigned = np.array([MASK, 2], "u8")
    with hmm.SoftDevice() as device:
        assert device.sum(signed) == -2
        assert device.sum(unsigned) == 1
        assert isinstance(device.sum(unsigned), int) and isinstance(device.sum(np.ones(3)), float)


def test_atomic_add_returns_the_old_value():
    unsigned, signed = np.full(1000, 10, "u8"), np.full(1000, -10, "i8")
    with hmm.SoftDevice() as device:
        for array in (unsigned, signed):
            device.migrate(array)
        assert device.atomic_add(unsigned, 5, index=999) == 10
        assert device.atomic_add(unsigned, MASK, index=999) == 15
        assert device.atomic_add(signed, -3) == -10
        assert device.atomic_add(signed, 1) == -13
    assert unsigned[999] == 14 and signed[0] == -12 and unsigned[:999].sum() == 9990


class Node(ctypes.Structure):
    """A node of a chain in the CPU's own memory."""

    _fields_ = [("value", ctypes.c_uint64), ("next", ctypes.c_void_p), ("padding", ctypes.c_char * 240)]


def test_chains_are_walked_by_the_cpus_pointers(generator):
    nodes = (Node * 2000)()
    order = generator.permutation(len(nodes))
    for here, there in itertools.pairwise(order):
        nodes[here].next = ctypes.addressof(nodes[there])
    for node in nodes:
        node.value = 3
    head = ctypes.addressof(nodes[order[0]])
    offsets = {"next_offset": Node.next.offset, "max_steps": 10_000}
    with hmm.SoftDevice() as device:
        device.migrate(nodes)
        assert on_device(nodes) >= 100
        assert device.chase(head, **offsets) == len(nodes)
        assert device.chase_sum(head, value_offset=Node.value.offset, **offsets) == 3 * len(nodes)
        nodes[order[100]].value += 1  # the CPU changes the chain, and its page comes home
        assert device.chase_sum(head, value_offset=Node.value.offset, **offsets) == 3 * len(nodes) + 1
        nodes[order[0]].next = head  # a cycle ends at max_steps
        assert device.chase(head, next_offset=Node.next.offset, max_steps=500) == 500


def test_a_kernel_on_bad_addresses_fails_and_the_device_goes_on():
    with hmm.SoftDevice() as device:
        with pytest.raises(hmm.Error):
            device.fill((0x1000, 4096), 1)
        with pytest.raises(hmm.Error):
            device.chase(0x1000, max_steps=3)
        assert device.sum(np.ones(100)) == 100.0


def test_device_counters_count():
    x = page_aligned(64 * 512)
    x[:] = 1.0
    with hmm.SoftDevice() as device:
        before = device.counters()
        device.migrate(x)
        device.sum(x)
        assert x[0] == 1.0
        after = device.counters()
    assert set(before) == set(after) and all(isinstance(value, int) for value in after.values())
    assert any(after[name] > before[name] for name in after)
