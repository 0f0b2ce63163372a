"""The encoder of a checkpoint, and what it says of an image in one vector."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nnssl_plugin.checkpoints.format.files import is_safetensors, read_checkpoint
from nnssl_plugin.checkpoints.format.provenance import datasets_of, weights_hash
from nnssl_plugin.checkpoints.format.shared_folder import read_shared_folder
from nnssl_plugin.checkpoints.format.teacher import teacher_weights
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.features.pretrained_backbone import PretrainedBackbone, load_backbone
from nnssl_plugin.networks.family import reader_of

FINAL = "checkpoint_final.pth"
SUMMARY, MEAN, MAXIMUM, ALIGNED = "summary", "mean", "maximum", "aligned"
"""Parts of a vector: the summary token; mean and maximum of the coarsest map; the embedding in the space of texts."""
LEAST_WEIGHT = 1e-6
"""Of each token of a window in which no token lies inside: it counts only where its row has nothing else."""


class Alignment(Protocol):
    """What a pretraining has learned to bring volumes into the space of texts."""

    metric: np.ndarray
    """(E, E) of the Mahalanobis distance between both."""
    centre: bool
    """Whether both are compared by what sets them apart from their means."""
    whole: bool
    """Whether the training showed whole images, not windows."""

    @property
    def dimensions(self) -> int:
        """Length E of an embedding."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """All that was learned."""

    def embed(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Volumes by the tokens (B, L, C) of their coarsest map: (B, E)."""


Alignments = Callable[[str | None], Callable[[Mapping[str, Tensor], Mapping[str, Any]], Alignment]]
"""Name of a method → what makes its alignment of the state of its task and its settings; the command hands it in."""


