"""Makes the golden numbers of class embeddings: run it in this folder, it writes three JSON files and three `.pth` files.

Made with torch 2.11.0 (CPU, f32), transformers 4.57.6, open_clip 2.32.0, scikit-learn 1.9.1.

No weights are kept: both sides fill every tensor by one formula of its name and flat index (`../clip/unit.py`); a file holds the shape of each,
and the middle and half range of its values.

vild.json: rows of OADP's vild.pth for five names, by a Hugging Face text tower of toy size: 74 sentences written out from the description of
methods/oadp, section 5.1, padded to 77 tokens, each embedding normalised, then the mean. Tolerance 1e-5 absolute [3e-8 seen]: the same
operations in f32, with sums in another order.

multilabel.json: five steps of torch.optim.Adam on the context, scaler and bias of a prompted open_clip text tower, padded to 77 tokens, one text a
row; loss, gradients and what is learned after each; the classes' embeddings before the first step, by `encode_text` of whole sentences, and after
the last. Tolerances, with what was seen: losses, scaler and bias 1e-5 relative [1e-7]; gradients 1e-5 of their largest [8e-7]; embeddings in the
beginning 1e-5 [2e-7]; the context after each step, and embeddings in the end, 1e-4 [3e-7]: Adam's first steps are `rate * sign(gradient)`, so
that where a gradient is almost nothing its rounding counts.

average_precision.json: sklearn.metrics.average_precision_score, with ties. Tolerance 1e-12.

published.pth, bare.pth, legacy.pth: a dict as OADP publishes it, and rows alone as DetPro does, as PyTorch writes them and as it did before 1.6
(f16).
"""

import hashlib
import json
import math
import pathlib
import sys

import numpy as np
import open_clip
import torch
from sklearn.metrics import average_precision_score
from transformers import CLIPConfig, CLIPModel

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "clip"))
from unit import unit

tokenize = open_clip.tokenizer.SimpleTokenizer()


def rule(name, shape):
    """Middle and half range of a tensor's values, chosen so that activations stay near one."""
    if name.endswith("bias"):
        return 0.0, 0.1
    if name.endswith(("positional_embedding", "position_embedding.weight", "token_embedding.weight", "class_embedding")):
        return 0.0, 1.0
    if len(shape) == 0:
        return 2.0, 0.5
    if len(shape) == 1:
        return 1.0, 0.1
    fan_in = shape[0] if name in ("visual.proj", "text_projection") else math.prod(shape[1:])
    return 0.0, float(np.float32(math.sqrt(3.0 / fan_in)))


def fill(model):
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            shape = list(tensor.shape)
            middle, half_range = rule(name, shape)
            flat = np.float32(middle) + np.float32(half_range) * unit(name, math.prod(shape))
            tensor.copy_(torch.from_numpy(flat).reshape(shape))
            weights[name] = [shape, middle, half_range]
    return weights


def numbers(tensor):
    return [float(f"{v:.8g}") for v in tensor.detach().double().flatten().tolist()]


def write(name, **content):
    with open(f"{name}.json", "w") as file:
        json.dump(content, file, separators=(",", ":"))
        file.write("\n")


def sentences():
    sizes, articles = ["small", "medium", "large"], ["a", "the", "one"]
    plain = ["This is a {}", "There is a {}"]
    for before, after in (("a photo of a ", " in the scene"), ("a photo of a ", ""), ("This is a photo of a ", "")):
        plain += [f"{before}{size}{{}}{after}" for size in ["", *(f"{s} " for s in sizes)]]
    plain += [f"There is {d} {{}} in the scene" for d in articles]
    plain += [f"This is {d} {{}} in the scene" for d in articles]
    plain += [f"This is one {s} {{}} in the scene" for s in sizes]
    plain += [f"There is a {s} {{}} in the scene" for s in sizes]
    for verb, medium in (("There is", "photo"), ("There is", "picture"), ("This is", "photo"), ("This is", "picture")):
        plain += [f"{verb} {d} {{}} in the {medium}" for d in articles]
        plain += [f"{verb} {d} {s} {{}} in the {medium}" for s in sizes for d in articles]
    digest = hashlib.sha256("\n".join(plain).encode()).hexdigest()
    assert digest == "327954310ab55c5c8cbd29b60139100178fd3d7564fe8924496b001d99091b1a", digest
    return plain


