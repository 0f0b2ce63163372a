"""The list of commands of the quickstart. The whole pipeline runs in end_to_end/test_med3dinsight.py."""

import math

import pytest

from nnssl_plugin.quickstart import steps as pipeline
from nnssl_plugin.quickstart.steps import finetuning_steps, fitting_patch, planning_steps, pretraining_steps, titles

PLAN = {
    "configurations": {
        "3d_fullres": {
            "patch_size": [40, 56, 40],
            "architecture": {"arch_kwargs": {
                "features_per_stage": [32, 64, 128, 256], "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            }},
        }
    }
}  # fmt: skip


def every_step(folder, device="cpu"):
    return [
        *planning_steps(folder),
        *pretraining_steps(folder, PLAN, device=device),
        *finetuning_steps(folder, device=device),
    ]


def commands(folder):
    return [step.command for step in every_step(folder)]


def test_the_pipeline_goes_through_nnunets_own_commands(tmp_path):
    names = [command[0] for command in commands(tmp_path)]
    assert {"nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"} <= set(names)
    assert set(names) <= {"nnssl_plugin"} | {name for name in names if name.startswith("nnUNetv2_")}


def test_the_numbered_titles_are_those_of_the_steps(tmp_path):
    labelled = [step.title for step in every_step(tmp_path)]
    assert titles(labelled=True) == ["scans", *labelled, "report"]
    until = labelled.index("pretrain") + 1
    assert titles(labelled=False) == ["scans", *labelled[:until], "report"]


def test_it_is_estimated_to_take_less_than_ten_minutes():
    assert sum(pipeline.SECONDS.values()) < 600


def test_workers_are_switched_off_for_training_only(tmp_path):
    # nnUNet_n_proc_DA=0 crashes nnU-Net's planning
    for step in every_step(tmp_path):
        assert ("nnUNet_n_proc_DA" in dict(step.environment)) == (step.command[0] == "nnUNetv2_train")
        assert (step.results is not None) == (step.command[0] == "nnUNetv2_train")


def test_both_arms_differ_in_their_weights_alone(tmp_path):
    arms = {arm: [c for c in commands(tmp_path) if arm in " ".join(c)] for arm in pipeline.ARMS}
    adapt = {arm: next(c for c in lines if c[1] == "adapt") for arm, lines in arms.items()}
    assert adapt["scratch"][-1] == "--from-scratch"
    assert [*(word.replace("scratch", "pretrained") for word in adapt["scratch"][:-1])] == list(adapt["pretrained"])
    train = {arm: next(c for c in lines if c[0] == "nnUNetv2_train") for arm, lines in arms.items()}
    assert [w.replace("scratch", "pretrained") for w in train["scratch"]] == list(train["pretrained"])


def test_the_small_network_keeps_the_planned_number_of_stages(tmp_path):
    shrink = next(c for c in commands(tmp_path) if c[1] == "plan")
    assert "configurations.3d_fullres.architecture.arch_kwargs.features_per_stage=[8,16,32,64]" in shrink
    assert "epochs=4" in shrink and "method.queries=32" in shrink


def test_the_device_reaches_training_and_prediction(tmp_path):
    on_device = [s.command for s in every_step(tmp_path, device="cuda") if "-device" in s.command]
    assert [c[c.index("-device") + 1] for c in on_device] == ["cuda"] * 5


@pytest.mark.parametrize(
    ("patch", "stride"),
    [([40, 56, 40], [8] * 3), ([128, 128, 128], [32] * 3), ([20, 256, 224], [1, 64, 32]), ([24, 40, 32], [8] * 3)],
)
def test_a_large_patch_is_cut_to_what_the_strides_divide(patch, stride):
    fitting = fitting_patch(patch, [[1, 1, 1], stride])
    assert all(
        size % s == 0 and 2 * s <= size <= planned for size, s, planned in zip(fitting, stride, patch, strict=True)
    )
    smallest = math.prod(fitting) <= pipeline.MOST_PATCH_VOXELS
    assert smallest or all(size == 2 * s for size, s in zip(fitting, stride, strict=True))
    if math.prod(patch) <= pipeline.MOST_PATCH_VOXELS:
        assert fitting == patch


def test_the_patch_of_the_pipeline_is_small(tmp_path):
    shrink = next(c for c in commands(tmp_path) if c[1] == "plan")
    assert "configurations.3d_fullres.patch_size=[32,32,32]" in shrink
