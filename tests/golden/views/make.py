"""Makes the golden geometry of object views: run it in this folder, it writes golden.json.

Made with torch 2.11.0 and NumPy 2.4.6.

`nearest_sha256`: SHA-256 of the sample (u16, little endian) that `F.interpolate(mode="nearest")` gives each of 14 cells, for 4 to 1,400 samples.
`geometry`: image size, proposal, square, mask of 14 x 14 cells (0 object, 1 background) of random proposals, by OADP's rule (adaptive mode) written
out in NumPy, f32. Tolerance: 1e-3 px on squares (the order of f32 operations); masks are computed from the stored square, and exact.
"""

import hashlib
import json

import numpy as np
import torch
import torch.nn.functional as F

f32 = np.float32


def nearest(n):
    samples = torch.arange(n, dtype=torch.float32)[None, None]
    return F.interpolate(samples, size=14, mode="nearest")[0, 0].numpy().astype("<u2")


def square(box, size):
    low, high = box[:2], box[2:]
    side = np.sqrt(f32(8) * (high - low).prod(dtype=f32))
    centre = (low + high) / f32(2)
    low, high = centre - side / f32(2), centre + side / f32(2)
    size = np.array(size, f32)
    shift = np.zeros(2, f32)
    shift = np.where(low < 0, -low, shift)
    shift = np.where(high > size, size - high, shift)
    shift = np.where(side > size, f32(0), shift)
    return np.concatenate([low + shift, high + shift]).astype(f32)


def mask(box, around):
    foreground = box - np.concatenate([around[:2], around[:2]])
    inside = []
    for axis in range(2):
        n = int(np.ceil(around[axis + 2] - around[axis]))
        samples = torch.arange(n, dtype=torch.float32)
        is_in = (samples >= float(foreground[axis])) & (samples <= float(foreground[axis + 2]))
        inside.append(is_in)
    full = (~(inside[1][:, None] & inside[0][None, :])).float()
    cells = F.interpolate(full[None, None], size=(14, 14), mode="nearest")[0, 0].int()
    return "".join(str(cell) for cell in cells.flatten().tolist())


def main():
    digest = hashlib.sha256()
    for n in range(4, 1401):
        digest.update(nearest(n).tobytes())
    random = np.random.default_rng(7)
    geometry = []
    for size in [[640, 480], [480, 640], [640, 427], [333, 500]] * 60:
        corners = np.sort(random.uniform(0, 1, (2, 2)).astype(f32) ** random.choice([1, 3]) * np.array(size, f32), axis=0)
        box = np.maximum(corners.reshape(4), f32(0)).astype(f32)
        if (box[2:] - box[:2]).min() < 4:
            box[2:] = box[:2] + f32(4)
        around = square(box, size)
        geometry.append([size, box.tolist(), around.tolist(), mask(box, around)])
    with open("golden.json", "w") as file:
        json.dump({"nearest_sha256": digest.hexdigest(), "geometry": geometry}, file, separators=(",", ":"))
        file.write("\n")


main()
