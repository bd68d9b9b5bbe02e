"""Makes the golden embeddings of CLIP: run it in this folder, it writes one JSON file per model.

Made with torch 2.11.0 (CPU, f32), open_clip 3.3.0, transformers 5.23.0.

No weights are kept. Both sides fill every tensor by one formula of its name and flat index (`values`), images and tokens likewise; a file holds
the names and shapes of the state dict, and the embeddings, not normalised.

Tolerance: 1e-4 absolute on embeddings whose largest values are 2 to 5, and of which two are at least 0.1 apart. The two sides run the same operations
in f32 but fuse and order sums differently; that leaves about 1e-6 to 1e-5.

ViT-B-32 and RN50 have their full size. ViT-B-16, ViT-L-14 and RN50x4 keep their patch, image side and number of bottlenecks, but are narrower or
shallower, so that the tests stay fast. `hugging-face.json` is a CLIPModel of ViT-B/32 with two blocks; its grid of 15 x 20 is reached twice: with the
position table resized bilinearly (what is expected) and by the library's own bicubic rule (what must not match). `objects.json` is OADP's masked forward pass, in f64.
"""

import json
import math

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from unit import unit


def rule(name, shape):
    """Middle and half range of a tensor's values, chosen so that activations stay near one."""
    if name.endswith("running_var"):
        return 1.0, 0.25
    if name.endswith(("bias", "running_mean")):
        return 0.0, 0.1
    if name.endswith(("positional_embedding", "position_embedding.weight", "token_embedding.weight", "class_embedding")):
        return 0.0, 1.0
    if len(shape) == 0:
        return 2.0, 0.5
    if name.endswith("bn3.weight"):
        # Small, so that the sum of many blocks does not grow; large enough that images are told apart.
        return 0.25, 0.1
    if len(shape) == 1:
        return 1.0, 0.1
    fan_in = shape[0] if name in ("visual.proj", "text_projection") else math.prod(shape[1:])
    # Convolutions are followed by ReLU, which halves the variance, as far as there is one.
    gain = 6.0 if len(shape) == 4 else 3.0
    return 0.0, math.sqrt(gain / fan_in)


def values(name, shape):
    middle, half_range = rule(name, shape)
    flat = np.float32(middle) + np.float32(half_range) * unit(name, math.prod(shape))
    return torch.from_numpy(flat).reshape(shape)


