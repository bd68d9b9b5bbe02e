"""What a detector is shown, and how it descends. Run it in this folder.

resize.json: OpenCV 5.0.0, INTER_LINEAR, on pictures made by the formula that the test has too. Tolerance: a level, in at most one of a
hundred numbers. OpenCV's vector code and its plain code round in different orders.

sgd.json: three steps of torch.optim.SGD, torch 2.11.0: momentum 0.9, decay 0.01, gradients clipped to a length of 2 all together by
torch.nn.utils.clip_grad_norm_; loss sum(a^2 b) + sum(b^2). Tolerance: 1e-6.

adamw.json: the same of torch.optim.AdamW, without clipping: betas 0.9 and 0.98, eps 1e-6, decay 0.05; `average`: of `a` by
torch.optim.swa_utils.AveragedModel with a decay of 0.9. Tolerance: 1e-6.

cosine.json: learning rates of torch.optim.lr_scheduler.CosineAnnealingLR over 9 steps, from 0.02 to 0. Tolerance: 1e-12.

masks.json: OpenCV 5.0.0, INTER_NEAREST and flip: where the pixels of a mask lie once it is resized. Exact.
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

a = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
b = torch.nn.Parameter(torch.tensor([1.5, 0.25, -0.75]))
optimizer = torch.optim.AdamW([a, b], lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
averaged = torch.optim.swa_utils.AveragedModel(torch.nn.ParameterList([a]), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
steps = []
for rate in (0.1, 0.1, 0.01):
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    ((a * a * b).sum() + (b * b).sum()).backward()
    optimizer.step()
    averaged.update_parameters(torch.nn.ParameterList([a]))
    steps.append({"rate": rate, "a": a.tolist(), "b": b.tolist(), "average": averaged.module[0].tolist()})
HERE.joinpath("adamw.json").write_text(json.dumps(steps, indent=1) + "\n")

optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
rates = []
for _ in range(9):
    rates.append(optimizer.param_groups[0]["lr"])
    optimizer.step()
    schedule.step()
HERE.joinpath("cosine.json").write_text(json.dumps(rates) + "\n")

cases = []
for (width, height), size in (((33, 21), (50, 32)), ((64, 48), (37, 28)), ((40, 30), (20, 15))):
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    mask = ((x - 0.4 * width) ** 2 / 30 + (y - 0.6 * height) ** 2 / 20 < 1).astype(np.uint8)
    for mirrored in (False, True):
        shown = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        shown = cv2.flip(shown, 1) if mirrored else shown
        rows, columns = np.nonzero(shown)
        cases.append({"from": [width, height], "to": size, "mirrored": mirrored, "mask": mask.flatten().tolist(),
                      "pixels": list(zip(columns.tolist(), rows.tolist()))})
HERE.joinpath("masks.json").write_text(json.dumps(cases) + "\n")
