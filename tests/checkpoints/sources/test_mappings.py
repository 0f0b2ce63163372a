"""Tables rename foreign keys, say what is known, and refuse what does not fit; the shipped ones fit their families."""

import functools
import json
import pydoc
import re
from unittest import mock

import pytest
import timm
import torch
import torchvision
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd, PatchDecode, PatchEmbed
from monai.networks.nets.segresnet_ds import SegResNetDS
from monai.networks.nets.swin_unetr import SwinUNETR
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnssl_plugin.checkpoints.format import content
from nnssl_plugin.checkpoints.sources.mappings import FORMAT, Mapping, read_mapping, shipped_mappings
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json
from nnssl_plugin.networks.patch_vit import PatchViT
from nnssl_plugin.networks.resnet_unet import ResNetUNet
from nnssl_plugin.networks.sam_unet import SAMUNet

IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
VALID = {"format": FORMAT, "name": "mine", "rename": [["^enc\\.", "encoder."]], "drop": ["^head\\."]}


def table(folder, **changes):
    write_json(folder / "table.json", VALID | changes)
    return folder / "table.json"


def layout_of(network: nn.Module) -> dict:
    """Tensors of the shapes of a network that was built without memory; each stores one number only."""
    return {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in network.state_dict().items()}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def without_memory(build, *arguments, **options):
    with torch.device("meta"):
        return build(*arguments, **options)


def built(network, **options):
    """The network that a source describes, without memory."""
    required = [name for name in IMPORTED if name in network["kwargs"]]
    return without_memory(get_network_from_plans, network["class"], network["kwargs"], required, 1, 2, **options)


@functools.cache
def res_enc_l():
    """nnssl's ``get_res_enc_l``."""
    return layout_of(built(read_mapping("openmind-resenc-l").network, deep_supervision=False))


@functools.cache
def eva_mae():
    """nnssl's ``EvaMAE`` in the sizes of ``BaseEvaMAETrainer``: Primus-M with a decoder of two blocks."""

    def eva(depth):
        return Eva(864, depth, 12, ref_feat_shape=(20, 20, 20), init_values=0.1, scale_attn_inner=True)

    patch = (8, 8, 8)
    parts = without_memory(
        lambda: nn.ModuleDict(
            {
                "down_projection": PatchEmbed(patch, 1, 864),
                "eva": eva(16),
                "decoder": eva(2),
                "up_projection": PatchDecode(patch, 864, 1, norm=LayerNormNd, activation=nn.GELU),
            }
        )
    )
    return layout_of(parts) | {"mask_token": torch.zeros(1, 1, 864)}


@functools.cache
def swin(feature_size, *, use_v2):
    with mock.patch.object(torch, "linspace", functools.partial(torch.linspace, device="cpu")):  # it is read as numbers
        return without_memory(SwinUNETR, 1, 21, feature_size=feature_size, use_v2=use_v2)


def voco(feature_size):
    """VoCo's ``Swin``: the encoder of SwinUNETR (second version) and a projection head."""
    network = layout_of(swin(feature_size, use_v2=True))
    encoder = {key: value for key, value in network.items() if key.startswith(("swinViT.", "encoder"))}
    return encoder | {f"proj_head.layer{i}.0.weight": torch.zeros(2) for i in (1, 2, 3)}


def save_and_read(content, folder, mapping):
    torch.save(content, folder / "weights.pt")
    return read_source(folder / "weights.pt", mapping=mapping)


def fits(part: nn.Module, weights, prefix) -> bool:
    """Whether the tensors below a prefix are exactly those of a part of the network."""
    below = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    part.load_state_dict(below, strict=True, assign=True)
    return bool(below)


def test_the_shipped_tables_are_valid_and_say_where_their_layout_is_public():
    assert {"openmind-resenc-l", "openmind-primus-m", "swinunetr-ssl", "voco-b"} <= set(shipped_mappings())
    for name in shipped_mappings():
        shipped = read_mapping(name)
        assert shipped.name == name and "https://github.com/" in shipped.source and shipped.citation
        assert pydoc.locate(shipped.network["class"]) is not None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: {"network_weights": prefixed("module.", w)},
        lambda w: {"state_dict": w},
        lambda w: w,
    ],
    ids=["checkpoint", "state_dict", "bare"],
)
def test_openmind_resenc_l(wrap, tmp_path):
    weights = res_enc_l()
    source = save_and_read(wrap(weights), tmp_path, "openmind-resenc-l")
    assert fits(built(source.network, deep_supervision=False), source.weights, "")
    assert source.provenance["spacing_mm"] == [1, 1, 1] and source.input_channels == 1
    assert source.provenance["normalisation"] == ["ZScoreNormalization"]
    assert (source.key_to_encoder, source.key_to_stem) == ("encoder.stages", "encoder.stem")


