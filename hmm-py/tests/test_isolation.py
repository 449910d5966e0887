"""The helper itself: failures are reported, hangs are killed."""

import pytest
from isolation import Hung, run_isolated


def test_output_comes_back():
    assert run_isolated("print('fine')") == "fine\n"


def test_failure_is_reported():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_isolated("1 / 0")


def test_hang_with_the_gil_held_is_killed_and_its_stack_shown():
    # PyDLL keeps the GIL during the call.
    code = "import ctypes\ndef stuck(): ctypes.PyDLL(None).pause()\nstuck()"
    with pytest.raises(Hung, match="in stuck"):
        run_isolated(code, timeout=5)
