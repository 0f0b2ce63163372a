"""Images as nnU-Net names them, read and preprocessed as in training, with the checks that training's images passed."""

import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.scans import nifti_unit_mm
from nnssl_plugin.nnunet.geometry import affine_of, largest_shift, orientation_of

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    zlib.error,
    ImageFileError,
)
"""What nnU-Net's readers and preprocessing raise for damaged or unusual files."""
SHIFT = 0.1
"""Of the smallest voxel edge: a segmentation with corners farther away than this lies in another place."""
ODD_SPACING = 2.0
"""A voxel that is so many times larger or smaller than the median of the training is told."""


class UnusableCase(Exception):
    """A case that cannot be used; the message says why, in one line."""


@dataclass(frozen=True)
class Image:
    """A case as the network's inputs are made from."""

    data: np.ndarray  # (C, z, y, x) float32, preprocessed
    segmentation: np.ndarray | None  # (1, z, y, x)
    properties: dict[str, Any]  # nnU-Net's
    spacing: tuple[float, ...]  # of ``data`` in mm, (z, y, x)
    warnings: tuple[str, ...]


def find_images(folder: str | Path, ending: str) -> tuple[dict[str, tuple[Path, ...]], dict[str, str]]:
    """The images of a folder, by case.

    Args:
        folder: with ``CASE_0000.nii.gz`` and so on, one file per channel.
        ending: of the dataset, for example ``.nii.gz``.

    Returns:
        case → its files in the order of the channels, and file or case → why it is left out.

    Raises:
        UserError: there is no such folder, or it holds no image of this kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Name the folder of the images with -i.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    channels: dict[str, dict[int, Path]] = defaultdict(dict)
    left_out = {}
    for path in files:
        named = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        if named:
            channels[named[1]][int(named[2])] = path
        elif path.name.endswith(ending):
            left_out[path.name] = f"its name does not end in _0000{ending}: _0000 says which channel it is"
    for case, found in list(channels.items()):
        if sorted(found) != list(range(len(found))):
            left_out[case] = f"it has channels {', '.join(f'_{k:04d}' for k in sorted(found))}: one is missing"
            del channels[case]
    if not channels and not left_out:
        others = sorted({"".join(p.suffixes[-2:]) for p in files})
        raise UserError(
            f"{folder} holds no {ending} file; it holds: {', '.join(others[:5]) or 'nothing'}.",
            f"The model was trained on {ending} files: convert the images, named CASE_0000{ending}.",
        )
    return {case: tuple(found[k] for k in sorted(found)) for case, found in sorted(channels.items())}, left_out


def read_image(
    files: tuple[Path, ...],
    *,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    segmentation: Path | None = None,
) -> Image:
    """Read, check and preprocess a case with the plan's own reader and preprocessor.

    Args:
        files: one per channel.
        plans: of the model.
        configuration: of the model.
        dataset_json: of the model, for the channels.
        segmentation: file of labels that goes through the same preprocessing.

    Raises:
        UnusableCase: a file cannot be read, is not in mm where nnU-Net takes it for such, has not the model's channels,
            its voxels are NaN, infinite or all equal, or the segmentation lies in another place.
    """
    reader = plans.image_reader_writer_class()
    try:
        _check_units(files, reader)
        data, properties = reader.read_images([str(path) for path in files])
        labels, of_labels = reader.read_seg(str(segmentation)) if segmentation else (None, {})
    except UNREADABLE as error:
        raise UnusableCase(f"it cannot be read: {_one_line(error)}") from error
    _check_voxels(data, dataset_json)
    if labels is not None and labels.shape[1:] != data.shape[1:]:
        raise UnusableCase(f"image {data.shape[1:]} and segmentation {labels.shape[1:]} differ in size")
    if labels is not None:
        _check_place(properties, of_labels, data.shape[1:])
    order = plans.transpose_forward
    original = [float(properties["spacing"][axis]) for axis in order]
    warnings = _odd_spacing(original, plans.plans.get("original_median_spacing_after_transp"))
    try:
        data, labels_out, properties = configuration.preprocessor_class(verbose=False).run_case_npy(
            data, labels, properties, plans, configuration, dataset_json
        )
    except UNREADABLE as error:
        raise UnusableCase(f"it cannot be preprocessed: {_one_line(error)}") from error
    target = [float(size) for size in configuration.spacing]
    return Image(
        data, None if labels is None else labels_out, properties, tuple(original[: 3 - len(target)] + target), warnings
    )


def _check_units(files: tuple[Path, ...], reader: BaseReaderWriter) -> None:
    """nnU-Net's readers through nibabel take every length for mm, whatever the header states."""
    if not isinstance(reader, NibabelIO | NibabelIOWithReorient):
        return
    for path in files:
        unit = nifti_unit_mm(nibabel.load(path).header)
        if unit != 1:
            raise UnusableCase(f"its header states a unit of length of {unit:g} mm, which nnU-Net reads as mm")


def _check_place(of_image: dict[str, Any], of_labels: dict[str, Any], shape: tuple[int, ...]) -> None:
    image, labels = affine_of(of_image), affine_of(of_labels)
    if image is None or labels is None:
        return
    shift = largest_shift(labels, image, shape)
    if shift > SHIFT * np.linalg.norm(image[:3, :3], axis=0).min():
        raise UnusableCase(
            f"its segmentation does not lie on it: a corner is {shift:.4g} mm away (orientations "
            f"{orientation_of(labels)} and {orientation_of(image)})"
        )


def _check_voxels(data: np.ndarray, dataset_json: dict[str, Any]) -> None:
    names = dataset_json["channel_names"]
    if len(data) != len(names):
        raise UnusableCase(f"it has {len(data)} channels, the model reads {len(names)}: {', '.join(names.values())}")
    wrong = int((~np.isfinite(data)).sum())
    if wrong:
        raise UnusableCase(f"{wrong} voxels are NaN or infinite")
    absent = [not channel.any() for channel in data]
    for channel, name, empty in zip(data, names.values(), absent, strict=True):
        if channel.min() == channel.max() and not (empty and not all(absent)):
            raise UnusableCase(f"constant image: every voxel of channel {name} is {channel.min():g}")


def _odd_spacing(spacing: list[float], median: list[float] | None) -> tuple[str, ...]:
    """A warning where voxels are far from those of the training: the spacing may be missing or in another unit."""
    if median is None or all(
        1 / ODD_SPACING <= own / usual <= ODD_SPACING for own, usual in zip(spacing, median, strict=True)
    ):
        return ()
    return (f"its voxels measure {_mm(spacing)}, those of the training {_mm(median)} (median): is its spacing right?",)


def _mm(spacing: list[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing) + " mm"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:160]}" if lines else type(error).__name__
