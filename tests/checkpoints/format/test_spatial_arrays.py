"""Spatial arrays: declared, checked, resampled, adapted, shared, inspected and written for viewers."""

import argparse
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from fake_dataset import fake_plan, write_fake_dataset
from scipy.ndimage import map_coordinates
from small_pretraining import pretrain_one_step
from toy_method import ToyPretrainer

from nnssl_plugin.checkpoints.adaptation.arrays import fit_arrays
from nnssl_plugin.checkpoints.adaptation.finetuning_plan import adapt_checkpoint
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.spatial_arrays import (
    SpatialArray,
    as_state,
    read_spatial_arrays,
    resampled,
    spatial_arrays_of,
)
from nnssl_plugin.checkpoints.sharing.array_files import write_nifti
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.checkpoints.sharing.importing import import_weights
from nnssl_plugin.cli import inspect as inspect_command
from nnssl_plugin.errors import UserError

AXES = ("IS", "PA", "LR")


def an_array(values=None, **changes) -> SpatialArray:
    values = torch.rand(2, 9, 8, 7) if values is None else values
    fields = {"spacing_mm": (2.0, 1.0, 1.5), "axes": AXES, "names": ("T1", "FLAIR"), "normalisation": ("A", "B")}
    return SpatialArray(values, **fields | changes)


