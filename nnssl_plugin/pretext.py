"""The contract of a pretraining method: a :class:`PretextTask` that knows nothing of nnU-Net.

A method is an ``nn.Module`` that owns a backbone and whatever else it trains. The pretrainer
(``nnssl_plugin/training/pretrainer.py``) owns data, optimiser, schedule, precision, ranks, checkpoints and logs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone

Batch = dict[str, Any]
"""What one step sees; tensors are on the device, B samples, spatial sizes in voxels of the plan's spacing:

``image`` (B, C, *window) float32, the plan's normalised intensities, 0 outside the case;
``available`` (B, C) bool, the channels that the case really has; ``cases`` list of B names;
``origin`` (B, dims) float, voxel of the case at which the window starts (negative where padded);
``extent`` (B, dims) float, size of the window in voxels of the case (differs from *window* where it was resized);
with triplets also ``plane`` (B,) int (index into ``planes.PLANES``), ``slice_axis`` (B,) int (spatial axis of ``image``
that the slice is normal to), ``slice_position`` (B,) float in [0, 1] (place of the slice along that axis of the
window), ``image_embedding`` and ``text_embedding`` (B, E) float32;
with labels, in validation batches of datasets that label structures, also ``labels`` (B, *window) int16: the case's
segmentation in the same window, -1 outside the case.
"""
Views = dict[str, Tensor]
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Needs:
    """What the batches of a method must hold."""

    window: Literal["crop", "whole", "slice"] = "crop"
    """``crop``: a random window (a third of them around foreground); ``whole``: the whole case resized to the
    window; ``slice``: a random window that contains the slice of the case's triplet."""
    margin: float | tuple[float, ...] = 1.0
    """Size of the window over the plan's patch size, for methods that move inside it; one number, or one per axis."""
    triplets: bool = False
    """The batch brings a slice, its place, and the frozen embeddings of slice and text."""
    modalities: int = 1
    """Channels that a case must really have to be used."""
    dimensions: tuple[int, ...] = (2, 3)
    """Spatial dimensions of the configurations that the method supports."""
    labels: bool = False
    """Validation batches bring ``labels`` for diagnostics, where the dataset labels structures; training batches
    never do."""


@dataclass(frozen=True)
class Overlay:
    """A grey image with something drawn over it, for :meth:`PretextTask.pictures`."""

    image: Tensor
    """(*spatial)."""
    values: Tensor | None = None
    """(*spatial) in [-1, 1], such as cosines: drawn as colours over the image, with a colour bar."""
    mark: tuple[float, ...] | None = None
    """A point to mark, in voxels of the image; all pictures of the file then show the slices through it."""


@dataclass(frozen=True)
class Colours:
    """A coloured image, for :meth:`PretextTask.pictures`."""

    image: Tensor
    """(*spatial, 3) in [0, 1]: red, green, blue."""


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast a method is trained: the ``pretraining`` block of a plan, except its ``method`` part."""

    epochs: int = 300
    iterations_per_epoch: int = 250
    validation_iterations: int = 10
    batch_size: int | None = None
    """Samples per rank and step; ``None`` keeps the plan's batch size."""
    chunk_size: int | None = None
    """Samples encoded at a time; fewer than ``batch_size`` make a virtual batch: its gradients at the memory of a chunk
    and the cost of one more forward. ``None`` encodes the batch at once."""
    lr: float = 1e-3
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up before the cosine to 0."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient (12 is nnU-Net's)."""
    seed: int = 12345
    figure_every: int = 10
    """Epochs between two pictures of reconstructions and the like."""
    max_skipped_in_a_row: int = 50
    """Steps with a non-finite loss or gradient in a row that end the run."""

    def __post_init__(self) -> None:
        counts = ("epochs", "iterations_per_epoch", "figure_every", "max_skipped_in_a_row")
        fine = {name: getattr(self, name) >= 1 for name in counts}
        sizes = {name: getattr(self, name) for name in ("batch_size", "chunk_size")}
        fine |= {name: size is None or (type(size) is int and size >= 1) for name, size in sizes.items()}
        fine |= {"validation_iterations": self.validation_iterations >= 0}
        fine |= {name: getattr(self, name) > 0 for name in ("lr", "gradient_clip")}
        fine |= {name: getattr(self, name) >= 0 for name in ("weight_decay", "warmup_epochs", "seed")}
        wrong = next((name for name, ok in fine.items() if not ok), None)
        if wrong is not None:
            raise UserError(
                f"Setting '{wrong}' of the pretraining block cannot be {getattr(self, wrong)!r}.",
                f"nnssl_plugin plan -d ID -n NAME --set {wrong}=VALUE",
            )


