"""What a detector is shown, and how it descends. Run it in this folder.

resize.json: OpenCV 5.0.0, INTER_LINEAR, on pictures made by the formula that the test has too. Tolerance: a level, in at most one of a
hundred numbers. OpenCV's vector code and its plain code round in different orders.

sgd.json: three steps of torch.optim.SGD, torch 2.11.0: momentum 0.9, decay 0.01, gradients clipped to a length of 2 all together by
torch.nn.utils.clip_grad_norm_; loss sum(a^2 b) + sum(b^2). Tolerance: 1e-6.
"""

import json
import pathlib

import cv2
import numpy as np
import torch

HERE = pathlib.Path(__file__).parent


def picture(width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return ((x * (37 + 11 * c) + y * (101 - 7 * c) + x * y) % 256).astype(np.uint8)


cases = []
for (width, height), size in (((33, 21), (50, 32)), ((64, 48), (37, 28)), ((61, 40), (61, 23)), ((5, 7), (11, 3)), ((40, 30), (20, 15)), ((1, 9), (4, 2))):
    cases.append({"from": [width, height], "to": size, "rgb": cv2.resize(picture(width, height), size, interpolation=cv2.INTER_LINEAR).flatten().tolist()})
HERE.joinpath("resize.json").write_text(json.dumps(cases) + "\n")

a = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
b = torch.tensor([1.5, 0.25, -0.75], requires_grad=True)
optimizer = torch.optim.SGD([a, b], lr=0.1, momentum=0.9, weight_decay=0.01)
steps = []
for rate in (0.1, 0.1, 0.01):
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    ((a * a * b).sum() + (b * b).sum()).backward()
    torch.nn.utils.clip_grad_norm_([a, b], 2.0)
    optimizer.step()
    steps.append({"rate": rate, "a": a.tolist(), "b": b.tolist()})
HERE.joinpath("sgd.json").write_text(json.dumps(steps, indent=1) + "\n")
