"""Converts the arrays of CORA to safetensors, and those of transforms to json: python make.py FOLDER, the folder of the `.npz` files.

The arrays were obtained by running the published code (tgxs002/CORA, branch `master` at c334a6d, branch `region` at 38124c2; torch 2.11.0 on a CPU in f32,
torchvision 0.26, scipy 1.17, numpy 2.4) on small inputs. Dropout was 0. `weights.json` lists the tensors of networks by stream: shape, scale and offset of
values that both sides make from one formula (`cora_weights` in `models/src/golden.rs`); `strings.json` the words that belong to arrays.

The f32 arrays were compared with a run of the same code in f64; tolerances are five to ten times the difference seen, and said where a test reads
an array. A trap that the data separate: pooling with the mean as a token, or without, differs by 5e-4.

Versions: Python 3.11, numpy 2.4.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from npz import convert

source, here = Path(sys.argv[1]), Path(__file__).parent
for file in sorted(source.glob("*.npz")):
    if file.stem != "transforms":
        convert(str(file), str(here / f"{file.stem}.safetensors"))
arrays = {name: array for name, array in np.load(source / "transforms.npz").items() if "norm" not in name}
numbers = {name: array.ravel().tolist() for name, array in arrays.items()} | {f"{name}.shape": array.shape for name, array in arrays.items()}
(here / "transforms.json").write_text(json.dumps(numbers) + "\n")
for name in ("weights.json", "strings.json"):
    shutil.copyfile(source / name, here / name)
