"""Numpy arrays larger than a device's memory, worked on by the device piece by piece while the CPU uses them.

Three arrays: the device computes ``y += a * x`` and sums over ``y``; a CPU thread all the while reads ``x`` and counts
in ``z`` by ordinary numpy accesses, and each of those may hit a page that is on the device. The pieces go to the
device and come home in turn, since they do not fit together. At the end every number is checked.
"""

import argparse
import collections
import random
import threading
import time

import hmm
import numpy as np

MIB = 1 << 20
PERIOD = 1000  # x repeats 0, 1, ... 999, so every sum below is exact in float64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=int, default=16, help="device memory in MiB")
    parser.add_argument("--array", type=int, default=32, help="size of each of the three arrays in MiB")
    parser.add_argument("--piece", type=int, default=2, help="bytes of an array handed over at once in MiB")
    parser.add_argument("--rounds", type=int, default=3, help="passes over the arrays")
    options = parser.parse_args()
    if 3 * 2 * options.piece > options.device:
        parser.error("the device must hold two pieces of each array")
    return options


class Clerk(threading.Thread):
    """The CPU's side: reads x and counts in z at random places until it is told to stop."""

    def __init__(self, x: np.ndarray, z: np.ndarray) -> None:
        super().__init__(name="clerk")
        self.x, self.z = x, z
        self.counted = 0
        self.wrong = 0
        self.stop = threading.Event()

    def run(self) -> None:
        pick = random.Random(1)
        while not self.stop.is_set():
            place = pick.randrange(len(self.x))
            self.wrong += self.x[place] != place % PERIOD
            self.z[place] += 1.0
            self.counted += 1


class Mover:
    """Keeps the newest pieces on the device, and brings the oldest home to make room."""

    def __init__(self, device: hmm.SoftDevice, pieces: int) -> None:
        self.device, self.room = device, pieces
        self.there: collections.deque[tuple[np.ndarray, ...]] = collections.deque()

    def fetch(self, *arrays: np.ndarray) -> None:
        if len(self.there) == self.room:
            for array in self.there.popleft():
                self.device.bring_home(array)
        for array in arrays:
            self.device.migrate(array)
        self.there.append(arrays)


def draw(title: str, **arrays: np.ndarray) -> None:
    print(title)
    for name, array in arrays.items():
        print(f"  {name} |{hmm.residency_map(array)}|")


def main() -> None:
    options = parse()
    count = options.array * MIB // 8
    step = options.piece * MIB // 8
    x = np.arange(count, dtype=np.float64) % PERIOD
    y, z = np.ones(count), np.zeros(count)
    plain_x, plain_y = x.copy(), y.copy()  # plain numpy does the same work on these
    print(f"arrays: 3 x {options.array} MiB; device: {options.device} MiB, engine {hmm.current().engine}")

    started, before = time.monotonic(), hmm.counters()
    clerk = Clerk(x, z)
    with hmm.SoftDevice(memory=options.device * MIB) as device:
        # A piece less than there is room for: pieces share the pages at their edges.
        mover = Mover(device, options.device // (3 * options.piece) - 1)
        clerk.start()
        for round_number in range(1, options.rounds + 1):
            for start in range(0, count, step):
                piece = slice(start, start + step)
                mover.fetch(x[piece], y[piece], z[piece])
                device.axpy(float(round_number), x[piece], y[piece])
                plain_y[piece] += round_number * plain_x[piece]
                assert device.sum(y[piece]) == plain_y[piece].sum(), f"sum of piece at {start}"
            draw(f"round {round_number} ({time.monotonic() - started:.2f} s)", x=x, y=y, z=z)
        clerk.stop.set()
        clerk.join()
    seconds, after = time.monotonic() - started, hmm.counters()
    print(hmm.MAP_LEGEND)

    assert clerk.wrong == 0, f"{clerk.wrong} wrong values read from x"
    assert np.array_equal(y, plain_y), "y differs from numpy's"
    assert z.sum() == clerk.counted, f"z counts {z.sum()}, the CPU counted {clerk.counted}"

    moved = {name: after[name] - before[name] for name in after}
    print(f"pages to the device  {moved['migrated_to_device']:>9}")
    print(f"pages home           {moved['migrated_to_system']:>9}")
    print(f"CPU faults answered  {moved['cpu_faults']:>9}  ({moved['device_faults']} on pages of the device)")
    print(f"CPU touches          {2 * clerk.counted:>9}  (all right)")
    print(f"seconds              {seconds:>9.2f}")
    print("every element of y and z is as plain numpy says")


if __name__ == "__main__":
    main()
