"""Objects as the OADP reference computes them, on open_clip's ViT-B/32 with random weights: an image at a time, crops by Pillow, f32 on
a CPU, object tokens with keys and values of their own: crops a second. Written from the method's description.

Usage: oadp_objects.py FOLDER N_IMAGES
"""

import pathlib
import sys
import time

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

PROPOSALS = 10


def forward(visual, pixels, masks):
    x = F.conv2d(pixels, visual.conv1.weight, stride=16, padding=15)
    n, c = x.shape[:2]
    table = visual.positional_embedding
    grid = table[1:].reshape(1, 7, 7, c).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(14, 14), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).reshape(-1, c)
    x = torch.cat([visual.class_embedding.expand(n, 1, c), x.flatten(2).transpose(1, 2)], 1) + torch.cat([table[:1], grid])
    x = visual.ln_pre(x)
    y = x[:, :1]
    bias = torch.cat([-100 * masks.flatten(1), torch.zeros(n, 1)], 1)[:, None].repeat_interleave(12, 0)
    for block in visual.transformer.resblocks:
        u = block.ln_1(torch.cat([x[:, 1:], y], 1))
        y = y + block.attn(u[:, -1:], u, u, need_weights=False, attn_mask=bias)[0]
        y = y + block.mlp(block.ln_2(y))
        x = block(x)
    return visual.ln_post(y[:, 0]) @ visual.proj


@torch.inference_mode()
def main():
    paths = sorted(pathlib.Path(sys.argv[1], "images").glob("*.jpg"))[: int(sys.argv[2])]
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None, precision="fp32")
    visual = model.eval().visual
    random = torch.Generator().manual_seed(5)

    def objects(path):
        image = Image.open(path).convert("RGB")
        sides = 30 + 270 * torch.rand(PROPOSALS, generator=random)
        corners = torch.rand(PROPOSALS, 2, generator=random) * torch.tensor(image.size)
        crops = []
        for side, (x, y) in zip((8 * sides**2).sqrt().tolist(), corners.tolist()):
            crops.append(preprocess(image.crop((round(x - side / 2), round(y - side / 2), round(x + side / 2), round(y + side / 2)))))
        masks = (torch.rand(PROPOSALS, 14, 14, generator=random) > 0.3).float()
        return F.normalize(forward(visual, torch.stack(crops), masks), dim=-1).half()

    objects(paths[0])
    started = time.perf_counter()
    n_crops = sum(len(objects(path)) for path in paths)
    print(f"f32 the reference's way, objects: {n_crops / (time.perf_counter() - started):.1f} crops/s of {len(paths)} images")


main()
