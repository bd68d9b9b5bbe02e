"""Makes the golden numbers of the detector: run it in this folder, it writes one JSON file per subject.

Made with torch 2.11.0 (CPU, f32), torchvision 0.26.0.

No weights and few inputs are kept. Both sides fill every tensor by one formula of its name and flat index (`unit`), as in `../clip/make.py`.

Tolerances, with the largest error seen in brackets:
- RoIAlign and its gradient 1e-4 absolute on values up to 2 [1e-6]: sampling points are computed alike, sums are ordered differently;
- overlaps, deltas, anchors 1e-5 relative; what is kept, matched and sampled must be equal.
"""

import json
import math

import numpy as np
import torch
import torchvision
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

MASK = (1 << 64) - 1


def fnv1a(text):
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = ((state ^ byte) * 0x100000001B3) & MASK
    return state


def unit(name, n):
    """n values, even in [-1, 1), exact in f32: splitmix64 of fnv1a(name) + index."""
    with np.errstate(over="ignore"):
        z = np.arange(n, dtype=np.uint64) + np.uint64(fnv1a(name)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def field(name, *shape):
    return torch.from_numpy(unit(name, math.prod(shape))).reshape(shape)


def boxes_of(name, n, extent, least, most):
    """n boxes with corners in a square of `extent` px and sides between `least` and `most` px; every operation is exact or rounds alike in f32."""
    u = (unit(name, 4 * n).reshape(n, 4) + np.float32(1)) * np.float32(0.5)
    low = u[:, :2] * np.float32(extent)
    return torch.from_numpy(np.concatenate([low, low + (np.float32(least) + u[:, 2:] * np.float32(most - least))], 1))


def numbers(tensor, digits=7):
    return [float(f"{v:.{digits}g}") for v in tensor.double().flatten().tolist()]


def write(name, **content):
    with open(f"{name}.json", "w") as file:
        json.dump(content, file, separators=(",", ":"))
        file.write("\n")


def make_roi_align():
    """One level of stride 4 under two images of 112 x 80 px, and boxes of all kinds."""
    boxes = [
        [
            [8.0, 8.0, 60.0, 44.0],
            [-30.5, -20.25, 40.0, 30.0],  # partly outside
            [90.0, 60.0, 150.0, 130.0],  # partly outside, beyond the padding
            [3.3, 70.1, 110.9, 72.4],  # wide and flat
            [50.2, 1.0, 51.0, 79.0],  # tall and thin
            [20.0, 20.0, 20.5, 20.5],  # far below a cell
            [33.0, 44.0, 33.0, 50.0],  # no width
            [-90.0, -90.0, -20.0, -20.0],  # wholly outside
        ],
        [
            [0.0, 0.0, 112.0, 80.0],  # everything
            [17.7, 12.3, 95.1, 66.6],
            [111.0, 79.0, 112.0, 80.0],  # the last px
        ],
    ]
    cases = {}
    for case, (sampling, aligned, side) in {"adaptive": (-1, True, 7), "fixed": (2, False, 5)}.items():
        features = field("features", 2, 2, 20, 28).requires_grad_()
        pooled = torchvision.ops.roi_align(features, [torch.tensor(b) for b in boxes], side, 0.25, sampling, aligned)
        (pooled * field(f"upstream.{case}", *pooled.shape)).sum().backward()
        cases[case] = {"pooled": numbers(pooled), "gradient": numbers(features.grad)}
    write("roi_align", boxes=boxes, **cases)


def make_boxes():
    """Duplicates among 5,000 boxes of 20 classes; overlaps, deltas and anchors of a few."""
    boxes = boxes_of("nms.boxes", 5000, 200, 10, 80)
    scores = field("nms.scores", 5000)
    groups = torch.from_numpy(((unit("nms.groups", 5000) + np.float32(1)) * np.float32(10)).astype(np.int64))
    assert len(scores.unique()) == 5000, "the order would be open"
    kept = torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
    print(f"nms keeps {len(kept)} of 5000")

    some, others = boxes_of("overlaps.a", 7, 60, 10, 80), boxes_of("overlaps.b", 5, 60, 10, 80)
    coder = det_utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    first, second = boxes_of("coder.from", 6, 60, 10, 80), boxes_of("coder.to", 6, 60, 10, 80)
    deltas = field("coder.deltas", 6, 8) * 3
    # The last one asks for more than 62.5 times the size.
    deltas[5, 2:4] = 25.0

    generator = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    levels = [torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 3, 3)]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 40, 48), [(40, 48)]), levels)
    write(
        "boxes",
        kept=kept.tolist(),
        iou=numbers(torchvision.ops.box_iou(some, others)),
        encoded=numbers(coder.encode_single(second, first)),
        decoded=numbers(coder.decode_single(deltas, first)),
        anchors=numbers(anchors),
    )


def make_matching():
    """Which of 2,000 boxes stand for which of 12 objects, by torchvision's matcher; low-quality matches after mmdet's rule."""
    boxes, objects = boxes_of("matching.boxes", 2000, 200, 10, 80), boxes_of("matching.objects", 12, 200, 10, 80)
    overlaps = torchvision.ops.box_iou(objects, boxes)
    plain = det_utils.Matcher(0.5, 0.5, allow_low_quality_matches=False)(overlaps)
    three = det_utils.Matcher(0.7, 0.3, allow_low_quality_matches=False)(overlaps)
    low_quality = three.clone()
    for row, overlap in enumerate(overlaps):
        if overlap.max() >= 0.3:
            low_quality[overlap == overlap.max()] = row
    changed = int((low_quality != three).sum())
    print(f"matching: {int((plain >= 0).sum())} at 0.5, {int((three >= 0).sum())} at 0.7, {changed} by low quality")
    assert changed > 3
    write("matching", at_half=plain.tolist(), low_quality=low_quality.tolist())


make_roi_align()
make_boxes()
make_matching()
