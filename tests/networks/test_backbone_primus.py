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


def encoded_beside_the_others(backbone, image, keep):
    """Kept tokens of a forward pass of all tokens, in which none may attend to a dropped one; a sample at a time."""
    network = backbone.network
    registers = 0 if network.register_tokens is None else network.register_tokens.shape[1]
    found = []
    for one, kept in zip(image, keep, strict=True):
        tokens = network.down_projection(one[None]).flatten(2).transpose(1, 2)
        if registers:
            tokens = torch.cat((network.register_tokens, tokens), 1)
        tokens = tokens + network.eva.pos_embed
        seen = torch.zeros(tokens.shape[1], dtype=torch.bool)
        seen[:registers], seen[kept + registers] = True, True
        for block in network.eva.blocks:
            tokens = block(tokens, rope=network.eva.rope.get_embed(), attn_mask=seen.expand(len(seen), -1))
        found.append(network.eva.norm(tokens)[0, registers + kept])
    return torch.stack(found)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("samples", [1, 2, 3])  # two heads: a batch of 2 would hide a wrong broadcast
def test_kept_tokens_attend_to_kept_ones_alone_from_their_own_places(samples, registers):
    backbone = build(num_register_tokens=registers).double().eval()
    image = torch.randn(samples, 1, *SHAPE, dtype=torch.float64)
    keep = torch.rand(samples, 48).argsort(1)[:, :11]
    expected = encoded_beside_the_others(backbone, image, keep)
    torch.testing.assert_close(backbone.kept_tokens(image, keep), expected)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("kind", [Primus, PrimusV2])
def test_all_tokens_kept_are_the_features_in_any_order(kind, registers):
    backbone = build(kind=kind, patch=8, num_register_tokens=registers).double().eval()
    image = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    tokens, _ = backbone.tokens(backbone.features(image))
    total = tokens.shape[1]
    torch.testing.assert_close(backbone.kept_tokens(image, torch.arange(total).expand(2, -1)), tokens)
    order = torch.rand(2, total).argsort(1)
    expected = tokens.gather(1, order[:, :, None].expand_as(tokens))
    torch.testing.assert_close(backbone.kept_tokens(image, order), expected)


def test_gradients_reach_kept_patches_alone():
    backbone = build().double().eval()
    image = torch.randn(2, 1, *SHAPE, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[0, 5, 40], [7, 8, 47]])
    backbone.kept_tokens(image, keep)[..., 0].sum().backward()
    reached = rearrange(image.grad != 0, "b 1 (d p) (h q) (w r) -> b (d h w) (p q r)", p=PATCH, q=PATCH, r=PATCH).any(2)
    expected = torch.zeros(2, 48, dtype=torch.bool).scatter(1, keep, True)
    assert torch.equal(reached, expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_abs_pos_embed": False}, {"use_rot_pos_emb": False}, {"num_register_tokens": 2}]
)
def test_the_token_decoder_lets_every_token_reach_every_other(options):
    backbone = build(**options).double()
    decoder = backbone.token_decoder(2).double()
    tokens = torch.randn(2, 48, WIDTH, dtype=torch.float64, requires_grad=True)
    restored = decoder(tokens, (4, 2, 6))
    assert restored.shape == tokens.shape
    restored[0, 3, 0].backward()
    assert (tokens.grad[0] != 0).any(1).all() and (tokens.grad[1] == 0).all()
    same = decoder(
        torch.ones(1, 48, WIDTH, dtype=torch.float64), (4, 2, 6)
    )  # equal tokens are told apart by their places
    assert options == {"use_abs_pos_embed": False} or not torch.allclose(same[0, 0], same[0, 1])


def test_convolutional_networks_say_that_they_need_the_whole_image():
    from fake_dataset import fake_plan

    from nnssl_plugin.nnunet.plans import build_network

    labels = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
    backbone = Backbone(build_network(fake_plan(), "3d_fullres", labels), 1)
    assert not backbone.encodes_subsets and build().encodes_subsets
    with pytest.raises(UserError, match="PlainConvUNet cannot encode a part of the image"):
        backbone.kept_tokens(torch.zeros(1, 1, 16, 16, 16), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(UserError, match="--preset primus-s"):
        backbone.token_decoder(2)
