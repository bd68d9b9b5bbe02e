"""Per-image features as the OADP reference stores them (section 1 of its description), written by PyTorch 2.11's torch.save.

Three images, embeddings of 8 numbers. The box of the whole image is as the reference stores it: left, top, side, side. The third image is
more than three times as long as high, which makes that box inside out. `golden.json` has the images and all numbers, as f16 has them:
equality is exact.
"""

import json
import pathlib

import torch

HERE = pathlib.Path(__file__).parent
torch.manual_seed(3)
SIZES = {9: (640, 480), 25: (333, 500), 139: (700, 200)}
DIM = 8


def embeddings(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, DIM), dim=-1).half()


def boxes(n, width, height):
    corners = torch.rand(n, 2, 2).sort(1).values * torch.tensor([width, height])
    return corners.reshape(n, 4).half()


golden = []
for image, (width, height) in SIZES.items():
    side = min(width, height)
    whole = torch.tensor([[max(0, (width - side) / 2), max(0, (height - side) / 2), side, side]]).half()
    blocks = {"embeddings": embeddings(4), "bboxes": torch.cat([whole, boxes(3, width, height)])}
    objects = {"embeddings": embeddings(5), "bboxes": boxes(5, width, height), "objectness": torch.rand(5, 1).half()}
    files = {"globals": embeddings(), "blocks": blocks, "objects": objects}
    for folder, value in files.items():
        HERE.joinpath(folder).mkdir(exist_ok=True)
        torch.save(value, HERE / folder / f"{image:012}.pth")
    lists = {f"{folder}.{k}": t.float().tolist() for folder in ("blocks", "objects") for k, t in files[folder].items()}
    golden.append({"id": image, "width": width, "height": height, "globals": files["globals"].float().tolist()} | lists)
HERE.joinpath("golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
