"""Small WebP and GIF files, and the RGB that Pillow reads from them (`convert("RGB")`, of several pictures the first). Pillow 13.0.

Equality is exact, but for `lossy.webp` and `animated.webp`: three levels, since decoders enlarge colour that is stored at half the resolution each in
its own way. `animated.gif` has no transparent pixels in its first picture.
"""

import json
import pathlib

from PIL import Image

HERE = pathlib.Path(__file__).parent


def picture(shift, alpha=False):
    width, height = 24, 18
    pixels = [((x * 10 + shift) % 256, (y * 14 + shift) % 256, (x * y + shift) % 256, 255 - x * y % 256) for y in range(height) for x in range(width)]
    image = Image.new("RGBA", (width, height))
    image.putdata(pixels)
    return image if alpha else image.convert("RGB")


files = {
    "lossless.webp": (picture(0), {"lossless": True}),
    "alpha.webp": (picture(3, alpha=True), {"lossless": True, "exact": True}),
    "lossy.webp": (picture(5), {"quality": 90}),
    "animated.webp": (picture(7), {"quality": 90, "save_all": True, "append_images": [picture(90)], "duration": 100}),
    "plain.gif": (picture(9).quantize(64), {}),
    "animated.gif": (picture(11).quantize(64), {"save_all": True, "append_images": [picture(99).quantize(64)], "duration": 100}),
}
golden = {}
for name, (image, options) in files.items():
    image.save(HERE / name, **options)
    read = Image.open(HERE / name)
    golden[name] = {"size": list(read.size), "rgb": list(read.convert("RGB").tobytes())}
(HERE / "golden.json").write_text(json.dumps(golden) + "\n")
