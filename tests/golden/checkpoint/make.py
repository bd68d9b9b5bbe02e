"""Checkpoints in the layouts that are published, as PyTorch 2.11 and safetensors 0.7 write them; sums agree to 1e-9.

`script.pt` stands in for OpenAI's `ViT-B-32.pt`: a traced module tree in fp16 with nested modules and a buffer.
"""

import collections
import json
import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
torch.manual_seed(0)
KIND = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float64: "Double", torch.int64: "Int64"}


def describe(tensors):
    def one(t):
        flat = t.detach().double().flatten()
        return {"kind": KIND[t.dtype], "shape": list(t.shape), "sum": float((flat * (torch.arange(len(flat)).double() + 1)).sum())}

    return {name: one(t) for name, t in sorted(tensors.items())}


golden = {}
base = torch.randn(6, 8)
weights = collections.OrderedDict(
    {
        "backbone.conv1.weight": torch.randn(4, 3, 3, 3),
        "backbone.view": base[1:3, 2:5],
        "backbone.transposed": base.t(),
        "head.half": torch.randn(5).half(),
        "head.bfloat": torch.randn(5).bfloat16(),
        "head.double": torch.randn(2, 2).double(),
        "head.parameter": nn.Parameter(torch.randn(3)),
        "bn.num_batches_tracked": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }
)
torch.save({"meta": {"epoch": 3, "classes": ("a", "b")}, "state_dict": weights, "optimizer": {"state": {0: {"momentum": torch.zeros(3)}}}}, HERE / "nested.pth")
golden["nested.pth"] = describe(weights)

flat = {"a": torch.randn(64), "b": torch.randn(2, 3), "c": torch.arange(5)}
torch.save(flat, HERE / "flat.pth")
golden["flat.pth"] = describe(flat)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.proj = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.ln(x) @ self.proj


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(Block(), Block())
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.visual(x) * self.logit_scale.exp()


clip = Clip().half()
torch.jit.save(torch.jit.trace(clip.float(), torch.randn(1, 8)).half(), HERE / "script.pt")
golden["script.pt"] = describe(dict(clip.half().named_parameters()) | dict(clip.named_buffers()))

tensors = {"x": torch.randn(3, 4), "y": torch.randn(7).half(), "z": torch.randn(2).bfloat16(), "n": torch.arange(3)}
save_file(tensors, HERE / "weights.safetensors", metadata={"made": "by make.py"})
golden["weights.safetensors"] = describe(tensors)

HERE.joinpath("golden.json").write_text(json.dumps(golden, indent=1) + "\n")
