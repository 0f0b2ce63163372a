"""Fast blocks beside the stock ones of nnU-Net's networks: results, keys, memory, training, and what is refused."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from fake_dataset import fake_plan
from method_checks import TWO_EPOCHS, assert_resumes_exactly
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pretraining_harness import make_trainer, run
from torch import nn
from toy_method import ToyPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.fast_blocks import FastBasicBlock, FastBottleneck, FastConv, use_fast_blocks
from nnssl_plugin.networks.teacher import Teacher

SIZES = {2: (19, 22), 3: (13, 10, 12)}


def planned(kind=PlainConvUNet, dimensions=3, *, channels=1, affine=True, strides=None, **changes):
    """A network as nnU-Net plans it, three stages, always the same weights."""
    torch.manual_seed(0)
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimensions]
    arguments = {
        "input_channels": channels,
        "n_stages": 3,
        "features_per_stage": (4, 6, 8),
        "conv_op": conv,
        "kernel_sizes": 3,
        "strides": strides or [1, 2, 2],
        "num_classes": 3,
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"eps": 1e-5, "affine": affine},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }
    arguments["n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage"] = 2
    network = kind(**arguments | changes)
    for parameter in network.parameters():  # norms start with weights of 1 and biases of 0
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.5)
    return network


def fast(network):
    network = copy.deepcopy(network)
    use_fast_blocks(network)
    return network


NETWORKS = {
    "plain 2d": {"dimensions": 2},
    "plain 3d": {"channels": 2},
    "plain, no affine": {"affine": False},
    "plain, anisotropic": {"kernel_sizes": [[1, 3, 3], 3, 3], "strides": [1, [1, 2, 2], 2]},
    "plain, dropout": {"dropout_op": nn.Dropout3d, "dropout_op_kwargs": {"p": 0.5}},
    "residual 2d": {"kind": ResidualEncoderUNet, "dimensions": 2, "channels": 4},
    "residual 3d": {"kind": ResidualEncoderUNet},
    "residual, anisotropic": {"kind": ResidualEncoderUNet, "strides": [1, [1, 2, 2], 2]},
    "residual, no affine": {"kind": ResidualEncoderUNet, "affine": False},
    "residual, bottlenecks": {"kind": ResidualEncoderUNet, "block": BottleneckD, "bottleneck_channels": 3},
}


def outcome(network, x, scale=1):
    """Everything that comes out, and the gradients of image and parameters; ``scale`` keeps those of half precision."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    results = network(x)
    loss = scale * sum(r.float().square().mean() if scale > 1 else r.square().mean() for r in results)
    gradients = torch.autograd.grad(loss, [x, *network.parameters()])
    return [*results, *(gradient / scale for gradient in gradients)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS)
