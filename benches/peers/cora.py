"""CORA's detector in plain PyTorch, one step at a time, so that another program can take turns with it.

Written from the published formulas in the way of the published code: all arithmetic in f32, frozen normalisation as a product and a sum, RoIAlign
of whole maps of queries, keys and values, attention whose weights are written down, and at test all queries classified anew. No line of it is
from the published code; parameters have its names.

Usage: cora.py FOLDER N_THREADS; it reads `weights.safetensors` and `inputs.safetensors` from the folder, and says `ready`. Then it reads `train`,
`test` or `check` from stdin, line by line, and answers each with a line of JSON: the seconds that took, and the loss or the number of detections.
`check` writes what it computes of a small batch to `peer.safetensors`.
"""

import math
import pathlib
import sys
import time

import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, generalized_box_iou, roi_align

DIM, HEADS, WIDTH = 256, 8, 1024
DROPOUT = 0.1
# The queries whose boxes are classified in `check`.
N_CHECKED = 50


class FrozenNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        for name, value in [("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)]:
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Bottleneck(nn.Module):
    def __init__(self, n_in, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, planes, 1, bias=False), FrozenNorm(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), FrozenNorm(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), FrozenNorm(4 * planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        fits = stride == 1 and n_in == 4 * planes
        self.downsample = None if fits else nn.Sequential(nn.Conv2d(n_in, 4 * planes, 1, bias=False), FrozenNorm(4 * planes))

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = self.pool(F.relu(self.bn2(self.conv2(inner))))
        inner = self.bn3(self.conv3(inner))
        return F.relu(inner + (x if self.downsample is None else self.downsample(self.pool(x))))


class AttentionPool(nn.Module):
    def __init__(self, side, n, heads, dim):
        super().__init__()
        self.side, self.heads = side, heads
        self.positional_embedding = nn.Parameter(torch.zeros(side * side + 1, n))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(n, n) for _ in range(3))
        self.c_proj = nn.Linear(n, dim)

    def attend(self, q, k, v):
        """`q` `[B, 1, C]`, `k` and `v` `[B, L, C]`: `[B, D]` of unit length."""
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1)
        return F.normalize(self.c_proj((weights @ v).transpose(1, 2).flatten(1)), dim=1)

    def full(self, grids):
        tokens = grids.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding
        return self.attend(self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))

    def fast(self, features, boxes):
        """Of the same number of boxes in every image, xyxy in cells: `[B, N, D]`."""
        cells, table = features.permute(0, 2, 3, 1), self.positional_embedding

        def pooled(linear):
            return roi_align(linear(cells).permute(0, 3, 1, 2).contiguous(), boxes, self.side, aligned=True).flatten(2).transpose(1, 2)

        q = pooled(self.q_proj).mean(1, keepdim=True) + table[:1] @ self.q_proj.weight.T
        k, v = (pooled(linear) + table[1:] @ linear.weight.T for linear in (self.k_proj, self.v_proj))
        return self.attend(q, k, v).unflatten(0, (len(boxes), -1))


class ClipResNet(nn.Module):
    """RN50."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), FrozenNorm(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), FrozenNorm(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, padding=1, bias=False), FrozenNorm(64)
        n_in = 64
        for level, blocks in enumerate((3, 4, 6, 3)):
            planes = 64 << level
            strides = [2 if level else 1] + [1] * (blocks - 1)
            layer = [Bottleneck(n_in if block == 0 else 4 * planes, planes, stride) for block, stride in enumerate(strides)]
            setattr(self, f"layer{level + 1}", nn.Sequential(*layer))
            n_in = 4 * planes
        self.attnpool = AttentionPool(7, 2048, 32, 1024)

    def forward(self, images):
        """Layer 3 and layer 4."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        layer3 = self.layer3(self.layer2(self.layer1(x)))
        return layer3, self.layer4(layer3)

    def exact(self, layer3, boxes):
        return self.attnpool.full(self.layer4(roi_align(layer3, boxes, 2 * self.attnpool.side, aligned=True)))


class Mlp(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class OutProjection(nn.Module):
    def __init__(self):
        super().__init__()
        self.out_proj = nn.Linear(DIM, DIM)


class PackedProjection(OutProjection):
    def __init__(self):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.zeros(3 * DIM, DIM)), nn.Parameter(torch.zeros(3 * DIM))


