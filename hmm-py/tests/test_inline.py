"""Inline ranges: system calls on memory that is away fail, on those ranges alone."""

import errno
import os

import hmm
import pytest
from pages import needs, private, send

pytestmark = pytest.mark.isolated(60)

PAGE = hmm.PAGE_SIZE


def test_system_calls_fail_on_an_inline_range_alone(tmp_path):
    needs("KERNEL_FAULTS")
    mm = hmm.current()
    memory = private(8 * PAGE)
    memory[:] = bytes(range(256)) * (8 * PAGE // 256)
    mm.inline_range(memoryview(memory)[: 4 * PAGE])
    with hmm.SoftDevice() as device, open(tmp_path / "data", "wb", buffering=0) as file:
        send(device, memory)
        with pytest.raises(OSError) as caught:
            os.write(file.fileno(), memoryview(memory)[:PAGE])
        assert caught.value.errno == errno.EFAULT
        assert os.write(file.fileno(), memoryview(memory)[5 * PAGE : 6 * PAGE]) == PAGE
        with mm.guard(memoryview(memory)[:PAGE]):
            assert os.write(file.fileno(), memoryview(memory)[:PAGE]) == PAGE
        mm.blocking_range(memory)
        send(device, memory)
        assert os.write(file.fileno(), memory) == 8 * PAGE
    assert memory[:] == bytes(range(256)) * (8 * PAGE // 256)


def test_only_whole_pages_can_be_inline():
    mm = hmm.current()
    view = memoryview(private(4 * PAGE))
    for part in (view[1:], view[: PAGE + 1], view[:0]):
        with pytest.raises(hmm.Error) as caught:
            mm.inline_range(part)
        assert caught.value.errno == errno.EINVAL
