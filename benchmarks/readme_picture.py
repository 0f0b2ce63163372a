"""Draw the README's picture: a volume, the same masked, and its reconstruction by a Med3DInsight checkpoint.

    python benchmarks/readme_picture.py -d 501 -p nnUNetPlans -w FILE --case CASE -o picture.png

The pretraining held out fold 0; CASE is one of its cases.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from nnssl_plugin.data.cases import Cases
from nnssl_plugin.data.windows import read_window
from nnssl_plugin.io.figures import pyplot, save_figure
from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.methods.med3dinsight.views import corrupt
from nnssl_plugin.nnunet.plans import dataset_folder, read_dataset_json, read_plan, resolve_configuration

CONFIGURATION, FOLD = "3d_fullres", 0
SEED = 0
"""Draws the masked blocks."""
TITLES = ("volume", "what the network sees", "what it restores")


def restored_volume(dataset: str, plans_name: str, checkpoint: Path, case: str) -> list[np.ndarray]:
    """The central window (D, H, W) of a case, the same with blocks masked, and the reconstruction."""
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    planned = resolve_configuration(plans, CONFIGURATION)
    trainer = Med3DInsightPretrainer(
        plans | {"continue_training": True}, CONFIGURATION, FOLD, dataset_json, torch.device("cpu")
    )
    trainer.load_checkpoint(str(checkpoint))
    task = trainer.task.eval()
    cases = Cases(folder / planned["data_identifier"], [case], transpose_forward=plans["transpose_forward"])
    data, _ = cases.load(case)
    origin = [(size - wanted) // 2 for size, wanted in zip(data.shape[1:], planned["patch_size"], strict=True)]
    image = torch.from_numpy(read_window(data, origin, planned["patch_size"]))[None]
    masked = corrupt(image, trainer.method_settings, torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        restored = task.backbone.reconstruct(task.backbone.features(masked))
    return [each[0, 0].numpy() for each in (image, masked, restored)]


def draw(volumes: list[np.ndarray], path: Path) -> None:
    """The central slice along the second axis of each volume beside the others, on one scale of grey."""
    plt = pyplot()
    low, high = np.percentile(volumes[0], (0.5, 99.5))
    figure, axes = plt.subplots(1, len(volumes), figsize=(9, 3.3))
    for axis, volume, title in zip(axes, volumes, TITLES, strict=True):
        axis.imshow(volume[:, volume.shape[1] // 2], cmap="gray", vmin=low, vmax=high, origin="lower")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    save_figure(figure, path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="ID", help="preprocessed dataset of the case")
    parser.add_argument("-p", required=True, metavar="PLAN", help="plan of the pretraining")
    parser.add_argument("-w", required=True, type=Path, metavar="FILE", help="its checkpoint")
    parser.add_argument("--case", required=True, metavar="NAME")
    parser.add_argument("-o", required=True, type=Path, metavar="PNG")
    given = parser.parse_args()
    draw(restored_volume(given.d, given.p, given.w, given.case), given.o)