@pytest.mark.parametrize("prefix", ["", "encoder."], ids=["nnssl's encoder_only", "names of the whole network"])
def test_an_encoder_of_resenc_l_alone(prefix, tmp_path):
    encoder = {k.removeprefix("encoder."): value for k, value in res_enc_l().items() if k.startswith("encoder.")}
    source = save_and_read(prefixed(prefix, encoder), tmp_path, "openmind-resenc-l")
    assert fits(built(source.network, deep_supervision=False).encoder, source.weights, "encoder.")
    assert len(source.weights) == len(encoder) and source.input_channels == 1


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "encoder."], ids=["MAE", "SimCLR and VoCo"])
def test_openmind_primus_m(prefix, tmp_path):
    weights = prefixed(prefix, eva_mae()) | {"projector.layer1.0.weight": torch.zeros(2)}
    source = save_and_read({"network_weights": weights}, tmp_path, "openmind-primus-m")
    primus = built(source.network)
    assert fits(primus.eva, source.weights, "eva.")
    assert fits(primus.down_projection, source.weights, "down_projection.")
    assert source.network["kwargs"]["input_shape"] == [160, 160, 160] and source.input_channels == 1
    assert not any(key.startswith("projector.") for key in source.weights)


@pytest.mark.parametrize("name, feature_size", [("voco-b", 48), ("voco-l", 96), ("voco-h", 192)])
def test_voco_in_the_layout_with_a_backbone_and_heads(name, feature_size, tmp_path, monkeypatch):
    """Luffy03/Large-Scale-Medical, ``VoCoHead``: a backbone, and projection heads called student and teacher."""
    monkeypatch.setattr(content, "LARGEST_REPEATED", 2**34)  # the tensors of this test store one number each
    heads = {"module.student.layer1.0.weight": torch.zeros(2), "module.teacher.layer1.0.weight": torch.zeros(2)}
    source = save_and_read(
        {"state_dict": prefixed("module.backbone.", voco(feature_size)) | heads, "epoch": 5}, tmp_path, name
    )
    network = swin(source.network["kwargs"]["feature_size"], use_v2=source.network["kwargs"]["use_v2"])
    assert fits(network.swinViT, source.weights, "swinViT.") and fits(network.encoder10, source.weights, "encoder10.")
    assert source.weights.keys() <= network.state_dict().keys()
    assert source.input_channels == 1 and source.provenance["channels"] == ["CT"]


def test_voco_in_the_layout_of_student_and_teacher(tmp_path):
    """Luffy03/VoCo, ``VoCoHead``: two whole networks."""
    weights = voco(48)
    both = prefixed("module.student.", weights) | prefixed("module.teacher.", weights)
    source = save_and_read(both, tmp_path, "voco-b")
    assert fits(swin(48, use_v2=True).swinViT, source.weights, "swinViT.")
    assert any("'teacher.' was taken" in line for line in source.provenance["taken"])


@pytest.mark.parametrize("prefix", ["swin_vit.", "swinViT.", ""], ids=["swin_vit", "swinViT", "without"])
def test_swinunetr_self_supervised(prefix, tmp_path):
    """MONAI's ``load_from`` reads ``module.layers1.0.blocks.0.mlp.fc1``; ``SSLHead`` has heads beside ``swinViT``."""
    network = swin(48, use_v2=False)
    weights = {
        prefix + key.removeprefix("swinViT.").replace(".mlp.linear", ".mlp.fc"): value
        for key, value in layout_of(network).items()
        if key.startswith("swinViT.")
    }
    heads = {
        "rotation_head.weight": torch.zeros(4, 768),
        "contrastive_head.bias": torch.zeros(512),
        "conv.0.weight": torch.zeros(2),
    }
    source = save_and_read({"state_dict": prefixed("module.", weights | heads)}, tmp_path, "swinunetr-ssl")
    assert fits(network.swinViT, source.weights, "swinViT.")
    assert all(key.startswith("swinViT.") for key in source.weights) and source.input_channels == 1


