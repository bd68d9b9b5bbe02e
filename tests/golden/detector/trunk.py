"""The trunk of a head (LP-OVOD, section 5.1; mmdet's ConvFCBBoxHead) with NumPy alone: python trunk.py > trunk.json

Four 3 x 3 convolutions without bias, each with batch normalisation and ReLU, then a fully connected layer with ReLU, on 16 regions of 4
channels and 7 x 7 cells; by running statistics and by those of the batch. Weights and inputs are `unit` of their names, as in Rust. Computed in
f64; a fully connected layer adds 196 numbers of f32, 196 x 2^-24 = 1e-5 of their size, and four layers before it: tolerance 1e-4.

Versions: Python 3.11, numpy 2.4.
"""

import json
import pathlib
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parent.parent / "clip"))
from unit import unit  # noqa: E402

REGIONS, CHANNELS, SIDE, WIDTH = 16, 4, 7, 8


def filled(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.array(unit(name, int(np.prod(shape))), np.float64).reshape(shape)


def conv(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight)


def trunk(by_batch: bool) -> tuple[np.ndarray, list[np.ndarray]]:
    x, running = filled("trunk.input", (REGIONS, CHANNELS, SIDE, SIDE)), []
    for layer in range(4):
        name = f"shared_convs.{layer}"
        x = conv(x, filled(f"{name}.conv.weight", (CHANNELS, CHANNELS, 3, 3)))
        mean, variance = filled(f"{name}.bn.running_mean", (CHANNELS,)), 1.5 + filled(f"{name}.bn.running_var", (CHANNELS,))
        if by_batch:
            n = x.size / CHANNELS
            of_batch = x.mean((0, 2, 3)), x.var((0, 2, 3))
            running.append(0.9 * mean + 0.1 * of_batch[0])
            running.append(0.9 * variance + 0.1 * of_batch[1] * n / (n - 1))
            mean, variance = of_batch
        scale, shift = 1.5 + filled(f"{name}.bn.weight", (CHANNELS,)), filled(f"{name}.bn.bias", (CHANNELS,))
        column = lambda numbers: numbers[None, :, None, None]  # noqa: E731
        x = (x - column(mean)) / np.sqrt(column(variance) + 1e-5) * column(scale) + column(shift)
        x = np.maximum(x, 0)
    weight = filled("shared_fcs.0.weight", (WIDTH, CHANNELS * SIDE * SIDE))
    return np.maximum(x.reshape(REGIONS, -1) @ weight.T + filled("shared_fcs.0.bias", (WIDTH,)), 0), running


tested, _ = trunk(False)
trained, running = trunk(True)
print(json.dumps({"test": tested.ravel().tolist(), "train": trained.ravel().tolist(), "running": [r.tolist() for r in running]}))
