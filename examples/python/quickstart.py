"""libhmm in twenty lines: a numpy array goes to a device and comes home by itself."""

import hmm
import numpy as np

x = np.arange(1 << 20, dtype=np.float64)
y = np.ones_like(x)

with hmm.SoftDevice(memory=32 << 20) as device:
    print(f"engine {hmm.current().engine}: {device.migrate(x)} pages of x moved to the device")
    print("x", hmm.residency_map(x))

    device.axpy(2.0, x, y)  # y += 2 * x, by the array's own addresses
    print("the device's sum of y:", device.sum(y))

    x[1000] = -1.0  # an ordinary store: the page comes home first
    print("x", hmm.residency_map(x), "after one touch")
    print(hmm.MAP_LEGEND)

assert np.array_equal(y, 1.0 + 2.0 * np.arange(1 << 20)) and x[1000] == -1.0
