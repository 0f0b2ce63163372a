"""The teacher: the frozen encoder of any checkpoint that says its network."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from nnssl_plugin.checkpoints.format.provenance import as_architecture
from nnssl_plugin.checkpoints.format.tensors import check_finite
from nnssl_plugin.checkpoints.sources.source import Source, read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.text import some
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import reader_of
from nnssl_plugin.nnunet.plan_edits import fitting_patch, patch_divisors
from nnssl_plugin.nnunet.plans import build_described


@dataclass(frozen=True)
class Teacher:
    """A frozen network in test mode, and the file that it came from."""

    backbone: Backbone
    source: Source


def read_teacher(path: Path) -> Teacher:
    """The encoder of a file, frozen; its decoder and its head stay as they were built, and nothing reads them.

    Raises:
        UserError: for a file that is missing or unreadable, that does not say its network, or whose weights are not
            those of the whole encoder, or not finite.
    """
    if not path.exists():
        raise UserError(
            f"The teacher {path} is not there.",
            "Name its file: nnssl_plugin plan -d ID -p PLANS -n NAME --set method.teacher=FILE",
        )
    source = read_source(path)
    if source.network is None or source.input_channels is None:
        raise UserError(
            f"{path} does not say which network its weights belong to.",
            f"See what it holds: nnssl_plugin inspect {path}. Fit it to a plan first, and take what that writes: "
            f"nnssl_plugin adapt -d ID -w {path} --mapping TABLE -n NAME",
        )
    network = build_described(as_architecture(source.network), source.input_channels, path.name, device="cpu")
    _load_encoder(network, source)
    backbone = Backbone(network, source.input_channels)
    backbone.train_only(())
    return Teacher(backbone.eval(), source)


def check_fits(teacher: Teacher, patch_size: tuple[int, ...], channels: int) -> None:
    """Refuse a plan whose windows the teacher cannot read.

    Raises:
        UserError: for another number of dimensions or channels, and for a patch that its network does not take.
    """
    backbone, name = teacher.backbone, teacher.source.path.name
    if backbone.dimensions != len(patch_size):
        raise UserError(
            f"The teacher {name} reads {backbone.dimensions}D images, the plan has {len(patch_size)}D patches.",
            "Name another configuration, or another teacher.",
        )
    if backbone.input_channels not in (1, channels):
        raise UserError(
            f"The teacher {name} reads {backbone.input_channels} channels, the dataset has {channels}.",
            "Take a teacher of one channel, which sees the first one that a case has, or of as many.",
        )
    fitting = _fitting_patch(teacher, patch_size)
    if fitting != list(patch_size):
        raise UserError(
            f"The teacher {name} does not take the plan's patch of {list(patch_size)} voxels, but {fitting}.",
            "Change the patch: nnssl_plugin plan -d ID -p PLANS -n NAME --set "
            f"'configurations.CONFIGURATION.patch_size={json.dumps(fitting, separators=(',', ':'))}'",
        )


def _fitting_patch(teacher: Teacher, patch_size: tuple[int, ...]) -> list[int]:
    """The patch in voxels that the teacher's network takes: the given one, or one near it."""
    made_for = _patch_of(teacher.backbone)
    if made_for is not None:
        return list(made_for)
    divisors = patch_divisors(as_architecture(teacher.source.network or {}), len(patch_size))
    fitting = list(patch_size)
    if any(size % divisor for size, divisor in zip(patch_size, divisors, strict=True)):
        fitting = fitting_patch(fitting, divisors)
    if fitting == list(teacher.backbone.strides[-1]):  # one voxel of the coarsest map has nothing to be normalised by
        return [2 * size for size in fitting]
    return fitting


def _patch_of(backbone: Backbone) -> tuple[int, ...] | None:
    """The only patch in voxels that a network takes whose positions were made for one; ``None`` for any other."""
    grid = reader_of(backbone.network).planned_grid
    return None if grid is None else tuple(n * step for n, step in zip(grid, backbone.strides[-1], strict=True))


def _load_encoder(network: torch.nn.Module, source: Source) -> None:
    prefixes = reader_of(network).encoder_prefixes
    expected = {key: value for key, value in network.state_dict().items() if key.startswith(prefixes)}
    wrong = [key for key, value in expected.items() if getattr(source.weights.get(key), "shape", None) != value.shape]
    if wrong:
        raise UserError(
            f"{source.path} does not hold the whole encoder of the network that it names: {some(wrong)} "
            "are missing or of another shape.",
            f"See what it holds: nnssl_plugin inspect {source.path}",
        )
    loaded = {key: source.weights[key] for key in expected}
    check_finite(loaded, str(source.path))
    network.load_state_dict(loaded, strict=False)
