"""fill: what nnU-Net's preprocessing finds of a stand-in, what stays of the other channels, files, errors."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from fake_dataset import NAME, write_fake_dataset
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from templated_dataset import NAMES, templates, write_channels

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.spatial_arrays import as_state
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.methods.brainmvp.finetuning.cases import TemplatedCase, channel_templates
from nnssl_plugin.tasks.filling.filling import fill_folder

SIZE, BOX = (22, 24, 20), (slice(3, 19), slice(2, 22), slice(4, 18))
CT = {"mean": 3.0, "std": 2.0, "percentile_00_5": -50.0, "percentile_99_5": 50.0}


@pytest.fixture
def dataset(nnunet_environment, tmp_path):
    """A function that writes a dataset of four channels with its plan, and a checkpoint with templates of them."""

    def make(schemes=("ZScoreNormalization",) * 4, mask=(True,) * 4, **changes):
        plan = write_fake_dataset(channels=4, **({"dimensions": 2} if changes.pop("flat", False) else {}))
        write_channels(4)
        (configuration,) = plan["configurations"].values()
        configuration |= {
            "normalization_schemes": list(schemes),
            "use_mask_for_norm": list(mask),
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        }
        plan["foreground_intensity_properties_per_channel"] = {str(c): CT for c in range(4)}
        folder = Path(os.environ["nnUNet_preprocessed"], NAME)
        write_json(folder / "nnUNetPlans.json", plan | changes)
        save_checkpoint(as_state({"templates": templates()}), tmp_path / "templates.pth")
        return plan | changes

    return make


def write_case(folder, *, lacking=(), spacing=1.0, seed=0, case="a", zeros=()):
    """A head that fills BOX but for a hole and corners; each file as (x, y, z) with axes to the left, back and up."""
    rng = np.random.default_rng(seed)
    head = np.zeros(SIZE, bool)
    head[BOX] = True
    head[3:6, 2:6, 4:8] = False
    head[9:12, 9:12, 9:12] = False  # a hole: nnU-Net's mask fills it
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = (5, -7, 11)
    folder.mkdir(exist_ok=True)
    for channel in range(4):
        image = np.where(head, 100 + 20 * rng.normal(size=SIZE), 0).astype(np.float32)
        if channel not in lacking:
            image = image * 0 if channel in zeros else image
            nibabel.save(nibabel.Nifti1Image(image.T, affine), folder / f"{case}_{channel:04d}.nii.gz")
    return head


def preprocessed(plan, folder, case="a"):
    manager = PlansManager(plan)
    (name,) = plan["configurations"]
    files = [str(folder / f"{case}_{channel:04d}.nii.gz") for channel in range(4)]
    return DefaultPreprocessor(verbose=False).run_case(
        files, None, manager, manager.get_configuration(name), read_json(folder_of() / "dataset.json")
    )


def folder_of():
    return Path(os.environ["nnUNet_preprocessed"], NAME)


READERS = ("NibabelIOWithReorient", "SimpleITKIO", "NibabelIO")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)])
def test_preprocessing_finds_what_training_shows(dataset, tmp_path, reader, masked, transpose):
    """The same values as the training's own templates, and other channels as if nothing had been filled in."""
    schemes = ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization")
    backward = tuple(int(axis) for axis in np.argsort(transpose))
    plan = dataset(
        schemes, (masked,) * 4, image_reader_writer=reader, transpose_forward=transpose, transpose_backward=backward
    )
    axes = [(("IS", "PA", "LR") if reader == READERS[0] else ("z", "y", "x"))[axis] for axis in transpose]
    for lacking in range(4):
        images, filled, zeros = (tmp_path / f"{name}_{lacking}" for name in ("images", "filled", "zeros"))
        write_case(images, lacking=(lacking,))
        for using, output in (("template", filled), ("zeros", zeros)):
            done = fill_folder(images, output, dataset="901", weights=tmp_path / "templates.pth", using=using)
            assert done.filled == {"a": [NAMES[lacking]]} and not done.failed
        data, labels, _ = preprocessed(plan, filled)
        plain, unchanged, _ = preprocessed(plan, zeros)
        assert data.shape == plain.shape
        assert np.array_equal(labels, unchanged) or not masked  # the mask, which nothing reads then
        others = [channel for channel in range(4) if channel != lacking]
        np.testing.assert_array_equal(data[others], plain[others])
        turned = templates()
        object.__setattr__(turned, "values", turned.values.permute(0, *(1 + axis for axis in transpose)))
        shown = channel_templates(turned, NAMES, schemes, [masked] * 4)
        case = TemplatedCase(data, labels, shown, shown.scaling(data.shape[1:], labels))
        kept = labels[0] >= 0 if masked else np.ones(data.shape[1:], bool)
        if schemes[lacking] == "RescaleTo01Normalization" and masked:
            continue  # nnU-Net takes the range with the zeros outside the mask
        np.testing.assert_allclose(data[lacking][kept], case[:][4 + lacking][kept], atol=3e-5, err_msg=str(axes))


