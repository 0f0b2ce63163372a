"""nnU-Net's ``dataset.json``: reading it and checking its form."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json

DATASET_FILE = "dataset.json"


def read_dataset_file(path: str | Path, *, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a ``dataset.json`` of nnU-Net v2.

    Args:
        path: the file.
        needed: keys that it has to have.

    Raises:
        UserError: it cannot be read, is in the format of nnU-Net v1 or of the decathlon, a needed key is absent, or
            ``labels`` or ``channel_names`` have another form.
    """
    content = read_json(path, dict)
    labels = content.get("labels", {})
    if "modality" in content and "channel_names" not in content:
        raise UserError(
            f"{path} is in the format of nnU-Net v1 or of the Medical Segmentation Decathlon.",
            "Convert the dataset: nnUNetv2_convert_MSD_dataset -i FOLDER, or nnUNetv2_convert_old_nnUNet_dataset.",
        )
    for key in ("labels", "channel_names"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f'{path}: "{key}" is no object.', _FORMS[key])
    if (
        isinstance(labels, dict)
        and labels
        and all(_is_number(name) and not _is_number(v) for name, v in labels.items())
    ):
        raise UserError(f'{path}: "labels" names numbers by names, as nnU-Net v1 did.', _FORMS["labels"])
    absent = [key for key in needed if key not in content]
    if absent:
        raise UserError(f'{path} has no "{absent[0]}".', _FORMS.get(absent[0], "Complete it as nnU-Net documents it."))
    if not isinstance(content.get("file_ending", ""), str):
        raise UserError(f'{path}: "file_ending" is no text.', _FORMS["file_ending"])
    return content


_FORMS = {
    "labels": 'It reads "labels": {"background": 0, "NAME": 1, …}.',
    "channel_names": 'It reads "channel_names": {"0": "CT"}.',
    "file_ending": 'It reads "file_ending": ".nii.gz".',
}


def _is_number(text: Any) -> bool:
    return isinstance(text, int) or (isinstance(text, str) and text.strip().isdigit())
