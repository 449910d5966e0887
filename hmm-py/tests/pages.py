"""What the kernel says about the pages of an object, and helpers to make memory."""

import mmap
import os
import time

import hmm
import numpy as np
import pytest

# Present, and of this mapping alone: the zero page, which stands for pages that are away on some engines, is not.
PRESENT = 1 << 63 | 1 << 56


def address_of(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def page_aligned(count: int, dtype: str = "float64") -> np.ndarray:
    """An array of its own pages: `count` elements from a page boundary on, zeroed."""
    size = np.dtype(dtype).itemsize * count
    store = np.zeros(size + hmm.PAGE_SIZE, "uint8")
    start = -address_of(store) % hmm.PAGE_SIZE
    return store[start : start + size].view(dtype)


def present_pages(array: np.ndarray) -> int:
    """How many of the array's pages have memory in the CPU's page table (/proc/self/pagemap)."""
    first = address_of(array) // hmm.PAGE_SIZE
    last = (address_of(array) + array.nbytes - 1) // hmm.PAGE_SIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        entries = os.pread(pagemap.fileno(), 8 * (last - first + 1), 8 * first)
    return int(np.count_nonzero(np.frombuffer(entries, "uint64") & PRESENT == PRESENT))


def private(size: int) -> mmap.mmap:
    """Fresh memory that can migrate."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def needs(capability: str) -> None:
    """Skips a test that is about what the engine lacks."""
    if capability not in hmm.current().capabilities:
        pytest.skip(f"the engine lacks {capability}")


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
