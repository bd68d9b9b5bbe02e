"""Converts `lp-ovod.npz` to safetensors: python make.py lp-ovod.npz golden.safetensors

The arrays were obtained by running LP-OVOD's published code (VinAIResearch/LP-OVOD, commit 133d26a; torch 2.11.0 on a CPU in f32,
torchvision 0.26, numpy 1.26) on small fixed inputs; faiss was replaced by an exact inner-product search in which the lower row wins ties.
They were recomputed in f64 from the inputs and the formulas alone: the largest relative difference is 6e-6.

Tolerances: integers exactly, numbers 1e-4, gradients 1e-3, preprocessed pixels 0.02. What is in each array is said where a test reads it.

Versions: Python 3.11, numpy 2.4.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from npz import convert

convert(*sys.argv[1:])
