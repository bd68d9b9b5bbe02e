"""open_clip's ViT-B/32 with random weights over a folder of images, through a PyTorch DataLoader with 2 workers: images a second.

Usage: open_clip_globals.py FOLDER N_IMAGES bf16|f32, the fastest precision here; f32 is always measured
"""

import pathlib
import sys
import time

import open_clip
import torch
from PIL import Image

BATCH = 64


class Folder(torch.utils.data.Dataset):
    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.preprocess(Image.open(self.paths[index]))


@torch.inference_mode()
def main():
    paths = sorted(pathlib.Path(sys.argv[1], "images").glob("*.jpg"))[: int(sys.argv[2])]
    precisions = {"bf16": (torch.bfloat16, len(paths)), "f32": (torch.float32, len(paths) // 4)}
    for name in dict.fromkeys([sys.argv[3], "f32"]):
        dtype, n = precisions[name]
        model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None, precision="fp32")
        model = model.eval().to(dtype)
        loader = torch.utils.data.DataLoader(Folder(paths[:n], preprocess), batch_size=BATCH, num_workers=2)
        model.encode_image(torch.zeros(BATCH, 3, 224, 224, dtype=dtype))
        started = time.perf_counter()
        rows = [torch.nn.functional.normalize(model.encode_image(batch.to(dtype)), dim=-1).half() for batch in loader]
        seconds = time.perf_counter() - started
        assert sum(map(len, rows)) == n
        print(f"{name} open_clip with a DataLoader, squares: {n / seconds:.1f} images/s of {n} images")


main()
