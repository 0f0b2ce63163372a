"""LVM-Med's ablations and fine-tunings: what their scripts count and draw, without a training."""

import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import r2_score

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
ablations = __import__("lvm_med_ablations")
finetuning = __import__("lvm_med_finetuning")


def test_what_the_volumes_add_has_r2_for_its_mean():
    rng = np.random.default_rng(0)
    truth, cases = rng.normal(2, 1, (12, 2)), np.repeat(["a", "b", "c"], 4)
    predicted = truth + rng.normal(0, 0.3, truth.shape)
    found = ablations.explained(truth, predicted, truth.mean(0), cases)
    assert list(found) == ["a", "b", "c"]
    assert np.mean(list(found.values())) == pytest.approx(r2_score(truth, predicted))
    assert not any(ablations.explained(truth, np.broadcast_to(truth.mean(0), (12, 2)), truth.mean(0), cases).values())


def test_slices_are_cut_and_padded_around_their_centre():
    slices = np.arange(2 * 5 * 2).reshape(2, 5, 2)
    found = ablations.centred(slices, (3, 4))
    assert found.shape == (2, 3, 4)
    np.testing.assert_array_equal(found[:, :, 1:3], slices[:, 1:4])
    assert not found[:, :, [0, 3]].any()


def test_the_table_of_ablations_compares_seed_by_seed():
    def run(arm, seed, *scores):
        named = dict(zip("ab", scores, strict=True))
        return {"arm": arm, "seed": seed, "score": named, "shuffled": dict.fromkeys(named, 0.0)}

    runs = [run("full", 0, 0.5, 0.7), run("full", 1, 0.6, 0.8), run("mae", 1, 0.5, 0.7), run("mae", 0, 0.4, 0.6)]
    _, _, full, mae = ablations.table(runs).splitlines()
    assert full == "| full | 0.650 | 0.600, 0.700 |  | 0.000 |"
    assert mae == "| mae | 0.550 | 0.500, 0.600 | -0.100 (-0.100 to -0.100) | 0.000 |"


@pytest.mark.parametrize(("size", "widths"), [("56x40", "[16,32,64,128]"), ("96x96", "[16,32,64,128,256]")])
def test_plans_are_edited_before_anything_is_preprocessed(size, widths, tmp_path):
    words = [" ".join(command) for command in ablations.commands(tmp_path, tmp_path, size, 16)]
    assert all(f"features_per_stage={widths}" in line for line in words[-3:-1])
    assert words[-1].startswith("nnUNetv2_preprocess") and "-plans_name small" in words[-1]


@pytest.mark.parametrize("name", ablations.SIZES)
def test_a_size_fits_its_network_and_its_data(name):
    size = ablations.SIZES[name]
    edits = ablations.plan_edits(size, 8)
    stride = 2 ** (size.stages - 1)
    assert name == "x".join(map(str, size.patch)) and size.token_stride == stride
    assert not any(length % stride for length in size.patch)
    assert len(edits["configurations.2d.architecture.arch_kwargs.features_per_stage"]) == size.stages
    assert edits.get("configurations.2d.patch_size", list(size.patch)) == list(size.patch)
    assert edits.get("configurations.2d.data_identifier", "nnUNetPlans_2d") == size.data


def test_every_seed_draws_its_labels_and_runs_all_arms_on_them():
    base = {"train": [f"case_{number:02d}" for number in range(20)], "val": ["x", "y"]}
    folds = [base, *finetuning.drawn_folds(base, [0, 1])]
    assert [len(fold["train"]) for fold in folds] == [20, 2, 20, 2, 20]
    assert folds[1] != folds[3] and all(fold["val"] == base["val"] for fold in folds)


def test_the_job_names_the_folds_of_each_seed(tmp_path):
    plans = {(arm, seed): f"tuned-{arm}" for arm in finetuning.ARMS for seed in (0, 1)}
    runs = finetuning.job_of([0, 1], 40, ["x"], plans, tmp_path / "finetuned")["runs"]
    assert len({run["name"] for run in runs}) == len(runs) == 12
    assert {(run["seed"], run["labelled"], run["fold"]) for run in runs} == {
        (0, 2, 1),
        (0, 20, 2),
        (1, 2, 3),
        (1, 20, 4),
    }
    assert all(run["settings"] == {"seed": run["seed"], "epochs": 2} for run in runs)


def test_the_table_of_finetunings_compares_with_scratch_and_mae():
    runs = [
        {"arm": arm, "seed": seed, "labelled": 2, "dice": {"a": {"x": dice, "y": dice}, "b": {"x": dice, "y": dice}}}
        for arm, dice in (("scratch", 0.25), ("mae", 0.5), ("full", 0.75))
        for seed in (0, 1)
    ]
    _, _, scratch, mae, full = finetuning.table(runs).splitlines()
    assert scratch == "| 2 | scratch | 0.250 | 0.250, 0.250 |  |  |"
    assert mae.endswith("| +0.250 (+0.250 to +0.250) |  |")
    assert full.endswith("| +0.500 (+0.500 to +0.500) | +0.250 (+0.250 to +0.250) |")
