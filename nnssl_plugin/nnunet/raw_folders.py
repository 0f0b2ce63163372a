"""Looking up a raw dataset: its folder, and the files of its training cases."""

from collections.abc import Mapping
from pathlib import Path

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.dataset_json import read_dataset_file


def raw_dataset_folder(dataset: str | int) -> Path:
    """The raw folder of a dataset given by ID or full name.

    Raises:
        UserError: nnUNet_raw is not set, or there is no such dataset.
    """
    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    if not nnUNet_raw.is_set():
        raise UserError("nnUNet_raw is not set.", 'Run: export nnUNet_raw="/path/to/nnUNet_raw"')
    remedy = "Prepare it first: nnssl_plugin prepare -i DIR -d ID -n NAME"
    try:
        folder = Path(nnUNet_raw) / maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"There is no single dataset {dataset}: {str(error).splitlines()[0]}", remedy) from error
    if not (folder / "dataset.json").is_file():
        raise UserError(f"{folder} holds no dataset.json.", remedy)
    return folder


def training_files(raw_folder: Path, channels: Mapping[str, int] | None = None) -> dict[str, tuple[Path, Path]]:
    """Case → (file of a channel, file of the label, which may not exist), sorted by case.

    The names are nnU-Net's; its own look-up starts a dozen processes per call where cases lie in imagesTr.

    Args:
        raw_folder: of the dataset.
        channels: case → channel whose file is wanted; 0 for cases that it does not name.
    """
    channels = channels or {}
    dataset_json = read_dataset_file(raw_folder / "dataset.json", needed=("file_ending",))
    if "dataset" in dataset_json:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        files = get_filenames_of_train_images_and_targets(str(raw_folder), dataset_json)
        return {
            case: (Path(files[case]["images"][channels.get(case, 0)]), Path(files[case]["label"]))
            for case in sorted(files)
        }
    ending = dataset_json["file_ending"]
    first = (raw_folder / "imagesTr").glob(f"*_0000{ending}")
    cases = sorted(image.name.removesuffix(f"_0000{ending}") for image in first)
    found = {case: raw_folder / "imagesTr" / f"{case}_{channels.get(case, 0):04d}{ending}" for case in cases}
    return {case: (found[case], raw_folder / "labelsTr" / f"{case}{ending}") for case in cases}


def raw_folder(dataset_name: str) -> Path:
    """The raw dataset, beside whose images captions and modalities lie."""
    from nnunetv2.paths import nnUNet_raw

    if not nnUNet_raw.is_set():
        raise UserError("nnUNet_raw is not set.", "export nnUNet_raw=/path/to/nnUNet_raw")
    return Path(str(nnUNet_raw)) / dataset_name
