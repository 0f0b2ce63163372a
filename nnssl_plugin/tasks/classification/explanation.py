"""Where a classifier looks: how much less sure it is of its prediction when a part of the image is hidden.

Occlusion sensitivity (Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014, section 4.2)
by MONAI. It asks the model only about images, so it holds for every network and both input strategies, and its unit is
plain. It shows what this model used, not where a disease is.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_plugin.data.images import Image
from nnssl_plugin.errors import UserError
from nnssl_plugin.tasks.classification.ensemble import Ensemble

PARTS = {2: 10, 3: 4}
"""How many masks lie side by side along an axis, by the number of axes; they overlap by half."""
OVERLAP = 0.5
SMALLEST = 1e-6
"""Probabilities are kept this far from 0 and 1, where log-odds end."""


@dataclass(frozen=True)
class Explanation:
    """Of one target."""

    class_index: int
    evidence: np.ndarray  # (z, y, x): log-odds of the class that are lost when the voxel's surroundings are hidden


def check_monai() -> None:
    """Raise the error that names the missing package before any work is done, without the seconds of its import."""
    if find_spec("monai") is None:
        raise UserError(
            "Pictures of where a model looked need MONAI, which is not installed.",
            'pip install "nnssl_plugin[evaluation]"',
        )


def explain(ensemble: Ensemble, image: Image, probabilities: Mapping[str, np.ndarray]) -> dict[str, Explanation]:
    """Explain the most probable class of every target.

    The preprocessed image is hidden part by part behind each channel's mean, about 350 times, and each time shown to
    all models.

    Args:
        ensemble: that gave the probabilities.
        image: a case.
        probabilities: target → (K,).
    """
    from monai.visualize import OcclusionSensitivity

    chosen = {target.name: int(np.argmax(probabilities[target.name])) for target in ensemble.targets}
    data = torch.from_numpy(np.ascontiguousarray(image.data, dtype=np.float32))
    mean = data.mean(dim=tuple(range(1, data.ndim)), keepdim=True)
    log_odds = _LogOdds(ensemble, chosen, mean, image.segmentation)
    occlusion = OcclusionSensitivity(
        log_odds,
        mask_size=mask_size(data.shape[1:]),
        n_batch=4,
        overlap=OVERLAP,
        mode=0.0,
        activate=False,
        verbose=False,
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # MONAI's own use of what torch has deprecated
        hidden, _ = occlusion((data - mean)[None])
        shown = log_odds((data - mean)[None])
    lost = (shown[0].reshape(-1, *[1] * image.data[0].ndim) - torch.as_tensor(hidden)[0]).numpy()
    # rounded, so that what single precision leaves does not choose the slices of a picture
    return {name: Explanation(index, lost[row].round(4)) for row, (name, index) in enumerate(chosen.items())}


def mask_size(shape: torch.Size | tuple[int, ...]) -> list[int]:
    """Voxels of the mask along each axis: a fixed share of the image, so that large images take no more masks."""
    parts = PARTS[3 if min(shape) > 1 else 2]
    return [max(1, -(-size // parts)) for size in shape]


class _LogOdds(nn.Module):
    """Images (B, C, z, y, x) with their channels' means taken off → log-odds (B, T) of one class per target."""

    def __init__(self, ensemble: Ensemble, chosen: Mapping[str, int], mean: Tensor, segmentation: np.ndarray | None):
        super().__init__()
        self.ensemble, self.chosen, self.mean, self.segmentation = ensemble, chosen, mean, segmentation

    def forward(self, x: Tensor) -> Tensor:
        images = (torch.as_tensor(x).cpu() + self.mean).numpy()
        inputs = torch.stack([self.ensemble.inputs(image, self.segmentation) for image in images])
        probabilities = self.ensemble.probabilities(inputs)
        found = torch.stack([probabilities[name][:, index] for name, index in self.chosen.items()], dim=1)
        return torch.logit(found.double(), eps=SMALLEST).float()
