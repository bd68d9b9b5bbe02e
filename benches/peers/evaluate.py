"""Evaluates a results file with pycocotools, faster-coco-eval or lvis-api. Prints json: seconds and peak MiB from the files to the
numbers, and the numbers, -1 where there are none.

Usage: evaluate.py pycocotools|faster-coco-eval|lvis-api coco|lvis boxes|masks ANNOTATIONS RESULTS
"""

import contextlib
import json
import logging
import resource
import sys
import time

import numpy as np

# lvis-api is older than numpy 1.20, which gave this name up.
np.float = float
COCO_LIMITS = [100, 300, 1000]


def mean(values):
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def numbers(precision, recall):
    """Of precision [T, R, K, A, M] and recall [T, K, A, M]: AP at the first limit of detections, all else at the last."""
    out = {"ap": mean(precision[..., 0, 0]), "ap50": mean(precision[0, :, :, 0, -1]), "ap75": mean(precision[5, :, :, 0, -1])}
    for area, size in enumerate(("small", "medium", "large"), 1):
        out[f"ap_{size}"], out[f"ar_{size}"] = mean(precision[..., area, -1]), mean(recall[..., area, -1])
    return out | {"ar": mean(recall[..., 0, -1])}


def load(results, of):
    """The path of a results file, or its content without boxes: with them, sizes of masks would be those of boxes."""
    if of == "boxes":
        return results
    with open(results) as file:
        return [{key: value for key, value in result.items() if key != "bbox"} for result in json.load(file)]


def evaluate(package, metric, of, annotations, results):
    kind = {"boxes": "bbox", "masks": "segm"}[of]
    if package == "lvis-api":
        from lvis import LVIS, LVISEval, LVISResults

        truth = LVIS(annotations)
        evaluation = LVISEval(truth, LVISResults(truth, load(results, of)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        return numbers(evaluation.eval["precision"][..., None], evaluation.eval["recall"][..., None])
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO(annotations)
        evaluation = COCOeval(truth, truth.loadRes(load(results, of)), kind)
    else:
        from faster_coco_eval import COCO, COCOeval_faster

        truth = COCO(annotations)
        found = truth.loadRes(load(results, of))
        evaluation = COCOeval_faster(truth, found, kind, lvis_style=metric == "lvis", print_function=lambda *words: None)
    evaluation.params.maxDets = COCO_LIMITS if metric == "coco" else [300]
    evaluation.evaluate()
    evaluation.accumulate()
    return numbers(evaluation.eval["precision"], evaluation.eval["recall"])


def main():
    logging.disable()
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate(*sys.argv[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.perf_counter() - started, "peak_mib": peak, "numbers": found}))


main()
