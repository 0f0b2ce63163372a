"""Boxes with torchvision's Faster R-CNN on a pretrained ResNet: slices of labelled scans, each structure a box.

    python benchmarks/detection.py -i HIPPOCAMPUS --encoder exported/encoder.pth --output detection.json
    python benchmarks/detection.py -i HIPPOCAMPUS                                   # from random weights

``HIPPOCAMPUS`` holds ``images/`` and ``labels/`` (one NIfTI file per case under the same name). ``encoder.pth`` is what
``nnssl_plugin export --format torchvision`` wrote, with its ``plans.json`` beside it. Of each case the slices with most
of the structures are taken, resized and z-scored; every connected part of a label is a box of its class. Every fifth
case is for evaluation: mean over the classes of the average precision at an IoU of 0.5 (LVM-Med, figure 4). Adam and
Faster R-CNN are the paper's, the rest is as small as a CPU needs. Batch normalisation is trained, with and without
--encoder, so that the two differ in their weights alone.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from skimage.measure import label, regionprops
from skimage.transform import resize
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import box_iou

from nnssl_plugin.io.files import read_json, write_json

IOU = 0.5
SMALLEST = 2
"""Pixels along each side of a box."""


class Slice(NamedTuple):
    """One training or evaluation image."""

    image: Tensor
    """(3, size, size), grey."""
    boxes: Tensor
    """(N, 4): x1, y1, x2, y2."""
    labels: Tensor
    """(N,), from 1."""


def slices_of(image: np.ndarray, labels: np.ndarray, *, number: int, size: int) -> list[Slice]:
    """The slices along the last axis with most labelled voxels, with the boxes of their structures."""
    largest = np.argsort((labels > 0).sum((0, 1)), kind="stable")[::-1][:number]
    found = (_slice(image[..., index], labels[..., index], size) for index in largest)
    return [each for each in found if len(each.boxes)]


def read_cases(
    folder: Path, *, number: int, size: int, cases: int | None = None
) -> tuple[list[Slice], list[Slice], int]:
    """Training and evaluation slices of the first cases, and the number of classes."""
    parts: tuple[list[Slice], list[Slice]] = ([], [])
    for index, path in enumerate(sorted((folder / "images").glob("*.nii.gz"))[:cases]):
        image, labels = (np.asarray(nibabel.load(folder / kind / path.name).dataobj) for kind in ("images", "labels"))
        parts[index % 5 == 0].extend(slices_of(image, labels, number=number, size=size))
    classes = max(int(each.labels.max()) for part in parts for each in part)
    return *parts, classes


def detector(encoder: Path | None, *, classes: int, size: int) -> FasterRCNN:
    """Faster R-CNN on the exported encoder, or on a ResNet-50 of random weights."""
    if encoder is None:
        resnet = ResNet(Bottleneck, [3, 4, 6, 3])
    else:
        planned = architecture_of(encoder.parent / "plans.json")
        width = planned.get("width_per_group", 64)
        resnet = ResNet(Bottleneck, planned.get("blocks", [3, 4, 6, 3]), width_per_group=width)
        weights = torch.load(encoder, weights_only=True)
        missing, unexpected = resnet.load_state_dict(weights, strict=False)
        if unexpected or set(missing) != {"fc.weight", "fc.bias"}:
            raise SystemExit(f"{encoder} is not an encoder of torchvision's: {missing} {unexpected}")
    backbone = BackboneWithFPN(resnet, {f"layer{n}": str(n - 1) for n in (1, 2, 3, 4)}, [256, 512, 1024, 2048], 256)
    return FasterRCNN(
        backbone,
        num_classes=classes + 1,
        min_size=size,
        max_size=size,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        box_detections_per_img=20,
        box_batch_size_per_image=64,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
    )


def architecture_of(plans: Path) -> dict:
    """Arguments of the ResNetUNet in a plan."""
    for configuration in read_json(plans)["configurations"].values():
        planned = configuration.get("architecture", {})
        if planned.get("network_class_name", "").endswith(".ResNetUNet"):
            return planned["arch_kwargs"]
    raise SystemExit(f"{plans} plans no ResNetUNet")


def train(
    network: FasterRCNN, slices: list[Slice], *, epochs: int, lr: float, batch_size: int, seed: int = 0
) -> list[float]:
    """Mean loss of every epoch."""
    optimiser = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    order, means = torch.Generator().manual_seed(seed), []
    device = next(network.parameters()).device
    network.train()
    for _ in range(epochs):
        losses = []
        for rows in torch.randperm(len(slices), generator=order).split(batch_size):
            batch = [slices[row] for row in rows.tolist()]
            targets = [{"boxes": each.boxes.to(device), "labels": each.labels.to(device)} for each in batch]
            loss = sum(network([each.image.to(device) for each in batch], targets).values())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
        means.append(float(np.mean(losses)))
    return means


@torch.no_grad()
def mean_average_precision(network: FasterRCNN, slices: list[Slice], classes: int) -> float:
    """Mean over the classes that occur of the average precision at an IoU of 0.5."""
    device = next(network.parameters()).device
    found = [network.eval()([each.image.to(device)])[0] for each in slices]
    found = [{name: values.cpu() for name, values in each.items()} for each in found]
    values = []
    for number in range(1, classes + 1):
        true = [each.boxes[each.labels == number] for each in slices]
        kept = [(each["boxes"][each["labels"] == number], each["scores"][each["labels"] == number]) for each in found]
        if sum(map(len, true)):
            values.append(average_precision(true, kept))
    return float(np.mean(values))


def average_precision(true: list[Tensor], found: list[tuple[Tensor, Tensor]]) -> float:
    """Area under precision over recall of one class, precision made monotonous (PASCAL VOC 2010).

    Args:
        true: boxes (N, 4) of each image.
        found: boxes (M, 4) and scores (M,) of each image; each box takes the true one that it overlaps most, which the
            box with the highest score keeps.
    """
    ranked = [
        (float(score), image, box)
        for image, (boxes, scores) in enumerate(found)
        for box, score in zip(boxes, scores, strict=True)
    ]
    ranked.sort(key=lambda each: -each[0])
    taken, hits = [set[int]() for _ in true], []
    for _, image, box in ranked:
        overlaps = box_iou(box[None], true[image])[0]
        best = int(overlaps.argmax()) if len(overlaps) else -1
        hit = best >= 0 and float(overlaps[best]) >= IOU and best not in taken[image]
        hits.append(hit)
        if hit:
            taken[image].add(best)
    right = np.cumsum(hits)
    recall = np.concatenate(([0.0], right / max(1, sum(map(len, true)))))
    precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float((np.diff(recall) * precision).sum())


def _slice(image: np.ndarray, labels: np.ndarray, size: int) -> Slice:
    scaled = resize(image.astype(np.float32), (size, size), order=1, anti_aliasing=True)
    named = resize(labels, (size, size), order=0, preserve_range=True, anti_aliasing=False).astype(int)
    boxes, classes = [], []
    for number in sorted(set(np.unique(named)) - {0}):
        for part in regionprops(label(named == number)):
            y1, x1, y2, x2 = part.bbox
            if min(y2 - y1, x2 - x1) >= SMALLEST:
                boxes.append([x1, y1, x2, y2])
                classes.append(int(number))
    grey = torch.from_numpy((scaled - scaled.mean()) / (scaled.std() + 1e-6)).float()
    shown = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return Slice(grey.expand(3, size, size).contiguous(), shown, torch.tensor(classes, dtype=torch.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", required=True, type=Path, help="folder with images/ and labels/")
    parser.add_argument("--encoder", type=Path, help="encoder.pth of an export; random weights without")
    parser.add_argument("--size", type=int, default=128, help="pixels along an axis (default: 128; the paper's 512)")
    parser.add_argument("--slices", type=int, default=2, help="slices per case (default: 2)")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5; the paper's 40")
    parser.add_argument("--lr", type=float, default=1e-4, help="of Adam (default: the paper's 1e-4)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cases", type=int, help="the first cases alone (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and the order of the slices")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    training, evaluation, classes = read_cases(args.i, number=args.slices, size=args.size, cases=args.cases)
    network = detector(args.encoder, classes=classes, size=args.size).to(args.device)
    schedule = {"epochs": args.epochs, "lr": args.lr, "batch_size": args.batch_size}
    losses = train(network, training, **schedule, seed=args.seed)
    numbers = {
        "encoder": args.encoder.name if args.encoder else None,
        "seed": args.seed,
        "training_slices": len(training),
        "evaluation_slices": len(evaluation),
        "losses": losses,
        "ap50": mean_average_precision(network, evaluation, classes),
    }
    print(numbers)
    if args.output is not None:
        write_json(args.output, numbers)


if __name__ == "__main__":
    main()
