"""How a network sees images: reading and preprocessing as its plan says, without the network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_plugin.data.images import Image, read_image


class Preprocessing:
    """The part of a plan that images go through; it can be sent to another process.

    Args:
        plans: nnU-Net's plan of the network.
        configuration: the configuration that was trained.
        dataset_json: nnU-Net's, for the channels of images.
    """

    def __init__(self, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]):
        self._plans = PlansManager(dict(plans))
        self._planned = self._plans.get_configuration(configuration)
        self._dataset_json = dict(dataset_json)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Size of the windows in voxels, in the order of the plan's axes."""
        return tuple(self._planned.patch_size)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Spacing of preprocessed images in mm, in the order of the plan's axes."""
        return tuple(float(size) for size in self._planned.spacing)

    @property
    def file_ending(self) -> str:
        """Of images, such as ``.nii.gz``."""
        return self._dataset_json["file_ending"]

    @property
    def reader(self) -> str:
        """nnU-Net's reader of the plan."""
        return self._plans.plans["image_reader_writer"]

    @property
    def transpose_forward(self) -> tuple[int, ...]:
        """Which axis of what the reader gives is each axis of a preprocessed image."""
        return tuple(self._plans.transpose_forward)

    def read(self, files: Sequence[Path], segmentation: Path | None = None) -> Image:
        """The preprocessed image of a case, its labels where there are any, and what is odd about it.

        Args:
            files: one per channel.
            segmentation: file of labels.

        Raises:
            UnusableCase: see :func:`~nnssl_plugin.data.images.read_image`.
        """
        return read_image(
            tuple(files),
            plans=self._plans,
            configuration=self._planned,
            dataset_json=self._dataset_json,
            segmentation=segmentation,
        )

    def of_array(self, image: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """An array (C, z, y, x) float32 of this spacing in mm, preprocessed: (C, *spatial) float32."""
        properties = {"spacing": [float(size) for size in spacing]}
        preprocessor = self._planned.preprocessor_class(verbose=False)
        data, _, _ = preprocessor.run_case_npy(image, None, properties, self._plans, self._planned, self._dataset_json)
        return np.asarray(data, dtype=np.float32)
