"""Proposals as mmdet dumps them, by Python's pickle and numpy 2.4.6. Equality is exact.

Protocols 2, 4 and 5; four images: a float32 array, a float64 array of numbers that float32 holds, no boxes, one box. `flat`:
a list of arrays; `list` and `tuple`: for each image a list or tuple of the arrays of its only class.

`forms/*.pkl`, protocol 4: the same boxes of the images 2, 4 and 9 (`a/2.jpg` and so on; 4 has none, 9 two) in every container.
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

forms = {}
images = {2: two[:1], 4: two[:0], 9: two}
for kind in ("float16", "float32", "float64"):
    forms[f"list-{kind}"] = [a.astype(kind) for a in images.values()]
forms["list-fortran"] = [np.asfortranarray(a) for a in images.values()]
forms["list-empty-1d"] = [images[2], np.array([]), images[9]]
forms["list-empty-2d"] = [images[2], np.zeros((0, 4), np.float32), images[9]]
forms["list-empty-list"] = [images[2], [], images[9]]
forms["tuple"] = tuple(images.values())
forms["objects"] = np.array([*images.values(), None], object)[:3]
forms["lists"] = [a.tolist() for a in images.values()]
forms["lists-of-a-class"] = [[a.tolist()] for a in images.values()]
forms["lists-of-rows"] = [list(a) for a in images.values()]
forms["object-rows"] = [a.astype(object) for a in images.values()]
named = {
    "by-id": {id: a for id, a in reversed(images.items())},
    "by-numpy-id": {np.int64(id): a for id, a in images.items()},
    "by-id-as-text": {f"{id:012}": a for id, a in images.items()},
    "by-name": {f"{id}.jpg": a for id, a in images.items()},
    "by-path": {f"data/coco/a/{id}.jpg": {"bboxes": a[:, :4], "scores": a[:, 4]} for id, a in images.items()},
    "by-windows-path": {f"C:\\coco\\a\\{id}.jpg": {"bboxes": a[:, :4], "scores": a[:, 4]} for id, a in images.items()},
    "mmdet-3": [{"img_id": id, "pred_instances": {"bboxes": a[:, :4], "scores": a[:, 4], "labels": a[:, 0] * 0}} for id, a in images.items()],
    "mmdet-3-paths": [{"img_path": f"./a/{id}.jpg", "bboxes": a[:, :4].tolist(), "scores": a[:, 4].tolist()} for id, a in images.items()],
}
order = [9, 2, 4]
boxes = [images[id][:, :4] for id in order]
sizes = [np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1) for b in boxes]
scores = [images[id][:, 4] for id in order]
named["detectron"] = {"boxes": boxes, "scores": scores, "ids": order}
named["detectron-indexes"] = {"boxes": boxes, "scores": [s[:, None] for s in scores], "indexes": np.array(order)}
named["detectron-arrays"] = {"boxes": np.array([*boxes, None], object)[:3], "scores": np.array([*scores, None], object)[:3], "ids": [np.int32(id) for id in order]}
named["detectron2"] = {"ids": order, "boxes": boxes, "objectness_logits": scores, "bbox_mode": 0}
named["detectron2-xywh"] = {"ids": order, "boxes": sizes, "objectness_logits": scores, "bbox_mode": 1}
folder = HERE / "forms"
folder.mkdir(exist_ok=True)
for name, value in (forms | named).items():
    folder.joinpath(f"{name}.pkl").write_bytes(pickle.dumps(value, 4))
np.save(folder / "objects.npy", forms["objects"])
# Two boxes an image: numpy makes one array of it.
folder.joinpath("one-array.pkl").write_bytes(pickle.dumps(np.array([two] * 3), 4))
