"""Where a page is."""

import enum
import itertools

from . import _native


class Residency(enum.IntEnum):
    """Where a page is: the values of the bytes that `residency` returns."""

    NONE = _native.RESIDENCY_NONE
    """Nothing is there yet: never touched, or dropped."""
    SYSTEM = _native.RESIDENCY_SYSTEM
    """In system memory."""
    DEVICE = _native.RESIDENCY_DEVICE
    """In the memory of a device."""
    MIGRATING = _native.RESIDENCY_MIGRATING
    """On its way from one to the other."""
    POISONED = _native.RESIDENCY_POISONED
    """Lost by its device: a touch raises SIGBUS."""
    UNMAPPED = _native.RESIDENCY_UNMAPPED
    """Not mapped."""


def draw(pages: bytes, width: int = 64) -> str:
    """Draws one character for each bucket of `pages`, at most `width` of them (see `MAP_LEGEND`)."""
    if width < 1:
        raise ValueError("width must be at least 1")
    if not pages:
        return ""
    buckets = min(width, len(pages))
    edges = [len(pages) * bucket // buckets for bucket in range(buckets + 1)]
    return "".join(_symbol(pages[start:end]) for start, end in itertools.pairwise(edges))


MAP_LEGEND = "# device  + partly device  . system  _ untouched  ~ migrating  ! lost"
"""What the characters of `residency_map` mean; blank is not mapped."""


def _symbol(bucket: bytes) -> str:
    if Residency.POISONED in bucket:
        return "!"
    if Residency.MIGRATING in bucket:
        return "~"
    if Residency.DEVICE in bucket:
        return "#" if bucket.count(Residency.DEVICE) == len(bucket) else "+"
    if Residency.SYSTEM in bucket:
        return "."
    return "_" if Residency.NONE in bucket else " "
