"""Teachers from files: frozen, whole, of a network that suits the plan; everything else is refused in words."""

from copy import deepcopy

import pytest
import torch
from fake_dataset import fake_plan
from small_primus import with_primus

from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.format.provenance import describe_network
from nnssl_plugin.errors import UserError
from nnssl_plugin.methods.distillation.teacher import check_fits, read_teacher
from nnssl_plugin.nnunet.plans import build_network


def write_source(path, *, plan=None, channels=1, change=lambda weights: weights, **said):
    """A checkpoint with a provenance; returns its weights as they were built."""
    torch.manual_seed(7)
    plan = plan or fake_plan(residual=True)
    configuration = next(iter(plan["configurations"]))
    labels = {"channel_names": {str(c): "MR" for c in range(channels)}, "labels": {"background": 0, "body": 1}}
    weights = build_network(plan, configuration, labels).state_dict()
    provenance = {"network": describe_network(plan, configuration), **said}
    save_checkpoint({"network_weights": change(dict(weights)), "provenance": provenance}, path)
    return weights


def refusal(path):
    with pytest.raises(UserError) as refused:
        read_teacher(path)
    return str(refused.value)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_encoder_is_loaded_frozen_and_in_test_mode(tmp_path, dimensions):
    weights = write_source(tmp_path / "teacher.pth", plan=fake_plan(dimensions=dimensions, residual=True), channels=2)
    teacher = read_teacher(tmp_path / "teacher.pth")
    network = teacher.backbone.network
    assert not network.training and not any(p.requires_grad for p in teacher.backbone.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items() if k.startswith("encoder."))
    assert teacher.backbone.input_channels == 2 and teacher.backbone.dimensions == dimensions


def test_a_file_that_holds_the_encoder_alone_will_do(tmp_path):
    write_source(tmp_path / "teacher.pth", change=lambda w: {k: v for k, v in w.items() if k.startswith("encoder.")})
    assert read_teacher(tmp_path / "teacher.pth").backbone.channels == (4, 8, 16)


def test_files_that_are_no_teacher_are_refused(tmp_path):
    path = tmp_path / "teacher.pth"
    assert "is not there" in refusal(path)
    write_source(path, change=lambda w: {k: v for k, v in w.items() if not k.startswith("encoder.stages.1.")})
    assert "does not hold the whole encoder" in refusal(path) and "encoder.stages.1." in refusal(path)

    def broken(weights):
        key = "encoder.stages.2.blocks.0.conv1.conv.weight"
        return weights | {key: torch.full_like(weights[key], float("nan"))}

    write_source(path, change=broken)
    assert "not finite" in refusal(path) or "NaN" in refusal(path)
    save_checkpoint({"state_dict": {"a.weight": torch.zeros(3, 3)}}, path)
    assert "does not say which network" in refusal(path)


def test_plans_that_the_teacher_cannot_read_are_refused(tmp_path):
    path = tmp_path / "teacher.pth"
    write_source(path, channels=2)
    teacher = read_teacher(path)
    check_fits(teacher, (16, 20, 12), 2)
    for patch, channels, said in (
        ((16, 20), 2, "reads 3D images, the plan has 2D"),
        ((16, 20, 12), 3, "reads 2 channels, the dataset has 3"),
        ((4, 4, 4), 2, r"patch of \[4, 4, 4\] voxels, but \[8, 8, 8\]"),  # a single voxel of its coarsest map
        ((16, 18, 12), 2, r"does not take the plan's patch of \[16, 18, 12\] voxels, but \[16, \d+, 12\]"),
    ):
        with pytest.raises(UserError, match=said):
            check_fits(teacher, patch, channels)


def test_a_transformer_takes_the_patch_that_it_was_made_for(tmp_path):
    path = tmp_path / "teacher.pth"
    write_source(path, plan=with_primus(deepcopy(fake_plan())))
    teacher = read_teacher(path)
    check_fits(teacher, (16, 16, 16), 4)  # of one channel: it sees the first that a case has
    with pytest.raises(UserError, match=r"patch of \[16, 16, 32\] voxels, but \[16, 16, 16\]"):
        check_fits(teacher, (16, 16, 32), 1)
