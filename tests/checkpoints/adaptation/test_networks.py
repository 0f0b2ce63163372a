"""What adaptation preserves on whole networks of dynamic_network_architectures, in double precision."""

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl_plugin.checkpoints.adaptation.adapt import adapt_weights, check_coverage
from nnssl_plugin.checkpoints.adaptation.options import AdaptationOptions
from nnssl_plugin.errors import UserError

UNETS = [PlainConvUNet, ResidualEncoderUNet]


def unet(
    kind=PlainConvUNet,
    *,
    channels=1,
    classes=2,
    features=(4, 8, 16),
    dimensions=3,
    kernels=None,
    strides=None,
    blocks=2,
    deeper_decoder=1,
):
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[dimensions]
    name = {PlainConvUNet: "n_conv_per_stage", ResidualEncoderUNet: "n_blocks_per_stage"}[kind]
    stages = len(features)
    network = kind(
        channels,
        stages,
        features,
        conv,
        kernels or [[3] * dimensions] * stages,
        strides or [[1] * dimensions, *[[2] * dimensions] * (stages - 1)],
        num_classes=classes,
        n_conv_per_stage_decoder=deeper_decoder,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=False,
        **{name: [blocks] * stages},
    )
    network.apply(network.initialize)
    return varied(network)


def primus(
    kind=Primus,
    *,
    channels=1,
    classes=2,
    embedded=(4, 4, 4),
    shape=(16, 16, 16),
    depth=2,
    registers=0,
    width=48,
    rotary=True,
):
    network = kind(
        channels,
        width,
        embedded,
        classes,
        eva_depth=depth,
        eva_numheads=2,
        input_shape=shape,
        num_register_tokens=registers,
        use_rot_pos_emb=rotary,
    )
    return varied(network)