@pytest.mark.parametrize("size", ["base", "small", "tiny"])
@pytest.mark.parametrize("prefix", ["", "teacher.backbone."], ids=["timm, MAE", "DINO's teacher"])
def test_a_vision_transformer_in_timms_names(size, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LARGEST_REPEATED", 2**34)  # the tensors of this test store one number each
    weights = layout_of(without_memory(timm.create_model, f"vit_{size}_patch16_224", num_classes=10))
    beside = {"teacher.head.mlp.0.weight": torch.zeros(2)} if prefix else {}
    source = save_and_read(prefixed(prefix, weights) | beside, tmp_path, f"timm-vit-{size[0]}")
    network = without_memory(PatchViT, 3, 2, **source.network["kwargs"])
    assert fits(network.encoder, source.weights, "encoder.")
    assert all(key.startswith("encoder.") for key in source.weights) and source.input_channels == 3


@functools.cache
def seg_res_net():
    return without_memory(SegResNetDS, in_channels=1, init_filters=32, blocks_down=[1, 2, 2, 4, 4])


CT_FM = {
    "Lightning": lambda encoder, decoder: {
        "state_dict": prefixed("model.backbone.", encoder)
        | {"model.projection_head.layers.0.weight": torch.zeros(256, 512)}
    },
    "backbone": lambda encoder, decoder: prefixed("backbone.", encoder),
    "feature extractor": lambda encoder, decoder: encoder,
    "whole network": lambda encoder, decoder: prefixed("encoder.", encoder) | decoder,
}
"""Layouts of project-lighter/CT-FM: ``models/frameworks/simclr.py`` in a Lightning module, what its evaluation strips
(``ckpt_to_model_prefix``), MONAI's ``SegResEncoder``, and MONAI's ``SegResNetDS``."""


@pytest.mark.parametrize("layout", CT_FM)
def test_ct_fm(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LARGEST_REPEATED", 2**34)  # the tensors of this test store one number each
    network = seg_res_net()
    weights = layout_of(network)
    size = sum(value.numel() for value in weights.values() if value.is_floating_point())
    assert round(4 * size / 1e6) == 349  # MB of the published model.safetensors
    encoder = {k.removeprefix("encoder."): value for k, value in weights.items() if k.startswith("encoder.")}
    decoder = {key: value for key, value in weights.items() if not key.startswith("encoder.")}
    source = save_and_read(CT_FM[layout](encoder, decoder), tmp_path, "ct-fm")
    assert fits(network.encoder, source.weights, "encoder.")
    assert all(key.startswith("encoder.") for key in source.weights) and source.input_channels == 1
    assert built(source.network).state_dict().keys() == network.state_dict().keys()
    assert source.provenance["spacing_mm"] == [3, 1, 1] and source.provenance["channels"] == ["CT"]


@pytest.mark.parametrize("prefix", ["", "module."], ids=["torchvision, LVM-Med", "parallel"])
def test_resnet_50_in_torchvisions_names(prefix, tmp_path, monkeypatch):
    """LVM-Med's file holds no ``fc``; ``segmentation_models_pytorch`` loads it strictly into torchvision's names."""
    monkeypatch.setattr(content, "LARGEST_REPEATED", 2**34)  # the tensors of this test store one number each
    weights = layout_of(without_memory(torchvision.models.resnet50, weights=None))
    source = save_and_read(prefixed(prefix, weights), tmp_path, "torchvision-resnet50")
    network = without_memory(ResNetUNet, 3, 2, **source.network["kwargs"])
    assert fits(network.encoder, source.weights, "encoder.")
    assert all(key.startswith("encoder.") for key in source.weights) and source.input_channels == 3


SAM_LAYOUTS = {
    "timm": ("sam-vit-b", True, lambda encoder: encoder),
    "segment_anything": ("sam-vit-b", True, lambda encoder: prefixed("image_encoder.", with_lin(encoder)) | SAM_REST),
    "LVM-Med": ("lvm-med-vit-b", False, lambda encoder: with_lin(encoder)),
}
"""timm's ``samvit_base_patch16``, Meta's ``sam_vit_b_01ec64.pth``, and LVM-Med's ``ImageEncoderViT`` without absolute
positions (``model/unet_vit.py``)."""
SAM_REST = {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256), "mask_decoder.iou_token.weight": torch.zeros(1)}


def with_lin(encoder):
    return {re.sub(r"\.mlp\.fc(\d)\.", r".mlp.lin\1.", key): value for key, value in encoder.items()}


@pytest.mark.parametrize("layout", SAM_LAYOUTS)
def test_sams_vit_b(layout, tmp_path, monkeypatch):
    monkeypatch.setattr(content, "LARGEST_REPEATED", 2**34)
    name, positions, arranged = SAM_LAYOUTS[layout]
    theirs = without_memory(timm.create_model, "samvit_base_patch16", num_classes=0, use_abs_pos=positions)
    source = save_and_read(arranged(layout_of(theirs)), tmp_path, name)
    network = without_memory(SAMUNet, 3, 2, **source.network["kwargs"])
    assert fits(network.vit, source.weights, "vit.")
    assert all(key.startswith("vit.") for key in source.weights) and source.input_channels == 3


def test_rules_apply_one_after_the_other(tmp_path):
    path = table(tmp_path, rename=[["^enc\\.(\\d+)", "blocks.\\1"], ["^blocks\\.", "encoder.blocks."]])
    weights = {"enc.0.weight": torch.ones(1), "head.weight": torch.ones(2), "norm.bias": torch.ones(3)}
    source = save_and_read(weights, tmp_path, path)
    expected = {re.sub(r"^enc\.", "encoder.blocks.", key) for key in weights if not key.startswith("head.")}
    assert set(source.weights) == expected and torch.equal(source.weights["norm.bias"], torch.ones(3))


def test_facts_of_a_table_reach_the_provenance(tmp_path):
    network = {"class": "a.ResidualEncoderUNet", "kwargs": {"n_stages": 2}}
    path = table(
        tmp_path,
        network=network,
        licence="CC-BY-4.0",
        citation="a paper",
        channels=["T1", "T2"],
        normalisation=["ZScoreNormalization"] * 2,
        spacing_mm=[1, 0.5, 0.5],
    )
    source = save_and_read({"enc.stages.0.weight": torch.zeros(1)}, tmp_path, path)
    assert source.network == network and source.key_to_encoder == "encoder.stages" and source.input_channels == 2
    facts = {"licence": "CC-BY-4.0", "citations": ["a paper"], "spacing_mm": [1, 0.5, 0.5], "channels": ["T1", "T2"]}
    assert facts.items() <= source.provenance.items()


def test_a_table_that_matches_nothing_lists_the_first_keys(tmp_path):
    weights = {f"layer{i}.weight": torch.zeros(1) for i in range(9)}
    with pytest.raises(UserError, match=r"'mine' does not fit .*: layer0\.weight, .*, layer4\.weight\."):
        save_and_read(weights, tmp_path, table(tmp_path))
    with pytest.raises(UserError, match="no tensor ends up below 'swinViT"):
        save_and_read(weights, tmp_path, "voco-b")


def test_a_table_that_drops_everything_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not fit"):
        save_and_read({"head.weight": torch.zeros(1)}, tmp_path, table(tmp_path))


def test_two_tensors_of_one_key_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"two tensors .* the key encoder\.a"):
        save_and_read({"enc.a": torch.zeros(1), "encoder.a": torch.zeros(1)}, tmp_path, table(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "not a table of format 1"),
        ({"renames": []}, "unknown fields: renames"),
        ({"name": ""}, "'name' must be"),
        ({"name": 3}, "'name' must be a text"),
        ({"rename": {"a": "b"}}, "'rename' must be a list"),
        ({"rename": [["a"]]}, "'rename' must be a list of pairs"),
        ({"rename": [["(", "b"]]}, r"'\(' is none"),
        ({"rename": [["a", "\\1"]]}, "replacement"),
        ({"drop": [3]}, "'drop' must be"),
        ({"drop": ["["]}, "'drop' must be"),
        ({"network": {"class": "a"}}, "'network' must be"),
        ({"network": {"class": 3, "kwargs": {}}}, "'network' must be"),
        ({"spacing_mm": [0, 1, 1]}, "'spacing_mm' must be"),
        ({"spacing_mm": [True, 1, 1]}, "'spacing_mm' must be"),
        ({"channels": [1]}, "'channels' must be"),
        ({"citation": None}, "'citation' must be"),
    ],
)
def test_a_wrong_table_is_refused_by_its_field(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_mapping(table(tmp_path, **changes))


@pytest.mark.parametrize("text", ["{", "[]", "null", '"voco-b"'])
def test_what_is_no_table_is_refused(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(UserError):
        read_mapping(tmp_path / "table.json")


def test_an_unknown_table_lists_those_that_there_are():
    with pytest.raises(UserError, match="no table 'absent'") as refused:
        read_mapping("absent")
    assert "voco-b" in refused.value.remedy


def test_every_field_of_a_table_is_in_the_reference(repository):
    page = (repository / "docs" / "reference" / "weight-sources.md").read_text()
    assert [name for name in Mapping.__dataclass_fields__ if f"`{name}`" not in page] == []
    example = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    assert json.loads(example[1])["format"] == FORMAT
