"""The end of a Python program while memory is away: by every way there is, in time, without a lost byte."""

import os
import signal
import subprocess
import sys

import pytest

START = """
import atexit, os, signal, sys, threading, time

def look():
    # Registered first, so it runs after the library's own hook.
    assert (x == 9.0).all()
    print("intact", flush=True)

atexit.register(look)
import hmm, numpy as np
x = np.full(1 << 17, 9.0)
device = hmm.SoftDevice()
busy = np.full(1 << 15, 3.0)

def work():
    while True:
        try:
            device.migrate(busy)
        except OSError:
            return
        busy.sum()

threading.Thread(target=work, daemon=True).start()
assert device.migrate(x) >= 256
"""


def end(code: str) -> tuple[int, str]:
    """Runs a program to its end; its status (negative: a signal) and what it printed. Raises when it hangs."""
    ended = subprocess.run(
        [sys.executable, "-c", START + code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=40,
        env=os.environ,
        check=False,
    )
    return ended.returncode, ended.stdout


def test_an_exception_that_nobody_catches():
    status, output = end("raise LookupError('gone')")
    assert status == 1
    assert output.endswith("LookupError: gone\nintact\n")


def test_sys_exit_in_a_thread_ends_that_thread_alone():
    code = "t = threading.Thread(target=sys.exit, args=(5,)); t.start(); t.join(); sys.exit(6)"
    assert end(code) == (6, "intact\n")


def test_os_exit_runs_nothing_and_waits_for_nothing():
    assert end("print(x.sum() == 9.0 * len(x), flush=True); os._exit(7)") == (7, "True\n")


def test_a_thread_that_is_not_a_daemon_finishes_with_its_data():
    code = """
def late():
    time.sleep(0.3)
    print((x == 9.0).all(), flush=True)
threading.Thread(target=late).start()
"""
    assert end(code) == (0, "True\nintact\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_at_once(number: int):
    assert end(f"os.kill(os.getpid(), {int(number)}); time.sleep(60)") == (-number, "")


def test_a_keyboard_interrupt_runs_the_exit_handlers():
    status, output = end("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in output and "intact\n" in output


def test_exec_starts_a_program_with_no_more_descriptors_than_it_was_given():
    code = """
count = "import os; print(len(os.listdir('/proc/self/fd')), flush=True)"
os.execv(sys.executable, [sys.executable, "-c", count])
"""
    plain = subprocess.run(
        [sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')), flush=True)"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=40,
        check=True,
    )
    assert end(code) == (0, plain.stdout)
