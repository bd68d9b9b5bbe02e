"""COCO and LVIS evaluation by pycocotools 2.0.11 and lvis-api 0.5.3 on random data (numpy 2.4.6, seeded).

Numbers agree to 1e-6: both sides compute in f64, only the order of sums differs.

The data have crowds, `ignore` flags (which pycocotools overwrites), empty images, images without detections, score ties,
objects of every size, classes without objects, negative and not-exhaustive lists, and images with so many detections that
every limit cuts: COCO 100, 300 and 1000 of a class in an image, LVIS 300 of all classes in an image. Crowds are also in the
LVIS file: lvis-api knows no crowds and takes them for objects. Boxes are whole or half pixels, so that f32 holds them
exactly. Nine classes with ids 0, 10, ..., 80: six base, three novel.

The same again of masks: those of objects are triangles, those of detections triangles, rectangles, nothing at all, and noise, drawn
into the image as run lengths. Boxes are taken out of the results, as mmdet and detectron2 do, so that sizes are those of masks.
"""

import copy
import json
import pathlib

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

# lvis-api is older than numpy 1.20, which gave this name up.
np.float = float
HERE = pathlib.Path(__file__).parent
N_CLASSES, N_BASE = 9, 6
# Image: how many more detections it has, and which of them are right.
CROWDED = {"coco": {20: (150, 4), 60: (400, 9), 106: (1150, 16)}, "lvis": {20: (340, 7), 60: (420, 5)}}
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
            crowd = int(rng.random() < 0.08)
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": 10 * c, "bbox": [x, y, w, h], "area": w * h * float(rng.uniform(0.6, 1)), "iscrowd": crowd, "segmentation": [[x, y, x + w, y, x + w, y + h]]})
            if not is_lvis and rng.random() < 0.05:
                annotations[-1]["ignore"] = 1
            present.add(10 * c)
            for _ in range(rng.integers(0, 4)):
                dx, dy, dw, dh = np.round(2 * rng.normal(0, 0.12, 4) * [w, h, w, h]) / 2
                cc = 10 * c if rng.random() < 0.8 else 10 * int(rng.integers(0, N_CLASSES))
                detections.append([image["id"], cc, [x + dx, y + dy, max(w + dw, 1.0), max(h + dh, 1.0)], round(float(rng.random()), 1) + 1 / 64])
        for _ in range(rng.integers(0, 12)):
            w, h = np.round(rng.uniform(4, 150, 2))
            x, y = np.round(rng.uniform(0, [400 - w, 300 - h]))
            detections.append([image["id"], 10 * int(rng.integers(0, N_CLASSES)), [x, y, w, h], round(float(rng.random()), 2)])
        if k in CROWDED[name]:
            n, per_object = CROWDED[name][k]
            for rank in range(n):
                # Every `per_object`-th detection is right, and the only one of its object; the others lie beside the objects.
                c, place = (k % N_CLASSES) if not is_lvis else rank % (N_CLASSES - 1), rank // per_object
                x, y, w = 5.0 * (place % 75), 4.0 * (place // 75), 5.0 if place % 2 else 4.0
                if rank % per_object == 0:
                    annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": 10 * c, "bbox": [x, y, w, 4.0], "area": 4 * w, "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + 4]]})
                    present.add(10 * c)
                else:
                    x, y = x / 2 + 1, y / 2 + 150
                detections.append([image["id"], 10 * c, [x, y, w, 4.0], 0.9 - rank / 2048])
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


def masks(name, results, seed):
    """Gives every result a mask of its image, 400 x 300 px, and takes its box away."""
    rng, packed, of_masks = np.random.default_rng(seed), [], []
    for result in results:
        x, y, w, h = result["bbox"]
        triangle, rectangle = [x, y, x + w, y, x + w, y + h], [x, y, x + w, y, x + w, y + h, x, y + h]
        rle = mask.frPyObjects([triangle if rng.random() < 0.8 else rectangle], 300, 400)[0]
        kind = rng.random()
        if kind < 0.1:
            pixels = mask.decode(rle) * (rng.random((300, 400)) < (0 if kind < 0.02 else 0.9)) if w * h < 400 or kind < 0.02 else mask.decode(rle)
            rle = mask.encode(np.asfortranarray(pixels, dtype=np.uint8))
        rle = {"size": rle["size"], "counts": rle["counts"].decode()}
        packed.append(rle["counts"])
        of_masks.append({"image_id": result["image_id"], "category_id": result["category_id"], "segmentation": rle, "score": result["score"]})
    HERE.joinpath(f"{name}.masks.json").write_text(json.dumps(packed, separators=(",", ":")) + "\n")
    return of_masks


