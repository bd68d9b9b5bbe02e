"""Converts arrays of RPL and PromptDet to safetensors: python make.py FILE.npz FILE.safetensors, for rpl and promptdet; and those of crops, and of views
and orders of batches, to json: python make.py rpl.npz crops.json; python make.py promptdet.npz views.json.

The arrays were obtained by running the published code (fcjian/RPL, commit b7e586a; fcjian/PromptDet, commit 45e3a3e; torch 2.11.0 on a CPU in f32,
torchvision 0.26, numpy 2.4) on small fixed inputs; sizes were reduced, nothing else. They were recomputed in f64 from the inputs and the formulas
alone: the largest relative difference is 1.1e-5, of logits of size 100.

Tolerances: 1e-4 relative plus absolute, gradients and trajectories 1e-3, integers exactly. Text is bytes, lines joined by LF (`*_utf8`). What is in
each array is said where a test reads it.

Versions: Python 3.11, numpy 2.4.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from npz import convert

source, target = sys.argv[1:]
if target.endswith(".json"):
    # Numbers row by row; null where nothing was drawn.
    arrays = {name: array for name, array in np.load(source).items() if name.startswith(("crop/", "rrc/", "views/", "order/"))}
    numbers = {name: [None if number != number else number for number in array.ravel().tolist()] for name, array in arrays.items()}
    Path(target).write_text(json.dumps(numbers) + "\n")
else:
    convert(source, target)
