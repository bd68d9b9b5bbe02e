"""Proposals as mmdet dumps them, by Python's pickle and numpy 2.4.6. Equality is exact.

Protocols 2, 4 and 5; four images: a float32 array, a float64 array of numbers that float32 holds, no boxes, one box. `flat`:
a list of arrays; `list` and `tuple`: for each image a list or tuple of the arrays of its only class.
"""

import pathlib
import pickle

import numpy as np

HERE = pathlib.Path(__file__).parent
two = np.array([[0, 0.25, 10.5, 20, 0.75], [1.5, 2, 30, 29.125, 0.5]])
arrays = [two.astype(np.float32), two, np.zeros((0, 5), np.float32), two[1:].astype(np.float32)]
for protocol in (2, 4, 5):
    for name, images in (("flat", arrays), ("list", [[a] for a in arrays]), ("tuple", [(a,) for a in arrays])):
        HERE.joinpath(f"{name}-{protocol}.pkl").write_bytes(pickle.dumps(images, protocol))
