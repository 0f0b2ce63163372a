"""What is drawn of a dataset's numbers, and what is told before a run."""

import numpy as np
import pytest
from PIL import Image

from nnssl_plugin.cli.main import main
from nnssl_plugin.intake.grouping import single_groups
from nnssl_plugin.intake.histograms import draw_histograms
from nnssl_plugin.intake.ledger import Origin, read_rows
from nnssl_plugin.intake.preview import MASK_BYTES_PER_VOXEL, preview
from nnssl_plugin.intake.tasks import Task
from nnssl_plugin.intake.unlabelled import prepare_dataset


def origin(case, **fields):
    row = {"shape": "10x20x30", "spacing_mm": "1x1x3", "body_share": "0.5", "percentiles": "1;5;9"} | fields
    return Origin(case, f"/{case}", "", orientation="RAS", status="linked", voxels_sha256="", stamp="", **row)


def tasks(source, paths, modalities=("MR",)):
    return [Task(group, source, modalities, ".nii.gz") for group in single_groups(paths, source)]


@pytest.mark.parametrize(
    "rows",
    [
        [origin("a")],
        [origin("a", channel="0"), origin("a", channel="1", percentiles="-1000;0;900"), origin("a", channel="label")],
        [origin("a", shape="10x20", spacing_mm="", body_share="", percentiles="")],
        [origin("a", spacing_mm=f"1x1x{k}") for k in (1, 2)],
    ],
)
def test_a_picture_is_drawn_whatever_is_known(tmp_path, rows):
    path = draw_histograms(tmp_path, rows)
    with Image.open(path) as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10
    assert draw_histograms(tmp_path, []) is None


def test_percentiles_are_those_within_the_mask(raw, source, save):
    array = np.zeros((20, 20, 20))
    array[5:15, 5:15, 5:15] = np.random.default_rng(0).uniform(100, 200, (10, 10, 10))
    save("a.nii.gz", array)
    summary = prepare_dataset(source, 501, "Cases", processes=1)
    (row,) = read_rows(summary.folder / "provenance.csv", Origin)
    inside = np.percentile(array[array > 0].astype(np.float32), (1, 50, 99))
    np.testing.assert_allclose([float(part) for part in row.percentiles.split(";")], inside, rtol=1e-5)


def test_voxels_bytes_and_time_are_estimated_from_headers_alone(source, save):
    linked, other = save("a.nii.gz", seed=1), save("b.nii", seed=2)
    broken = source / "c.nii.gz"
    broken.write_bytes(b"damaged")
    ahead = preview(tasks(source, [linked, other, broken]), known=3, folder=source, processes=2)
    voxels = 2 * 20 * 18 * 16
    assert (ahead.known, ahead.cases, ahead.files, ahead.voxels) == (3, 3, 3, voxels)
    assert ahead.ranges == "20 x 18 x 16 voxels of 1 x 1 x 1 mm" and ahead.by_name == ()
    assert ahead.read == sum(path.stat().st_size for path in (linked, other, broken))
    assert ahead.written == other.stat().st_size + int(MASK_BYTES_PER_VOXEL * voxels)
    one = preview(tasks(source, [linked, other, broken]), known=3, folder=source, processes=1)
    assert one.seconds == pytest.approx(2 * ahead.seconds) and ahead.free > 0


def test_what_names_say_is_counted_before_anything_is_read(source, save):
    named = [
        save(name, seed=seed) for seed, name in enumerate(["a_seg.nii.gz", "b_mask.nii.gz", "PET.nii.gz", "MR.nii.gz"])
    ]
    ahead = preview(tasks(source, named), known=0, folder=source, processes=1)
    assert ahead.by_name == ((2, "named as a segmentation"), (1, "its name says PET, not MR"))


def test_the_command_tells_before_and_after(nnunet_environment, source, save, capsys):
    save("a.nii.gz", seed=1)
    assert main(["prepare", "-i", str(source), "-d", "77", "-n", "Cli", "-np", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("To look at: 1 cases (1 files, ") and "on the disk, which has" in printed
    assert "histograms.png" in printed
