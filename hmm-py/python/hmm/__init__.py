"""HMM (heterogeneous memory management) in user space. Not hidden Markov models.

Plain memory of this process (numpy arrays, bytearrays, mmaps: anything with a buffer) is handed to a device where
it lies; it leaves the CPU's page table, and comes home when the CPU touches it::

    import hmm, numpy as np

    x, y = np.ones(1 << 20), np.zeros(1 << 20)
    with hmm.SoftDevice(memory=32 << 20) as device:
        device.migrate(x)
        device.axpy(2.0, x, y)
        print(y[0], hmm.residency_map(x))

Memory is named by an object with a C-contiguous buffer, or by ``(address, nbytes)``. Whole pages move, so what shares
a page with an array moves along; that changes nothing but speed, where the engine has ``KERNEL_FAULTS``. Calls that wait
release the GIL. A call that fails raises `Error`, an `OSError` with its ``errno``.

Where the engine lacks ``KERNEL_FAULTS`` (see `Mm.capabilities`), system calls on pages that are on a device fail with
``EFAULT``. A guard keeps their memory at home meanwhile::

    with hmm.guard(x):
        file.readinto(x)
"""

import atexit as _atexit
from typing import TYPE_CHECKING

from . import _native
from ._native import (
    PAGE_SIZE,
    Error,
    Guard,
    MemoryGroup,
    Mm,
    Pin,
    SoftDevice,
    current,
    stay_reasons,
)
from ._residency import MAP_LEGEND, Residency
from ._residency import draw as _draw

if TYPE_CHECKING:
    from ._native import _Memory

__all__ = [
    "MAP_LEGEND",
    "PAGE_SIZE",
    "Error",
    "Guard",
    "MemoryGroup",
    "Mm",
    "Pin",
    "Residency",
    "SoftDevice",
    "counters",
    "current",
    "guard",
    "make_present",
    "pin",
    "residency",
    "residency_map",
    "rss",
    "stay_reasons",
    "unpin",
]

__version__: str = _native.VERSION

# Pages that stayed on a device would be lost with it, and a blocked thread cannot be joined: home before the end.
_atexit.register(_native.close_all)


def counters() -> dict[str, int]:
    """The counters of this process's mm (see `Mm.counters`)."""
    return current().counters()


def rss() -> dict[str, int]:
    """Resident memory of this process by kind, wherever it is (see `Mm.rss`)."""
    return current().rss()


def residency(memory: "_Memory") -> bytes:
    """Where each page of the memory is: one `Residency` value a byte."""
    return current().residency(memory)


def residency_map(memory: "_Memory", width: int = 64) -> str:
    """Draws where the memory is, one character for each of at most `width` buckets of pages (see `MAP_LEGEND`)."""
    return _draw(current().residency(memory), width)


def make_present(memory: "_Memory", *, write: bool = False) -> int:
    """Brings the memory home and populates it, so that the next touches do not fault (see `Mm.make_present`)."""
    return current().make_present(memory, write=write)


def guard(memory: "_Memory", *, write: bool = True) -> Guard:
    """Keeps the memory present for system calls in a ``with`` block (see `Mm.guard`)."""
    return current().guard(memory, write=write)


def pin(memory: "_Memory") -> Pin:
    """Brings the memory home and keeps it there until the `Pin` goes, is unpinned or leaves its ``with`` block."""
    return current().pin(memory)


def unpin(pinned: Pin) -> None:
    """Lets pinned memory migrate again."""
    pinned.unpin()
