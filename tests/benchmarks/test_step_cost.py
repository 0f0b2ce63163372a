"""What the step benchmarks call the floor: each network once, teachers forward only; and the correspondence's share."""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from fake_dataset import fake_plan
from pretraining_harness import make_trainer
from torch import nn

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.teacher import Teacher
from nnssl_plugin.nnunet.plans import build_network

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
step_cost, correspondence = __import__("step_cost"), __import__("correspondence")

DATASET = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}


class Student(nn.Module):
    """A backbone and a head as one network."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.channels[-1], 3)

    def forward(self, image):
        return self.head(self.backbone.pooled(self.backbone.features(image)))


class Task(nn.Module):
    """Asks networks in every way that methods do."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone(build_network(fake_plan(), "3d_fullres", DATASET), 1)
        self.backbone.train_only(("encoder", "decoder"))
        self.head = nn.Sequential(nn.Linear(16, 5), nn.ReLU())
        self.teacher = Teacher(self.backbone, 0.9)
        self.teacher_head = Teacher(self.head, 0.9)
        self.whole_teacher = Teacher(Student(self.backbone), 0.9)

    def encode(self, views):
        features = self.backbone.features(views["image"])
        outputs = {
            "restored": self.backbone.reconstruct(features),
            "tokens": self.head(self.backbone.tokens(features)[0]),
        }
        with torch.no_grad():
            theirs = self.teacher.module.tokens(self.teacher.module.features(views["image"]))[0]
        outputs["theirs"] = self.teacher_head(theirs)
        outputs["key"] = self.whole_teacher(views["image"])
        return outputs, {}


@pytest.fixture(scope="module")
def recorded():
    task = Task()
    return task, step_cost.RecordedCalls(task, {"image": torch.randn(2, 1, 16, 16, 16)})


def test_every_network_is_recorded_once_and_teachers_are_not_trained(recorded):
    task, calls = recorded
    expected = [
        (task.backbone, True),
        (task.backbone, True),
        (task.backbone.reconstruction_head, True),
        (task.head, True),
        (task.teacher.module, False),
        (task.teacher_head, False),
        (task.whole_teacher, False),
    ]
    assert [call.network for call in calls.calls] == [network for network, _ in expected]
    assert [call.trained for call in calls.calls] == [trained for _, trained in expected]


def test_inputs_ask_for_a_gradient_only_where_they_did(recorded):
    _, calls = recorded
    asks = [any(tensor.requires_grad for tensor in step_cost._tensors(call.inputs)) for call in calls.calls]
    assert asks == [False, True, True, True, False, False, False]


def test_making_the_calls_again_reaches_the_student_and_no_teacher(recorded):
    task, calls = recorded
    task.zero_grad()
    calls.replay().backward()
    for name, parameter in task.named_parameters():
        reached = parameter.requires_grad and "teacher" not in name
        assert (parameter.grad is not None) == reached, name


def test_the_backbones_can_be_asked_alone(recorded):
    task, calls = recorded
    task.zero_grad()
    calls.replay(Backbone).backward()
    assert all(parameter.grad is None for parameter in task.head.parameters())
    encoder = task.backbone.network.encoder
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_recording_leaves_modules_as_they_were(recorded):
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl
    assert Backbone.features.__qualname__ == "Backbone.features"


def test_the_parts_of_a_real_step_add_up(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = make_trainer(pretraining={"epochs": 1, "iterations_per_epoch": 4, "validation_iterations": 1})
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    try:
        times = step_cost.Round(trainer, "cpu", "process").run()
        summary = step_cost.summarise([times])
    finally:
        trainer.interruption.release()
    assert summary["step_over_floor"] == pytest.approx(times["step"] / times["floor"])
    assert times["step"] > times["backbone"] > 0 and times["floor"] > 0
    inner = sum(summary["shares"][name] for name in ("backbone", "heads", "objective"))
    assert inner == pytest.approx(times["whole"] / times["step"])
    assert isinstance(trainer.precision(), nullcontext)


def test_the_correspondence_has_a_share_of_the_step():
    result = correspondence.measure(
        patch=(16, 16, 16), grid=(4, 4, 4), batch=2, features=(4, 8), rounds=2, device="cpu"
    )
    assert result["tokens"] == 64 and 0 < result["share"] < 1
    assert 0 < result["matches_per_sample"] <= 64


def test_operators_are_counted_forward_and_backward_without_views():
    device_work = __import__("device_work")
    x = torch.ones(3, requires_grad=True)
    forward = device_work.work_of(lambda: (2 * x).view(1, 3), "cpu")
    both = device_work.work_of(lambda: (2 * x).sum().backward(), "cpu")
    assert forward == {"operators": 1} and both["operators"] > 2