class Layer(nn.Module):
    """What layers of the encoder and of the decoder have in common."""

    def __init__(self):
        super().__init__()
        self.linear1, self.linear2, self.activation = nn.Linear(DIM, WIDTH), nn.Linear(WIDTH, DIM), nn.PReLU()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.dropout = nn.Dropout(DROPOUT)

    def attend(self, q, k, v, mask=None):
        """`q`, `k`, `v`: `[B, HEADS, L, W]`; `mask` `[B, L]`, true where keys are hidden."""
        logits = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None], float("-inf"))
        return (self.dropout(logits.softmax(-1)) @ v).transpose(1, 2).flatten(2)

    def perceive(self, x):
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))


def to_heads(x):
    return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class EncoderLayer(Layer):
    def __init__(self):
        super().__init__()
        self.self_attn = PackedProjection()

    def forward(self, x, places, mask):
        weights, biases = self.self_attn.in_proj_weight.chunk(3), self.self_attn.in_proj_bias.chunk(3)
        q, k, v = (to_heads(F.linear(y, *part)) for y, part in zip((x + places, x + places, x), zip(weights, biases)))
        x = self.norm1(x + self.dropout(self.self_attn.out_proj(self.attend(q, k, v, mask))))
        return self.norm2(x + self.perceive(x))


class DecoderLayer(Layer):
    def __init__(self, is_first):
        super().__init__()
        self.norm3 = nn.LayerNorm(DIM)
        names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v", "ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"]
        for name in names + ["ca_qpos"] * is_first:
            setattr(self, f"{name}_proj", nn.Linear(DIM, DIM))
        self.self_attn, self.cross_attn, self.is_first = OutProjection(), OutProjection(), is_first

    def forward(self, x, places, sines, memory, pos, mask):
        q = self.sa_qcontent_proj(x) + self.sa_qpos_proj(places)
        k = self.sa_kcontent_proj(x) + self.sa_kpos_proj(places)
        seen = self.attend(*map(to_heads, (q, k, self.sa_v_proj(x))))
        x = self.norm1(x + self.dropout(self.self_attn.out_proj(seen)))
        q, k, k_places = self.ca_qcontent_proj(x), self.ca_kcontent_proj(memory), self.ca_kpos_proj(pos)
        if self.is_first:
            q, k = q + self.ca_qpos_proj(places), k + k_places
        q = torch.cat([to_heads(q), to_heads(self.ca_qpos_sine_proj(sines))], 3)
        k = torch.cat([to_heads(k), to_heads(k_places)], 3)
        seen = self.attend(q, k, to_heads(self.ca_v_proj(memory)), mask)
        x = self.norm2(x + self.dropout(self.cross_attn.out_proj(seen)))
        return self.norm3(x + self.perceive(x))


