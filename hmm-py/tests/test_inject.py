"""Failures on request: nothing is lost."""

import contextlib
import errno

import hmm
import pytest
from pages import page_aligned

PAGES = 64


@pytest.mark.isolated(60)
def test_arrays_survive_failing_calls():
    device = hmm.SoftDevice(memory=PAGES * hmm.PAGE_SIZE)
    array = page_aligned(PAGES * hmm.PAGE_SIZE // 8, "uint64")
    hmm.inject("all/7,seed=5")
    for number in range(30):
        array[:] = number
        with contextlib.suppress(hmm.Error):
            device.migrate(array)
        assert array.sum() == number * array.size
    failures = hmm.inject("")
    assert sum(failures.values()) > 30
    assert hmm.inject() == failures
    device.close()
    assert hmm.counters()["poisoned"] == 0


def test_nonsense_is_named():
    with pytest.raises(hmm.Error, match="moon/3") as caught:
        hmm.inject("copy/10, moon/3")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert set(hmm.inject()) >= {"copy", "move", "arena"}
