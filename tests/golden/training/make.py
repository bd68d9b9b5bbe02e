"""Pictures resized as a detector sees them: OpenCV 5.0.0, INTER_LINEAR, on pictures made by the formula that the test has too.

Tolerance: a level, in at most one of a hundred numbers. OpenCV's vector code and its plain code round in different orders.
"""

import json
import pathlib

import cv2
import numpy as np


def picture(width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * (37 + 11 * c) + y * (101 - 7 * c) + x * y) % 256).astype(np.uint8)


cases = []
for (width, height), size in (((33, 21), (50, 32)), ((64, 48), (37, 28)), ((61, 40), (61, 23)), ((5, 7), (11, 3)), ((40, 30), (20, 15)), ((1, 9), (4, 2))):
    cases.append({"from": [width, height], "to": size, "rgb": cv2.resize(picture(width, height), size, interpolation=cv2.INTER_LINEAR).flatten().tolist()})
pathlib.Path(__file__).with_name("resize.json").write_text(json.dumps(cases) + "\n")
