"""The teacher against a naive average, one update per tensor, and nothing changed where a step was skipped."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.teacher import Teacher, _in_one_pass, _in_three_launches

DONE, SKIPPED = torch.tensor(True), torch.tensor(False)


def small_network():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(4))


def student_of(dtype=torch.float32):
    network = small_network().to(dtype)
    network(torch.randn(2, 2, 5, 5, dtype=dtype))
    return network


def disturb(network):
    """A training step that changes every parameter, and BatchNorm's statistics."""
    network.train()
    first = next(network.parameters())
    network(torch.randn(4, 2, 5, 5, dtype=first.dtype))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def unet(dimensions=2):
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimensions]
    return PlainConvUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 6, 8],
        conv_op=conv,
        kernel_sizes=3,
        strides=[1, 2, 2],
        n_conv_per_stage=2,
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_teacher_is_the_average_that_a_naive_loop_gives(dtype, tolerance):
    torch.manual_seed(0)
    student = student_of(dtype)
    teacher = Teacher(student, 0.9)
    naive = {key: value.double().clone() for key, value in student.state_dict().items()}
    for step in range(20):
        disturb(student)
        teacher.update(student, DONE, None if step % 2 else 0.7)
        momentum = 0.9 if step % 2 else 0.7
        for key, value in student.state_dict().items():
            counter = key.endswith("num_batches_tracked")
            naive[key] = value.double() if counter else momentum * naive[key] + (1 - momentum) * value.double()
    got = teacher.module.state_dict()
    for key, value in naive.items():
        torch.testing.assert_close(got[key].double(), value, atol=tolerance, rtol=tolerance)
    assert got["1.num_batches_tracked"] == student.state_dict()["1.num_batches_tracked"] > 0