def varied(network):
    """Biases and the scales of normalisation away from 0 and 1, so that a mistake in them is seen; double precision."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 and ".norm.weight" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.double().eval()


def adapted(source, target, **options):
    torch.manual_seed(1)
    state, report = adapt_weights(source.state_dict(), target, trained=None, options=AdaptationOptions(**options))
    target.load_state_dict(state)
    return report


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def reasons(report, status):
    return {record.reason for record in report.tensors if record.status == status}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3), (3, 2)])
def test_features_of_replicated_channels_stay(kind, dimensions, before, after):
    source, target = (unet(kind, channels=c, dimensions=dimensions) for c in (before, after))
    report = adapted(source, target)
    x = image(1, 1, *[16] * dimensions)
    old, new = (n.encoder(x.expand(-1, c, *x.shape[2:])) for n, c in ((source, before), (target, after)))
    for ours, theirs in zip(new, old, strict=True):
        close(ours, theirs)
    assert reasons(report, "adapted") == {f"input channels {before} → {after}"}
    assert report.coverage("encoder") == 1.0


@pytest.mark.parametrize("kind", [Primus, PrimusV2])
def test_tokens_of_replicated_channels_stay(kind):
    embedded, shape = ((4, 4, 4), (16, 16, 16)) if kind is Primus else ((8, 8, 8), (16, 16, 16))
    source, target = (primus(kind, channels=c, embedded=embedded, shape=shape) for c in (1, 3))
    report = adapted(source, target)
    x = image(1, 1, *shape)
    old, new = (
        n.eva(n.down_projection(x.expand(-1, c, -1, -1, -1)).flatten(2).mT)[0] for n, c in ((source, 1), (target, 3))
    )
    close(new, old)
    assert report.coverage("encoder") == 1.0


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 3), (4, 2)])
def test_stages_are_matched_from_the_finest(kind, before, after):
    widths = (4, 8, 16, 16)
    source, target = (unet(kind, features=widths[:n], classes=c) for n, c in ((before, 2), (after, 5)))
    report = adapted(source, target)
    common = min(before, after)
    x = image(1, 1, 16, 16, 16)
    for ours, theirs in zip(target.encoder(x)[:common], source.encoder(x)[:common], strict=True):
        assert torch.equal(ours, theirs)
    for place in range(1, common):  # counted from the finest
        for name in ("stages", "transpconvs"):
            ours, theirs = (getattr(n.decoder, name)[-place].state_dict() for n in (target, source))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    new = {record.keys[0].split(".")[2] for record in report.initialised() if "new stage" in record.reason}
    assert (new == {"0", "3"}) if after > before else not new  # the coarsest of decoder and encoder
    moved = next(r for r in report.tensors if r.keys[0] == f"decoder.transpconvs.{after - 2}.weight")
    assert moved.source == f"decoder.transpconvs.{before - 2}.weight" and moved.status == "copied"
    assert bool(report.unused) == (after < before)


def test_a_deeper_stage_keeps_its_blocks_and_the_new_one_starts_near_the_identity():
    source, target = unet(ResidualEncoderUNet, blocks=1), unet(ResidualEncoderUNet, blocks=3)
    for block in target.encoder.stages[0].blocks[1:]:
        nn.init.zeros_(block.conv2.norm.bias)
    report = adapted(source, target)
    x = image(1, 1, 8, 8, 8)
    old, new = (n.encoder.stages[0](n.encoder.stem(x)) for n in (source, target))
    close(new[old > 0], old[old > 0])
    assert reasons(report, "initialised") == {
        "new block: the checkpoint has fewer in this place",
        "segmentation layer of the target's classes",
    }
    assert all(".blocks.0." not in r.keys[0] for r in report.initialised())


def test_other_kernels_keep_the_first_response_to_images_constant_along_the_axis():
    source = unet()
    target = unet(kernels=[[1, 3, 3], [3, 3, 3], [5, 5, 5]], strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    report = adapted(source, target)
    x = image(1, 1, 1, 8, 8).expand(-1, -1, 8, -1, -1)
    first = [n.encoder.stages[0][0].convs[0].conv(x)[:, :, 1:-1] for n in (target, source)]
    close(*first)
    y = image(1, 8, 8, 8, 8)
    deepest = [n.encoder.stages[2][0].convs[0].conv(y) for n in (target, source)]
    close(*deepest)
    assert reasons(report, "adapted") == {
        "kernel 3×3×3 → 1×3×3",
        "kernel 3×3×3 → 5×5×5",
        "upsampling stride 2×2×2 → 1×2×2",
    }


@pytest.mark.parametrize("kind", UNETS)
def test_one_isotropic_channel_becomes_four_anisotropic_ones_with_other_classes(kind):
    source = unet(kind)
    target = unet(
        kind,
        channels=4,
        classes=5,
        kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    )
    report = adapted(source, target)
    output = target(image(1, 4, 4, 16, 16))
    assert output.shape == (1, 5, 4, 16, 16) and torch.isfinite(output).all()
    assert "input channels 1 → 4; kernel 3×3×3 → 1×3×3 (1 tensor)" in report.table()
    assert (report.coverage("encoder"), report.coverage("decoder"), report.coverage("head")) == (1.0, 1.0, 0.0)


def test_a_network_that_is_mostly_new_is_refused_by_its_largest_reasons():
    _, report = adapt_weights(unet().state_dict(), unet(features=(4, 8, 16, 16), blocks=3), trained=None)
    with pytest.raises(UserError, match=r"encoder\.stages\.3\.\S+: new stage: 3 in the checkpoint, 4 here"):
        check_coverage(report)


def test_a_primus_becomes_anisotropic_with_more_channels_and_other_classes():
    source = primus(registers=2)
    target = primus(channels=4, classes=2, embedded=(2, 4, 4), shape=(6, 24, 16), registers=3)
    report = adapted(source, target, source_grid=(4, 4, 4))
    assert report.coverage("encoder") > 0.99
    assert {
        "input channels 1 → 4; embedded patch 4×4×4 → 2×4×4",
        "tokens 2 → 3",
        "prefix tokens 2 → 3; positions 4×4×4 → 3×6×4",
    } == reasons(report, "adapted") - {"upsampling stride 2×2×2 → 1×2×2"}
    assert torch.equal(target.register_tokens[:, :2], source.register_tokens)
    assert torch.equal(target.eva.pos_embed[:, :2], source.eva.pos_embed[:, :2])
    ones = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    close(target.down_projection(ones.expand(1, 4, 2, 4, 4)), source.down_projection(ones.expand(1, 1, 4, 4, 4)))
    output = target(image(1, 4, 6, 24, 16))
    assert output.shape == (1, 2, 6, 24, 16) and torch.isfinite(output).all()


def test_fewer_register_tokens_keep_the_first():
    source, target = primus(registers=3), primus(registers=1)
    report = adapted(source, target)
    assert torch.equal(target.register_tokens, source.register_tokens[:, :1])
    assert torch.equal(target.eva.pos_embed, source.eva.pos_embed[:, [0, *range(3, 67)]])
    assert report.coverage("encoder") == 1.0


def test_new_register_tokens_stay_as_initialised_and_are_not_counted_as_loaded():
    source, target = primus(), primus(registers=2)
    before = target.register_tokens.detach().clone(), target.eva.pos_embed.detach().clone()
    report = adapted(source, target)
    assert torch.equal(target.register_tokens, before[0]) and torch.equal(target.eva.pos_embed[:, :2], before[1][:, :2])
    assert torch.equal(target.eva.pos_embed[:, 2:], source.eva.pos_embed)
    loaded, total = report.parameters("encoder")
    assert total - loaded == 2 * 2 * 48


def test_a_grid_that_is_not_known_is_an_error_that_names_what_is_missing():
    source, target = primus(shape=(16, 16, 16)), primus(shape=(16, 24, 24))
    with pytest.raises(UserError, match="of the checkpoint has 64 tokens; over which grid is not known") as error:
        adapted(source, target)
    assert "--token-grid" in error.value.remedy
    with pytest.raises(UserError, match="its grid would be 3×3×3"):
        adapted(source, target, source_grid=(3, 3, 3))
    with pytest.raises(UserError, match="of the network has 144 tokens"):
        adapted(source, primus(shape=(16, 24, 24), rotary=False), source_grid=(4, 4, 4))


def test_a_grid_that_only_one_product_gives_is_inferred():
    source, target = primus(shape=(12, 12, 12)), primus(shape=(16, 12, 12))
    report = adapted(source, target)
    assert "positions 3×3×3 → 4×3×3" in reasons(report, "adapted")


def test_another_grid_of_as_many_tokens_is_seen_where_both_are_known():
    source, target = primus(shape=(8, 16, 32)), primus(shape=(16, 16, 16))
    report = adapted(source, target, source_grid=(2, 4, 8))
    assert reasons(report, "adapted") == {"positions 2×4×8 → 4×4×4"}
    with torch.no_grad():
        target.eva.pos_embed.zero_()
    assert not reasons(adapted(source, target), "adapted")


def test_a_deeper_transformer_keeps_its_blocks_and_another_width_is_never_cut():
    source, target = primus(depth=1), primus(depth=3)
    report = adapted(source, target)
    assert {r.keys[0].split(".")[2] for r in report.initialised() if r.part == "encoder"} == {"1", "2"}
    _, report = adapt_weights(
        primus(width=24).state_dict(), primus(width=48), trained=None, options=AdaptationOptions(resize_width=True)
    )
    assert report.coverage("encoder") == 0.0
    assert any("never resized" in r.reason for r in report.initialised())


@pytest.mark.parametrize("kind", UNETS)
def test_inflation_between_2d_and_3d_is_asked_for(kind):
    flat, deep = unet(kind, dimensions=2), unet(kind)
    _, report = adapt_weights(flat.state_dict(), deep, trained=None)
    with pytest.raises(UserError, match="--inflate adapts it"):
        check_coverage(report)
    assert adapted(flat, deep, inflate=True).coverage("encoder") == 1.0
    key = "encoder.stages.1.0.convs.0.conv" if kind is PlainConvUNet else "encoder.stages.1.blocks.0.conv1.conv"
    x = image(1, 4, 12, 12)
    with_depth, without = deep.get_submodule(key), flat.get_submodule(key)
    close(with_depth(x.unsqueeze(2).expand(-1, -1, 12, -1, -1))[:, :, 2], without(x))
    back = unet(kind, dimensions=2)
    assert adapted(deep, back, inflate=True).coverage("encoder") == 1.0
    for ours, theirs in zip(back.encoder(image(1, 1, 16, 16).clone()), flat.encoder(image(1, 1, 16, 16)), strict=True):
        assert ours.shape == theirs.shape
    for name, value in back.state_dict().items():
        if ".seg_layers." not in name:
            close(value, flat.state_dict()[name])


@pytest.mark.parametrize("kind", UNETS)
def test_a_wider_network_answers_as_before_in_its_first_channels(kind):
    source, target = unet(kind), unet(kind, features=(6, 10, 20))
    _, report = adapt_weights(source.state_dict(), target, trained=None)
    with pytest.raises(UserError, match="--resize-width takes the first channels"):
        check_coverage(report)
    report = adapted(source, target, resize_width=True)
    x = image(1, 1, 16, 16, 16)
    last = []
    for network in (source, target):
        network.decoder.stages[-1].register_forward_hook(lambda module, inputs, output: last.append(output))
        network(x)
    for ours, theirs in zip([*target.encoder(x), last[1]], [*source.encoder(x), last[0]], strict=True):
        close(ours[:, : theirs.shape[1]], theirs)
    loaded, _ = report.parameters("encoder")
    assert loaded == sum(p.numel() for p in source.encoder.parameters())


def test_a_narrower_network_takes_the_first_channels():
    source, target = unet(features=(6, 10, 20)), unet()
    report = adapted(source, target, resize_width=True)
    assert report.coverage("encoder") == 1.0
    ours, theirs = (n.encoder.stages[1][0].convs[1].conv.weight for n in (target, source))
    assert torch.equal(ours, theirs[:8, :8])


@pytest.mark.parametrize(
    ("source", "target"), [(PlainConvUNet, ResidualEncoderUNet), (ResidualEncoderUNet, PlainConvUNet)]
)
def test_another_family_of_networks_is_refused_as_a_whole(source, target):
    _, report = adapt_weights(unet(source).state_dict(), unet(target), trained=None)
    assert all(report.coverage(part) == 0 for part in ("encoder", "decoder", "head"))
    with pytest.raises(UserError, match=f"[Tt]he checkpoint holds a {source.__name__}, this network is a "):
        check_coverage(report)


@pytest.mark.parametrize(
    ("build", "channels"),
    [
        (unet, 2),
        (lambda **k: unet(ResidualEncoderUNet, **k), 2),
        (primus, 2),
        (lambda **k: primus(registers=2, **k), 1),
    ],
)
def test_equal_networks_get_exact_copies_whatever_is_asked_for(build, channels):
    source, target = build(channels=channels), build(channels=channels)
    report = adapted(source, target, inflate=True, resize_width=True)
    assert not report.adapted()
    heads = {key for record in report.tensors if record.part == "head" for key in record.keys}
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]) == (key not in heads), key


def test_aliases_get_one_tensor_also_when_it_is_adapted():
    target = unet(channels=4)
    state, _ = adapt_weights(unet().state_dict(), target, trained=None)
    aliases = [
        key
        for key in state
        if key.endswith("encoder.stages.0.0.convs.0.conv.weight")
        or key.endswith("encoder.stages.0.0.convs.0.all_modules.0.weight")
    ]
    assert len(aliases) == 4 and len({state[key].data_ptr() for key in aliases}) == 1


def test_a_projection_that_stands_elsewhere_in_its_block_is_found():
    source = unet(ResidualEncoderUNet)
    target = unet(ResidualEncoderUNet, strides=[[1, 1, 1], [1, 1, 1], [2, 2, 2]])
    report = adapted(source, target)
    ours, theirs = target.encoder.stages[1].blocks[0].skip[0].conv.weight, source.encoder.stages[1].blocks[0].skip[1]
    assert torch.equal(ours, theirs.conv.weight) and report.coverage("encoder") == 1.0


@pytest.mark.slow  # importing MONAI alone takes many seconds
def test_a_published_swin_transformer_of_one_channel_reads_two():
    from monai.networks.nets import SwinUNETR

    source, target = (SwinUNETR(in_channels=c, out_channels=o, feature_size=12).double() for c, o in ((1, 2), (2, 4)))
    report = adapted(source, target)
    assert report.coverage("encoder") == 1.0 and report.coverage("decoder") == 1.0 and report.coverage("head") == 0.0
    x = image(1, 1, 32, 32, 32)
    for ours, theirs in zip(target.swinViT(x.expand(-1, 2, -1, -1, -1)), source.swinViT(x), strict=True):
        close(ours, theirs)
