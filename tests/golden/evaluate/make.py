"""COCO and LVIS evaluation by pycocotools 2.0 and lvis-api 0.5.3 on random data; numbers agree to 1e-6.

The data have crowds, empty images, images without detections, score ties, objects of every size, classes without
detections, negative and not-exhaustive lists. Boxes are whole or half pixels, so that f32 holds them exactly. Nine classes
with ids 0, 10, ..., 80: six base, three novel.
"""

import json
import pathlib

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

HERE = pathlib.Path(__file__).parent
N_CLASSES, N_BASE = 9, 6
GROUPS = {"all": slice(0, 9), "base": slice(0, 6), "novel": slice(6, 9)}


def build(name, n_images, seed):
    rng = np.random.default_rng(seed)
    is_lvis = name == "lvis"
    images, annotations, detections = [], [], []
    for k in range(n_images):
        image = {"id": 3 * k + 1, "file_name": f"{k}.jpg", "width": 400, "height": 300}
        present = set()
        for _ in range(0 if rng.random() < 0.1 else rng.integers(1, 9)):
            c = int(rng.integers(0, N_CLASSES - 1))
            w, h = np.round(2 * np.exp(rng.uniform(np.log(8), np.log(180), 2))) / 2
            x, y = np.round(2 * rng.uniform(0, [400 - w, 300 - h])) / 2
            crowd = int(not is_lvis and rng.random() < 0.08)
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": 10 * c, "bbox": [x, y, w, h], "area": w * h * float(rng.uniform(0.6, 1)), "iscrowd": crowd, "segmentation": [[x, y, x + w, y, x + w, y + h]]})
            present.add(10 * c)
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = np.round(2 * rng.normal(0, 0.12, 4) * [w, h, w, h]) / 2
                cc = 10 * c if rng.random() < 0.8 else 10 * int(rng.integers(0, N_CLASSES))
                detections.append([image["id"], cc, [x + dx, y + dy, max(w + dw, 1.0), max(h + dh, 1.0)], round(float(rng.random()), 1) + 1 / 64])
        for _ in range(rng.integers(0, 12)):
            w, h = np.round(rng.uniform(4, 150, 2))
            x, y = np.round(rng.uniform(0, [400 - w, 300 - h]))
            detections.append([image["id"], 10 * int(rng.integers(0, N_CLASSES)), [x, y, w, h], round(float(rng.random()), 2)])
        if is_lvis:
            absent = [10 * c for c in range(N_CLASSES) if 10 * c not in present]
            image["neg_category_ids"] = [c for c in absent if rng.random() < 0.4]
            image["not_exhaustive_category_ids"] = [c for c in sorted(present) if rng.random() < 0.2]
        images.append(image)
    categories = [{"id": 10 * c, "name": f"class {c}"} for c in range(N_CLASSES)]
    if is_lvis:
        for c, category in enumerate(categories):
            category["frequency"] = "r" if c >= N_BASE else "cf"[c % 2]
            category["image_count"] = 1
    # f32 scores, as detectors write them.
    for d in detections:
        d[3] = float(np.float32(d[3]))
        d[2] = [float(v) for v in d[2]]
    HERE.joinpath(f"{name}.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}, separators=(",", ":")))
    HERE.joinpath(f"{name}.detections.json").write_text(json.dumps(detections, separators=(",", ":")))
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in detections]


def mean(values):
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def summary(precision, recall, first, last):
    """precision [T, R, K, A, M], recall [T, K, A, M]."""
    out = {"ap": mean(precision[..., 0, first]), "ap50": mean(precision[0, :, :, 0, last]), "ap75": mean(precision[5, :, :, 0, last]), "ar": mean(recall[..., 0, last])}
    for a, size in enumerate(("small", "medium", "large"), 1):
        out[f"ap_{size}"], out[f"ar_{size}"] = mean(precision[..., a, last]), mean(recall[..., a, last])
    return out


results = build("coco", 120, 1)
gt = COCO(str(HERE / "coco.json"))
e = COCOeval(gt, gt.loadRes(results), "bbox")
e.params.maxDets = [100, 300, 1000]
e.evaluate()
e.accumulate()
p, r = e.eval["precision"], e.eval["recall"]
golden = {"groups": {g: summary(p[:, :, s], r[:, s], 0, 2) for g, s in GROUPS.items()}, "class_ap": [mean(p[:, :, c, 0, 0]) for c in range(N_CLASSES)]}
HERE.joinpath("coco.golden.json").write_text(json.dumps(golden, indent=1) + "\n")

results = build("lvis", 100, 2)
gt = LVIS(str(HERE / "lvis.json"))
e = LVISEval(gt, LVISResults(gt, results), "bbox")
e.run()
p, r = e.eval["precision"][..., None], e.eval["recall"][..., None]
golden = {"groups": {g: summary(p[:, :, s], r[:, s], 0, 0) for g, s in GROUPS.items()}, "class_ap": [mean(p[:, :, c, 0, 0]) for c in range(N_CLASSES)]}
official = e.get_results()
for group, key in (("rare", "APr"), ("common", "APc"), ("frequent", "APf")):
    golden["groups"][group] = {"ap": official[key]}
assert abs(golden["groups"]["all"]["ap"] - official["AP"]) < 1e-12 and abs(golden["groups"]["all"]["ar"] - official["AR@300"]) < 1e-12
HERE.joinpath("lvis.golden.json").write_text(json.dumps(golden, indent=1) + "\n")
