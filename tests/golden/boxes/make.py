"""NMS and IoU by torchvision 0.26; the kept boxes are equal, IoU agrees to 1e-6 (f32). Scores are unique."""

import json
import pathlib

import torch
from torchvision.ops import batched_nms, box_iou

torch.manual_seed(0)
n = 3000
corners = torch.rand(n, 2) * 300
boxes = torch.cat([corners, corners + torch.rand(n, 2) * 120 + 2], 1).mul(4).round().div(4)
scores = torch.randperm(n).float() / n
classes = torch.randint(0, 7, (n,))
kept = batched_nms(boxes, scores, classes, 0.45)
golden = {"boxes": boxes.tolist(), "scores": scores.tolist(), "classes": classes.tolist(), "threshold": 0.45, "kept": kept.tolist(), "iou": box_iou(boxes[:20], boxes[:20]).flatten().tolist()}
pathlib.Path(__file__).with_name("golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