@torch.no_grad()
def make_vild():
    config = CLIPConfig(projection_dim=48)
    config.text_config.update(dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, projection_dim=48))
    config.vision_config.update(dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1, projection_dim=48))
    model = CLIPModel(config).eval()
    weights = fill(model)
    names = ["person", "hair drier", "speaker_(stero_equipment)", "arctic_(type_of_shoe)", "x-ray"]
    rows = []
    for name in names:
        features = model.get_text_features(input_ids=tokenize([s.replace("{}", name) for s in sentences()]))
        rows.append((features / features.norm(dim=-1, keepdim=True)).mean(0))
    rows = torch.stack(rows)
    print("vild: norms", rows.norm(dim=-1).tolist(), "apart", (rows[0] - rows[1]).abs().max().item())
    write("vild", weights=weights, names=names, rows=[numbers(row) for row in rows])


def asymmetric(logits, targets):
    p = torch.sigmoid(logits)
    q = torch.clamp(1 - p + 0.05, max=1)
    positive = -torch.log(torch.clamp(p, min=1e-8))
    negative = -((1 - q) ** 4).detach() * torch.log(torch.clamp(q, min=1e-8))
    return torch.where(targets, positive, negative).mean()


def make_multilabel():
    model = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=32),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
        quick_gelu=True,
    ).eval()
    with torch.no_grad():
        weights = fill(model)
    model.requires_grad_(False)
    base, novel = ["person", "hair drier", "traffic_light", "dog", "fire engine"], ["cat", "speaker_(stero_equipment)"]
    texts = [name.replace("_", " ") + "." for name in base + novel]
    tokens = tokenize(texts)
    ends = tokens.argmax(-1) + 4

    def classes(context, tokens, ends):
        words = model.token_embedding(tokens)
        x = torch.cat([words[:, :1], context.expand(len(tokens), -1, -1), words[:, 1:-4]], 1) + model.positional_embedding
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        x = x[torch.arange(len(tokens)), ends] @ model.text_projection
        return x / x.norm(dim=-1, keepdim=True)

    n_images, n_base = 10, len(base)
    images = torch.from_numpy(unit("images", n_images * 32)).reshape(n_images, 32)
    images = images / images.norm(dim=-1, keepdim=True)
    labels = torch.from_numpy(unit("labels", n_images * n_base) > 0.2).reshape(n_images, n_base)
    context = model.token_embedding(tokenize(["a photo of a"]))[0, 1:5].clone().requires_grad_()
    scaler, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    optimizer = torch.optim.Adam([context, scaler, bias], lr=5e-2, weight_decay=1e-3)
    whole = model.encode_text(tokenize(["a photo of a " + text for text in texts]), normalize=True)
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [7, 3, 1, 9], [0, 2, 4, 6]]
    steps = []
    for batch in batches:
        logits = images[batch] @ classes(context, tokens[:n_base], ends[:n_base]).T * scaler - bias
        loss = 640 * asymmetric(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        gradients = [numbers(t.grad) for t in (context, scaler, bias)]
        optimizer.step()
        steps.append(dict(loss=loss.item(), gradients=gradients, learned=[numbers(t) for t in (context, scaler, bias)]))
        print("loss", loss.item(), "scaler", scaler.item(), "bias", bias.item(), "gradient", context.grad.abs().max().item())
    with torch.no_grad():
        after = classes(context, tokens, ends)
    print("moved by", (after - whole).abs().max().item())
    write("multilabel", weights=weights, base=base, novel=novel, n_images=n_images, batches=batches, steps=steps, before=numbers(whole), after=numbers(after))


def make_average_precision():
    cases = []
    for case, (n, levels) in enumerate([(1, 1), (7, 3), (50, 8), (50, 1), (200, 1 << 20)]):
        scores = np.floor(unit(f"scores.{case}", n) * levels) / np.float32(levels)
        labels = unit(f"labels.{case}", n) > 0.5
        labels[0] = True
        cases.append(dict(scores=scores.astype(np.float64).tolist(), labels=labels.tolist(), precision=average_precision_score(labels, scores)))
    write("average_precision", cases=cases)


def make_published():
    rows = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 8
    names = ["person", "hair drier", "speaker_(stero_equipment)", "café"]
    torch.save(dict(embeddings=rows, names=names, scaler=torch.tensor(20.5), bias=torch.tensor(4.25)), "published.pth")
    torch.save(rows, "bare.pth")
    torch.save(rows.half(), "legacy.pth", _use_new_zipfile_serialization=False)


make_vild()
make_multilabel()
make_average_precision()
make_published()
