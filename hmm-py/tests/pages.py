"""What the kernel says about the pages of an object, and helpers to make memory."""

import os
import time

import hmm
import numpy as np

PRESENT = 1 << 63


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def page_aligned(count: int, dtype: str = "float64") -> np.ndarray:
    """An array of its own pages: `count` elements from a page boundary on, zeroed."""
    size = np.dtype(dtype).itemsize * count
    store = np.zeros(size + hmm.PAGE_SIZE, "uint8")
    start = -address_of(store) % hmm.PAGE_SIZE
    return store[start : start + size].view(dtype)


def present_pages(array: np.ndarray) -> int:
    """How many of the array's pages the CPU's page table maps (/proc/self/pagemap)."""
    first = address_of(array) // hmm.PAGE_SIZE
    last = (address_of(array) + array.nbytes - 1) // hmm.PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * (last - first + 1), 8 * first)
    return int(np.count_nonzero(np.frombuffer(entries, "uint64") & PRESENT))


def on_device(memory: object) -> int:
    """How many pages of the memory are on a device."""
    return hmm.residency(memory).count(hmm.Residency.DEVICE)


def send(device: hmm.SoftDevice, memory: object) -> None:
    """Migrates all of the memory, which must have its pages for itself.

    A page that is still on its way home from an earlier touch may stay at first.
    """
    deadline = time.monotonic() + 10
    device.migrate(memory)
    while on_device(memory) < len(hmm.residency(memory)):
        assert time.monotonic() < deadline, hmm.residency_map(memory)
        device.migrate(memory)
