"""A backbone out of a checkpoint: its weights, its preprocessing, whole images, frozen and trainable, and refusals."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from fake_dataset import NAME, fake_plan
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from small_checkpoint import READER, checkpoint_of

import nnssl_plugin as nnssl
from nnssl_plugin.checkpoints.format.files import save_checkpoint
from nnssl_plugin.checkpoints.sources.source import read_source
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.tasks.classification.classifier import Classifier


@pytest.fixture
def checkpoint(nnunet_environment, tmp_path):
    return checkpoint_of(tmp_path)


@pytest.fixture
def scan(tmp_path, phantom):
    """Anisotropic, larger than a patch in every axis once it is at 1 mm."""
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(phantom(5, (20, 22, 14)), np.diag([1.0, 1.0, 2.0, 1.0])), path)
    return path


def test_the_maps_are_those_of_the_encoder_with_the_weights_of_the_file(checkpoint):
    backbone = nnssl.load_backbone(checkpoint)
    x = torch.randn(2, 1, 16, 16, 16)
    content = torch.load(checkpoint, weights_only=True)
    network = build_network(content["init_args"]["plans"], "3d_fullres", content["init_args"]["dataset_json"])
    network.load_state_dict(content["network_weights"])
    expected = network.eval().encoder(x)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))
    assert backbone.channels == (4, 8, 16) and backbone.patch_size == (16, 16, 16) and backbone.spacing == (1, 1, 1)


def test_files_are_preprocessed_as_nnunet_does(checkpoint, scan):
    content = torch.load(checkpoint, weights_only=True)["init_args"]
    manager = PlansManager(content["plans"])
    expected, _, _ = DefaultPreprocessor(verbose=False).run_case(
        [str(scan)], None, manager, manager.get_configuration("3d_fullres"), content["dataset_json"]
    )
    got = nnssl.load_backbone(checkpoint).preprocess(scan)
    assert got.shape == (1, 28, 22, 20) and got.dtype == np.float32  # 14 slices of 2 mm at 1 mm
    np.testing.assert_allclose(got, expected)


def test_an_array_with_its_spacing_equals_its_file(checkpoint, scan):
    backbone = nnssl.load_backbone(checkpoint)
    array = np.asarray(nibabel.load(scan).dataobj, dtype=np.float32).T[None]
    np.testing.assert_allclose(backbone.preprocess(array, spacing=(2, 1, 1)), backbone.preprocess(scan), atol=1e-5)


def test_windows_cover_the_image_and_what_is_outside_is_0(checkpoint, scan):
    backbone = nnssl.load_backbone(checkpoint)
    windows = backbone.windows(scan)
    assert windows.shape == (2 * 2 * 2, 1, 16, 16, 16)
    data = backbone.preprocess(scan)
    covered = {float(value) for value in windows.flatten()}
    assert {float(value) for value in data.flatten()} <= covered
    small = backbone.windows(np.random.default_rng(0).normal(size=(1, 10, 16, 5)).astype(np.float32), spacing=(1, 1, 1))
    assert small.shape == (1, 1, 16, 16, 16)
    assert (small[0, 0, :3] == 0).all() and (small[0, 0, 13:] == 0).all() and (small[0, 0, 3:13, :, 5:10] != 0).any()


def test_the_embedding_is_the_mean_over_windows(checkpoint, scan):
    backbone = nnssl.load_backbone(checkpoint)
    expected = torch.stack([backbone(window[None])[-1].mean((0, 2, 3, 4)) for window in backbone.windows(scan)]).mean(0)
    torch.testing.assert_close(backbone.embed(scan), expected)
    assert backbone.embed(scan).shape == (16,)


def test_slices_of_a_2d_network(nnunet_environment, tmp_path, scan):
    backbone = nnssl.load_backbone(checkpoint_of(tmp_path, dimensions=2, spacing=(1.0, 1.0)))
    assert backbone.windows(scan).shape == (14 * 2 * 2, 1, 16, 16)
    assert backbone.embed(scan).shape == (16,)


def test_frozen_and_trainable(checkpoint):
    frozen, trainable = nnssl.load_backbone(checkpoint), nnssl.load_backbone(checkpoint, trainable=True)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert trainable.training
    trainable(torch.randn(1, 1, 16, 16, 16))[-1].square().mean().backward()
    encoder = [p for p in trainable.network.encoder.parameters() if p.ndim > 1]
    assert encoder and all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder)
    assert not any(p.requires_grad for p in trainable.network.decoder.seg_layers.parameters())


def test_weights_that_adapt_wrote_find_their_plan(checkpoint):
    folder = Path(os.environ["nnUNet_preprocessed"], NAME)
    adapted = nnssl.adapt(NAME, name="toy", weights=checkpoint)
    backbone = nnssl.load_backbone(adapted.weights)
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.equal(backbone(x)[-1], nnssl.load_backbone(checkpoint)(x)[-1])
    assert adapted.plan.parent == folder


def test_a_classifier_gives_its_encoder(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    network = build_network(content["init_args"]["plans"], "3d_fullres", content["init_args"]["dataset_json"])
    network.load_state_dict(content["network_weights"])
    classifier = Classifier(network, input_channels=1, heads={"grade": 3, "sign": 2})
    weights = classifier.state_dict()
    assert not any(key.startswith("encoder.") for key in weights)
    path = tmp_path / "classifier.pth"
    save_checkpoint(content | {"network_weights": weights, "trainer_name": "PretrainedClassificationTrainer"}, path)
    x = torch.randn(1, 1, 16, 16, 16)
    assert all(
        torch.equal(a, b) for a, b in zip(nnssl.load_backbone(path)(x), nnssl.load_backbone(checkpoint)(x), strict=True)
    )
    assert set(read_source(path).weights) == set(network.state_dict())
    assert all(prefix.startswith("encoder") for prefix in read_source(path).trained)
    assert read_source(checkpoint).trained is None


@pytest.mark.parametrize(
    ("image", "spacing", "said"),
    [
        (np.ones((1, 4, 4, 4)), None, "spacing"),
        (np.ones((2, 4, 4, 4)), (1, 1, 1), "1 channels"),
        (np.ones((4, 4, 4)), (1, 1, 1), "1 channels"),
        (np.full((1, 4, 4, 4), np.nan), (1, 1, 1), "NaN"),
        ("absent.nii.gz", None, "absent.nii.gz"),
    ],
)
def test_images_that_do_not_fit_are_refused(checkpoint, image, spacing, said):
    with pytest.raises(UserError, match=said):
        nnssl.load_backbone(checkpoint).preprocess(image, spacing=spacing)


def test_files_that_do_not_fit_are_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    save_checkpoint({"state_dict": content["network_weights"]}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="nnssl_plugin adapt"):
        nnssl.load_backbone(tmp_path / "plain.pth")
    content["network_weights"].popitem()
    save_checkpoint(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="inspect"):
        nnssl.load_backbone(tmp_path / "other.pth")


def test_a_file_cannot_name_what_is_built(nnunet_environment, tmp_path, checkpoint):
    called = checkpoint_of(tmp_path, network_class="subprocess.Popen")
    with pytest.raises(UserError, match=r"subprocess\.Popen"):
        nnssl.load_backbone(called)
    content = torch.load(checkpoint, weights_only=True)
    plan = fake_plan() | READER
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    content["init_args"]["plans"] = plan
    for name in ("os.system", "torch.nn.modules.module.os.system", "torch.hub.load"):
        architecture["arch_kwargs"]["nonlin"] = name
        save_checkpoint(content, tmp_path / "crafted.pth")
        with pytest.raises(UserError, match="no network, layer"):
            nnssl.load_backbone(tmp_path / "crafted.pth")
