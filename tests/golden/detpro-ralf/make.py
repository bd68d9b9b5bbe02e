"""Converts arrays of DetPro and RALF to safetensors: python make.py FILE.npz FILE.safetensors, for detpro, detector, ralf and ralf_full_width.

The arrays were obtained by running the published code (dyabel/detpro, commit 9a14699; mlvlab/RALF, branches DetPro a39327c, prerequisite
8438377, RAF e6c41f7, OADP 1c182c1, Centric 9c85e7e; torch 2.11.0 on a CPU, one thread, in f32, torchvision 0.26, numpy 2.4, Pillow 13.0) on
small fixed inputs. Where that code fixes a size (866 classes, width 512, 6 layers, top 2000), this one constant was replaced by a small one;
drawn indices are stored instead of seeds. The arrays were recomputed in f64 from the inputs and the formulas alone (pixels by Pillow): the
largest relative difference is 4e-6. `neg_feature_small.pkl` was written by the published writer, `neg_feature_small_numpy1.pkl` is the same
pickle with the module name of numpy 1.

Tolerances: 1e-4 relative plus absolute in f32, gradients 1e-3, integers and index lists exactly, preprocessed pixels 0.02. What is in each array is
said where a test reads it.

Versions: Python 3.11, numpy 2.4.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from npz import convert

convert(*sys.argv[1:])
