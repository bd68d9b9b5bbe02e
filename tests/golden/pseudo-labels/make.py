"""Pseudo labels as the OADP reference finds them (section 6.8 of its description), by numpy 2.4 in f64 and torchvision 0.26's NMS.

Boxes and classes are equal; scores agree to 1e-5 (f32 softmax of logits up to 40). The columns are COCO's with learned scale, LVIS's
without one, and a learned scale with a temperature. Threshold and NMS are mmdet's `multiclass_nms`: above the threshold, then NMS within
each class. No two numbers that are compared lie closer than the tolerance; the script asserts it.
"""

import json
import pathlib

import numpy as np
import torch
from torchvision.ops import batched_nms, box_iou

rng = np.random.default_rng(5)
N_CLASSES, DIM = 12, 16


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


prompts = unit(rng.normal(size=(N_CLASSES, DIM))).astype(np.float32)
images = []
for n in (160, 0, 70):
    corners = rng.integers(0, 1200, (n, 2)) / 4
    boxes = np.concatenate([corners, corners + rng.integers(60, 600, (n, 2)) / 4], 1).astype(np.float32)
    classes = rng.integers(0, N_CLASSES, n)
    if n:
        # Some of one class that overlap, and one without an area.
        boxes[20:50], classes[20:50] = boxes[:30] + rng.integers(0, 12, (30, 4)) / 4, classes[:30]
        boxes[3, 2] = boxes[3, 0]
    embeddings = unit(prompts[classes] + 0.25 * rng.normal(size=(n, DIM))).astype(np.float16)
    images.append((boxes, rng.permutation(n).astype(np.float32) / max(n, 1), embeddings))


def find(boxes, objectness, embeddings, scale, with_):
    order = np.argsort(-objectness)[: with_["max_per_image"]]
    boxes, objectness = boxes[order], objectness[order].astype(np.float64)
    if not len(order):
        return []
    scaler, bias = scale or (1, 0)
    logits = (unit(embeddings[order].astype(np.float64)) @ prompts.T.astype(np.float64) * scaler - bias) / with_.get("temperature", 1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    best = np.sort(p, 1)[:, -2:]
    assert (best[:, 1] - best[:, 0] > 1e-6).all()
    scores = p.max(1) ** with_["probability_power"] * objectness ** with_["objectness_power"]
    assert (abs(scores - with_["score_threshold"]) > 1e-5).all()
    kept = np.flatnonzero((scores > with_["score_threshold"]) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    boxes, scores, classes = (torch.from_numpy(x[kept]) for x in (boxes, scores, p.argmax(1)))
    assert (abs(box_iou(boxes, boxes) - with_["nms_iou"]) > 1e-5).all()
    assert (np.diff(np.sort(scores)) > 1e-7).all()
    kept = batched_nms(boxes, scores.float(), classes, with_["nms_iou"])
    assert not len(scores) > 20 or len(kept) < len(scores)
    return [(boxes[k].tolist(), int(classes[k]), float(scores[k])) for k in kept]


COCO = {"probability_power": 0.306, "objectness_power": 0.758, "nms_iou": 0.49705, "score_threshold": 0.5, "max_per_image": 100}
LVIS = {
    "temperature": 0.40192,
    "probability_power": 0.71821,
    "objectness_power": 0.74209,
    "nms_iou": 0.674,
    "score_threshold": 0.2,
    "max_per_image": 100,
}
cases = []
for scale, with_ in (((20.0, 4.0), COCO), (None, LVIS), ((18.5, 3.25), COCO | {"temperature": 2.0})):
    added = [find(*image, scale, with_) for image in images]
    assert len(added[0]) > 10 and not added[1]
    cases.append({"scale": scale, "with": with_, "added": added})
golden = {
    "prompts": prompts.tolist(),
    "images": [{"boxes": b.tolist(), "objectness": o.tolist(), "embeddings": e.tolist()} for b, o, e in images],
    "cases": cases,
}
pathlib.Path(__file__).with_name("golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
