"""Runs risky code in a process of its own, which is killed and reported when it hangs.

A thread that hangs in a page fault may hold the GIL, so no time limit inside the process can be relied upon. The
child dumps the stacks of its threads (faulthandler needs no GIL) shortly before the parent kills it.
"""

import os
import signal
import subprocess
import sys

DUMP_BEFORE_KILL = 3.0


class Hung(AssertionError):
    """The process did not end in time and was killed."""


def run_process(argv: list[str], timeout: float, **environment: str) -> str:
    """Runs a command, returns its output (stdout and stderr), raises AssertionError on failure and `Hung` on a hang."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=30)
        raise Hung(f"hung, killed after {timeout} s; its output:\n{output}") from None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        raise
    if process.returncode != 0:
        raise AssertionError(f"ended with {process.returncode}; its output:\n{output}")
    return output


def run_isolated(code: str, timeout: float = 30.0) -> str:
    """Runs Python code in a process of its own; see `run_process`."""
    delay = max(1.0, timeout - DUMP_BEFORE_KILL)
    prelude = f"import faulthandler; faulthandler.dump_traceback_later({delay})\n"
    return run_process([sys.executable, "-W", "error", "-X", "faulthandler", "-c", prelude + code], timeout)
