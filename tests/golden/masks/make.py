"""Masks by pycocotools 2.0.11 and torch 2.11.0 (numpy 2.4.6, seeded). Equality is exact: masks are whole pixels.

Polygons (one part, several parts, partly outside the image, on pixel edges) become run lengths with `frPyObjects` and
`merge`; random pixels become run lengths with `encode`. Kept are the compressed runs, the area, the box, and for the first
mask its pixels, row by row. Polygons round as pycocotools does on x86-64.

`pasted.json`: probabilities of the cells of a box, pasted into an image by `grid_sample` as mmdet's `_do_paste_mask` does over the
whole image, and `encode`d. Cases with a pixel within 2e-6 of the threshold are drawn again: sums may round otherwise.
"""

import json
import pathlib

import numpy as np
import torch
from pycocotools import mask
from torch.nn.functional import grid_sample, interpolate

rng = np.random.default_rng(3)
cases = []


def add(kind, segmentation, rle):
    pixels = mask.decode(rle)
    case = {"kind": kind, "size": [rle["size"][1], rle["size"][0]], "segmentation": segmentation, "counts": rle["counts"].decode()}
    case |= {"area": int(mask.area(rle)), "xywh": mask.toBbox(rle).tolist(), "row_sums": pixels.sum(1).tolist()}
    if not cases:
        case["pixels"] = pixels.flatten().tolist()
    cases.append(case)


for k in range(24):
    width, height = int(rng.integers(20, 120)), int(rng.integers(20, 90))
    polygons = []
    for _ in range(1 + k % 3):
        n = int(rng.integers(3, 12))
        centre, radius = rng.uniform(0, [width, height]), rng.uniform(4, 40)
        angles = np.sort(rng.uniform(0, 2 * np.pi, n))
        corners = centre + radius * rng.uniform(0.4, 1, (n, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        polygons.append((corners.round() if k % 4 == 0 else corners.round(2)).flatten().tolist())
    add("polygons", polygons, mask.merge(mask.frPyObjects(polygons, height, width)))
for k in range(6):
    width, height = int(rng.integers(1, 40)), int(rng.integers(1, 30))
    pixels = np.asfortranarray(rng.random((height, width)) < (0, 0.1, 0.5, 0.9, 1, 0.5)[k], dtype=np.uint8)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], pixels.flatten("F"), [2]])))
    counts = np.diff(np.concatenate([[0], runs])).tolist()
    add("runs", {"size": [height, width], "counts": counts}, mask.encode(pixels))
pathlib.Path(__file__).with_name("golden.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")


def pasted(cells, xyxy, width, height):
    x0, y0, x1, y1 = torch.tensor(xyxy, dtype=torch.float32)
    x = (torch.arange(width, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(height, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([x[None].expand(height, width), y[:, None].expand(height, width)], 2)
    return grid_sample(cells[None, None], grid[None], align_corners=False)[0, 0].numpy()


# Side of the cells, size of the image, box; None stands for a random one.
SHAPES = [(28, (640, 480), None)] * 6 + [(28, (200, 150), None)] * 12 + [(14, (90, 60), None)] * 6 + [(7, (60, 90), None)] * 4
SHAPES += [(28, (64, 48), (0, 0, 64, 48)), (28, (64, 48), (10.25, 7.5, 10.75, 40)), (28, (64, 48), (3, 4, 31, 32)), (28, (64, 48), (3.5, 4.5, 59.5, 32.5))]
SHAPES += [(28, (64, 48), (-20, -9.5, 30, 70)), (28, (64, 48), (50.2, 40.7, 90, 48)), (1, (20, 30), (4.2, 5.1, 11.9, 17)), (2, (20, 30), (4, 5, 12, 17))]
cases = []
for k, (side, (width, height), xyxy) in enumerate(SHAPES):
    while True:
        # A smooth shape, hard noise, or all of the box.
        smooth = interpolate(torch.tensor(rng.normal(0.3, 1.5, (1, 1, 4, 4))), size=(side, side), mode="bicubic")[0, 0].sigmoid().numpy()
        cells = [smooth, rng.random((side, side)), np.ones((side, side))][0 if k % 8 < 5 else 1 if k % 8 < 7 else 2]
        cells = (2 * (255 * cells).astype(int) + 1).astype(np.float32)
        if xyxy is None:
            (x, y), (w, h) = rng.uniform(0, 0.7, 2) * (width, height), rng.uniform(0.02, 0.8, 2) * (width, height)
            corners = np.array([x, y, min(x + w, width), min(y + h, height)], dtype=np.float32).tolist()
        else:
            corners = list(xyxy)
        probabilities = pasted(torch.tensor(cells) / 512, corners, width, height)
        if abs(probabilities - 0.5).min() > 2e-6:
            break
    counts = mask.encode(np.asfortranarray(probabilities >= 0.5, dtype=np.uint8))["counts"].decode()
    cases.append({"side": side, "probabilities": cells.astype(int).flatten().tolist(), "xyxy": corners, "size": [width, height], "counts": counts})
pathlib.Path(__file__).with_name("pasted.json").write_text(json.dumps(cases, separators=(",", ":")) + "\n")
