"""A folder of images as for nnU-Net's prediction in, the same with every missing modality filled in out."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnssl_plugin.checkpoints.format.provenance import describe_input
from nnssl_plugin.checkpoints.format.spatial_arrays import SpatialArray
from nnssl_plugin.data.images import UNREADABLE
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import atomic_path, disk_errors_in_words, keep_file, write_json
from nnssl_plugin.nnunet.geometry import affine_of
from nnssl_plugin.nnunet.plans import dataset_folder, read_dataset_json, read_plan, resolve_configuration
from nnssl_plugin.tasks.filling.stand_ins import mean_images, templates_for
from nnssl_plugin.tasks.filling.volumes import stand_in_volume

TEMPLATE, MEAN, ZEROS = WITH = ("template", "mean", "zeros")
RECORD = "filled.json"
"""File of the output folder: what stands in where."""


class Unfillable(Exception):
    """A case that cannot be filled in; the message says why, in one line."""


@dataclass(frozen=True)
class Filled:
    """What was done."""

    cases: int
    filled: dict[str, list[str]]  # case → names of the channels that were filled in
    failed: dict[str, str]  # case or file → why it was left out


def fill_folder(
    images: str | Path,
    output: str | Path,
    *,
    dataset: str,
    weights: str | Path | None = None,
    using: str = TEMPLATE,
    plans_name: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
) -> Filled:
    """Copy a folder of images and fill in the channels that cases lack: files that are absent, or hold zeros alone.

    A case that cannot be filled in is named and left out; the others go on. Running it again writes everything anew.

    Args:
        images: with ``CASE_0000.nii.gz`` and so on, one file per channel.
        output: another folder.
        dataset: whose model will see them, ID or name; it has been preprocessed.
        weights: checkpoint with templates, for ``template``.
        using: ``template``; ``mean``, the mean of the preprocessed training cases; ``zeros``.
        plans_name: of the model.
        configuration: of the model.

    Raises:
        UserError: nothing can be filled in: no images, no templates, or the dataset is not there.
    """
    images, output = Path(images), Path(output)
    folder = dataset_folder(dataset)
    plans, dataset_json = read_plan(folder, plans_name), read_dataset_json(folder)
    resolve_configuration(plans, configuration)
    names = describe_input(plans, configuration, dataset_json)["channels"]
    cases, failed = _cases(images, dataset_json["file_ending"], len(names))
    if images.resolve() == output.resolve():
        raise UserError(f"{output} is the folder of the images themselves.", "Name another folder with -o.")
    stand_ins = _stand_ins(using, weights, folder, plans, configuration, dataset_json)
    fill = _CaseFiller(PlansManager(plans), configuration, names, stand_ins)
    filled = {}
    with disk_errors_in_words(output):
        for case, files in tqdm(cases.items(), desc="fill", unit="case"):
            try:
                filled[case] = fill(case, files, output, dataset_json["file_ending"])
            except Unfillable as error:
                failed[case] = str(error)
        write_json(output / RECORD, {"with": using, "cases": {case: done for case, done in filled.items() if done}})
    return Filled(len(filled), {case: done for case, done in filled.items() if done}, failed)


def _cases(folder: Path, ending: str, channels: int) -> tuple[dict[str, dict[int, Path]], dict[str, str]]:
    """Case → channel → file, and what is left out."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Name the folder of the images with -i.")
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    left_out = {}
    for path in sorted(folder.glob(f"*{ending}")):
        named = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", path.name)
        if named is None:
            left_out[path.name] = f"its name does not end in _0000{ending}: _0000 says which channel it is"
        elif int(named[2]) >= channels:
            left_out[path.name] = f"the dataset has the channels _0000 to _{channels - 1:04d}"
        else:
            cases[named[1]][int(named[2])] = path
    if not cases:
        raise UserError(
            f"{folder} holds no image CASE_0000{ending} of the dataset's channels.",
            "Name the folder of the images with -i.",
        )
    return dict(cases), left_out


def _stand_ins(
    using: str,
    weights: str | Path | None,
    folder: Path,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
) -> SpatialArray | None:
    if using == ZEROS:
        return None
    if using == MEAN:
        return mean_images(folder, plans, configuration, dataset_json)
    if weights is None:
        raise UserError("Templates come from a checkpoint.", "Name it with -w, or fill --with mean or zeros.")
    return templates_for(weights, plans, configuration, dataset_json)


class _CaseFiller:
    """Writes one case.

    Args:
        plans: of the model.
        configuration: of the model.
        names: of the channels.
        stand_ins: on the plan's grid; ``None`` for zeros.
    """

    def __init__(self, plans: PlansManager, configuration: str, names: list[str], stand_ins: SpatialArray | None):
        self.plans, self.configuration = plans, plans.get_configuration(configuration)
        self.names, self.stand_ins = names, stand_ins

    def __call__(self, case: str, files: Mapping[int, Path], output: Path, ending: str) -> list[str]:
        """Write all channels of a case; names of those that were filled in.

        Raises:
            Unfillable: a file cannot be read, none holds an image, or nothing can stand in for a channel.
        """
        data, properties = self._read(files)
        has = [channel for channel, image in zip(files, data, strict=True) if image.any()]
        if not has:
            raise Unfillable("every channel that it has is zero")
        absent = [channel for channel in range(len(self.names)) if channel not in has]
        present = data[[list(files).index(channel) for channel in has]]
        volumes = {channel: self._volume(channel, present, properties) for channel in absent}
        for channel in has:
            keep_file(files[channel], output / files[channel].name)
        for channel, volume in volumes.items():
            _write(volume, output / f"{case}_{channel:04d}{ending}", properties, like=files[has[0]])
        return [self.names[channel] for channel in absent]

    def _read(self, files: Mapping[int, Path]) -> tuple[np.ndarray, dict[str, Any]]:
        try:
            data, properties = self.plans.image_reader_writer_class().read_images([str(p) for p in files.values()])
        except UNREADABLE as error:
            reason = (str(error) or "its channels differ in size or spacing").splitlines()[-1][:160]
            raise Unfillable(f"it cannot be read: {type(error).__name__}: {reason}") from error
        if affine_of(properties) is None:
            reader = type(self.plans.image_reader_writer_class()).__name__
            raise Unfillable(f"its files are pictures ({reader}), for which there is nothing to stand in")
        if not np.isfinite(data).all():
            raise Unfillable("voxels are NaN or infinite")
        return data, properties

    def _volume(self, channel: int, present: np.ndarray, properties: Mapping[str, Any]) -> np.ndarray:
        if self.stand_ins is None:
            return np.zeros(present.shape[1:], np.float32)
        number = self.stand_ins.number_of(self.names[channel])
        if number is None:
            known = ", ".join(self.stand_ins.names)
            raise Unfillable(f"nothing stands in for {self.names[channel]}: there is only {known}")
        return stand_in_volume(
            self.stand_ins.values[number],
            present,
            properties["spacing"],
            channel,
            plans=self.plans,
            configuration=self.configuration,
        )


def _write(volume: np.ndarray, path: Path, properties: Mapping[str, Any], *, like: Path) -> None:
    """Write a volume of the reader's axes to the place of the image ``like``."""
    with atomic_path(path) as temporary:
        if "nibabel_stuff" in properties:
            nibabel.save(nibabel.Nifti1Image(volume.T, affine_of(properties)), temporary)
            return
        model = sitk.ReadImage(str(like))
        image = sitk.GetImageFromArray(volume if model.GetDimension() == volume.ndim else volume[0])
        image.CopyInformation(model)
        sitk.WriteImage(image, str(temporary), useCompression=True)
