"""A labelled dataset of phantoms for nnU-Net's commands, with an image to predict, and what its prediction must be."""

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from nnssl_plugin.io.files import write_json
from nnssl_plugin.quickstart.phantoms import write_phantoms

LABELS = {"background": 0, "liver": 1, "kidney": 2}


def write_labelled_phantoms(
    raw: Path, *, shape: Sequence[int], spacing_mm: Sequence[float], channels: Sequence[str] = ("MR",), **more: str
) -> None:
    """Write five labelled cases and one to predict into a dataset's folder.

    Args:
        raw: the folder, below nnUNet_raw.
        shape: voxels (z, y, x).
        spacing_mm: voxel size (z, y, x) in mm.
        channels: their names, at most four.
        more: further entries of dataset.json.
    """
    grid = {"shape": shape, "spacing_mm": spacing_mm, "channels": len(channels)}
    write_phantoms(raw / "imagesTr", 5, seed=1, labels_folder=raw / "labelsTr", **grid)
    write_phantoms(raw / "imagesTs", 1, seed=2, **grid)
    write_json(
        raw / "dataset.json",
        {
            "channel_names": {str(number): name for number, name in enumerate(channels)},
            "labels": LABELS,
            "numTraining": 5,
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
            **more,
        },
    )


def assert_predicted(predictions: Path, raw: Path) -> None:
    """There is one prediction, which lies on the grid of the image to predict."""
    (predicted,) = predictions.glob("*.nii.gz")
    assert_on_grid(predicted, raw / "imagesTs" / "phantom_000_0000.nii.gz")


def assert_on_grid(predicted: Path, image: Path) -> None:
    """A prediction of the labelled structures has the shape and the place of an image."""
    prediction, expected = nibabel.load(predicted), nibabel.load(image)
    assert prediction.shape == expected.shape, f"{prediction.shape}, not {expected.shape}"
    np.testing.assert_allclose(prediction.affine, expected.affine, atol=1e-4)
    found = set(np.unique(prediction.get_fdata()))
    assert found <= set(LABELS.values()), f"labels {found}"
