"""Reading any planned U-Net: shapes, agreement with the network's own forward, freezing."""

import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone

CHANNELS = (4, 8, 16)
STRIDES = {
    2: {"isotropic": (1, 2, 2), "anisotropic": ((1, 1), (1, 2), (2, 2))},
    3: {"isotropic": (1, 2, 2), "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 2, 2))},
}
CUMULATIVE = {
    2: {"isotropic": ((1, 1), (2, 2), (4, 4)), "anisotropic": ((1, 1), (1, 2), (2, 4))},
    3: {"isotropic": ((1,) * 3, (2,) * 3, (4,) * 3), "anisotropic": ((1, 1, 1), (1, 2, 2), (2, 4, 4))},
}
SPATIAL = {2: (16, 24), 3: (8, 16, 12)}

every_network = pytest.mark.parametrize("network_class", [PlainConvUNet, ResidualEncoderUNet])
every_dimension = pytest.mark.parametrize("dimensions", [2, 3])
every_stride = pytest.mark.parametrize("strides", ["isotropic", "anisotropic"])


def build(network_class=PlainConvUNet, dimensions=3, strides="isotropic", channels=1, deep_supervision=False):
    torch.manual_seed(0)
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimensions]
    depth = "n_blocks_per_stage" if network_class is ResidualEncoderUNet else "n_conv_per_stage"
    network = network_class(
        channels,
        3,
        CHANNELS,
        conv,
        3,
        STRIDES[dimensions][strides],
        num_classes=2,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **{depth: (1, 2, 1)},
    )
    return Backbone(network, channels)


@every_network
@every_dimension
@every_stride
@pytest.mark.parametrize("channels", [1, 4])
def test_shapes_of_features_tokens_and_reconstruction(network_class, dimensions, strides, channels):
    backbone = build(network_class, dimensions, strides, channels)
    spatial, cumulative = SPATIAL[dimensions], CUMULATIVE[dimensions][strides]
    assert (backbone.channels, backbone.strides, backbone.dimensions) == (CHANNELS, cumulative, dimensions)
    features = backbone.features(torch.randn(2, channels, *spatial))
    sizes = [tuple(n // s for n, s in zip(spatial, stride, strict=True)) for stride in cumulative]
    assert [tuple(f.shape) for f in features] == [(2, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    tokens, grid = backbone.tokens(features)
    assert grid == sizes[-1] and tokens.shape == (2, math.prod(grid), CHANNELS[-1])
    assert backbone.pooled(features).shape == (2, CHANNELS[-1])
    assert backbone.decode(features).shape == (2, CHANNELS[0], *spatial)
    assert backbone.reconstruct(features).shape == (2, channels, *spatial)


@every_network
@every_dimension
@every_stride
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_decode_then_segment_is_the_networks_own_forward(network_class, dimensions, strides, deep_supervision):
    backbone = build(network_class, dimensions, strides, deep_supervision=deep_supervision)
    image = torch.randn(2, 1, *SPATIAL[dimensions])
    expected = backbone.network(image)
    decoded = backbone.decode(backbone.features(image))
    segmented = backbone.network.decoder.seg_layers[-1](decoded)
    torch.testing.assert_close(segmented, expected[0] if deep_supervision else expected)


def test_tokens_are_the_voxels_of_a_stage_in_row_major_order():
    backbone = build(strides="anisotropic")
    features = backbone.features(torch.randn(2, 1, *SPATIAL[3]))
    tokens, grid = backbone.tokens(features, stride=2)
    assert grid == (8, 8, 6)
    for d, h, w in ((0, 0, 0), (1, 2, 3), (7, 7, 5)):
        assert torch.equal(tokens[:, (d * grid[1] + h) * grid[2] + w], features[1][:, :, d, h, w])
    torch.testing.assert_close(backbone.pooled(features), backbone.tokens(features)[0].mean(1))


@pytest.mark.parametrize(("stride", "stage"), [(1, 0), (2, 1), (3, 2), (4, 2), (64, 2), (None, 2)])
def test_stride_chooses_the_finest_stage_that_is_coarse_enough(stride, stage):
    backbone = build()
    features = backbone.features(torch.randn(1, 1, *SPATIAL[3]))
    assert backbone.tokens(features, stride)[0].shape[2] == CHANNELS[stage]


@every_network
@every_dimension
def test_without_skips_only_the_bottleneck_counts(network_class, dimensions):
    backbone = build(network_class, dimensions)
    features = backbone.features(torch.randn(2, 1, *SPATIAL[dimensions]))
    spoiled = [torch.randn_like(f) for f in features[:-1]] + features[-1:]
    assert torch.equal(backbone.reconstruct(spoiled, skips=False), backbone.reconstruct(features, skips=False))
    assert not torch.allclose(backbone.reconstruct(spoiled), backbone.reconstruct(features))
    other = [*features[:-1], torch.randn_like(features[-1])]
    assert not torch.allclose(backbone.reconstruct(other, skips=False), backbone.reconstruct(features, skips=False))


@every_network
@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (("encoder", "decoder"), ["encoder.", "decoder.encoder.", "decoder.transpconvs.", "decoder.stages."]),
        (("encoder",), ["encoder.", "decoder.encoder."]),
        (("decoder",), ["decoder.transpconvs.", "decoder.stages."]),
        ((), []),
    ],
)
def test_trained_prefixes_name_exactly_the_trained_keys(network_class, parts, prefixes):
    backbone = build(network_class)
    backbone.train_only(parts)
    assert backbone.trained_prefixes() == prefixes
    for name, p in backbone.network.named_parameters(remove_duplicate=False):
        assert p.requires_grad == name.startswith(tuple(prefixes)), name
    assert not any(p.requires_grad for p in backbone.network.decoder.seg_layers.parameters())
    assert backbone.reconstruction_head.weight.requires_grad == ("decoder" in parts)


@every_network
def test_reconstruction_reaches_everything_trained(network_class):
    backbone = build(network_class)
    backbone.train_only(("encoder", "decoder"))
    backbone.reconstruct(backbone.features(torch.randn(2, 1, *SPATIAL[3]))).square().mean().backward()
    without = [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_the_network_keeps_its_keys():
    backbone = build()
    fresh = build().network
    assert set(backbone.network.state_dict()) == set(fresh.state_dict())
    fresh.load_state_dict(backbone.network.state_dict())


@pytest.mark.parametrize("network", [nn.Conv3d(1, 1, 1), nn.Sequential(nn.Linear(2, 2))])
def test_other_networks_are_refused_with_a_remedy(network):
    with pytest.raises(UserError) as caught:
        Backbone(network, 1)
    assert type(network).__name__ in caught.value.problem
    assert "PlainConvUNet" in caught.value.remedy
