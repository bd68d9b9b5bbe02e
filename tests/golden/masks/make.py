"""Masks by pycocotools 2.0.11 (numpy 2.4.6, seeded). Equality is exact: masks are whole pixels.

Polygons (one part, several parts, partly outside the image, on pixel edges) become run lengths with `frPyObjects` and
`merge`; random pixels become run lengths with `encode`. Kept are the compressed runs, the area, the box, and for the first
mask its pixels, row by row. Polygons round as pycocotools does on x86-64.
"""

import json
import pathlib

import numpy as np
from pycocotools import mask

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