def logit(x, eps):
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def waves(angles, temperature):
    """Sines and cosines of angles `[...]`: `[..., DIM / 2]`."""
    order = torch.arange(DIM // 2, dtype=torch.float32)
    angles = angles[..., None] / temperature ** (2 * (order // 2) / (DIM // 2))
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-2)


def image_encoding(mask):
    """Of the cells of maps, `mask` `[B, h, w]`, true where padded: `[B, h w, DIM]`."""
    kept = (~mask).float()

    def axis(along):
        places = kept.cumsum(along) - 0.5
        last = places.select(along, -1).unsqueeze(along)
        return waves(places / (last + 0.5 + 1e-6) * 2 * math.pi, 20.0)

    return torch.cat([axis(1), axis(2)], -1).flatten(1, 2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.query_scale = nn.ModuleList(EncoderLayer() for _ in range(3)), Mlp(DIM, DIM, DIM)

    def forward(self, x, pos, mask):
        for layer in self.layers:
            x = layer(x, pos * self.query_scale(x), mask)
        return x


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(index == 0) for index in range(6))
        self.norm, self.query_scale = nn.LayerNorm(DIM), Mlp(DIM, DIM, DIM)
        self.ref_point_head, self.ref_anchor_head = Mlp(2 * DIM, DIM, DIM), Mlp(DIM, DIM, 2)

    def forward(self, state, reference, memory, pos, mask, heads):
        states, references, start = [], [reference], reference
        for index, (layer, head) in enumerate(zip(self.layers, heads)):
            encoding = waves(start[..., [1, 0, 2, 3]] * 2 * math.pi, 10000.0)
            places = self.ref_point_head(encoding.flatten(2))
            sines = encoding[..., :2, :].flatten(2) * (1 if index == 0 else self.query_scale(state))
            ratio = self.ref_anchor_head(state).sigmoid() / start[..., 2:]
            y, x = sines.chunk(2, -1)
            sines = torch.cat([y * ratio[..., 1:], x * ratio[..., :1]], -1)
            state = layer(state, places, sines, memory, pos, mask)
            states.append(self.norm(state))
            if index + 1 < len(self.layers):
                references.append((head(state) + logit(start, 1e-3)).sigmoid())
                start = references[-1].detach()
        return torch.stack(states), torch.stack(references)


class Localizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_embed = nn.Embedding(1000, 4)
        self.input_proj = nn.Sequential(nn.Sequential(nn.Conv2d(1024, DIM, 1)))
        self.text_proj = Mlp(1024, 128, DIM)
        self.transformer = nn.Module()
        self.transformer.encoder, self.transformer.decoder = Encoder(), Decoder()
        self.bbox_embed = nn.ModuleList(Mlp(DIM, DIM, DIM, 4) for _ in range(6))
        self.objectness_embed = nn.Linear(DIM, 1)

    def forward(self, layer3, mask, texts, classes):
        """Boxes `[6, B, N, 4]` and logits of objectness `[6, B, N]`."""
        pos, hidden = image_encoding(mask), mask.flatten(1)
        memory = self.transformer.encoder(self.input_proj(layer3).flatten(2).transpose(1, 2), pos, hidden)
        content = self.text_proj(texts)[classes]
        anchors = self.query_embed.weight.sigmoid().expand(len(classes), -1, -1)
        states, references = self.transformer.decoder(content, anchors, memory, pos, hidden, self.bbox_embed)
        boxes = [(head(state) + logit(reference, 1e-5)).sigmoid() for head, state, reference in zip(self.bbox_embed, states, references)]
        return torch.stack(boxes), self.objectness_embed(states).squeeze(-1)


def to_xyxy(boxes):
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def in_cells(boxes, mask):
    """Boxes `[N, 4]`, cxcywh, relative to an image: xyxy in cells of a map with `mask` `[h, w]`."""
    sides = torch.stack([(~mask[0]).sum(), (~mask[:, 0]).sum()]).float()
    return to_xyxy(boxes) * sides.repeat(2)


def padding(sizes, images):
    """The mask of pixels: `[B, H, W]`, true where padded; `sizes` `[B, 2]`: height and width."""
    mask = torch.ones(len(images), *images.shape[2:], dtype=torch.bool)
    for of_image, (height, width) in zip(mask, sizes.tolist()):
        of_image[:height, :width] = False
    return mask


def sampled(mask, features):
    return F.interpolate(mask[None].float(), size=features.shape[2:])[0].bool()


@torch.no_grad()
def match(boxes, objectness, classes, targets):
    """For each image the places of queries and of their objects."""
    pairs = []
    for boxes, objectness, classes, (wanted, labels) in zip(boxes, objectness, classes, targets):
        p = objectness.sigmoid()
        cost = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        overlap = generalized_box_iou(to_xyxy(boxes), to_xyxy(wanted))
        cost = 5 * torch.cdist(boxes, wanted, p=1) + 2 * cost[:, None] - 2 * overlap
        allowed = classes[:, None] == labels[None]
        allowed &= (allowed & (overlap > 0)).any(0)
        cost = cost.masked_fill(~allowed, 99.0)
        queries, objects = map(torch.as_tensor, linear_sum_assignment(cost))
        kept = cost[queries, objects] < 99
        pairs.append((queries[kept], objects[kept]))
    return pairs


def losses(all_boxes, all_objectness, classes, targets):
    levels = [match(boxes, objectness, classes, targets) for boxes, objectness in zip(all_boxes, all_objectness)]
    n = max(sum(len(queries) for queries, _ in levels[-1]), 1)
    total = 0
    for boxes, objectness, pairs in zip(all_boxes, all_objectness, levels):
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
        queries = torch.cat([queries for queries, _ in pairs])
        wanted = torch.cat([wanted[objects] for (wanted, _), (_, objects) in zip(targets, pairs)])
        positive = torch.zeros_like(objectness)
        positive[images, queries] = 1
        p = objectness.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(objectness, positive, reduction="none")
        right = p * positive + (1 - p) * (1 - positive)
        focal = entropy * (1 - right) ** 2 * (0.25 * positive + 0.75 * (1 - positive))
        found = boxes[images, queries]
        overlap = generalized_box_iou(to_xyxy(found), to_xyxy(wanted)).diag()
        total = total + (2 * focal.sum() + 5 * (found - wanted).abs().sum() + 2 * (1 - overlap).sum()) / n
    return total


def main():
    folder = pathlib.Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    weights, inputs = load_file(folder / "weights.safetensors"), load_file(folder / "inputs.safetensors")
    clip, localizer = ClipResNet(), Localizer()
    clip.load_state_dict({name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")})
    localizer.load_state_dict({name: value for name, value in weights.items() if not name.startswith("visual.")})
    clip.requires_grad_(False)
    base, texts = inputs["texts.base"], inputs["texts.all"]
    optimizer = torch.optim.AdamW(localizer.parameters(), lr=1e-10, weight_decay=1e-4)

    def batch(name):
        images = inputs[f"{name}.images"]
        return images, padding(inputs[f"{name}.sizes"], images)

    def targets(name):
        return [(inputs[f"{name}.boxes.{image}"], inputs[f"{name}.labels.{image}"]) for image in range(len(inputs[f"{name}.sizes"]))]

    @torch.no_grad()
    def maps(images, mask):
        """Layer 3, its mask, and the anchors' features by layer 4."""
        layer3, layer4 = clip(images)
        anchors = localizer.query_embed.weight.sigmoid()
        boxes = [in_cells(anchors, of_image) for of_image in sampled(mask, layer4)]
        return layer3, sampled(mask, layer3), clip.attnpool.fast(layer4, boxes)

    @torch.no_grad()
    def name_anchors(features, texts, factors=1.0):
        cosines = features @ texts.T
        background = torch.full_like(cosines[..., :1], -1.0)
        probabilities = (100 * torch.cat([cosines, background], -1)).softmax(-1)[..., :-1]
        return (probabilities * factors).argmax(-1)

    def train():
        localizer.train()
        layer3, mask, features = maps(*batch("train"))
        classes = name_anchors(features, base)
        loss = losses(*localizer(layer3, mask, base, classes), classes, targets("train"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(localizer.parameters(), 0.1)
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def test():
        localizer.eval()
        layer3, mask, features = maps(*batch("test"))
        factors = torch.ones(len(texts))
        factors[len(base) :] = 8.0
        boxes, objectness = localizer(layer3, mask, texts, name_anchors(features, texts, factors))
        boxes, objectness = boxes[-1, 0], objectness[-1, 0]
        cosines = clip.exact(layer3, [in_cells(boxes, mask[0])]) @ texts.T
        probabilities = F.pad(100 * cosines, (0, 1)).softmax(-1)[:, :-1]
        scores = logit(probabilities * objectness.sigmoid()[:, None], 1e-5).sigmoid()
        queries, classes = torch.where(scores > 0.001)
        scores = scores[queries, classes]
        kept = batched_nms(to_xyxy(boxes)[queries], scores, classes, 0.5)[:100]
        return len(kept)

    def check():
        localizer.eval()
        layer3, mask, features = maps(*batch("small"))
        boxes, objectness = localizer(layer3, mask, base, inputs["small.classes"])
        loss = losses(boxes, objectness, inputs["small.classes"], targets("small"))
        optimizer.zero_grad()
        loss.backward()
        gradients = {f"gradient.{name}": parameter.grad for name, parameter in localizer.named_parameters()}
        with torch.no_grad():
            of_boxes = clip.exact(layer3, [in_cells(of_image[:N_CHECKED], image) for of_image, image in zip(boxes[-1], mask)])
        found = {"anchors": features, "boxes": boxes.detach(), "objectness": objectness.detach(), "loss": loss.detach(), "exact": of_boxes}
        save_file({name: value.contiguous() for name, value in (found | gradients).items()}, folder / "peer.safetensors")
        return loss.item()

    print("ready", flush=True)
    for line in sys.stdin:
        work = {"train": train, "test": test, "check": check}[line.strip()]
        started = time.perf_counter()
        outcome = work()
        print(time.perf_counter() - started, outcome, flush=True)


main()
