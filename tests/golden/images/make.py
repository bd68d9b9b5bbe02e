"""Pixels as Pillow and torchvision make them. Pillow 13.0, torchvision 0.26, OpenCV for PNGs of 16 bits.

Pictures are resized along rows first, as Pillow did up to 12; 13 begins with columns where the height shrinks much more.
Equality is exact (digests), but 1e-7 for floats and three levels for JPEGs: libjpeg-turbo enlarges colour that is stored at
half the resolution in another way than other decoders do. Drafts, JPEGs that are decoded at half their size, are within six
levels, a level on the average.
"""

import hashlib
import json
import pathlib

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

HERE = pathlib.Path(__file__).parent


def picture(width, height):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    x, y, c = x.astype(np.uint32), y.astype(np.uint32), c.astype(np.uint32)
    wave = (x * (3 + c) + y * (7 - c)) % 256
    noise = ((x * np.uint32(73856093)) ^ (y * np.uint32(19349663)) ^ (c * np.uint32(83492791))) % 64
    block = ((x // 9 + y // 5 + c) % 2) * 96
    return Image.fromarray(((wave // 2 + noise + block) % 256).astype(np.uint8))


def rows_first(image, size):
    return image.resize((size[0], image.height), Image.BICUBIC).resize(size, Image.BICUBIC)


def entry(array):
    return {"sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(), "size": [array.shape[-2], array.shape[-3]]}


fixed, resized, decoded = {}, {}, {}
resize, crop = transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)
for width, height in ((640, 480), (640, 427), (333, 500), (224, 900), (219, 220), (5, 7), (224, 224), (1, 3), (1000, 224), (231, 621), (600, 228)):
    image = picture(width, height)
    fixed[f"{width}x{height}"] = entry(np.asarray(crop(rows_first(image, resize(image).size))))
for (w, h), (tw, th) in (((640, 480), (298, 224)), ((100, 80), (333, 201)), ((37, 911), (224, 5519)), ((900, 11), (13, 7)), ((1, 1), (9, 4)), ((7, 5), (1, 1)), ((501, 333), (250, 334)), ((64, 64), (32, 32)), ((20, 210), (175, 203)), ((3, 355), (18, 118))):
    resized[f"{w}x{h}-{tw}x{th}"] = entry(np.asarray(rows_first(picture(w, h), (tw, th))))

small = picture(33, 21)
files = {
    "rgb.png": small,
    "grey.png": small.convert("L"),
    "palette.png": small.quantize(16),
    "alpha.png": Image.merge("RGBA", (*small.split(), small.convert("L"))),
}
for name, image in files.items():
    image.save(HERE / name)
deep = np.asarray(small).astype(np.uint16) * 251 + 77
cv2.imwrite(str(HERE / "rgb-16.png"), deep)
cv2.imwrite(str(HERE / "alpha-16.png"), np.concatenate([deep, deep[..., :1]], -1))
small.convert("1").save(HERE / "one-bit.png")
small.convert("LA").save(HERE / "grey-alpha.png")
small.quantize(16).save(HERE / "palette-alpha.png", transparency=3)
for path in sorted(HERE.glob("*.png")):
    decoded[path.name] = entry(np.asarray(Image.open(path).convert("RGB")))

y, x = np.mgrid[0:45, 0:61]
smooth = Image.fromarray(np.stack([x * 4, y * 5, (x + y) * 2], -1).astype(np.uint8))
turned = Image.Exif()
turned[0x112] = 6
jpegs = {
    "half.jpg": (smooth, {}),
    "full.jpg": (smooth, {"subsampling": 0}),
    "progressive.jpg": (smooth, {"progressive": True}),
    "grey.jpg": (smooth.convert("L"), {}),
    "cmyk.jpg": (smooth.convert("CMYK"), {}),
    "exif.jpg": (smooth, {"exif": turned}),
}
jpeg = {}
for name, (image, options) in jpegs.items():
    image.save(HERE / name, quality=90, **options)
    rgb = np.asarray(Image.open(HERE / name).convert("RGB"))
    # Every pixel, for what embeddings make of the differences between decoders.
    (HERE / "pillow").mkdir(exist_ok=True)
    Image.fromarray(rgb).save(HERE / "pillow" / f"{name}.png")
    draft = Image.open(HERE / name)
    if name != "cmyk.jpg":
        draft.draft("RGB", (30, 22))
        assert draft.size == (31, 23)
        draft.convert("RGB").save(HERE / "pillow" / f"draft-{name}.png")
    pixels = rgb.reshape(-1, 3)
    jpeg[name] = {"size": [rgb.shape[1], rgb.shape[0]], "mean": pixels.mean(0).tolist(), "pixels": pixels[::37].tolist()}

normalise = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
levels = [normalise(torch.full((3, 1, 1), v, dtype=torch.uint8).float() / 255).flatten().tolist() for v in (0, 1, 128, 255)]
HERE.joinpath("golden.json").write_text(json.dumps({"fixed": fixed, "resized": resized, "decoded": decoded, "jpeg": jpeg, "normalised": levels}, indent=1) + "\n")
