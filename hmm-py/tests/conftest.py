"""`@pytest.mark.isolated(timeout)`: the test runs in a process of its own (see isolation.py)."""

import os
import re
import sys

import pytest
from isolation import DUMP_BEFORE_KILL, run_process

IN_CHILD = "HMM_TEST_ISOLATED"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    marker = pyfuncitem.get_closest_marker("isolated")
    if marker is None or IN_CHILD in os.environ:
        return None
    (timeout,) = marker.args
    options = ["-rs", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={timeout - DUMP_BEFORE_KILL}"]
    # -s: what a killed process printed would be lost in pytest's own capture.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--no-header", "--rootdir", str(pyfuncitem.config.rootpath)]
    node = f"{pyfuncitem.path}::{pyfuncitem.nodeid.partition('::')[2]}"
    failure = None
    try:
        output = run_process([*command, *options, node], timeout, **{IN_CHILD: "1"})
    except AssertionError as error:
        failure = str(error)
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    if skipped := re.search(r"^SKIPPED \[\d+\] [^:]+:\d+: (.*)$", output, re.MULTILINE):
        pytest.skip(skipped[1])
    return True
