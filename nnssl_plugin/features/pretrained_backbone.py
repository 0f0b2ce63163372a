"""A pretrained network out of its checkpoint, with the preprocessing of its plan: features of any image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnssl_plugin.checkpoints.sources.source import Source, read_source
from nnssl_plugin.data.images import UnusableCase
from nnssl_plugin.data.windows import covering_origins, read_window
from nnssl_plugin.errors import UserError
from nnssl_plugin.features.preprocessing import Preprocessing
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network, input_channels, read_dataset_json

STEP = 1.0
"""Step between two windows of an image over their size: they overlap only where the image is no multiple of it."""

ImageLike = str | Path | Sequence[str | Path] | np.ndarray
"""An image file, one file per channel, or an array (C, z, y, x)."""


class PretrainedBackbone(Backbone):
    """The network of a checkpoint, and the way from an image to what it reads.

    Called with a tensor (B, C, *spatial) of preprocessed intensities it returns the encoder's maps, fine to coarse
    (:meth:`Backbone.features`); ``channels`` and ``strides`` describe them.

    Args:
        network: the bare network with its weights.
        plans: nnU-Net's plan of the network.
        configuration: the configuration that was trained.
        dataset_json: nnU-Net's, for the channels of images.
        channels: that the network reads, where they are not those of images.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        channels: int | None = None,
    ):
        image_channels = input_channels(plans, configuration, dataset_json)
        super().__init__(network, channels or image_channels)
        self.image_channels = image_channels
        self.preprocessing = Preprocessing(plans, configuration, dataset_json)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Size of the windows in voxels, in the order of the plan's axes."""
        return self.preprocessing.patch_size

    @property
    def spacing(self) -> tuple[float, ...]:
        """Spacing of preprocessed images in mm, in the order of the plan's axes."""
        return self.preprocessing.spacing

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def forward(self, x: Tensor) -> list[Tensor]:
        """Encoder maps of ``x`` (B, C, *spatial), fine to coarse: (B, channels[s], *spatial / strides[s])."""
        return self.features(x)

    def preprocess(self, image: ImageLike, *, spacing: Sequence[float] | None = None) -> np.ndarray:
        """An image as the network was trained on: cropped, normalised and resampled by nnU-Net, as the plan says.

        Args:
            image: a file, one file per channel, or an array (C, z, y, x) in the orientation of the plan's reader.
            spacing: of an array, (z, y, x) in mm; a file says its own.

        Returns:
            (C, *spatial) float32.

        Raises:
            UserError: for a file that cannot be read, other channels than the plan's, and values that are not finite.
        """
        if isinstance(image, np.ndarray):
            return self._preprocess_array(image, spacing)
        files = [image] if isinstance(image, (str, Path)) else list(image)
        try:
            read = self.preprocessing.read([Path(file) for file in files])
        except UnusableCase as error:
            raise UserError(
                f"{files[0]}: {error}.", "Give one readable file per channel, in the plan's order."
            ) from error
        return np.asarray(read.data, dtype=np.float32)

    def windows(self, image: ImageLike, *, spacing: Sequence[float] | None = None) -> Tensor:
        """The preprocessed image in windows of the plan's patch size that cover it: (W, C, *patch_size).

        What lies outside the image is 0. In 2D every slice gives windows of its own.

        Args:
            image: see :meth:`preprocess`.
            spacing: see :meth:`preprocess`.
        """
        data = self.preprocess(image, spacing=spacing)
        window = (1,) * (data.ndim - 1 - len(self.patch_size)) + self.patch_size
        places = covering_origins(data.shape[1:], window, step=STEP)
        cut = torch.from_numpy(np.stack([read_window(data, place, window) for place in places]))
        return cut.reshape(*cut.shape[:2], *self.patch_size)

    @torch.no_grad()
    def embed(self, image: ImageLike, *, spacing: Sequence[float] | None = None) -> Tensor:
        """One vector (channels[-1],) for an image, on the CPU: the mean of the coarsest map over all its windows.

        Args:
            image: see :meth:`preprocess`.
            spacing: see :meth:`preprocess`.

        Raises:
            UserError: where the network reads other channels than images have, and what :meth:`preprocess` raises.
        """
        if self.input_channels != self.image_channels:
            raise UserError(
                f"The network reads {self.input_channels} channels, which its method made of the "
                f"{self.image_channels} of an image.",
                "Call the backbone with a tensor of yours, or fit its weights to the images and load what that writes: "
                "nnssl_plugin adapt -d ID -w CHECKPOINT -n NAME",
            )
        windows = self.windows(image, spacing=spacing)
        return torch.cat([self.pooled(self.features(window[None].to(self.device))) for window in windows]).mean(0).cpu()

    def _preprocess_array(self, image: np.ndarray, spacing: Sequence[float] | None) -> np.ndarray:
        if spacing is None or len(spacing) != 3:
            raise UserError("The spacing of the array is not known.", "Give it in mm: spacing=(z, y, x)")
        if image.ndim != 4 or len(image) != self.image_channels:
            raise UserError(
                f"An array of the shape {image.shape} was given.",
                f"Give (C, z, y, x) with {self.image_channels} channels.",
            )
        if not np.isfinite(image).all():
            raise UserError("The array holds values that are NaN or infinite.", "Replace them.")
        return self.preprocessing.of_array(image.astype(np.float32), spacing)


def load_backbone(
    checkpoint: str | Path,
    *,
    trainable: bool = False,
    device: str | torch.device = "cpu",
    trust: bool = False,
) -> PretrainedBackbone:
    """The network of a checkpoint as a frozen or trainable encoder, with the preprocessing of its plan.

    Args:
        checkpoint: of a pretraining, segmentation or classification of this package or a training of nnU-Net, a folder
            that ``export`` wrote, or weights that ``adapt`` wrote. The file says its plan itself; nothing in it is run.
        trainable: False: no gradients, in test mode. True: the encoder takes gradients, in training mode; the decoder
            stays frozen.
        device: where the weights go.
        trust: build the network whatever class the file names; by default only known classes are built.

    Raises:
        UserError: for a file without a plan, with a plan that names an unknown class, or with other weights than those
            of its plan's network; and what ``read_source`` raises.
    """
    source = read_source(checkpoint)
    plans, configuration, dataset_json = _plan_of(source)
    channels = None if "adaptation" in source.content else source.provenance.get("network_channels")
    network = build_network(plans, configuration, dataset_json, channels=channels, trust=trust)
    try:
        network.load_state_dict(source.weights)
    except RuntimeError as error:
        raise UserError(
            f"The weights of {source.path} are not those of the network that its plan names.",
            f"See what it holds: nnssl_plugin inspect {source.path}",
        ) from error
    backbone = PretrainedBackbone(
        network, plans=plans, configuration=configuration, dataset_json=dataset_json, channels=channels
    )
    backbone.train_only(("encoder",) if trainable else ())
    return backbone.train(trainable).to(device)


def _plan_of(source: Source) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    """Plan, configuration and dataset.json; for weights that ``adapt`` wrote the last one lies beside them."""
    beside = source.path.parent / "dataset.json"
    dataset_json = source.dataset_json or (
        read_dataset_json(beside.parent) if source.plans and beside.is_file() else None
    )
    if not source.plans or not source.configuration or not dataset_json:
        raise UserError(
            f"{source.path} does not say which plan its weights were trained with.",
            f"Fit them to a dataset, and load what that writes: nnssl_plugin adapt -d ID -w {source.path} -n NAME",
        )
    return source.plans, source.configuration, dataset_json
