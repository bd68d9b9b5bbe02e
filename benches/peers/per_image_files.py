"""Writes one file an image, as torch.save does, and loads each again: the way of the OADP reference. Prints s for the loading.

Usage: per_image_files.py FOLDER N_FILES N_NUMBERS
"""

import pathlib
import sys
import time

import torch

folder, n_files, n_numbers = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
folder.mkdir()
for index in range(n_files):
    torch.save(torch.full((n_numbers,), 0.5, dtype=torch.float16), folder / f"{index:012}.pth")
started = time.perf_counter()
for index in range(n_files):
    torch.load(folder / f"{index:012}.pth", weights_only=True)
print(time.perf_counter() - started)
