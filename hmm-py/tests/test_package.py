"""The package without a device: names, constants, the residency map, and what an import does not do."""

import importlib.metadata

import hmm
import pytest
from hmm import Residency, _native
from hmm._residency import draw
from isolation import run_isolated


def test_version_is_that_of_the_distribution():
    assert importlib.metadata.version("libhmm") == hmm.__version__


def test_every_name_is_there_and_every_constant_has_its_name():
    for name in hmm.__all__:
        assert hasattr(hmm, name), name
    constants = {name for name in dir(_native) if name.startswith("RESIDENCY_")}
    assert constants == {f"RESIDENCY_{member.name}" for member in Residency}
    assert len({member.value for member in Residency}) == len(constants)


def test_error_is_an_oserror_with_errno():
    error = hmm.Error(16, "busy")
    assert isinstance(error, OSError) and (error.errno, error.strerror) == (16, "busy")


def test_map_draws_one_character_a_bucket():
    device, system = bytes([Residency.DEVICE]), bytes([Residency.SYSTEM])
    assert draw(device * 4 + system * 4, width=4) == "##.."
    assert draw(device * 3 + system * 5, width=4) == "#+.."
    assert draw(device + system, width=64) == "#."
    assert draw(b"", width=64) == ""
    assert len(draw(system * 1000, width=64)) == 64


def test_map_shows_the_worst_of_a_bucket():
    every = bytes(Residency)
    assert draw(every, width=1) == "!"
    assert draw(every, width=len(every)) == "_.#~! "
    assert draw(bytes([Residency.NONE, Residency.UNMAPPED]), width=1) == "_"


def test_map_refuses_a_width_of_nothing():
    with pytest.raises(ValueError, match="width"):
        draw(b"\1", width=0)


def test_import_needs_no_numpy_and_starts_no_thread():
    run_isolated(
        """
import os, sys
sys.modules["numpy"] = None
import hmm
threads = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
assert not [name for name in threads if name.startswith("hmm")], threads
"""
    )