def mean(values):
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def summary(precision, recall, limits):
    """precision [T, R, K, A, M], recall [T, K, A, M]; `limits`: detections an image along M."""
    first, last = 0, len(limits) - 1
    out = {"ap": mean(precision[..., 0, first]), "ap50": mean(precision[0, :, :, 0, last]), "ap75": mean(precision[5, :, :, 0, last]), "ar": mean(recall[..., 0, last])}
    for a, size in enumerate(("small", "medium", "large"), 1):
        out[f"ap_{size}"], out[f"ar_{size}"] = mean(precision[..., a, last]), mean(recall[..., a, last])
    for m, limit in enumerate(limits):
        if limit in (100, 300):
            out[f"ar_{limit}"] = mean(recall[..., 0, m])
    return out


def save(name, golden, precision, last):
    golden["class_ap"] = [mean(precision[:, :, c, 0, 0]) for c in range(N_CLASSES)]
    golden["class_ap50"] = [mean(precision[0, :, c, 0, last]) for c in range(N_CLASSES)]
    golden["curves"] = {g: [round(mean(at), 9) for at in precision[0, :, s, 0, last]] for g, s in GROUPS.items()}
    HERE.joinpath(f"{name}.golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


LIMITS = [100, 300, 1000]
boxes = build("coco", 200, 1)
gt = COCO(str(HERE / "coco.json"))
for name, results, kind in (("coco", boxes, "bbox"), ("coco.masks", masks("coco", boxes, 5), "segm")):
    # pycocotools writes into what it is given.
    e = COCOeval(gt, gt.loadRes(copy.deepcopy(results)), kind)
    e.params.maxDets = LIMITS
    e.evaluate()
    e.accumulate()
    p, r = e.eval["precision"], e.eval["recall"]
    golden = {"groups": {g: summary(p[:, :, s], r[:, s], LIMITS) for g, s in GROUPS.items()}}
    # The official summary reads AP at maxDets 100 and the rest at the last limit: the slices above are the same reading.
    official = golden["groups"]["all"]
    e.summarize()
    assert np.allclose(e.stats[:6], [official[key] for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")], atol=1e-12, rtol=0)
    assert np.allclose(e.stats[6:9], [official["ar_100"], official["ar_300"], official["ar"]], atol=1e-12, rtol=0)
    # The limits of pycocotools' own table.
    usual = COCOeval(gt, gt.loadRes(results), kind)
    usual.evaluate()
    usual.accumulate()
    usual.summarize()
    for g, s in GROUPS.items():
        recall = usual.eval["recall"][:, s, 0]
        golden["groups"][g].update({f"ar_{limit}": mean(recall[..., m]) for m, limit in ((0, 1), (1, 10))})
    assert np.allclose(usual.stats[6:9], [official["ar_1"], official["ar_10"], official["ar_100"]], atol=1e-12, rtol=0)
    assert official["ar_1"] + 0.003 < official["ar_10"] and official["ar_10"] + 0.003 < official["ar_100"]
    assert official["ar_100"] + 0.003 < official["ar_300"] and official["ar_300"] + 0.003 < official["ar"]
    save(name, golden, p, 2)

boxes = build("lvis", 160, 2)
gt = LVIS(str(HERE / "lvis.json"))
for name, results, kind in (("lvis", boxes, "bbox"), ("lvis.masks", masks("lvis", boxes, 6), "segm")):
    # lvis-api writes into what it is given.
    free = LVISEval(gt, LVISResults(gt, copy.deepcopy(results), max_dets=-1), kind)
    e = LVISEval(gt, LVISResults(gt, results), kind)
    e.run()
    p, r = e.eval["precision"][..., None], e.eval["recall"][..., None]
    golden = {"groups": {g: summary(p[:, :, s], r[:, s], [300]) for g, s in GROUPS.items()}}
    official = e.get_results()
    for group, key in (("rare", "APr"), ("common", "APc"), ("frequent", "APf")):
        golden["groups"][group] = {"ap": official[key]}
    assert abs(golden["groups"]["all"]["ap"] - official["AP"]) < 1e-12 and abs(golden["groups"]["all"]["ar"] - official["AR@300"]) < 1e-12
    # The limit of 300 an image cuts: without it the numbers are others.
    free.run()
    assert abs(free.get_results()["AP"] - official["AP"]) > 1e-4
    save(name, golden, p, 0)
