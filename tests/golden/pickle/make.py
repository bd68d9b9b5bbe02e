"""Pickles as Python writes them. Python 3.11, numpy 2.x; equality is exact.

`written.pkl` is what our own writer makes of [[1, 2, 3, 4, 0.5]] and an empty array; it is committed by hand from the test's
bytes, and this script asserts that Python reads it.
"""

import collections
import pathlib
import pickle

import numpy as np

HERE = pathlib.Path(__file__).parent

ramp = np.arange(10, dtype=np.float32).reshape(2, 5) / 4
arrays = [ramp, ramp.astype(np.float64), np.zeros((0, 5), np.float32), np.asfortranarray(ramp)]
shared = [1, 2]
data = {
    "int": -300,
    "float": 0.1,
    "text": "naïve \U0001f426\n\\u",
    "nothing": None,
    "tuple": (True, 1 << 40),
    "ordered": collections.OrderedDict(a=1, b=2),
    "shared": [shared, shared],
}
for protocol in (0, 2, 4, 5):
    HERE.joinpath(f"arrays-{protocol}.pkl").write_bytes(pickle.dumps(arrays, protocol))
    HERE.joinpath(f"data-{protocol}.pkl").write_bytes(pickle.dumps(data, protocol))

written = pickle.loads(HERE.joinpath("written.pkl").read_bytes())
assert [(a.dtype, a.shape, a.tolist()) for a in written] == [
    (np.float32, (1, 5), [[1.0, 2.0, 3.0, 4.0, 0.5]]),
    (np.float32, (0, 5), []),
]