def images(name, shape):
    """Squares of 32 px in random colours, under a fine grain: so that images differ at every scale."""
    b, c, h, w = shape
    colours = torch.from_numpy(unit(f"{name}.colours", b * c * h // 32 * w // 32)).reshape(b, c, h // 32, w // 32)
    grain = torch.from_numpy(unit(f"{name}.grain", b * c * h * w)).reshape(shape)
    return 2.0 * colours.repeat_interleave(32, 2).repeat_interleave(32, 3) + grain


def tokens():
    """Three rows of 4, 20 and 77 tokens, padded with zeros to 77."""
    rows = torch.zeros(3, 77, dtype=torch.long)
    for row, length in enumerate([4, 20, 77]):
        words = (unit(f"tokens.{row}", length).astype(np.float64) + 1.0) * 0.5 * 49406
        rows[row, :length] = torch.from_numpy(words.astype(np.int64))
        rows[row, 0], rows[row, length - 1] = 49406, 49407
    return rows


def fill(model):
    state = model.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    for name, shape in shapes.items():
        state[name].copy_(values(name, shape))
    return shapes


def write(name, shapes, **embeddings):
    rows = {key: [[float(f"{v:.8g}") for v in row] for row in tensor.tolist()] for key, tensor in embeddings.items()}
    for key, tensor in embeddings.items():
        largest, apart = tensor.abs().max(), (tensor[0] - tensor[1]).abs().max()
        print(f"{name} {key}: {list(tensor.shape)}, largest {largest:.2f}, first two rows {apart:.2f} apart")
        assert apart > 0.1, "the embeddings do not depend on their input"
    with open(f"{name.lower()}.json", "w") as file:
        json.dump({"shapes": shapes, **rows}, file, separators=(",", ":"))
        file.write("\n")


def make_open_clip(name, config, side):
    model = open_clip.model.CLIP(**config).eval()
    shapes = fill(model)
    write(
        name,
        shapes,
        image=model.encode_image(images(f"images.{name.lower()}", [2, 3, side, side])),
        text=model.encode_text(tokens()),
    )


def config_of(name, vision={}, text={}, embed_dim=None, quick_gelu=True):
    config = open_clip.get_model_config(name)
    config["vision_cfg"].update(vision)
    config["text_cfg"].update(text)
    return {**config, "embed_dim": embed_dim or config["embed_dim"], "quick_gelu": quick_gelu}


def make_hugging_face():
    config = CLIPConfig(projection_dim=512)
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = 2
    config.text_config.projection_dim = config.vision_config.projection_dim = 512
    model = CLIPModel(config).eval()
    shapes = fill(model)
    embeddings = model.vision_model.embeddings

    def project(pixels, **options):
        return model.visual_projection(model.vision_model(pixel_values=pixels, **options).pooler_output)

    def bilinear(_embeddings, height, width):
        table = embeddings.position_embedding.weight
        grid = table[1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height // 32, width // 32), mode="bilinear", align_corners=False)
        return torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(1, 2)[0]])[None]

    square = project(images("images.hugging-face", [2, 3, 224, 224]))
    wide = images("images.wide", [2, 3, 480, 640])
    bicubic = project(wide, interpolate_pos_encoding=True)
    embeddings.interpolate_pos_encoding = bilinear
    write(
        "hugging-face",
        shapes,
        image=square,
        image_15x20=project(wide, interpolate_pos_encoding=True),
        image_15x20_bicubic=bicubic,
        text=model.text_projection(model.text_model(input_ids=tokens()).pooler_output),
    )


def make_objects():
    """OADP's object-token mask attention over a Hugging Face vision tower, written out in f64 with explicit query, key and value matrices."""
    config = CLIPConfig(projection_dim=512)
    config.vision_config.projection_dim = config.text_config.projection_dim = 512
    config.text_config.num_hidden_layers = 1
    model = CLIPModel(config).eval()
    shapes = fill(model)
    vision = model.double().vision_model
    heads, width = 12, 64

    def attend(layer, queries, keys, bias):
        def split(x):
            return x.unflatten(-1, (heads, width)).transpose(1, 2)

        q, k, v = split(layer.q_proj(queries)), split(layer.k_proj(keys)), split(layer.v_proj(keys))
        logits = q @ k.transpose(-1, -2) / math.sqrt(width) + bias
        return layer.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(pixels, background):
        n = len(pixels)
        patches = F.conv2d(pixels, vision.embeddings.patch_embedding.weight, stride=16, padding=15)
        assert patches.shape[2:] == (14, 14)
        table = vision.embeddings.position_embedding.weight
        grid = table[1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(14, 14), mode="bilinear", align_corners=False)
        positions = torch.cat([table[:1], grid.permute(0, 2, 3, 1).flatten(1, 2)[0]])
        x = torch.cat([vision.embeddings.class_embedding.expand(n, 1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x = vision.pre_layrnorm(x + positions)
        y = x[:, :1]
        bias = torch.cat([-100 * background.flatten(1), torch.zeros(n, 1)], 1)[:, None, None]
        for layer in vision.encoder.layers:
            # The object first: it reads the stream as it enters the block.
            u = layer.layer_norm1(torch.cat([x[:, 1:], y], 1))
            y = y + attend(layer.self_attn, u[:, -1:], u, bias)
            y = y + layer.mlp(layer.layer_norm2(y))
            x = layer(x, attention_mask=None)
            x = x[0] if isinstance(x, tuple) else x
        ordinary = model.visual_projection(vision.post_layernorm(x[:, 0]))
        return model.visual_projection(vision.post_layernorm(y[:, 0])), ordinary

    pixels = images("images.objects", [3, 3, 224, 224]).double()
    # Something in between, the object everywhere, and nowhere.
    some = (torch.from_numpy(unit("masks.objects", 3 * 14 * 14)).reshape(3, 14, 14) > 0.4).double()
    objects, ordinary = forward(pixels, some)
    everywhere, _ = forward(pixels, torch.zeros(3, 14, 14))
    nowhere, _ = forward(pixels, torch.ones(3, 14, 14))
    assert (everywhere - ordinary).abs().max() < 1e-9
    assert (nowhere - nowhere[:1]).abs().max() < 1e-5
    write("objects", shapes, objects=objects, everywhere=everywhere)


@torch.no_grad()
def main():
    small_text = {"width": 128, "heads": 2, "layers": 3}
    make_open_clip("ViT-B-32", config_of("ViT-B-32"), 224)
    make_open_clip("RN50", config_of("RN50"), 224)
    make_open_clip("ViT-B-16", config_of("ViT-B-16", {"width": 192, "layers": 3}, small_text, 128, quick_gelu=False), 224)
    make_open_clip("ViT-L-14", config_of("ViT-L-14", {"width": 256, "layers": 4}, small_text, 192), 224)
    make_open_clip("RN50x4", config_of("RN50x4", {"width": 20}, small_text, 160), 288)
    make_hugging_face()
    make_objects()


main()