@pytest.mark.parametrize("flat", [False, True])
def test_a_case_of_other_voxels_is_near_and_in_place(dataset, tmp_path, flat):
    plan = dataset(("NoNormalization",) * 4, (False,) * 4, flat=flat)
    smooth = torch.nn.functional.avg_pool3d(templates().values, 5, stride=1, padding=2)
    array = templates()
    array.values.copy_(smooth)
    save_checkpoint(as_state({"templates": array}), tmp_path / "templates.pth")
    write_case(tmp_path / "images", lacking=(1,), spacing=0.8)
    (configuration,) = plan["configurations"]
    fill_folder(
        tmp_path / "images",
        tmp_path / "filled",
        dataset="901",
        weights=tmp_path / "templates.pth",
        configuration=configuration,
    )
    data, labels, _ = preprocessed(plan, tmp_path / "filled")
    shown = channel_templates(array, NAMES, ["NoNormalization"], [False])
    expected = TemplatedCase(data, labels, shown, shown.scaling(data.shape[1:], labels))[:][5]
    assert np.corrcoef(data[1].flatten(), expected.flatten())[0, 1] > 0.97
    assert np.abs(data[1] - expected).max() < 0.5 * expected.std()


def test_files_keep_their_grid_and_those_that_are_there_their_bytes(dataset, tmp_path):
    dataset(image_reader_writer="SimpleITKIO")
    images, filled = tmp_path / "images", tmp_path / "filled"
    write_case(images, lacking=(0,), zeros=(3,))
    write_case(images, case="b", seed=1)
    done = fill_folder(images, filled, dataset="901", weights=tmp_path / "templates.pth")
    assert (done.cases, done.filled, done.failed) == (2, {"a": ["T1", "PD"]}, {})
    assert read_json(filled / "filled.json") == {"with": "template", "cases": {"a": ["T1", "PD"]}}
    names = [f"{case}_{channel:04d}.nii.gz" for case in "ab" for channel in range(4)]
    assert sorted(path.name for path in filled.glob("*.nii.gz")) == names
    for name in ("a_0001.nii.gz", "a_0002.nii.gz", *names[4:]):
        assert (filled / name).read_bytes() == (images / name).read_bytes()
    new, old = (sitk.ReadImage(str(filled / name)) for name in ("a_0000.nii.gz", "a_0001.nii.gz"))
    for about in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(new, about)() == getattr(old, about)()
    assert sitk.GetArrayFromImage(new).any()


def test_the_mean_is_that_of_the_cases_that_have_the_channel_centre_on_centre(dataset, tmp_path):
    plan = dataset(("NoNormalization",) * 4, (False,) * 4)
    raw = Path(os.environ["nnUNet_raw"], NAME)
    write_json(raw / "modalities.json", {f"case_{c:02d}": [0, 2, 3] for c in range(3)} | {"case_05": [1, 2, 3]})
    write_json(raw / "dataset.json", read_json(folder_of() / "dataset.json"))
    write_case(tmp_path / "images", lacking=(1,))
    fill_folder(tmp_path / "images", tmp_path / "filled", dataset="901", using="mean")
    data, labels, _ = preprocessed(plan, tmp_path / "filled")
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    cases = nnUNetDatasetBlosc2(str(folder_of() / "fake_data"))
    mean = np.mean([np.asarray(cases.load_case(f"case_{c:02d}")[0][:])[1] for c in (3, 4, 5)], 0)
    array = templates(("T2",), mean.shape)
    array.values[0] = torch.from_numpy(mean)
    shown = channel_templates(array, NAMES, ["NoNormalization"], [False])
    expected = TemplatedCase(data, labels, shown, shown.scaling(data.shape[1:], labels))[:][5]
    np.testing.assert_allclose(data[1], expected, atol=1e-5)


def test_what_cannot_be_filled_is_named_and_the_others_go_on(dataset, tmp_path, capsys):
    dataset()
    images = tmp_path / "images"
    write_case(images, lacking=(1,))
    write_case(images, case="empty", zeros=(0, 1, 2, 3))
    write_case(images, case="broken", lacking=(2,))
    (images / "broken_0000.nii.gz").write_bytes(b"no image")
    (images / "scan.nii.gz").write_bytes(b"")
    words = ["-i", str(images), "-o", str(tmp_path / "out"), "-d", "901", "-w", str(tmp_path / "templates.pth")]
    assert main(["fill", *words]) == 1
    printed = capsys.readouterr().out
    assert "empty: left out, every channel that it has is zero." in printed
    assert "broken: left out, it cannot be read" in printed and "scan.nii.gz: left out, its name" in printed
    assert "1 cases; filled in (template): T2 in 1" in printed
    assert not list((tmp_path / "out").glob("broken*"))

    few = templates(("T1", "PD"))
    save_checkpoint(as_state({"templates": few}), tmp_path / "few.pth")
    done = fill_folder(images, tmp_path / "out2", dataset="901", weights=tmp_path / "few.pth")
    assert "nothing stands in for T2: there is only T1, PD" in done.failed["a"]


def test_errors_name_a_way_on(dataset, tmp_path):
    dataset()
    images = tmp_path / "images"
    write_case(images)
    save_checkpoint({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "plain.pth")
    good = {"dataset": "901", "weights": tmp_path / "templates.pth"}
    for arguments, said in (
        ((tmp_path / "nowhere", tmp_path / "out", good), "There is no folder"),
        ((folder_of(), tmp_path / "out", good), "holds no image"),
        ((images, images, good), "the folder of the images themselves"),
        ((images, tmp_path / "out", {"dataset": "901"}), "come from a checkpoint"),
        ((images, tmp_path / "out", good | {"weights": tmp_path / "plain.pth"}), "holds no templates"),
        ((images, tmp_path / "out", good | {"plans_name": "other"}), "There is no plan"),
        ((images, tmp_path / "out", good | {"configuration": "2d"}), "has no configuration 2d"),
        ((images, tmp_path / "out", {"dataset": "777"}), "There is no dataset 777"),
    ):
        with pytest.raises(UserError) as error:
            fill_folder(arguments[0], arguments[1], **arguments[2])
        assert said in error.value.problem and error.value.remedy