@dataclass(frozen=True)
class Sums:
    """What windows add to the vector of their row; one row of each tensor per window."""

    weight: Tensor
    """(B,) voxels inside, over those of a token."""
    parts: dict[str, Tensor]
    """:data:`SUMMARY`, :data:`MEAN` and :data:`ALIGNED` times the weight, and the :data:`MAXIMUM`; (B, C)."""

    def cpu(self) -> "Sums":
        """On the CPU; on a device this waits for the pass."""
        return Sums(self.weight.cpu(), {name: value.cpu() for name, value in self.parts.items()})


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder in test mode, with the preprocessing and the rules of its checkpoint."""

    backbone: PretrainedBackbone
    path: Path
    parts: tuple[str, ...]
    """What a vector consists of, in this order."""
    unit_range: bool
    """Whether each input is brought to [0, 1], as the pretraining did."""
    teacher: bool
    """Whether the weights are those of the pretraining's teacher."""
    method: str | None
    dataset: str | None = None
    """That the pretraining saw."""
    alignment: Alignment | None = None
    """Where vectors lie in the space of texts."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.alignment.dimensions if self.alignment else self.backbone.channels[-1] * len(self.parts)

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the vectors of an image, and must be the same throughout an index."""
        network = self.backbone.network
        prefixes = reader_of(network).encoder_prefixes
        encoder = {key: value for key, value in network.state_dict().items() if key.startswith(prefixes)}
        return {
            "encoder_sha256": weights_hash(encoder),
            "network": type(network).__name__,
            "method": self.method,
            "weights": "teacher" if self.teacher else "network",
            "parts": list(self.parts),
            "patch_size": list(self.backbone.patch_size),
            "spacing_mm": list(self.backbone.spacing),
            "unit_range": self.unit_range,
            **({"alignment_sha256": weights_hash(self.alignment.weights)} if self.alignment else {}),
        }

    @torch.no_grad()
    def read(self, windows: Tensor, inside: Tensor) -> Sums:
        """Weighted sums over the tokens of some windows.

        Args:
            windows: (B, C, *patch) preprocessed, with the images' channels.
            inside: (B, 1, *patch), 1 where a voxel counts.
        """
        x = self._as_trained(windows.to(self.backbone.device))
        with torch.autocast(x.device.type, enabled=x.device.type == "cuda"):
            if SUMMARY in self.parts:
                summary, features = self.backbone.summarised(x)
            else:
                summary, features = None, self.backbone.features(x)
        tokens = features[-1].float().flatten(2)
        weights = self._weights(inside.to(x.device), tuple(features[-1].shape[2:]))
        total = weights.sum(-1)
        parts = {
            MEAN: (tokens * weights).sum(-1),
            MAXIMUM: tokens.masked_fill(weights <= 0, -torch.inf).amax(-1),
        }
        if summary is not None:
            parts[SUMMARY] = summary.float() * total
        if self.alignment is not None:
            parts[ALIGNED] = self.alignment.embed(*self.backbone.tokens([each.float() for each in features])) * total
        return Sums(total[:, 0], {name: parts[name] for name in self.parts})

    def _weights(self, inside: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(B, 1, N): how much of each token's cell lies inside."""
        sums = self.backbone.token_grid(counts).sums(inside)
        return torch.where(sums.sum(-1, keepdim=True) > 0, sums, LEAST_WEIGHT)

    def _as_trained(self, x: Tensor) -> Tensor:
        channels = self.backbone.input_channels
        if self.unit_range:
            flat = x.flatten(1)
            low, high = (edge.reshape(-1, *[1] * (x.ndim - 1)) for edge in (flat.amin(1), flat.amax(1)))
            x = (x - low) / torch.where(high > low, high - low, 1)
        return x.expand(-1, channels, *[-1] * (x.ndim - 2)) if x.shape[1] != channels else x


def load_encoder(
    model: str | Path, *, device: str = "cpu", trust: bool = False, alignments: Alignments | None = None
) -> Encoder:
    """The encoder of a model: the teacher's weights where the pretraining had one, else the network's.

    Args:
        model: a checkpoint, a folder that ``export`` wrote, or ``TRAINER__PLANS__CONFIG``.
        device: ``cpu``, ``cuda`` or ``mps``.
        trust: build the network whatever class the file names.
        alignments: vectors shall lie in the space of the texts that the encoder was aligned with; None: its features.

    Raises:
        UserError: no such file, several that could be meant, one that says too little or reads other channels, or that
            was not aligned.
    """
    path = checkpoint_of(model)
    backbone = load_backbone(path, device=device, trust=trust)
    if backbone.input_channels != backbone.image_channels and backbone.image_channels != 1:
        raise UserError(
            f"The network of {path} reads {backbone.input_channels} channels, which its method drew from the "
            f"{backbone.image_channels} of an image.",
            f"Fit its weights to the images, and take what that writes: nnssl_plugin adapt -d ID -w {path} -n NAME",
        )
    content = _content_of(path)
    teacher = teacher_weights(content)
    if teacher is not None:
        own = backbone.network.state_dict()
        backbone.network.load_state_dict({key: teacher.get(key, value) for key, value in own.items()})
    provenance = read_source(path).provenance
    of_tokens = backbone.has_summary or backbone.encodes_subsets
    parts = ((SUMMARY,) if backbone.has_summary else ()) + ((MEAN,) if of_tokens else (MEAN, MAXIMUM))
    settings = provenance.get("settings") or {}
    method, datasets = provenance.get("method"), [data.get("dataset") for data in datasets_of(provenance)]
    alignment = None
    if alignments is not None:
        alignment = alignments(method)((content.get("ssl_state") or {}).get("task") or {}, settings)
        parts = (ALIGNED,)
    return Encoder(
        backbone,
        path,
        parts,
        settings.get("intensity") == "unit",
        teacher is not None,
        method,
        datasets[0] if len(datasets) == 1 else None,
        alignment,
    )


def checkpoint_of(model: str | Path) -> Path:
    """The file, or folder of shared weights, that is meant by a model folder or checkpoint."""
    path = Path(model)
    if not path.is_dir() or (path / "model.safetensors").is_file():
        return path
    found = sorted(path.glob(f"fold_*/{FINAL}")) or sorted(path.glob(FINAL))
    whole = [file for file in found if file.parent.name == "fold_all"]
    if len(whole or found) != 1:
        have = ", ".join(str(file.relative_to(path)) for file in found) or "none"
        raise UserError(
            f"{path} does not say which checkpoint is meant; it holds: {have}.",
            f"Name one, for example: -m {(found or [path / 'fold_all' / FINAL])[0]}",
        )
    return (whole or found)[0]


def _content_of(path: Path) -> Mapping[str, Any]:
    """What lies beside the weights."""
    if path.is_file() and is_safetensors(path):
        return {}
    return read_shared_folder(path) if path.is_dir() else read_checkpoint(path)


def vector_of(sums: Sums) -> Tensor:
    """The vector (dimensions,) of a row: weighted means and the largest maximum, one after the other."""
    return torch.cat([_value(name, sums) for name in sums.parts])


def joined(first: Sums | None, second: Sums) -> Sums:
    """The sums of one row's windows together, each of one row."""
    if first is None:
        return second
    parts = {
        name: torch.maximum(first.parts[name], value) if name == MAXIMUM else first.parts[name] + value
        for name, value in second.parts.items()
    }
    return Sums(first.weight + second.weight, parts)


def _value(name: str, sums: Sums) -> Tensor:
    return sums.parts[name] if name == MAXIMUM else sums.parts[name] / sums.weight
