"""Opening, closing, use after close, and the end of the interpreter."""

import errno

import hmm
import numpy as np
import pytest
from isolation import run_isolated
from pages import on_device, page_aligned, send


@pytest.mark.isolated(30)
def test_close_brings_everything_home_and_opening_again_works():
    x = page_aligned(100 * 512)
    x[:] = 6.0
    for _ in range(3):
        with hmm.current() as mm:
            device = hmm.SoftDevice()
            send(device, x)
        assert (x == 6.0).all()
        mm.close()
        for call in (lambda: mm.residency(x), lambda: mm.pin(x), lambda: device.migrate(x), lambda: device.sum(x)):
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == errno.ENODEV
        device.close()
    assert hmm.current().engine == mm.engine


@pytest.mark.isolated(30)
def test_a_closed_device_says_so_and_its_pages_are_home():
    x = page_aligned(100 * 512)
    x[:] = 7.0
    with hmm.SoftDevice() as device:
        device.migrate(x)
        assert "SoftDevice" in repr(device)
    assert on_device(x) == 0
    device.close()
    for call in (lambda: device.migrate(x), lambda: device.bring_home(x), lambda: device.fill(x, 1)):
        with pytest.raises(hmm.Error) as caught:
            call()
        assert caught.value.errno == errno.ENODEV
    assert (x == 7.0).all()


@pytest.mark.isolated(30)
def test_a_forgotten_device_is_closed():
    x = page_aligned(100 * 512)
    x[:] = 8.0
    for _ in range(20):  # more pages than one device holds, and more devices than threads may pile up
        device = hmm.SoftDevice(memory=1 << 20)
        send(device, x)
        del device
        assert on_device(x) == 0
    assert (x == 8.0).all()


@pytest.mark.isolated(30)
def test_a_with_block_that_raises_closes_the_device():
    x = page_aligned(512)
    with pytest.raises(LookupError), hmm.SoftDevice() as device:
        device.migrate(x)
        raise LookupError
    with pytest.raises(hmm.Error):
        device.migrate(x)


AT_EXIT = """
import atexit, sys, threading

def look():
    # Registered first, so it runs after the library's own hook.
    assert (x == 9.0).all()
    print("intact", flush=True)

atexit.register(look)
import hmm, numpy as np
x = np.full(1 << 18, 9.0)
device = hmm.SoftDevice()
assert device.migrate(x) >= 512
"""


def test_exit_brings_pages_home():
    assert run_isolated(AT_EXIT) == "intact\n"


def test_exit_after_an_exception_brings_pages_home():
    code = AT_EXIT + "sys.excepthook = lambda *_: print('raised', flush=True)\nraise SystemExit(0)"
    assert run_isolated(code) == "intact\n"


def test_exit_with_pins_views_and_busy_daemon_threads():
    code = (
        AT_EXIT
        + """
pinned = hmm.pin(x[:512])
def work():
    while True:
        try:
            device.migrate(x)
        except OSError:
            return
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
import time; time.sleep(0.2)
"""
    )
    assert run_isolated(code) == "intact\n"


def test_globals_that_die_with_the_interpreter_do_no_harm():
    code = """
import hmm, numpy as np
x = np.ones(1 << 16)
mm, device = hmm.current(), hmm.SoftDevice()
device.migrate(x)
keep = [mm, device, hmm.pin(x[:512])]
keep.append(keep)  # only the last collection, or nothing, ends these
"""
    assert run_isolated(code) == ""


@pytest.mark.isolated(30)
def test_the_buffer_is_exported_only_during_a_call():
    memory = bytearray(8192)
    with hmm.SoftDevice() as device:
        device.migrate(memory)
        device.fill(memory, 5)
        memory.extend(b"more")
        assert device.bring_home(memory) >= 0
    assert memory == b"\5" * 8192 + b"more"
    assert np.frombuffer(memory, "u1").sum() == 5 * 8192 + sum(b"more")
