"""Bad arguments: the documented exception, a text that helps, and nothing changed."""

import array
import ctypes
import errno

import hmm
import numpy as np
import pytest

pytestmark = pytest.mark.isolated(30)


def test_memory_must_have_a_contiguous_buffer():
    with hmm.SoftDevice() as device:
        for wrong in (5, 1.5, "text", None, [1, 2], {}):
            with pytest.raises(TypeError, match="bytes-like"):
                device.migrate(wrong)
        for wrong in (np.zeros((8, 8))[:, 1], np.zeros((8, 8), order="F"), memoryview(bytes(9))[::2]):
            with pytest.raises(BufferError, match="contiguous"):
                device.migrate(wrong)
        with pytest.raises(ValueError, match="dtype"):
            device.migrate(np.zeros(4, "datetime64[s]"))  # numpy exports no buffer of these


def test_python_objects_are_refused():
    with hmm.SoftDevice() as device:
        for wrong in (np.array([None, 1]), np.zeros(3, [("number", "f8"), ("thing", "O")])):
            with pytest.raises(TypeError, match="Python objects"):
                device.migrate(wrong)
        assert device.migrate(np.zeros(512, [("Only", "f8")])) >= 1  # an O in a name is none


def test_address_pairs_are_checked():
    with hmm.SoftDevice() as device:
        for wrong in ((1,), (1, 2, 3), ("a", 1), (-1, 4096), (1 << 64, 1), (1.0, 2)):
            with pytest.raises(TypeError, match="address, nbytes"):
                device.migrate(wrong)
        for wrong in ((0, 4096), ((1 << 64) - 1, 2), (1 << 62, 4096)):
            with pytest.raises(OSError) as caught:
                device.migrate(wrong)
            assert isinstance(caught.value, hmm.Error) and caught.value.errno == errno.EINVAL


def test_unmapped_memory_is_efault():
    with hmm.SoftDevice() as device:
        for call in (device.migrate, hmm.make_present):
            with pytest.raises(hmm.Error) as caught:
                call((0x1000, 4096))
            assert caught.value.errno == errno.EFAULT, call
    assert hmm.residency((0x1000, 4096)) == bytes([hmm.Residency.UNMAPPED])


def test_element_types():
    floats, singles = np.zeros(8), np.zeros(8, "f4")
    with hmm.SoftDevice() as device:
        calls = [
            lambda: device.axpy(1.0, singles, floats),
            lambda: device.axpy(1.0, floats, np.zeros(8, "i8")),
            lambda: device.sum(singles),
            lambda: device.sum(np.zeros(8, ">f8")),
            lambda: device.sum(np.zeros(8, "bool")),
            lambda: device.sum((floats.ctypes.data, 64)),
            lambda: device.gather(floats, floats, floats),
            lambda: device.gather(floats, np.zeros(8, "i8"), np.zeros(8, "i8")),
            lambda: device.atomic_add(floats, 1),
            lambda: device.add(floats, 1),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(TypeError, match="must have"):
                call()
                pytest.fail(f"call {number} was taken")
        assert device.sum((ctypes.c_double * 3)(1, 2, 3)) == 6.0
        assert device.sum(array.array("q", [1, -3])) == -2


def test_read_only_targets():
    fixed, free = np.zeros(8), np.zeros(8)
    numbers = np.zeros(8, "u8")
    fixed.flags.writeable = numbers.flags.writeable = False
    with hmm.SoftDevice() as device:
        calls = [
            lambda: device.fill(fixed, 1),
            lambda: device.fill(bytes(8), 1),
            lambda: device.copy(fixed, free),
            lambda: device.axpy(1.0, free, fixed),
            lambda: device.gather(fixed, free, numbers),
            lambda: device.atomic_add(numbers, 1),
            lambda: device.add(numbers, 1),
        ]
        for number, call in enumerate(calls):
            with pytest.raises(BufferError, match="read-only"):
                call()
                pytest.fail(f"call {number} was taken")
    assert not fixed.any() and not numbers.any()


def test_sizes_and_values():
    floats, numbers = np.zeros(8), np.zeros(8, "u8")
    odd = np.zeros(65, "u1")[1:].view("f8")
    with hmm.SoftDevice() as device:
        calls = [
            (ValueError, lambda: device.axpy(1.0, floats, floats[:4])),
            (ValueError, lambda: device.copy(floats, floats[:4])),
            (ValueError, lambda: device.copy(floats[:4], floats[2:6])),
            (ValueError, lambda: device.axpy(1.0, floats[:4], floats[2:6])),
            (ValueError, lambda: device.gather(floats, floats, numbers[:4])),
            (ValueError, lambda: device.gather(numbers, numbers, numbers)),
            (ValueError, lambda: device.sum(odd)),
            (ValueError, lambda: device.add(numbers, 1, stride=0)),
            (IndexError, lambda: device.atomic_add(numbers, 1, index=8)),
            (OverflowError, lambda: device.atomic_add(numbers, -1)),
            (OverflowError, lambda: device.add(numbers, 1 << 64)),
            (OverflowError, lambda: device.fill(floats, 256)),
            (ValueError, lambda: device.set_policy("sometimes")),
            (ValueError, lambda: device.set_latency(-1.0)),
            (ValueError, lambda: device.set_latency(float("nan"))),
        ]
        for number, (kind, call) in enumerate(calls):
            with pytest.raises(kind):
                call()
                pytest.fail(f"call {number} was taken")


def test_device_settings():
    wrong = [
        (ValueError, {"policy": "x"}),
        (ValueError, {"latency": float("inf")}),
        (OverflowError, {"memory": -1}),
        (hmm.Error, {"memory": 0}),
        (hmm.Error, {"memory": 5000}),
        (hmm.Error, {"fault_around": 0}),
        (hmm.Error, {"fault_around": 513}),
        (hmm.Error, {"threads": 0}),
        (TypeError, {"colour": "red"}),
    ]
    for kind, settings in wrong:
        with pytest.raises(kind):
            hmm.SoftDevice(**settings)
            pytest.fail(f"{settings} was taken")


def test_empty_memory_is_nothing_to_do():
    none = np.zeros(0)
    with hmm.SoftDevice() as device:
        assert device.migrate(none) == device.bring_home(none) == hmm.make_present(none) == 0
        assert hmm.residency(none) == b"" and hmm.residency_map(none) == ""
        assert device.sum(none) == 0.0 and device.sum(np.zeros(0, "i8")) == 0
        device.fill(none, 1)
        device.copy(none, none)
        device.axpy(1.0, none, none)
        with hmm.pin(none):
            pass
