"""Letterboxed pictures by OpenCV and albumentations, as img2dataset uses them (resize_mode border, image_size 1024).

    python3 -m venv v && v/bin/pip install numpy==2.4.6 opencv-python-headless==5.0.0.93 albumentations==2.0.8
    v/bin/python make.py

Writes golden.json: for 200 sizes, edge cases among them, the size after resizing and where it lies in the square; and the levels of some pixels of
the whole square. The picture is smooth and made from integers alone, see `levels`. Tolerance of the pixels: 2 levels, since OpenCV's vector code
rounds in another order than its plain code does. Also the formula for transparent pixels on white, for every level and opacity.
"""

import json
import random

import albumentations
import cv2
import numpy as np

SIDE = 1024
SIZES = [(640, 480), (300, 451), (2048, 1000), (333, 1000), (50, 50), (1024, 1024), (1024, 1), (1, 1024), (1, 1), (2, 3), (3000, 7), (1023, 1025), (2, 2048)]


def levels(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red = x * 255 // max(width - 1, 1)
    green = y * 255 // max(height - 1, 1)
    wave = (x * 510 // width + y * 510 // height) % 510
    return np.stack([red, green, np.minimum(wave, 510 - wave)], 2).astype(np.uint8)


def main():
    random.seed(7)
    while len(SIZES) < 200:
        SIZES.append((random.randint(3, 2500), random.randint(3, 2500)))
    resize = albumentations.LongestMaxSize(max_size=SIDE, interpolation=cv2.INTER_LANCZOS4)
    pad = albumentations.PadIfNeeded(SIDE, SIDE, border_mode=cv2.BORDER_CONSTANT, fill=255)
    cases = []
    for width, height in SIZES:
        resized = resize(image=levels(width, height))["image"]
        # Where the picture lies: of a black one of the same size.
        ground = pad(image=np.zeros_like(resized))["image"]
        rows, columns = np.where(ground[:, :, 0] == 0)
        square = pad(image=resized)["image"]
        places = [(random.randrange(SIDE), random.randrange(SIDE)) for _ in range(12)]
        inside = [(random.randrange(resized.shape[1]) + int(columns[0]), random.randrange(resized.shape[0]) + int(rows[0])) for _ in range(12)]
        cases.append({
            "size": [width, height],
            "resized": [resized.shape[1], resized.shape[0]],
            "offset": [int(columns.min()), int(rows.min())],
            "pixels": [[x, y, *map(int, square[y, x])] for x, y in places + inside],
        })
    level, opacity = np.meshgrid(np.arange(256), np.arange(256))
    white = np.rint(opacity / 255 * level + 255 - opacity).astype(np.uint8)
    json.dump({
        "versions": {"numpy": np.__version__, "cv2": cv2.__version__, "albumentations": albumentations.__version__},
        "cases": cases,
        # By opacity, then level: the sum of each row, and every 17th level.
        "white_sums": white.astype(int).sum(1).tolist(),
        "white": white[:, ::17].tolist(),
    }, open("golden.json", "w"))


main()