def test_networks_give_the_same_forward_and_backward(arguments, batch):
    network = planned(**arguments)
    x = torch.randn(batch, arguments.get("channels", 1), *[4 * (s // 4) for s in SIZES[arguments.get("dimensions", 3)]])
    stock, swapped = (outcome(each, x) for each in (network, fast(network)))
    torch.testing.assert_close(swapped, stock, rtol=1e-5, atol=1e-5)
    exact = outcome(network.double(), x.double())
    torch.testing.assert_close(outcome(fast(network), x.double()), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [SIZES[3], (5, 9, 7), (1, 12, 3)])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_encoders_of_odd_sizes(kind, size):
    stride = 1 if kind is ResidualEncoderUNet else [1, 2, 1]  # the stock block pools odd sizes to another size
    network = planned(kind, strides=[1, stride, 1]).double()
    x = torch.randn(1, 1, *size).double()
    torch.testing.assert_close(fast(network).encoder(x), network.encoder(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS)
def test_every_block_is_swapped_and_keys_stay(arguments):
    network = planned(**arguments)
    swapped = fast(network)
    kinds = [type(module) for module in swapped.modules()]
    assert FastConv in kinds and all(kind.__name__ != "ConvDropoutNormReLU" for kind in kinds)
    if "kind" in arguments:
        assert (FastBottleneck if "block" in arguments else FastBasicBlock) in kinds
    state = swapped.state_dict()
    assert list(state) == list(network.state_dict())
    network.load_state_dict(state)  # what was trained with fast blocks loads into stock nnU-Net's network
    swapped.load_state_dict(network.state_dict())


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_maps_stay_in_channels_last_memory(kind, dimensions, channels):
    memory = torch.channels_last if dimensions == 2 else torch.channels_last_3d
    network, seen = fast(planned(kind, dimensions, channels=channels)), []
    for module in network.modules():
        if isinstance(module, FastConv | FastBasicBlock | nn.ConvTranspose2d | nn.ConvTranspose3d):
            module.register_forward_hook(
                lambda module, inputs, output: seen.append(output.is_contiguous(memory_format=memory))
            )
    network(torch.randn(2, channels, *[16] * dimensions))
    assert len(seen) > 7 and sum(not each for each in seen) <= 2 * (kind is ResidualEncoderUNet)  # after 3D pooling


def test_a_swap_twice_is_one():
    network = fast(planned())
    use_fast_blocks(network)
    assert len(network.encoder._forward_pre_hooks) == 1


def test_a_teacher_copies_fast_blocks():
    backbone = Backbone(fast(planned(deep_supervision=False)), 1)
    teacher, x = Teacher(backbone, 0.9), torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(teacher.module.features(x), backbone.features(x))
    assert any(isinstance(module, FastConv) for module in teacher.modules())


@pytest.mark.slow
def test_compiled_as_the_trainers_compile():
    network = planned(ResidualEncoderUNet, deep_supervision=False)
    x, compiled = torch.randn(1, 1, 8, 8, 8), fast(network)
    for stage in (compiled.encoder, *compiled.decoder.stages):
        stage.compile(backend="aot_eager", fullgraph=True)
    results = [each(x) for each in (compiled, network)]
    gradients = [
        torch.autograd.grad(r.square().mean(), [p for p in n.parameters() if p.requires_grad], allow_unused=True)
        for r, n in zip(results, (compiled, network), strict=True)
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_mixed_precision_stays_within_its_rounding(kind):
    network = planned(kind, deep_supervision=False)
    x = torch.randn(2, 1, 16, 16, 16)
    exact = network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [(each(x).float() - exact).abs().mean() for each in (fast(network), network)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("arguments", NETWORKS.values(), ids=NETWORKS)
def test_networks_on_cuda_give_the_same_forward_and_backward(arguments):
    network = planned(**{name: value for name, value in arguments.items() if not name.startswith("dropout")})
    x = torch.randn(2, arguments.get("channels", 1), *[16] * arguments.get("dimensions", 3))
    exact = outcome(network.double(), x.double())
    network, x = network.float().cuda(), x.cuda()
    with torch.backends.cudnn.flags(allow_tf32=False):
        swapped = outcome(fast(network), x)
    for found, expected in zip(swapped, exact, strict=True):  # of biases before a norm it is rounding, of zero
        assert (found.cpu().double() - expected).norm() <= 1e-4 * expected.norm() + 1e-5
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            halves = [outcome(each, x, scale=1024) for each in (fast(network), network)]
        mine, others = (
            torch.stack([(found.cpu().double() - expected).norm() for found, expected in zip(half, exact, strict=True)])
            for half in halves
        )
        assert mine.norm() <= 2 * others.norm() + 1e-3  # values near 0 that activate or not make single maps differ


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (planned(norm_op=nn.BatchNorm3d), "BatchNorm3d"),
        (planned(norm_op_kwargs={"track_running_stats": True}), "statistics of each image"),
        (planned(norm_op=None), "normalises by nothing"),
        (planned(nonlin=nn.PReLU, nonlin_kwargs={}), "PReLU"),
        (planned(ResidualEncoderUNet, nonlin=nn.ELU, nonlin_kwargs={}), "ELU"),
        (planned(nonlin_first=True), "before it normalises"),
        (nn.Sequential(nn.Conv3d(1, 2, 3)), "not nnU-Net's convolution blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_networks_are_refused_in_words_and_stay(network, reason):
    kinds = [type(module) for module in network.modules()]
    with pytest.raises(UserError, match=reason) as error:
        use_fast_blocks(network)
    assert "setting fast" in error.value.remedy
    assert [type(module) for module in network.modules()] == kinds


def test_blocks_with_more_before_the_addition_are_refused():
    network = planned(ResidualEncoderUNet)
    network.encoder.stages[1].blocks[0].apply_se = True
    with pytest.raises(UserError, match="between its last normalisation and the addition"):
        use_fast_blocks(network)


# ---------------------------------------------------------------------- trainers


@pytest.fixture
def here(monkeypatch):
    """Without worker processes."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
def test_pretraining_with_the_setting_goes_the_same_way(residual, here):
    stock, swapped = (run(pretraining={"fast": chosen} | TWO_EPOCHS, residual=residual) for chosen in (False, True))
    assert any(isinstance(module, FastConv) for module in swapped.task.modules())
    for name in ("train_losses", "val_losses"):  # weights without gradient move by the sign of its rounding
        losses = [each.log.history()[name] for each in (swapped, stock)]
        assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_pretraining_with_the_setting_resumes_exactly(here):
    assert_resumes_exactly(ToyPretrainer, pretraining={"fast": True} | TWO_EPOCHS)


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_of_either_goes_on_with_the_other(first, here):
    run(pretraining={"fast": first} | TWO_EPOCHS)
    resumed = make_trainer(pretraining={"fast": not first} | TWO_EPOCHS, resume="checkpoint_final.pth")
    assert resumed.step == 4
    for parameter, state in resumed.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


def test_left_open_the_setting_is_off_on_a_cpu_and_on_for_known_networks_on_cuda(here, monkeypatch):
    trainer = make_trainer(pretraining=TWO_EPOCHS)
    trainer.initialize()
    assert trainer.training_settings.fast is None
    assert not any(isinstance(module, FastConv) for module in trainer.task.modules())
    monkeypatch.setattr(trainer, "device", torch.device("cuda"))
    assert trainer._takes_fast_blocks(planned())
    assert not trainer._takes_fast_blocks(planned(norm_op=nn.BatchNorm3d))


def test_fast_blocks_are_not_compiled(here, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "t")
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append(module))
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer: True)
    for chosen in (True, False):
        make_trainer(pretraining={"fast": chosen} | TWO_EPOCHS).initialize()
        assert bool(compiled) != chosen


def test_pretraining_refuses_other_networks_before_it_starts(here):
    with pytest.raises(UserError, match="BatchNorm3d"):
        make_trainer(pretraining={"fast": True} | TWO_EPOCHS, batch_norm=True).initialize()


def test_the_fine_tuning_trainer_builds_fast_blocks_for_prediction_too():
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

    for chosen in (False, True):
        plans = PlansManager(fake_plan() | {"finetuning": {"weights": None, "fast": chosen}})
        network = PretrainedSegmentationTrainer.build_network_architecture(
            plans, plans.get_configuration("3d_fullres"), 1, 2, enable_deep_supervision=False
        )
        assert any(isinstance(module, FastConv) for module in network.modules()) == chosen