class PretextTask(nn.Module):
    """One pretraining method: backbone, heads, views and losses.

    Args:
        backbone: the network that nnU-Net built from the plan, with ways to read features out of it.
        settings: an instance of the method's frozen dataclass.
    """

    needs: Needs = Needs()
    trained_parts: Sequence[str] = ("encoder", "decoder")
    """Parts of the backbone's network that the losses reach; the others are frozen and reported as initialised."""

    def __init__(self, backbone: Backbone, settings: Any):
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.gather: Callable[[Views], Views] = _identity
        backbone.train_only(self.trained_parts)

    def views(self, batch: Batch, generator: torch.Generator) -> Views:
        """Everything random: the tensors that ``encode`` reads, B samples each, on the device, without gradient."""
        raise _missing(self, "views")

    def encode(self, views: Views) -> tuple[Views, Terms]:
        """Per-sample outputs (B, ...), and losses (B,) that each sample has alone.

        Samples must not interact here, nor may the task's state change: a virtual batch encodes each sample twice.
        """
        raise _missing(self, "encode")

    def loss(self, outputs: Views, progress: float) -> Terms:
        """Scalar terms that couple the samples of all ranks; ``progress`` is the fraction of training done, below 1."""
        return {}

    def weights(self, progress: float) -> dict[str, float]:
        """The factor of each term in the total; 1 for terms that are not named."""
        return {}

    def forward(self, views: Views, progress: float) -> Terms:
        """``encode``, then ``terms``."""
        return self.terms(*self.encode(views), progress)

    def terms(self, outputs: Views, own: Terms, progress: float) -> Terms:
        """Means of the samples' own losses, ``loss`` over the gathered outputs, and their weighted sum as ``total``."""
        terms = {name: value.mean() for name, value in own.items()}
        terms |= self.loss(self.gather(outputs), progress)
        weights = self.weights(progress)
        terms["total"] = sum(weights.get(name, 1.0) * value for name, value in terms.items())
        return terms

    @torch.no_grad()
    def on_weights_loaded(self) -> None:
        """Starting weights were put into the backbone: copy them into whatever else must start from them (teachers)."""

    @torch.no_grad()
    def after_step(self, progress: float, applied: Tensor) -> None:
        """Update teachers, queues and projections.

        Args:
            progress: fraction of training done.
            applied: () bool on the device, False where the step was skipped because its loss was not finite.
                It is never read on the host: multiply or ``torch.where`` with it.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: ``lr_scale`` multiplies the scheduled rate, ``clip=False`` is left unclipped."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    @torch.no_grad()
    def diagnostics(self, views: Views) -> dict[str, Tensor]:
        """Numbers to log once per epoch, on one validation batch; ``features`` (B, F) feeds the collapse measures."""
        return {}

    @torch.no_grad()
    def pictures(self, views: Views) -> dict[str, list[tuple[str, Tensor | Overlay | Colours]]]:
        """Pictures to draw every few epochs: file name → titled images of the first sample, grey where a tensor."""
        return {}


def settings_from(block: dict[str, Any], default: Any, where: str) -> Any:
    """A frozen settings dataclass from the plan's JSON: the defaults with the values of ``block``.

    Raises:
        UserError: for a key that the settings do not have, or a value of the wrong type.
    """
    known = {f.name: f for f in fields(default)}
    for key, value in block.items():
        if key not in known:
            raise UserError(f"Unknown setting '{key}' in {where}.", f"Known settings: {', '.join(known)}.")
        # a field whose default is None says itself what it takes, in its dataclass
        if getattr(default, key) is not None and not _fits(value, known[key].type):
            expected = getattr(known[key].type, "__name__", known[key].type)
            raise UserError(f"Setting '{key}' in {where} is {value!r}; expected {expected}.")
    values = {f: getattr(default, f) for f in known} | block
    return type(default)(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value read from JSON is of a field's declared type; whole numbers serve as float, lists as tuple."""
    options = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    kinds = tuple(get_origin(option) or option for option in options)
    if isinstance(value, bool):  # bool is an int to isinstance
        return bool in kinds
    widened = {int: float, list: tuple}.get(type(value))
    return isinstance(value, kinds) or widened in kinds


def _identity(outputs: Views) -> Views:
    return outputs


def _missing(task: PretextTask, method: str) -> TypeError:
    return TypeError(f"{type(task).__name__} must define {method}()")
