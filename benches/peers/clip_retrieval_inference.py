"""clip-retrieval's `clip_inference` on ViT-B/32 with random weights over a folder of images, f32 as it computes on a CPU: images a second.

Usage: clip_retrieval_inference.py FOLDER N_IMAGES
"""

import os
import pathlib
import sys
import tempfile
import time

os.environ["WANDB_MODE"] = "disabled"

import numpy
import open_clip
import torch
from clip_retrieval import clip_inference

MODEL = "ViT-B-32-quickgelu"


def main():
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        images = folder / "images"
        images.mkdir()
        paths = sorted(pathlib.Path(sys.argv[1], "images").glob("*.jpg"))[: int(sys.argv[2])]
        for path in paths:
            images.joinpath(path.name).symlink_to(path.resolve())
        weights = folder / "weights.pt"
        torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), weights)

        started = time.perf_counter()
        clip_inference(
            input_dataset=str(images),
            output_folder=str(folder / "embeddings"),
            clip_model=f"open_clip:{MODEL}/{weights}",
            enable_text=False,
            use_jit=False,
            batch_size=64,
            num_prepro_workers=2,
        )
        seconds = time.perf_counter() - started
        assert sum(len(numpy.load(file)) for file in folder.glob("embeddings/img_emb/*.npy")) == len(paths)
        print(f"f32 clip-retrieval, squares: {len(paths) / seconds:.1f} images/s of {len(paths)} images, loading included")


if __name__ == "__main__":
    main()
