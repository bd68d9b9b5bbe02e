"""torchvision's Mask R-CNN R50-FPN with frozen statistics, one step at a time, so that another program can take turns with it.

Usage: mask_rcnn.py FOLDER N_THREADS; it writes `weights.pth` and `inputs.pth` into the folder, and says `ready`. Then it reads `train`, `detect`
or `nms` from stdin, line by line, and answers each with the seconds that took and with a number: the loss, or how many boxes were found.
"""

import pathlib
import sys
import time

import torch
import torchvision
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList

# Width and height, of which the batch has more: it is padded to multiples of 32 px.
SIZES = [(426, 320), (426, 320)]
N_OBJECTS = 5
# Candidates of suppression: boxes and classes, as LVIS has them.
N_BOXES, N_CLASSES = 1000, 1203


def toy_inputs():
    """Noise of several scales; boxes of 30 to 200 px; ellipses as masks."""
    batch = torch.zeros(len(SIZES), 3, 320, 448)
    targets = []
    for image, (width, height) in zip(batch, SIZES):
        for cell in (1, 8, 32):
            noise = torch.randn(3, height // cell + 1, width // cell + 1)
            image[:, :height, :width] += noise.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]
        sides = 30 + 170 * torch.rand(N_OBJECTS, 2)
        low = torch.rand(N_OBJECTS, 2) * (torch.tensor([width, height]) - sides)
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        centre, half = (low + sides / 2)[:, :, None, None], (sides / 2)[:, :, None, None]
        masks = (((x - centre[:, 0]) / half[:, 0]) ** 2 + ((y - centre[:, 1]) / half[:, 1]) ** 2 <= 1).byte()
        targets.append({"boxes": torch.cat([low, low + sides], 1), "labels": torch.randint(1, 91, (N_OBJECTS,)), "masks": masks})
    return ImageList(batch, [(height, width) for width, height in SIZES]), targets


@torch.no_grad()
def calm(model, batch):
    """Makes random weights behave as trained ones where time depends on it: activations near one, scores of some classes above 5 %."""
    for block in (module for module in model.modules() if isinstance(module, torchvision.models.resnet.Bottleneck)):
        block.bn3.weight.fill_(0.25)
    model.rpn.head.bbox_pred.weight *= 10
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)
    heads = model.roi_heads
    logits = heads.box_predictor.cls_score(heads.box_head(heads.box_roi_pool(features, proposals, batch.image_sizes)))
    scale = 4 / logits.std(0).mean()
    heads.box_predictor.cls_score.weight *= scale
    heads.box_predictor.cls_score.bias.copy_(-(logits.mean(0) - heads.box_predictor.cls_score.bias) * scale)


def main():
    folder = pathlib.Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, trainable_layers=3
    )
    model = torchvision.models.detection.MaskRCNN(backbone, 91).eval()
    batch, targets = toy_inputs()
    calm(model, batch)
    boxes = torch.rand(N_BOXES, 2) * 400
    boxes = torch.cat([boxes, boxes + 20 + 150 * torch.rand(N_BOXES, 2)], 1)
    scores = torch.randn(N_BOXES, N_CLASSES).softmax(1)
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pth")
    named = {f"{key}.{image}": value for image, target in enumerate(targets) for key, value in target.items()}
    torch.save({"images": batch.tensors, "nms_boxes": boxes, "nms_scores": scores, **named}, folder / "inputs.pth")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-10, momentum=0.9, weight_decay=1e-4)

    def train():
        model.train()
        features = model.backbone(batch.tensors)
        proposals, losses = model.rpn(batch, features, targets)
        _, of_regions = model.roi_heads(features, proposals, batch.image_sizes, targets)
        loss = sum((losses | of_regions).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.inference_mode()
    def detect():
        model.eval()
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(batch, features)
        detections, _ = model.roi_heads(features, proposals, batch.image_sizes)
        return sum(len(detection["boxes"]) for detection in detections)

    @torch.inference_mode()
    def nms():
        flat = scores.flatten()
        kept = torchvision.ops.batched_nms(
            boxes.repeat_interleave(N_CLASSES, 0), flat, torch.arange(N_CLASSES).repeat(N_BOXES), 0.5
        )[:300]
        return flat[kept].sum().item()

    print("ready", flush=True)
    for line in sys.stdin:
        work = {"train": train, "detect": detect, "nms": nms}[line.strip()]
        started = time.perf_counter()
        number = work()
        print(time.perf_counter() - started, number, flush=True)


main()
