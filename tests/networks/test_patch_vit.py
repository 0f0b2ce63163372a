"""PatchViT: every grid by one network, its positions, its decoder, what the reader says of it, and 2D beside 3D."""

import copy
import json
import math

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from timm.models.vision_transformer import VisionTransformer

from nnssl_plugin.checkpoints.adaptation import rules
from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights
from nnssl_plugin.checkpoints.adaptation.options import AdaptationOptions
from nnssl_plugin.errors import UserError
from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.networks.family import family_of_class, family_of_keys
from nnssl_plugin.networks.patch_vit import PatchViT, halvings, positions

SMALL = {"patch_size": (2, 4, 4), "embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_width": 4}


def build(channels=1, **arguments):
    torch.manual_seed(0)
    return Backbone(PatchViT(channels, 3, **SMALL | arguments), channels)


@pytest.mark.parametrize(("preset", "million"), [("patch-vit-b", 86), ("patch-vit-s", 22), ("patch-vit-t", 6)])
def test_the_presets_are_the_papers_and_give_256_1024_and_4096_tokens(repository, preset, million):
    architecture = json.loads((repository / "plans" / f"{preset}.json").read_text())["architecture"]
    with torch.device("meta"):
        network = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            3,
            2,
            deep_supervision=False,
        )
        counts = [network.encoder(torch.empty(1, 3, slices, 256, 256))[1].shape[1] for slices in (4, 16, 64)]
    assert counts == [256, 1024, 4096]
    encoder = sum(p.numel() for p in network.encoder.parameters())
    assert encoder / 1e6 == pytest.approx(million + 2 * network.encoder.embed_dim / 768, abs=1)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(4, 8, 12), (2, 4, 4), (8, 4, 8)])
