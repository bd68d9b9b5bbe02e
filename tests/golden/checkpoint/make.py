"""Checkpoints in the layouts that are published, as PyTorch 2.11 and safetensors 0.8 write them.

`golden.json` holds, for each file and tensor, the type, the shape and the sum of the numbers weighted 1, 2, 3 ... in C order, in f64.
Tolerance 1e-9: numbers are copied, not computed; the sums may be added up in another order.

`script.pt` stands in for OpenAI's `ViT-B-32.pt`: a traced module tree in fp16 with the same nesting and names, sizes as buffers.
"""

import collections
import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
torch.manual_seed(0)
KIND = {
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float64: "Double",
    torch.int64: "Int64",
    torch.int32: "Int",
    torch.int16: "Int16",
    torch.int8: "Int8",
    torch.uint8: "Uint8",
    torch.bool: "Bool",
}


def describe(tensors):
    def one(t):
        flat = t.detach().double().flatten()
        return {"kind": KIND[t.dtype], "shape": list(t.shape), "sum": float((flat * (torch.arange(len(flat)).double() + 1)).sum())}

    return {name: one(t) for name, t in sorted(tensors.items())}


golden = {}
base = torch.randn(6, 8)
tied = nn.Parameter(torch.randn(4, 4))
labelled = nn.Parameter(torch.randn(3))
labelled.label = "an attribute"
weights = collections.OrderedDict(
    {
        "backbone.conv1.weight": torch.randn(4, 3, 3, 3),
        "backbone.channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "backbone.view": base[1:3, 2:5],
        "backbone.transposed": base.t(),
        "backbone.expanded": base[:, :1].expand(6, 4),
        "backbone.steps": torch.arange(20)[3::4],
        "head.half": torch.randn(5).half(),
        "head.bfloat": torch.randn(5).bfloat16(),
        "head.double": torch.randn(2, 2).double(),
        "head.int": torch.arange(-3, 4, dtype=torch.int32),
        "head.short": torch.arange(-3, 4, dtype=torch.int16),
        "head.char": torch.arange(-3, 4, dtype=torch.int8),
        "head.byte": torch.arange(4, dtype=torch.uint8),
        "head.bool": torch.tensor([True, False, True]),
        "head.parameter": nn.Parameter(torch.randn(3)),
        "head.labelled": labelled,
        "head.tied": tied,
        "head.tied_too": tied,
        "bn.num_batches_tracked": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
)
weights._metadata = {"": {"version": 2}}
optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3, dtype=torch.float64)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
nested = {"meta": {"epoch": 3, "classes": ("a", "b")}, "state_dict": weights, "optimizer": optimizer}
torch.save(nested, HERE / "nested.pth")
torch.save(nested, HERE / "legacy.pth", _use_new_zipfile_serialization=False)
golden["nested.pth"] = golden["legacy.pth"] = describe(weights)

model = {"visual": {"proj": torch.randn(2, 3)}, "logit_scale": torch.tensor(2.5)}
torch.save({"model": model, "iteration": 5}, HERE / "model.pth")
golden["model.pth"] = describe({"visual.proj": model["visual"]["proj"], "logit_scale": model["logit_scale"]})

flat = {"a": torch.randn(64), "b": torch.randn(2, 3), "c": torch.arange(5)}
torch.save(flat, HERE / "flat.pth")
golden["flat.pth"] = describe(flat)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.ln_1 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(collections.OrderedDict(c_fc=nn.Linear(8, 16), gelu=nn.GELU(), c_proj=nn.Linear(16, 8)))

    def forward(self, x):
        x = self.ln_1(x)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.resblocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(4, 8))
        self.transformer = Transformer()
        self.proj = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        x = self.conv1(x).flatten(2).permute(2, 0, 1) + self.positional_embedding[:, None]
        return self.transformer(x).mean(0) @ self.proj


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(8))

    def forward(self, x):
        return self.visual(x) * self.logit_scale.exp()


clip = Clip()
script = torch.jit.trace(clip.eval(), torch.randn(1, 3, 8, 8)).half()
torch.jit.save(script, HERE / "script.pt")
golden["script.pt"] = describe(script.state_dict())

tensors = {
    "x": torch.randn(3, 4),
    "y": torch.randn(7).half(),
    "z": torch.randn(2).bfloat16(),
    "n": torch.arange(3),
    "flags": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
}
save_file(tensors, HERE / "weights.safetensors", metadata={"made": "by make.py"})
HERE.joinpath("weights.safetensors").chmod(0o644)
golden["weights.safetensors"] = describe(tensors)

HERE.joinpath("golden.json").write_text(json.dumps(golden, indent=1) + "\n")
