"""Reading Primus: its tokens as one map, its own forward, reconstruction, freezing, copies."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from einops import rearrange

from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone

SHAPE, PATCH, WIDTH = (16, 8, 24), 4, 24


def build(channels=1, kind=Primus, patch=PATCH, **arguments):
    torch.manual_seed(0)
    network = kind(
        input_channels=channels,
        embed_dim=WIDTH,
        patch_embed_size=(patch,) * 3,
        num_classes=3,
        eva_depth=2,
        eva_numheads=2,
        input_shape=SHAPE,
        init_values=0.1,
        scale_attn_inner=True,
        **arguments,
    )
    return Backbone(network, channels)


@pytest.mark.parametrize("channels", [1, 4])
def test_tokens_are_one_map_at_the_stride_of_the_patches(channels):
    backbone = build(channels)
    assert (backbone.channels, backbone.strides, backbone.dimensions) == ((WIDTH,), ((PATCH,) * 3,), 3)
    features = backbone.features(torch.randn(2, channels, *SHAPE))
    assert [tuple(f.shape) for f in features] == [(2, WIDTH, 4, 2, 6)]
    tokens, grid = backbone.tokens(features)
    assert grid == (4, 2, 6) and torch.equal(tokens, rearrange(features[0], "b c d h w -> b (d h w) c"))
    assert torch.equal(backbone.tokens(features, stride=1)[0], tokens)
    torch.testing.assert_close(backbone.pooled(features), tokens.mean(1))
    assert backbone.reconstruct(features).shape == (2, channels, *SHAPE)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("kind", [Primus, PrimusV2])
def test_the_map_up_projected_is_the_networks_own_forward(kind, registers):
    backbone = build(kind=kind, patch=8, num_register_tokens=registers).eval()
    image = torch.randn(2, 1, *SHAPE)
    assert backbone.strides == ((8,) * 3,)
    torch.testing.assert_close(backbone.network.up_projection(backbone.features(image)[0]), backbone.network(image))
    decoded = backbone.decode(backbone.features(image))
    torch.testing.assert_close(backbone.network.up_projection.decode[-1](decoded), backbone.network(image))


def test_patches_that_the_transformer_drops_come_back_as_mask_tokens(monkeypatch):
    backbone = build()
    backbone.network.mask_token.fill_(7.0)
    kept = torch.arange(0, 48, 2)
    monkeypatch.setattr(backbone.network.eva, "forward", lambda tokens: (tokens[:, kept], kept.expand(2, -1)))
    tokens, _ = backbone.tokens(backbone.features(torch.randn(2, 1, *SHAPE)))
    assert (tokens[:, 1::2] == 7.0).all() and not (tokens[:, ::2] == 7.0).all(2).any()


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (("encoder", "decoder"), ["down_projection.", "eva.", "register_tokens", "up_projection.decode.0."]),
        (("encoder",), ["down_projection.", "eva.", "register_tokens"]),
        (("decoder",), ["up_projection.decode.0."]),
        ((), []),
    ],
)
def test_trained_prefixes_name_exactly_the_trained_keys(parts, prefixes):
    backbone = build(num_register_tokens=2)
    backbone.train_only(parts)
    assert backbone.trained_prefixes() == prefixes
    for name, parameter in backbone.network.named_parameters():
        assert parameter.requires_grad == name.startswith(tuple(prefixes)), name
    assert backbone.reconstruction_head.weight.requires_grad == ("decoder" in parts)
    key = backbone.network.key_to_encoder
    assert any(name.startswith(f"{key}.") for name in prefixes) == ("encoder" in parts)


def test_reconstruction_reaches_everything_trained():
    backbone = build()
    backbone.train_only(("encoder", "decoder"))
    backbone.reconstruct(backbone.features(torch.randn(2, 1, *SHAPE))).square().mean().backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_network_keeps_its_keys():
    assert set(build().network.state_dict()) == {
        key.removeprefix("network.") for key in build().state_dict() if key.startswith("network.")
    }


def test_a_copy_reads_its_own_network():
    backbone = build().eval()
    teacher = copy.deepcopy(backbone)
    image = torch.randn(1, 1, *SHAPE)
    before = teacher.features(image)[0]
    torch.nn.init.zeros_(backbone.network.down_projection.proj.weight)
    assert torch.equal(teacher.features(image)[0], before)
    assert not torch.equal(backbone.features(image)[0], before)


def test_another_image_size_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"48 tokens; an image of 16x16x16 voxels gives 64"):
        build().features(torch.randn(1, 1, 16, 16, 16))