def test_one_network_serves_every_grid(channels, size):
    backbone = build(channels)
    x = torch.randn(2, channels, *size)
    grid = tuple(length // patch for length, patch in zip(size, SMALL["patch_size"], strict=True))
    features = backbone.features(x)
    assert features[0] is x and features[1].shape == (2, 24, *grid)
    assert backbone.strides == ((1, 1, 1), (2, 4, 4)) and backbone.channels == (channels, 24)
    assert backbone.network(x).shape == (2, 3, *size)
    assert backbone.reconstruct(features).shape == backbone.reconstruct(features[-1:]).shape == x.shape


def test_decode_then_segment_is_the_networks_own_forward():
    backbone, x = build().eval(), torch.randn(1, 1, 4, 8, 8)
    torch.testing.assert_close(backbone.network.head(backbone.decode(backbone.features(x))), backbone.network(x))


def test_without_skips_the_image_is_not_read_and_its_layer_still_has_a_gradient():
    backbone, x = build(), torch.randn(1, 1, 4, 8, 8, requires_grad=True)
    backbone.reconstruct([torch.randn(1, 1, 4, 8, 8), backbone.features(x)[1].detach()], skips=False).sum().backward()
    assert x.grad is None
    assert all((p.grad == 0).all() for p in backbone.network.decoder.image.parameters())


def test_kept_tokens_of_all_patches_are_the_tokens_and_of_some_know_nothing_of_the_others():
    backbone, x = build().double().eval(), torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    tokens = backbone.network.encoder(x)[1]
    order = torch.stack([torch.randperm(8), torch.randperm(8)])
    expected = tokens.gather(1, order[:, :, None].expand_as(tokens))
    torch.testing.assert_close(backbone.kept_tokens(x, order), expected)
    keep = torch.tensor([[0, 5], [7, 2]])
    image = x.clone().requires_grad_()
    backbone.kept_tokens(image, keep).sum().backward()
    patches = image.grad.unfold(2, 2, 2).unfold(3, 4, 4).unfold(4, 4, 4).flatten(5)[:, 0].ne(0).any(-1).flatten(1)
    assert torch.equal(patches, torch.zeros(2, 8, dtype=torch.bool).scatter(1, keep, True))


@pytest.mark.parametrize("summary_token", [True, False])
def test_the_summary_stands_beside_the_tokens(summary_token):
    encoder = build(summary_token=summary_token).network.encoder
    summary, tokens = encoder(torch.randn(3, 1, 4, 8, 8))
    assert tokens.shape == (3, 8, 24)
    assert summary.shape == (3, 24) if summary_token else summary is None


def test_the_backbone_gives_it_with_the_features():
    backbone, x = build().eval(), torch.randn(3, 1, 4, 8, 8)
    summary, features = backbone.summarised(x)
    torch.testing.assert_close(summary, backbone.network.encoder(x)[0])
    torch.testing.assert_close(features, backbone.features(x))
    without = build(summary_token=False)
    assert backbone.has_summary and not without.has_summary
    with pytest.raises(UserError, match="PatchViT has no summary token"):
        without.summarised(x)


def test_positions_tell_every_patch_from_every_other_and_depend_on_its_place_alone():
    table = positions((3, 4, 5), 24)[0]
    assert table.shape == (60, 24) and len(table.unique(dim=0)) == 60
    assert torch.equal(positions((1, 4, 5), 24), positions((4, 5), 24))
    assert torch.equal(table[:20], positions((4, 5), 24)[0])
    odd = positions((2, 2), 20)
    assert odd.shape == (1, 4, 20) and (odd[..., 18:] == 0).all()
    along_x = positions((1, 1, 2), 6)[0, 1]
    expected = [0.0, 1, 0, 1, math.sin(1), math.cos(1)]
    torch.testing.assert_close(along_x, torch.tensor(expected))


def test_a_grey_image_copied_to_three_channels_is_the_one_channel_image_through_the_adapted_layer():
    three = build(3).double().eval()
    one = build(1).double().eval()
    weights = three.network.state_dict()
    for key in ("encoder.patch_embed.proj.weight", "decoder.image.0.weight"):
        weights[key] = rules.input_channels(weights[key], 1)
    one.network.load_state_dict(weights)
    x = torch.randn(1, 1, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(one.network(x), three.network(x.expand(-1, 3, -1, -1, -1)))


def test_a_flat_network_gives_a_slice_the_tokens_of_the_image_that_repeats_it():
    volume = build(patch_size=(4, 4, 4)).double().eval().network.encoder
    flat = build(patch_size=(4, 4)).double().eval().network.encoder
    weights = volume.state_dict()
    weights["patch_embed.proj.weight"] = rules.flatten(weights["patch_embed.proj.weight"], mean=False)
    flat.load_state_dict(weights)
    x = torch.randn(2, 1, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(flat(x)[1], volume(x[:, :, None].expand(-1, -1, 4, -1, -1))[1])


def test_it_is_timms_network_but_for_the_positions():
    theirs = VisionTransformer(
        img_size=(16, 24), patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0, global_pool=""
    )
    ours = build(3, patch_size=(4, 4)).eval().network.encoder
    weights = {key: value for key, value in theirs.state_dict().items() if key != "pos_embed"}
    ours.load_state_dict(weights, strict=True)
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.cat((torch.zeros(1, 1, 24), positions((4, 6), 24)), 1))
        x = torch.randn(2, 3, 16, 24)
        summary, tokens = ours(x)
        torch.testing.assert_close(torch.cat((summary[:, None], tokens), 1), theirs.eval()(x))


@pytest.mark.parametrize(("patch", "steps"), [
    ((4, 16, 16), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
    ((8, 8), [(2, 2)] * 3),
    ((1, 2, 4), [(1, 1, 2), (1, 2, 2)]),
])  # fmt: skip
def test_the_decoder_grows_short_axes_last(patch, steps):
    assert halvings(patch) == steps


def test_the_token_decoder_knows_the_places_of_any_grid():
    decoder = build().token_decoder(1).double()
    same = decoder(torch.ones(1, 6, 24, dtype=torch.float64), (1, 2, 3))
    assert same.shape == (1, 6, 24) and len(same[0].unique(dim=0)) == 6


def test_a_copy_has_the_same_keys_and_parts():
    backbone = build(3)
    assert copy.deepcopy(backbone).state_dict().keys() == backbone.state_dict().keys()
    parts = backbone.parts()
    assert len(parts.stages) == 2 and len(parts.head) == 2
    counted = sum(p.numel() for stage in parts.stages for p in stage)
    assert counted == sum(p.numel() for p in backbone.network.encoder.parameters())
    network = backbone.network
    assert network.get_submodule(network.key_to_encoder) is network.encoder
    readers = {name for name, module in network.named_modules() if getattr(module, "in_channels", None) == 3}
    assert readers == set(network.keys_to_in_proj)


def test_the_family_is_told_by_class_and_keys():
    network = build().network
    assert family_of_class("nnssl_plugin.networks.patch_vit.PatchViT") is family_of_keys(network.state_dict())
    assert family_of_class("PatchViT").divisors({"patch_size": [2, 8, 8]}, 3) == [2, 8, 8]


@pytest.mark.parametrize("patch", [(3, 4, 4), (4,), (0, 4, 4)])
def test_a_patch_that_cannot_be_halved_is_refused(patch):
    with pytest.raises(UserError, match="powers of two"):
        build(patch_size=patch)


def test_deep_supervision_is_refused():
    with pytest.raises(UserError, match="without deep supervision"):
        build(deep_supervision=True)


def test_a_flat_network_of_three_colours_becomes_one_of_grey_volumes_that_gives_the_same_tokens():
    flat, volume = build(3, patch_size=(4, 4)).network, build(1, patch_size=(2, 4, 4)).network
    encoder = {key: value for key, value in flat.state_dict().items() if key.startswith("encoder.")}
    state, _ = adapt_weights(encoder, volume, trained=None, options=AdaptationOptions(inflate=True))
    volume.load_state_dict(state)
    x = torch.randn(1, 1, 8, 12)
    repeated = volume.eval().encoder(x[:, :, None].expand(-1, -1, 2, -1, -1))[1]
    torch.testing.assert_close(repeated, flat.eval().encoder(x.expand(-1, 3, -1, -1))[1])
