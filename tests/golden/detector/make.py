"""Makes the golden numbers of the detector: run it in this folder, it writes one JSON file per subject.

Made with torch 2.11.0 (CPU, f32), torchvision 0.26.0, scikit-learn 1.7.2 (recall).

No weights and few inputs are kept. Both sides fill every tensor by one formula of its name and flat index (`unit`), as in `../clip/make.py`.

Tolerances, absolute where nothing else is said, with the largest error seen in brackets:
- RoIAlign and its gradient 1e-5 absolute on values up to 2 [5e-7]: sampling points are computed alike, sums are ordered differently;
- overlaps 1e-6, deltas 1e-4 on values up to 30, decoded boxes 1e-3 px, anchors none; what is kept, matched and sampled must be equal;
- feature maps 1e-4 of their spread [8e-6]: convolutions sum in another order where frozen weights are fused or memory lies otherwise;
- losses of proposals 1e-5 relative, those of training 1e-4 and lengths of gradients 1e-3 [3e-7, 7e-5], proposals 1e-3 px; logits 1e-4 on values up to 100, which are f64 here;
- Mask R-CNN 1e-3 on px, scores and mask probabilities [3e-4 px, 2e-5, 1e-5]: what feature maps differ by goes through two heads. Scores of
  neighbours are at least 1e-5 apart, so that the order is settled.
- losses of distillation 1e-6 relative, which are f64 here, and their gradients 1e-6; recall 1e-6;
- the object localisation network: losses 1e-4 and lengths of gradients 1e-3 relative, boxes 1e-3 px, scores 1e-5.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection import _utils as det_utils
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "clip"))
from unit import unit


def field(name, *shape):
    return torch.from_numpy(unit(name, math.prod(shape))).reshape(shape)


def boxes_of(name, n, extent, least, most):
    """n boxes with corners in a square of `extent` px and sides between `least` and `most` px; every operation is exact or rounds alike in f32."""
    u = (unit(name, 4 * n).reshape(n, 4) + np.float32(1)) * np.float32(0.5)
    low = u[:, :2] * np.float32(extent)
    return torch.from_numpy(np.concatenate([low, low + (np.float32(least) + u[:, 2:] * np.float32(most - least))], 1))


def numbers(tensor, digits=7):
    return [float(f"{v:.{digits}g}") for v in tensor.double().flatten().tolist()]


def write(name, **content):
    with open(f"{name}.json", "w") as file:
        json.dump(content, file, separators=(",", ":"))
        file.write("\n")


def make_roi_align():
    """One level of stride 4 under two images of 112 x 80 px, and boxes of all kinds."""
    boxes = [
        [
            [8.0, 8.0, 60.0, 44.0],
            [-30.5, -20.25, 40.0, 30.0],  # partly outside
            [90.0, 60.0, 150.0, 130.0],  # partly outside, beyond the padding
            [3.3, 70.1, 110.9, 72.4],  # wide and flat
            [50.2, 1.0, 51.0, 79.0],  # tall and thin
            [20.0, 20.0, 20.5, 20.5],  # far below a cell
            [33.0, 44.0, 33.0, 50.0],  # no width
            [-90.0, -90.0, -20.0, -20.0],  # wholly outside
        ],
        [
            [0.0, 0.0, 112.0, 80.0],  # everything
            [17.7, 12.3, 95.1, 66.6],
            [111.0, 79.0, 112.0, 80.0],  # the last px
        ],
    ]
    cases = {}
    for case, (sampling, aligned, side) in {"adaptive": (-1, True, 7), "fixed": (2, False, 5)}.items():
        features = field("features", 2, 2, 20, 28).requires_grad_()
        pooled = torchvision.ops.roi_align(features, [torch.tensor(b) for b in boxes], side, 0.25, sampling, aligned)
        (pooled * field(f"upstream.{case}", *pooled.shape)).sum().backward()
        cases[case] = {"pooled": numbers(pooled), "gradient": numbers(features.grad)}
    write("roi_align", boxes=boxes, **cases)


def make_boxes():
    """Duplicates among 5,000 boxes of 20 classes; overlaps, deltas and anchors of a few."""
    boxes = boxes_of("nms.boxes", 5000, 200, 10, 80)
    scores = field("nms.scores", 5000)
    groups = torch.from_numpy(((unit("nms.groups", 5000) + np.float32(1)) * np.float32(10)).astype(np.int64))
    assert len(scores.unique()) == 5000, "the order would be open"
    kept = torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
    print(f"nms keeps {len(kept)} of 5000")

    some, others = boxes_of("overlaps.a", 7, 60, 10, 80), boxes_of("overlaps.b", 5, 60, 10, 80)
    coder = det_utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    first, second = boxes_of("coder.from", 6, 60, 10, 80), boxes_of("coder.to", 6, 60, 10, 80)
    deltas = field("coder.deltas", 6, 8) * 3
    # The last one asks for more than 62.5 times the size.
    deltas[5, 2:4] = 25.0

    generator = AnchorGenerator(((32,), (64,)), ((0.5, 1.0, 2.0),) * 2)
    levels = [torch.zeros(1, 1, 5, 6), torch.zeros(1, 1, 3, 3)]
    (anchors,) = generator(ImageList(torch.zeros(1, 3, 40, 48), [(40, 48)]), levels)
    write(
        "boxes",
        kept=kept.tolist(),
        iou=numbers(torchvision.ops.box_iou(some, others)),
        encoded=numbers(coder.encode_single(second, first)),
        decoded=numbers(coder.decode_single(deltas, first)),
        anchors=numbers(anchors),
    )


def make_matching():
    """Which of 2,000 boxes stand for which of 12 objects, by torchvision's matcher; low-quality matches after mmdet's rule."""
    boxes, objects = boxes_of("matching.boxes", 2000, 200, 10, 80), boxes_of("matching.objects", 12, 200, 10, 80)
    overlaps = torchvision.ops.box_iou(objects, boxes)
    plain = det_utils.Matcher(0.5, 0.5, allow_low_quality_matches=False)(overlaps)
    three = det_utils.Matcher(0.7, 0.3, allow_low_quality_matches=False)(overlaps)
    low_quality = three.clone()
    for row, overlap in enumerate(overlaps):
        if overlap.max() >= 0.3:
            low_quality[overlap == overlap.max()] = row
    changed = int((low_quality != three).sum())
    print(f"matching: {int((plain >= 0).sum())} at 0.5, {int((three >= 0).sum())} at 0.7, {changed} by low quality")
    assert changed > 3
    write("matching", at_half=plain.tolist(), low_quality=low_quality.tolist())


def rule(name, shape):
    """Middle and half range of a tensor's values, chosen so that activations stay near one."""
    if name.endswith("running_var"):
        return 1.0, 0.25
    if name.endswith(("bias", "running_mean")):
        return 0.0, 0.1
    if name.endswith("bn3.weight"):
        # Small, so that the sum of many blocks does not grow.
        return 0.25, 0.1
    if len(shape) == 1:
        return 1.0, 0.1
    gain = math.sqrt((6.0 if len(shape) == 4 else 3.0) / math.prod(shape[1:]))
    if name.endswith(("rpn_reg.weight", "bbox_pred.weight")):
        # Boxes should differ from anchors, but not by the largest factor.
        return 0.0, (0.2 if name.endswith("rpn_reg.weight") else 0.05) * gain
    if name.endswith("mask_fcn_logits.weight"):
        # Probabilities should be far from 0 and 1.
        return 0.0, 0.15 * gain
    return 0.0, gain


