"""Where tokens lie: grids against loops, and the centres that each family states against measured gradients."""

import math

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.receptive_fields import chain
from nnssl_plugin.networks.token_grid import TokenGrid

GRIDS = [
    TokenGrid((3, 2), (0.0, 0.5), (4, 3)),
    TokenGrid((2, 3, 2), (1.5, 0.0, 0.75), (4, 2, 4)),
    TokenGrid((1,), (0.0,), (1,)),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_centres_run_as_a_flattened_map(grid):
    expected = [
        [o + s * i for o, s, i in zip(grid.offset, grid.spacing, index, strict=True)]
        for index in np.ndindex(*grid.counts)
    ]
    assert torch.equal(grid.centres(), torch.tensor(expected, dtype=torch.float32))
    assert grid.token_at(grid.centres()).tolist() == list(range(math.prod(grid.counts)))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_point_lies_in_the_cell_of_one_token_or_of_none(grid):
    points = 12 * torch.rand(200, len(grid.counts), generator=torch.Generator().manual_seed(0)) - 3
    points[:50] = (2 * points[:50]).round() / 2  # many of them on faces
    for point, found in zip(points, grid.token_at(points[None])[0].tolist(), strict=True):
        apart = point - grid.centres()
        half = torch.tensor(grid.spacing) / 2
        inside = ((apart >= -half) & (apart < half)).all(1).nonzero().flatten().tolist()
        assert inside == ([] if found < 0 else [found])


def test_sums_count_the_part_of_a_voxel_that_lies_in_a_cell():
    grid, size = GRIDS[1], (7, 6, 5)
    volume = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, 3, math.prod(grid.counts))
    for number, centre in enumerate(grid.centres().tolist()):
        for voxel in np.ndindex(*size):
            shared = [
                max(0.0, min(v + 0.5, c + s / 2) - max(v - 0.5, c - s / 2))
                for v, c, s in zip(voxel, centre, grid.spacing, strict=True)
            ]
            expected[:, :, number] += math.prod(shared) * volume[(slice(None), slice(None), *voxel)]
    torch.testing.assert_close(grid.sums(volume), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(grid.sums(volume), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_map_is_read_linearly_between_tokens_and_is_constant_beyond_them(grid):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, *grid.counts, generator=generator, dtype=torch.float64)
    axes = [
        20 * torch.rand(2, number, generator=generator, dtype=torch.float64) - 5
        for number in range(2, 2 + len(grid.counts))
    ]
    got = grid.read(maps, axes)
    assert got.shape == (2, 3, *(axis.shape[1] for axis in axes))
    for sample in range(2):
        for index in np.ndindex(*got.shape[2:]):
            expected = torch.zeros(3, dtype=torch.float64)
            for token in np.ndindex(*grid.counts):
                weight = 1.0
                for axis, (count, offset, spacing) in enumerate(
                    zip(grid.counts, grid.offset, grid.spacing, strict=True)
                ):
                    place = (float(axes[axis][sample, index[axis]]) - offset) / spacing
                    weight *= max(0.0, 1 - abs(min(max(place, 0.0), count - 1) - token[axis]))
                expected += weight * maps[(sample, slice(None), *token)]
            torch.testing.assert_close(got[(sample, slice(None), *index)], expected)


def test_a_map_read_at_its_own_tokens_is_the_map():
    grid = GRIDS[1]
    maps = torch.randn(2, 3, *grid.counts)
    own = [axis[None] for axis in grid.axes()]
    torch.testing.assert_close(grid.read(maps, own), maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grid.read(maps.bfloat16(), own).dtype == torch.float32


# ---------------------------------------------------------------------- what families state, measured


class FixedStatistics(nn.Module):
    """An instance normalisation whose statistics do not count as depending on the image: they depend on all of it."""

    def forward(self, x):
        variance, mean = torch.var_mean(x.detach(), tuple(range(2, x.ndim)), correction=0, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt()


def measured_centre(network, size, stage):
    """Centre of gravity, per axis, of the squared gradient of the token in the middle by the image, and its index."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.InstanceNorm2d | nn.InstanceNorm3d):
                setattr(module, name, FixedStatistics())
    image = torch.randn(1, 1, *size, requires_grad=True)
    features = Backbone(network, 1).features(image)[stage]
    middle = tuple(count // 2 for count in features.shape[2:])
    energy = torch.zeros(size)
    for _ in range(4):
        value = features[(0, slice(None), *middle)] @ torch.randn(features.shape[1])
        energy += torch.autograd.grad(value, image, retain_graph=True)[0][0, 0].square()
    energy /= energy.sum()
    axes = range(len(size))
    sums = [energy.sum([other for other in axes if other != axis]) for axis in axes]
    return middle, torch.stack([(line * torch.arange(len(line))).sum() for line in sums])


def unet(kind, strides, kernels):
    dims = len(strides[0])
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dims]
    blocks = "n_blocks_per_stage" if kind is ResidualEncoderUNet else "n_conv_per_stage"
    features = [(16 if dims == 2 else 8) * 2**stage for stage in range(len(strides))]
    return kind(
        1, len(strides), features, conv, kernels, strides, num_classes=2, n_conv_per_stage_decoder=1,
        norm_op=norm, nonlin=nn.LeakyReLU, **{blocks: 1},
    )  # fmt: skip


U_NETS = {
    "2d": ([(1, 1), (2, 2), (2, 2), (2, 2)], 3, (64, 64)),
    "2d anisotropic": ([(1, 1), (1, 2), (2, 2), (1, 2)], 3, (24, 64)),
    "3d": ([(1, 1, 1), (2, 2, 2), (2, 2, 2)], 3, (20, 20, 20)),
    "3d anisotropic": ([(1, 1, 1), (1, 2, 2), (1, 2, 2)], [[1, 3, 3], [1, 3, 3], [3, 3, 3]], (9, 24, 24)),
}


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
@pytest.mark.parametrize("plan", U_NETS)
def test_u_nets_state_the_centres_that_gradients_have(kind, plan):
    strides, kernels, size = U_NETS[plan]
    found, stage = [], len(strides) - 1
    for seed in range(4):
        torch.manual_seed(seed)
        network = unet(kind, strides, kernels)
        middle, centre = measured_centre(network, size, stage)
        found.append(centre)
    backbone = Backbone(network, 1)
    counts = tuple(n // s for n, s in zip(size, backbone.strides[stage], strict=True))
    stated = backbone.token_centres(counts, max(backbone.strides[stage])).view(*counts, -1)[middle]
    spacing = torch.tensor(backbone.strides[stage])
    assert ((torch.stack(found).mean(0) - stated).abs() <= 0.13 * spacing).all(), (found, stated)
    cell = (torch.tensor(middle) + 0.5) * spacing - 0.5
    if kind is PlainConvUNet:  # what was assumed before
        assert ((torch.stack(found).mean(0) - cell).abs() > 0.25 * spacing)[spacing > 2].all()


@pytest.mark.parametrize("kind", [Primus, pytest.param(PrimusV2, marks=pytest.mark.slow)])
def test_primus_states_the_centres_of_its_embedding(kind):
    """Attention sees the whole image: what is measured is the embedding, at the token that it becomes."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = kind(
            input_channels=1, embed_dim=48, patch_embed_size=(8, 8, 8), num_classes=2, eva_depth=1, eva_numheads=2,
            input_shape=(24, 24, 24),
        )  # fmt: skip
        network.eva.blocks = nn.ModuleList()
        middle, centre = measured_centre(network, (24, 24, 24), 0)
        found.append(centre)
    backbone = Backbone(network, 1)
    stated = backbone.token_centres((3, 3, 3)).view(3, 3, 3, 3)[middle]
    assert ((torch.stack(found).mean(0) - stated).abs() <= 0.13 * 8).all(), (found, stated)
    if kind is Primus:
        assert stated.tolist() == [11.5] * 3


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
def test_swin_unetr_states_the_centres_of_its_cells(dims):
    swin = pytest.importorskip("nnssl_plugin.networks.swin_unetr")
    torch.manual_seed(0)
    network = swin.SwinUNETR(
        1, 2, feature_size=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=3, spatial_dims=dims
    )
    backbone = Backbone(network, 1)
    # without attention within windows, a token sees what embedding and merging gave it
    for name, module in network.named_modules():
        if name.endswith((".attn", ".mlp")):
            nn.init.zeros_(getattr(module, "proj", getattr(module, "linear2", None)).weight)
    size = (64, 32, 32)[-dims:]
    for stage in (1, 2, 3):
        middle, centre = measured_centre(network, size, stage)
        counts = tuple(n // s for n, s in zip(size, backbone.strides[stage], strict=True))
        stated = backbone.token_centres(counts, backbone.strides[stage][0]).view(*counts, -1)[middle]
        assert ((centre - stated).abs() <= 0.13 * torch.tensor(backbone.strides[stage])).all()


def test_layers_are_centred_by_kernel_stride_padding_and_dilation():
    layers = [nn.Conv2d(1, 1, (3, 5), (2, 3), (1, 0)), nn.AvgPool2d(2), nn.Conv2d(1, 1, 3, padding=2, dilation=2)]
    whole = chain(layers, 2)
    # axis 0: 0, then + 2 * 0.5; axis 1: 2, then + 3 * 0.5
    assert whole.offset == (1.0, 3.5) and whole.stride == (4, 6)
