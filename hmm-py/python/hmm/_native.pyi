# Types of the native module. tests/test_stubs.py compares the names and parameters here with the binary.
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeAlias, final

from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = [
    "PAGE_SIZE",
    "RESIDENCY_DEVICE",
    "RESIDENCY_MIGRATING",
    "RESIDENCY_NONE",
    "RESIDENCY_POISONED",
    "RESIDENCY_SYSTEM",
    "RESIDENCY_UNMAPPED",
    "VERSION",
    "Error",
    "Mm",
    "Pin",
    "SoftDevice",
    "close_all",
    "current",
]

# Before Python 3.12 numpy's own stubs do not say that arrays have a buffer.
class _Array(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...

# An object with a C-contiguous buffer.
_Readable: TypeAlias = ReadableBuffer | _Array
_Writable: TypeAlias = WriteableBuffer | _Array
# The same, or (address, nbytes).
_Memory: TypeAlias = _Readable | tuple[int, int]
_WritableMemory: TypeAlias = _Writable | tuple[int, int]
_Policy: TypeAlias = Literal["never", "on_request", "on_touch"]

PAGE_SIZE: Final[int]
RESIDENCY_NONE: Final[int]
RESIDENCY_SYSTEM: Final[int]
RESIDENCY_DEVICE: Final[int]
RESIDENCY_MIGRATING: Final[int]
RESIDENCY_POISONED: Final[int]
RESIDENCY_UNMAPPED: Final[int]
VERSION: Final[str]

class Error(OSError): ...

def current() -> Mm: ...
def close_all() -> None: ...

@final
class Mm:
    @property
    def engine(self) -> str: ...
    @property
    def capabilities(self) -> list[str]: ...
    def counters(self) -> dict[str, int]: ...
    def residency(self, memory: _Memory) -> bytes: ...
    def make_present(self, memory: _Memory, *, write: bool = False) -> int: ...
    def pin(self, memory: _Memory) -> Pin: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Pin:
    def unpin(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class SoftDevice:
    def __new__(
        cls,
        *,
        memory: int = 67108864,
        policy: _Policy = "on_request",
        latency: float = 0.0,
        bandwidth: int = 0,
        fault_around: int = 16,
        threads: int = 1,
    ) -> Self: ...
    @property
    def memory(self) -> int: ...
    def migrate(self, memory: _Memory) -> int: ...
    def bring_home(self, memory: _Memory) -> int: ...
    def fill(self, dst: _WritableMemory, byte: int) -> None: ...
    def copy(self, dst: _WritableMemory, src: _Memory) -> None: ...
    def axpy(self, a: float, x: _Readable, y: _Writable) -> None: ...
    def sum(self, src: _Readable) -> int | float: ...
    def gather(self, dst: _Writable, src: _Readable, index: _Readable) -> None: ...
    def chase(self, head: int, *, max_steps: int, next_offset: int = 0) -> int: ...
    def chase_sum(self, head: int, *, value_offset: int, max_steps: int, next_offset: int = 0) -> int: ...
    def atomic_add(self, target: _Writable, value: int, *, index: int = 0) -> int: ...
    def add(self, target: _Writable, value: int, *, stride: int = 1) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def set_policy(self, policy: _Policy) -> None: ...
    def set_latency(self, latency: float) -> None: ...
    def set_bandwidth(self, bandwidth: int) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...
