"""Split annotation files as the OADP reference defines them, built independently with pycocotools and Python's json.

pycocotools 2.0.11, lvis 0.5.3. Equality is exact, byte by byte: no number is computed. The inputs have a dropped class, a crowd, an empty image,
shuffled ids, unknown fields and floats with many digits. With the ground truth as detections, lvis-api gives AP = 1 in every
group, before and after.
"""

import copy
import json
import pathlib

import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO

HERE = pathlib.Path(__file__).parent
BASE, NOVEL = ["owl", "wren"], ["heron", "crane"]
NAMES = BASE + NOVEL

images = [
    {"license": 4, "file_name": f"{i:03d}.jpg", "height": 40 + i, "width": 50, "id": i, "note": "a \"b\" \\ c"}
    for i in (7, 2, 9, 4, 11, 5)
]
coco = {
    "info": {"year": 2017},
    "licenses": [],
    "images": images,
    "annotations": [
        {"segmentation": [[1.25, 2.0, 3.333333333333333, 4.0, 5.1, 6.0]], "area": 10.123456789012345, "iscrowd": 0, "image_id": 9, "bbox": [1.25, 2.0, 3.85, 4.0], "category_id": 40, "id": 5},
        {"segmentation": {"counts": [3, 4, 2040], "size": [49, 50]}, "area": 4, "iscrowd": 1, "image_id": 9, "bbox": [0, 3, 1, 4], "category_id": 7, "id": 3},
        {"segmentation": [[0, 0, 1, 0, 1, 1]], "area": 0.5, "iscrowd": 0, "image_id": 2, "bbox": [0, 0, 1, 1], "category_id": 30, "id": 9},
        {"segmentation": [[0, 0, 1, 0, 1, 1]], "area": 0.5, "iscrowd": 0, "image_id": 4, "bbox": [0, 0, 1, 1], "category_id": 20, "id": 8},
        {"segmentation": [[0, 0, 2, 0, 2, 2]], "area": 2.0, "iscrowd": 0, "image_id": 7, "bbox": [0, 0, 2, 2], "category_id": 3, "id": 1},
    ],
    "categories": [
        {"supercategory": "bird", "id": 3, "name": "wren"},
        {"supercategory": "bird", "id": 7, "name": "owl"},
        {"supercategory": "thing", "id": 20, "name": "dropped"},
        {"supercategory": "bird", "id": 30, "name": "heron"},
        {"supercategory": "bird", "id": 40, "name": "crane"},
    ],
}
lvis = copy.deepcopy(coco)
lvis["categories"] = [c for c in lvis["categories"] if c["name"] != "dropped"]
lvis["annotations"] = [a for a in lvis["annotations"] if a["category_id"] != 20]
for c in lvis["categories"]:
    c["frequency"] = "r" if c["name"] in NOVEL else {"owl": "c", "wren": "f"}[c["name"]]
    c["image_count"] = 1
for k, image in enumerate(lvis["images"]):
    image["neg_category_ids"] = [40, 3][: k % 3]
    image["not_exhaustive_category_ids"] = [30, 7][: (k + 1) % 3]
HERE.joinpath("coco.json").write_text(json.dumps(coco))
HERE.joinpath("lvis.json").write_text(json.dumps(lvis))


def build(source, n_kept, is_min):
    source = copy.deepcopy(source)
    new = {c["id"]: NAMES.index(c["name"]) for c in source["categories"] if c["name"] in NAMES}
    annotations = [a for a in source["annotations"] if new.get(a["category_id"], len(NAMES)) < n_kept]
    for annotation in annotations:
        annotation["category_id"] = new[annotation["category_id"]]
    categories = [c for c in source["categories"] if c["id"] in new]
    for category in categories:
        category["id"] = new[category["id"]]
    for image in source["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key in image:
                image[key] = [new[i] for i in image[key]]
    labelled = {a["image_id"] for a in annotations}
    kept = [i for i in source["images"] if not is_min or i["id"] in labelled]
    return {"categories": sorted(categories, key=lambda c: c["id"]), "annotations": annotations, "images": kept}


for name, source, api in (("coco", coco, COCO), ("lvis", lvis, LVIS)):
    for suffix, n_kept, is_min in (("all", 4, False), ("base", 2, False), ("all-annotated", 4, True)):
        path = HERE / f"{name}.{suffix}.json"
        path.write_text(json.dumps(build(source, n_kept, is_min), separators=(",", ":")))
        loaded = api(str(path))
        assert sorted(loaded.cats) == [0, 1, 2, 3] and all(a["category_id"] < n_kept for a in loaded.anns.values())


def perfect(path):
    gt = LVIS(str(path))
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in gt.anns.values()]
    e = LVISEval(gt, LVISResults(gt, found), "bbox")
    e.run()
    return [e.get_results()[key] for key in ("AP", "APr", "APc", "APf")]


for name in ("lvis.json", "lvis.all.json"):
    assert np.allclose(perfect(HERE / name), 1, atol=1e-9), perfect(HERE / name)
