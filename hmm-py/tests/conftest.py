"""`@pytest.mark.isolated(timeout)`: the test runs in a process of its own (see isolation.py). After every test that had
the library at work, its accounts must agree."""

import os
import re
import sys

import hmm
import pytest
from isolation import DUMP_BEFORE_KILL, run_process

IN_CHILD = "HMM_TEST_ISOLATED"


def is_open() -> bool:
    """Whether the mm of this process is open: asking the library would open it."""
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/comm") as comm:
                if comm.read().startswith("hmm-watch"):
                    return True
        except OSError:
            continue
    return False


@pytest.fixture(autouse=True)
def accounts():
    yield
    if is_open():
        hmm.current().check_accounts()


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