class ArrayPretrainer(ToyPretrainer):
    def spatial_arrays(self):
        return {"templates": an_array()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return pretrain_one_step(tmp_path_factory.mktemp("pretraining"), trainer_class=ArrayPretrainer)


def test_resampling_agrees_with_interpolation_about_the_centre():
    array = an_array(torch.rand(2, 9, 8, 7, dtype=torch.float64).float())
    new = resampled(array, spacing_mm=(0.7, 0.8, 0.9), axes=AXES)
    assert new.grid == (26, 10, 12) and new.spacing_mm == (0.7, 0.8, 0.9)
    places = [
        (np.arange(now) - (now - 1) / 2) * fine / coarse + (before - 1) / 2
        for now, before, fine, coarse in zip(new.grid, array.grid, new.spacing_mm, array.spacing_mm, strict=True)
    ]
    expected = map_coordinates(
        array.values[1].numpy().astype(float), np.meshgrid(*places, indexing="ij"), order=1, mode="nearest"
    )
    np.testing.assert_allclose(new.values[1].numpy(), expected, atol=1e-6)


def test_resampling_keeps_constants_centres_and_what_is_as_it_should_be():
    array = an_array(torch.full((2, 9, 8, 7), 3.0))
    coarse = resampled(array, spacing_mm=(5.0, 4.0, 4.0), axes=AXES)
    assert coarse.grid == (4, 2, 3) and torch.allclose(coarse.values, torch.tensor(3.0))
    point = torch.zeros(2, 9, 9, 9)
    point[:, 4, 4, 4] = 1
    fine = resampled(an_array(point, spacing_mm=(3.0, 3.0, 3.0)), spacing_mm=(1.0, 1.0, 1.0), axes=AXES)
    assert fine.values[0].argmax() == 13 * 27 * 27 + 13 * 27 + 13
    same = an_array()
    assert torch.equal(resampled(same, spacing_mm=same.spacing_mm, axes=AXES).values, same.values)


def test_axes_come_in_the_order_that_is_asked_for():
    array = an_array()
    turned = resampled(array, spacing_mm=(1.5, 2.0, 1.0), axes=("LR", "IS", "PA"))
    assert torch.equal(turned.values, array.values.permute(0, 3, 1, 2))
    stored = resampled(array, spacing_mm=(1.5, 2.0, 1.0), axes=("x", "z", "y"))
    assert torch.equal(stored.values, turned.values)


def test_an_absurd_spacing_is_refused():
    with pytest.raises(UserError, match="too many"):
        resampled(an_array(spacing_mm=(900.0, 900.0, 900.0)), spacing_mm=(0.1, 0.1, 0.1), axes=AXES)


@pytest.mark.parametrize(
    "change",
    [
        {"values": torch.rand(2, 3, 3)},
        {"values": torch.full((2, 3, 3, 3), float("nan"))},
        {"names": ["T1"]},
        {"names": ["T1", "T1"]},
        {"names": "T1"},
        {"normalisation": ["A"]},
        {"axes": ["IS", "IS", "LR"]},
        {"axes": ["z", "PA", "LR"]},
        {"spacing_mm": [1.0, 0.0, 1.0]},
        {"spacing_mm": [1.0, float("nan"), 1.0]},
        {"placement": "corner"},
    ],
)
def test_a_declaration_that_is_none_is_refused(tmp_path, change):
    content = as_state({"templates": an_array()})
    content["ssl_state"]["spatial_arrays"]["templates"] |= change
    with pytest.raises(UserError, match="templates"):
        spatial_arrays_of(content, tmp_path / "file.pth")


@pytest.mark.parametrize("state", [None, {}, {"spatial_arrays": {}}, 5])
def test_most_checkpoints_have_none(tmp_path, state):
    assert spatial_arrays_of({"ssl_state": state}, tmp_path) == {}


def test_adapt_brings_them_onto_the_target_s_grid(nnunet_environment, checkpoint):
    write_fake_dataset(cases=1)
    adapted = adapt_checkpoint("901", name="toy", weights=checkpoint)
    (array,) = read_spatial_arrays(adapted.weights).values()
    assert array.spacing_mm == (1.0, 1.0, 1.0) and array.grid == (18, 8, 10) and array.axes == AXES
    assert array.names == ("T1", "FLAIR") and array.normalisation == ("A", "B")
    table = adapted.report.table()
    assert "array templates carried: T1, FLAIR: 18 × 8 × 10 voxels of 1.0 × 1.0 × 1.0 mm" in table
    assert "has nothing for the channel MR" in table
    again = adapt_checkpoint("901", name="again", weights=adapted.weights)
    assert torch.equal(read_spatial_arrays(again.weights)["templates"].values, array.values)


def test_adapt_says_what_cannot_be_carried():
    arrays, dataset = {"templates": an_array(axes=("z", "y", "x"))}, {"channel_names": {"0": "t1"}}
    _, lines = fit_arrays(arrays, fake_plan(), "3d_fullres", dataset)
    assert "t1 is in A, its channel here in ZScoreNormalization" in lines[1] and "known in the target alone" in lines[2]


def test_a_2d_configuration_gets_them_at_the_median_spacing_of_its_slices():
    plan = fake_plan(dimensions=2) | {"original_median_spacing_after_transp": [3.0, 1.0, 1.0]}
    fitted, _ = fit_arrays({"templates": an_array()}, plan, "2d", {"channel_names": {"0": "t1"}})
    assert fitted["templates"].spacing_mm == (3.0, 1.0, 1.0)


@pytest.mark.parametrize("layout", ["safetensors", "nnunet", "nnssl"])
def test_every_export_carries_them(checkpoint, tmp_path, layout):
    folder = export_checkpoint(checkpoint, tmp_path / "shared", layout=layout).folder
    file = {"safetensors": "", "nnunet": "pretrained_weights.pth", "nnssl": "checkpoint_final.pth"}[layout]
    imported = import_weights(folder / file, tmp_path / "imported.pth")
    expected = read_spatial_arrays(checkpoint)["templates"]
    for path in (folder / file, imported):
        array = read_spatial_arrays(path)["templates"]
        assert torch.equal(array.values, expected.values) and array.said() == expected.said()


def test_inspect_shows_and_writes_them(checkpoint, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    inspect_command.run(parser.parse_args([str(checkpoint), "--arrays", str(tmp_path / "templates")]))
    assert "templates of T1, FLAIR: 9 × 8 × 7 voxels of 2.0 × 1.0 × 1.5 mm, axes IS PA LR" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "templates").iterdir()}
    assert names == {"templates_T1.nii.gz", "templates_FLAIR.nii.gz", "templates.png"}
    with pytest.raises(UserError, match="is there already"):
        inspect_command.run(parser.parse_args([str(checkpoint), "--arrays", str(tmp_path / "templates")]))


def test_inspect_refuses_to_write_none(tmp_path):
    save_checkpoint({"network_weights": {"a.weight": torch.rand(3, 3)}}, tmp_path / "plain.pth")
    parser = argparse.ArgumentParser()
    inspect_command.add_arguments(parser)
    with pytest.raises(UserError, match="no arrays"):
        inspect_command.run(parser.parse_args([str(tmp_path / "plain.pth"), "--arrays", str(tmp_path / "out")]))


def test_a_nifti_lies_where_the_array_says(tmp_path):
    values = torch.zeros(1, 5, 9, 7)  # axes LR, IS, PA
    values[0, 3, 1, 6] = 1
    array = an_array(values, names=("T1 post/Gd",), normalisation=("Z",), axes=("LR", "IS", "PA"))
    (path,) = write_nifti({"templates": array}, tmp_path)
    image = nibabel.load(path)
    assert path.name == "templates_T1-post-Gd.nii.gz" and nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.shape == (5, 7, 9) and np.allclose(image.header.get_zooms(), (2.0, 1.5, 1.0))
    place = image.affine @ [*np.argwhere(image.get_fdata())[0], 1]
    np.testing.assert_allclose(place[:3], [1 * 2.0, 3 * 1.5, -3 * 1.0])  # from the centre, in RAS