@pytest.mark.parametrize("share", [0.0, 0.01, 0.7, 1.0])
def test_both_ways_to_move_are_one(share):
    torch.manual_seed(0)
    shapes = [(3, 4), (7,), ()]
    start, target = ([torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    moved = [[tensor.clone() for tensor in start] for _ in range(2)]
    for ways, own in zip((_in_one_pass, _in_three_launches), moved, strict=True):
        ways(own, target, torch.tensor(share, dtype=torch.float64))
    expected = [kept + share * (new - kept) for kept, new in zip(start, target, strict=True)]
    for own in moved:
        torch.testing.assert_close(own, expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_tensor_under_several_keys_is_averaged_once(dimensions):
    student = unet(dimensions)
    teacher = Teacher(student, 0.75)
    start = copy.deepcopy(student.state_dict())
    keys = {}
    for key, value in teacher.module.state_dict().items():
        keys.setdefault(value.data_ptr(), []).append(key)
    assert max(len(aliases) for aliases in keys.values()) == 4  # two names in the encoder, and the decoder's copies
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    teacher.update(student, DONE)
    for key, value in teacher.module.state_dict().items():
        torch.testing.assert_close(value, start[key] + 0.25, atol=1e-6, rtol=0)


def test_tied_weights_stay_tied():
    student = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    student[1].weight = student[0].weight
    teacher = Teacher(student, 0.5)
    assert teacher.module[1].weight is teacher.module[0].weight
    before = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight.mul_(3)
    teacher.update(student, DONE)
    torch.testing.assert_close(teacher.module[0].weight, 2 * before)


def test_a_skipped_step_changes_nothing_even_if_it_broke_the_students_statistics():
    student = student_of()
    teacher = Teacher(student, 0.5)
    before = copy.deepcopy(teacher)
    disturb(student)
    student(torch.full((2, 2, 5, 5), torch.nan))
    assert student[1].running_mean.isnan().all()
    teacher.update(student, SKIPPED)
    teacher.update(student, SKIPPED, 0.0)
    assert same(teacher, before)


def test_momentum_one_keeps_and_momentum_zero_follows():
    student = student_of()
    teacher = Teacher(student, 1.0)
    start = copy.deepcopy(student)
    disturb(student)
    teacher.update(student, DONE)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), start.parameters(), strict=True))
    assert torch.equal(teacher.module[1].running_mean, start[1].running_mean)
    teacher.update(student, DONE, 0.0)
    for kept, value in zip(teacher.module.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(kept, value, atol=1e-6, rtol=0)


def test_what_equals_the_student_stays_bit_for_bit():
    student = student_of()
    teacher = Teacher(student, 0.999)
    for _ in range(50):
        teacher.update(student, DONE)
    assert same(teacher.module, student)


def test_copy_from_takes_everything_over_exactly():
    student = unet()
    teacher = Teacher(student, 0.9)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_()
    teacher.copy_from(student)
    assert same(teacher.module, student)
    batch_norm = student_of()
    teacher = Teacher(batch_norm, 0.9)
    disturb(batch_norm)
    teacher.copy_from(batch_norm)
    assert same(teacher.module, batch_norm)


def test_a_teacher_goes_on_exactly_from_its_state():
    student = student_of()
    teacher = Teacher(student, 0.9)
    disturb(student)
    teacher.update(student, DONE)
    other = Teacher(student, 0.9)
    other.load_state_dict(copy.deepcopy(teacher.state_dict()))
    disturb(student)
    for one in (teacher, other):
        one.update(student, DONE)
    assert same(teacher, other)


def test_the_copy_is_frozen_and_separate_and_the_student_is_left_as_it_was():
    student = student_of().train()
    teacher = Teacher(student, 0.9)
    assert not any(p.requires_grad for p in teacher.parameters()) and all(p.requires_grad for p in student.parameters())
    assert student.training and not {p.data_ptr() for p in student.parameters()} & {
        p.data_ptr() for p in teacher.parameters()
    }
    image = torch.randn(2, 2, 5, 5, requires_grad=True)
    assert not teacher(image).requires_grad


def test_the_teacher_stays_in_evaluation_mode_and_its_use_changes_no_state():
    student = student_of()
    parent = nn.ModuleDict({"student": student, "teacher": Teacher(student, 0.9)}).train()
    teacher = parent["teacher"]
    assert student.training and not any(m.training for m in teacher.module.modules())
    before = copy.deepcopy(teacher)
    images = torch.randn(3, 2, 5, 5)
    together = teacher(images)
    assert same(teacher, before)
    torch.testing.assert_close(torch.cat([teacher(image[None]) for image in images]), together)
    torch.testing.assert_close(together, copy.deepcopy(student).eval()(images))


def test_the_teacher_of_a_backbone_gives_its_features():
    backbone = Backbone(unet(), 1)
    teacher = Teacher(backbone, 0.9)
    image = torch.randn(1, 1, 16, 16)
    for ours, theirs in zip(teacher.module.features(image), backbone.features(image), strict=True):
        assert torch.equal(ours, theirs) and not ours.requires_grad


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum"):
        Teacher(nn.Linear(2, 2), momentum)
    with pytest.raises(ValueError, match="momentum"):
        Teacher(nn.Linear(2, 2), 0.5).update(nn.Linear(2, 2), DONE, momentum)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="student"):
        Teacher(nn.Linear(2, 2), 0.5).update(nn.Linear(2, 3), DONE)


def test_a_network_without_parameters_is_no_error():
    teacher = Teacher(nn.Identity(), 0.5)
    teacher.update(nn.Identity(), DONE)
    assert torch.equal(teacher(torch.ones(2)), torch.ones(2))


def test_nothing_is_read_on_the_host():
    student = student_of().to("meta")  # tensors without values: reading one raises
    teacher = Teacher(student, 0.9)
    teacher.update(student, torch.ones((), dtype=torch.bool, device="meta"))
    assert teacher(torch.zeros(1, 2, 5, 5, device="meta")).shape == (1, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    student = student_of().cuda()
    teacher, applied = Teacher(student, 0.9), torch.ones((), dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update(student, applied)
        teacher.copy_from(student)
    finally:
        torch.cuda.set_sync_debug_mode("default")