def values(name, shape):
    middle, half_range = rule(name, shape)
    flat = np.float32(middle) + np.float32(half_range) * unit(name, math.prod(shape))
    return torch.from_numpy(flat).reshape(shape)


def fill(model, prefix=""):
    """Overwrites all floating tensors of a network; returns their names and shapes."""
    state = model.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    for name, shape in shapes.items():
        state[name].copy_(values(prefix + name, shape))
    return shapes


def images(name, b, h, w):
    """Squares of 32 px in random colours, under a fine grain: so that images differ at every scale."""
    colours = field(f"{name}.colours", b, 3, h // 32, w // 32)
    return 2.0 * colours.repeat_interleave(32, 2).repeat_interleave(32, 3) + field(f"{name}.grain", b, 3, h, w)


def summary(tensor):
    """Shape, spread, and 200 values evenly spaced in memory order."""
    flat = tensor.flatten()
    step = max(len(flat) // 200, 1)
    return {"shape": list(tensor.shape), "std": float(flat.std()), "values": numbers(flat[::step])}


def maps_of(network, x):
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    maps = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        maps.append(x)
    return maps


@torch.no_grad()
def make_backbones():
    """C2 to C5 of torchvision's ResNets, as they are and with the stride in the first convolution; P2 to P6 of its pyramid."""
    content = {}
    x = images("images.backbone", 2, 96, 128)
    for case, name in {"middle": "resnet50", "first": "resnet50", "18": "resnet18", "101": "resnet101"}.items():
        network = torchvision.models.get_model(name).eval()
        fill(network)
        if case == "first":
            for stage in (network.layer2, network.layer3, network.layer4):
                stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        maps = maps_of(network, x)
        print(case, [f"{m.std():.2f}" for m in maps])
        content[case] = [summary(m) for m in maps]

    widths = [8, 12, 16, 20]
    # Sides that are not twice the next one.
    maps = {str(i): field(f"pyramid.{i}", 2, c, h, w) for i, (c, h, w) in enumerate(zip(widths, (25, 13, 7, 4), (19, 10, 5, 3)))}
    for case, norm in {"bias": None, "batch": torch.nn.BatchNorm2d}.items():
        pyramid = FeaturePyramidNetwork(widths, 16, extra_blocks=LastLevelMaxPool(), norm_layer=norm)
        for i in range(4):
            for ours, theirs in (("lateral_convs", pyramid.inner_blocks[i]), ("fpn_convs", pyramid.layer_blocks[i])):
                for index, layer in (("0", "conv"), ("1", "bn")):
                    if index in dict(theirs.named_children()):
                        fill(theirs[int(index)], f"neck.{ours}.{i}.{layer}.")
        content[f"pyramid.{case}"] = [summary(m) for m in pyramid.eval()(maps).values()]
    # Last, because it moves the running statistics.
    content["pyramid.batch.train"] = [summary(m) for m in pyramid.train()(maps).values()]
    content["names.resnet101"] = [[n, list(t.shape)] for n, t in torchvision.models.resnet101().state_dict().items() if n[:3] != "fc." and t.dim()]
    write("backbones", **content)


@torch.no_grad()
def make_rpn():
    """A proposal network over a pyramid of 16 channels and two images, of which the second is smaller than the batch."""
    batch, sizes = (128, 160), [(128, 160), (100, 90)]
    strides = [4, 8, 16, 32, 64]
    pyramid = [field(f"rpn.{i}", 2, 16, -(-batch[0] // s), -(-batch[1] // s)) for i, s in enumerate(strides)]
    weights = {name: values(f"rpn_head.{name}.weight", shape) for name, shape in
               {"rpn_conv": (16, 16, 3, 3), "rpn_cls": (3, 16, 1, 1), "rpn_reg": (12, 16, 1, 1)}.items()}
    biases = {name: values(f"rpn_head.{name}.bias", (weights[name].shape[0],)) for name in weights}
    anchors, objectness, deltas, covered, level_of = [], [], [], [[], []], []
    for i, (level, stride) in enumerate(zip(pyramid, strides)):
        hidden = F.relu(F.conv2d(level, weights["rpn_conv"], biases["rpn_conv"], padding=1))
        h, w = level.shape[2:]
        objectness.append(F.conv2d(hidden, weights["rpn_cls"], biases["rpn_cls"]).permute(0, 2, 3, 1).flatten(1))
        deltas.append(F.conv2d(hidden, weights["rpn_reg"], biases["rpn_reg"]).permute(0, 2, 3, 1).reshape(2, -1, 4))
        ratios = torch.tensor([0.5, 1.0, 2.0]).double()
        sides = torch.stack([8 * stride / ratios.sqrt(), 8 * stride * ratios.sqrt()], 1)
        base = torch.cat([-sides, sides], 1) / 2
        y, x = torch.meshgrid(torch.arange(h) * stride, torch.arange(w) * stride, indexing="ij")
        shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        anchors.append((shifts + base).reshape(-1, 4).float())
        level_of += [i] * len(anchors[-1])
        for image, (height, width) in enumerate(sizes):
            rows, columns = (-(-(-(-side // 32) * 32) // stride) for side in (height, width))
            inside = (torch.arange(h)[:, None] < rows) & (torch.arange(w)[None] < columns)
            covered[image].append(inside.flatten().repeat_interleave(3))
    coder = det_utils.BoxCoder((1.0, 1.0, 1.0, 1.0))
    objects = [boxes_of("rpn.objects.0", 4, 70, 20, 60), boxes_of("rpn.objects.1", 2, 30, 20, 50)]
    all_anchors, n_sampled, entropy, differences = torch.cat(anchors), 0, 0.0, 0.0
    proposals, n_objects = [], []
    for image in range(2):
        inside = torch.cat(covered[image])
        logits, changes = torch.cat([o[image] for o in objectness]), torch.cat([d[image] for d in deltas])
        overlaps = torchvision.ops.box_iou(objects[image], all_anchors[inside])
        matches = det_utils.Matcher(0.7, 0.3, allow_low_quality_matches=False)(overlaps)
        for row, overlap in enumerate(overlaps):
            if overlap.max() >= 0.3:
                matches[overlap == overlap.max()] = row
        learned = matches != -2
        entropy += F.binary_cross_entropy_with_logits(logits[inside][learned], (matches[learned] >= 0).float(), reduction="sum")
        found = matches >= 0
        targets = coder.encode_single(objects[image][matches[found]], all_anchors[inside][found])
        differences += (changes[inside][found] - targets).abs().sum()
        n_sampled += int(learned.sum())
        n_objects.append(int(found.sum()))

        boxes, scores, levels = [], [], []
        for i in range(5):
            best = objectness[i][image].topk(min(300, len(anchors[i]))).indices
            boxes.append(coder.decode_single(deltas[i][image][best], anchors[i][best]))
            scores.append(objectness[i][image][best].sigmoid())
            levels.append(torch.full_like(best, i))
        boxes, scores, levels = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        boxes = torchvision.ops.clip_boxes_to_image(boxes, sizes[image])
        large = torchvision.ops.remove_small_boxes(boxes, 1e-3)
        boxes, scores, levels = boxes[large], scores[large], levels[large]
        kept = torchvision.ops.batched_nms(boxes, scores, levels, 0.7)[:100]
        proposals.append({"boxes": numbers(boxes[kept]), "scores": numbers(scores[kept])})
    print(f"rpn: {n_objects} anchors of objects among {n_sampled}, outside {[int((~torch.cat(c)).sum()) for c in covered]}")
    write("rpn", objectness=float(entropy / n_sampled), boxes=float(differences / n_sampled), proposals=proposals)


@torch.no_grad()
def make_classifier():
    """Logits of 5 regions over 7 classes, of which 4 are base, in f64."""
    x = field("classifier.x", 5, 12).double()
    weight, bias = field("classifier._linear.weight", 8, 12).double(), field("classifier._linear.bias", 8).double()
    table, background = field("classifier.classes", 7, 8).double(), field("classifier._bg_embedding", 1, 8).double()
    e = F.normalize(x @ weight.T + bias)
    cosines = torch.cat([e @ table.T, e @ F.normalize(background).T], 1)
    write("classifier", embeddings=numbers(e), train=numbers(cosines / 0.007), test=numbers(cosines / 0.01), affine=numbers(cosines * 20 - 4))


def make_distillation():
    """Losses and gradients of embeddings of unit length, and recall, by torch's functions and scikit-learn."""
    from sklearn.metrics import recall_score

    said = F.normalize(field("distillation.said", 9, 6).double()).requires_grad_()
    expected = F.normalize(field("distillation.expected", 9, 6).double())
    losses = {
        "embeddings": lambda s, e: F.l1_loss(s, e),
        "relations": lambda s, e: F.mse_loss(s @ s.T, e @ e.T),
        "images": lambda s, e: F.mse_loss(s, e, reduction="sum"),
    }
    content = {}
    for name, loss in losses.items():
        # All rows at once, and as two images of four and five rows on a device each.
        for case, parts in {"": [slice(0, 9)], "_groups": [slice(0, 4), slice(4, 9)]}.items():
            value = torch.stack([loss(said[part], expected[part]) for part in parts]).mean()
            (gradient,) = torch.autograd.grad(value, said)
            content[name + case] = {"loss": numbers(value), "gradient": numbers(gradient)}
    logits, labels = field("distillation.logits", 9, 7), field("distillation.labels", 9, 7) > 0.6
    labels[:, [3, 6]] = False
    best = torch.zeros_like(labels).scatter_(1, logits.topk(2).indices, True)
    present = labels.any(0).nonzero().flatten().tolist()
    recall = recall_score(labels.numpy(), best.numpy(), labels=present, average="macro", zero_division=0)

    # The asymmetric loss, in f64; the last class is novel.
    logits = (logits * 5).double()
    logits[:, 6] = -math.inf
    logits.requires_grad_()
    p = logits.sigmoid()
    q = torch.minimum(1 - p + 0.05, torch.ones_like(p))
    cost = torch.where(labels, -p.clamp(min=1e-8).log(), -((1 - q) ** 4).detach() * q.clamp(min=1e-8).log())
    cost[:, 6] = 0
    cost.mean().backward()
    asymmetric = {"loss": numbers(cost.mean()), "gradient": numbers(logits.grad)}
    write("distillation", **content, asymmetric=asymmetric, labels=labels.int().flatten().tolist(), recall=[recall])


@torch.no_grad()
def make_mask_rcnn():
    """torchvision's Mask R-CNN on five images of different sizes in one batch, without its resizing; the best 20 detections of each.

    Biases of classes make up for what all regions have in common, so that many classes are found; they are kept."""
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, rpn_pre_nms_top_n_test=300, rpn_post_nms_top_n_test=150
    ).eval()
    shapes = fill(model)
    sizes = [(160, 192), (224, 256), (200, 131), (97, 256), (224, 150)]
    batch = images("images.mask-rcnn", 5, 224, 256)
    for image, (height, width) in enumerate(sizes):
        batch[image, :, height:], batch[image, :, :, width:] = 0, 0
    features = model.backbone(batch)
    batch = ImageList(batch, sizes)
    proposals, _ = model.rpn(batch, features)
    heads = model.roi_heads
    regions = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
    logits = heads.box_predictor.cls_score(regions)
    biases = heads.box_predictor.cls_score.bias
    biases -= logits.mean(0)
    biases.copy_(torch.tensor(numbers(biases)))
    detections, _ = model.roi_heads(features, proposals, sizes)
    found = []
    for detection in detections:
        boxes, scores, labels, masks = (detection[key][:20] for key in ("boxes", "scores", "labels", "masks"))
        gap = (scores[:-1] - scores[1:]).min()
        print(f"mask r-cnn: {len(detection['scores'])} detections, scores {scores[0]:.3f} to {scores[-1]:.3f}, smallest gap {gap:.1e}, "
              f"{len(labels.unique())} classes, masks {masks.quantile(0.1):.3f} to {masks.quantile(0.9):.3f}")
        assert gap > 1e-5, "the order would be open"
        found.append({
            "n": len(detection["scores"]), "boxes": numbers(boxes), "scores": numbers(scores), "labels": labels.tolist(),
            "mask_means": numbers(masks.mean((1, 2, 3))), "mask_diagonals": numbers(masks[:, 0].diagonal(dim1=1, dim2=2)),
        })
    write("mask_rcnn", shapes=shapes, cls_score_bias=numbers(biases), detections=found)


def make_training():
    """Losses of torchvision's Mask R-CNN with frozen statistics on two images, and the lengths of gradients, by the names of parameters.

    Samplers draw all that there is, so that nothing is left to chance."""
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    most = {f"rpn_{which}_nms_top_n_{phase}": n for which, n in (("pre", 300), ("post", 150)) for phase in ("train", "test")}
    all_of_them = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
    model = torchvision.models.detection.MaskRCNN(backbone, 91, **most, **all_of_them).train()
    with torch.no_grad():
        fill(model)
    height, width = 160, 192
    sizes = [(160, 192), (128, 150)]
    batch = images("images.training", 2, height, width)
    batch[1, :, 128:], batch[1, :, :, 150:] = 0, 0
    batch = ImageList(batch, sizes)
    features = model.backbone(batch.tensors)
    with torch.no_grad():
        found, _ = model.rpn.eval()(batch, features)
    targets = []
    for image, ranks in enumerate(([3, 20, 60], [5, 40])):
        # Objects lie where there are proposals, 3 px off: so that more regions than the objects themselves stand for them.
        boxes = (found[image][ranks] + torch.tensor([3.0, -3.0, 3.0, 3.0])).round().clamp(min=0)
        masks = torch.zeros(len(ranks), height, width, dtype=torch.uint8)
        for index, (x1, y1, x2, y2) in enumerate(boxes.int().tolist()):
            masks[index, y1:y2, x1:x2] = field(f"training.masks.{image}.{index}", height, width)[y1:y2, x1:x2] > -0.5
        targets.append({"boxes": boxes, "labels": torch.tensor([7, 1, 90][: len(ranks)]), "masks": masks})
    print("training:", [target["boxes"].tolist() for target in targets])
    proposals, losses = model.rpn.train()(batch, features, targets)
    regions = model.roi_heads.select_training_samples(proposals, targets)
    print("training:", [f"{int((labels > 0).sum())} of {len(labels)} regions are objects" for labels in regions[2]])
    losses |= model.roi_heads(features, proposals, sizes, targets)[1]
    sum(losses.values()).backward()
    losses = {name: loss.item() for name, loss in losses.items()}
    print("training:", losses)
    lengths = {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.requires_grad}
    write("training", objects=[numbers(target["boxes"]) for target in targets], losses=losses, gradients=lengths)


def make_oln():
    """An object localisation network on torchvision's backbone, written down after its paper and its authors' configuration: distances to
    sides by torchvision's BoxLinearCoder, centerness by FCOS's formula, overlaps by torchvision's box_iou, regions by its roi_align.

    The image is small enough that samples hold all anchors and all regions on objects, so that nothing is left to chance."""
    height, width, side = 64, 96, 7
    network = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    for name, tensor in network.state_dict().items():
        ours = name.replace("body.", "backbone.").replace("fpn.inner_blocks.", "neck.lateral_convs.").replace("fpn.layer_blocks.", "neck.fpn_convs.")
        ours = ours.replace(".0.weight", ".conv.weight").replace(".0.bias", ".conv.bias") if "neck" in ours else ours
        tensor.copy_(values(ours, tensor.shape))
    shapes = {
        "rpn_head.rpn_conv": (256, 256, 3, 3),
        "rpn_head.rpn_reg": (4, 256, 1, 1),
        "rpn_head.rpn_obj": (1, 256, 1, 1),
        "roi_head.bbox_head.shared_fcs.0": (1024, 256 * side * side),
        "roi_head.bbox_head.shared_fcs.1": (1024, 1024),
        "roi_head.bbox_head.fc_reg": (4, 1024),
        "roi_head.bbox_head.fc_bbox_score": (1, 1024),
    }
    heads = {}
    for name, shape in shapes.items():
        heads[f"{name}.weight"] = values(f"{name}.weight", shape).requires_grad_()
        heads[f"{name}.bias"] = values(f"{name}.bias", shape[:1])
    # Boxes about as large as their anchors, though hidden features have unit length.
    heads["rpn_head.rpn_reg.bias"] += 0.5

    def layer(kind, name, x, **options):
        return kind(x, heads[f"{name}.weight"], heads[f"{name}.bias"], **options)

    objects = torch.tensor([[20.0, 10.0, 58.0, 44.0], [48.0, 16.0, 84.0, 50.0]])
    levels = list(network(images("oln", 1, height, width)).values())
    coder = det_utils.BoxLinearCoder(normalize_by_size=True)
    anchors, centerness, boxes = [], [], []
    for level, stride in zip(levels, (4, 8, 16, 32, 64)):
        hidden = F.normalize(F.relu(layer(F.conv2d, "rpn_head.rpn_conv", level, padding=1)), p=2, dim=1)
        rows, columns = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing="ij")
        centres = torch.stack([columns, rows, columns, rows], -1).reshape(-1, 4) * stride
        anchors.append(centres + torch.tensor([-4.0, -4.0, 4.0, 4.0]) * stride)
        centerness.append(layer(F.conv2d, "rpn_head.rpn_obj", hidden).flatten())
        up, down, left, right = layer(F.conv2d, "rpn_head.rpn_reg", hidden)[0].flatten(1)
        boxes.append(coder.decode(torch.stack([left, up, right, down], 1), anchors[-1]))
    anchors, centerness, boxes = (torch.cat(parts) for parts in (anchors, centerness, boxes))

    limits = torch.tensor([width, height, width, height])
    inside = ((anchors[:, :2] >= 0).all(1) & (anchors[:, 2:] < limits[2:]).all(1)).nonzero()[:, 0]
    overlaps = torchvision.ops.box_iou(objects, anchors[inside])

    def assigned(high, low):
        matched = det_utils.Matcher(high, low, allow_low_quality_matches=False)(overlaps)
        for row, overlap in enumerate(overlaps):
            if overlap.max() >= 0.3:
                matched[overlap == overlap.max()] = row
        return matched

    matched = assigned(0.7, 0.3)
    positive = matched >= 0
    n = max(int(positive.sum()), 1) + min(int((matched == -1).sum()), 256 - int(positive.sum()))
    assert len(inside) < 256 and 0 < positive.sum() < 128
    said = boxes[inside[positive]]
    expected = objects[matched[positive]]
    lacking = 1 - torch.diag(torchvision.ops.box_iou(said, expected)).clamp(min=1e-6)

    near = assigned(0.3, 0.1)
    learned = near != -2
    left, up, right, down = coder.encode(anchors[inside], objects[near.clamp(min=0)]).T
    targets = torch.sqrt((torch.minimum(left, right) / torch.maximum(left, right)) * (torch.minimum(up, down) / torch.maximum(up, down)))
    is_centred = (near >= 0) & (torch.stack([left, up, right, down]).min(0).values > 0)
    targets = torch.where(is_centred, targets, torch.zeros(()))
    apart = (centerness[inside].sigmoid() - targets).abs()[learned]

    def look_again(regions):
        sizes = (regions[:, 2:] - regions[:, :2]).clamp(min=0)
        level_of = (torch.log2(torch.sqrt(sizes.prod(1)) / 56 + 1e-6)).floor().clamp(0, 3).long()
        pooled = torch.zeros(len(regions), 256, side, side)
        for place, stride in enumerate((4, 8, 16, 32)):
            rows = (level_of == place).nonzero()[:, 0]
            rois = torch.cat([torch.zeros(len(rows), 1), regions[rows]], 1)
            pooled = pooled.index_copy(0, rows, torchvision.ops.roi_align(levels[place], rois, side, 1 / stride, -1, True))
        hidden = F.relu(layer(F.linear, "roi_head.bbox_head.shared_fcs.0", pooled.flatten(1)))
        hidden = F.relu(layer(F.linear, "roi_head.bbox_head.shared_fcs.1", hidden))
        return layer(F.linear, "roi_head.bbox_head.fc_reg", hidden), layer(F.linear, "roi_head.bbox_head.fc_bbox_score", hidden)[:, 0]

    proposals = torchvision.ops.clip_boxes_to_image(boxes, (height, width)).detach()
    candidates = torch.cat([objects, proposals])
    region_overlaps, object_of = torchvision.ops.box_iou(objects, candidates).max(0)
    regions, on = candidates[region_overlaps >= 0.5], objects[object_of[region_overlaps >= 0.5]]
    assert 2 < len(regions) < 128 and len(candidates) > 512
    deltas, quality = look_again(regions)
    delta_coder = det_utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    losses = {
        "proposals": 10 * lacking.sum() / n,
        "centerness": apart.sum() / n,
        "boxes": (deltas - delta_coder.encode_single(on, regions)).abs().sum() / 512,
        "overlaps": (quality.sigmoid() - region_overlaps[region_overlaps >= 0.5]).abs().sum() / 512,
    }
    sum(losses.values()).backward()
    gradients = {name: float(tensor.grad.norm()) for name, tensor in heads.items() if tensor.grad is not None}
    gradients["backbone.layer4.2.conv3.weight"] = float(network.body.layer4[2].conv3.weight.grad.norm())

    with torch.no_grad():
        deltas, quality = look_again(proposals)
        found = torchvision.ops.clip_boxes_to_image(delta_coder.decode_single(deltas, proposals), (height, width))
        scores = torch.sqrt(centerness.sigmoid() * quality.sigmoid())
        kept = torchvision.ops.nms(found, scores, 0.7)[:30]
    gap = (scores[kept][:-1] - scores[kept][1:]).min()
    print("oln:", {name: f"{loss:.4f}" for name, loss in losses.items()}, f"{len(regions)} regions on objects, {n} anchors,")
    print(f"oln: scores {scores.max():.3f} to {scores.min():.3f}, smallest gap {gap:.1e}")
    losses = {name: loss.item() for name, loss in losses.items()}
    write("oln", losses=losses, gradients=gradients, boxes=numbers(found[kept]), scores=numbers(scores[kept]))


make_roi_align()
make_boxes()
make_matching()
make_backbones()
make_rpn()
make_classifier()
make_distillation()
make_mask_rcnn()
make_training()
make_oln()
