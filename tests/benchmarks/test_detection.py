"""The detection script: boxes of structures, average precision by hand, and a detector trained on its encoder."""

import importlib.util
import json

import nibabel
import numpy as np
import pytest
import torch
from small_planar import NETWORKS

from nnssl_plugin.networks.resnet_unet import ResNetUNet


@pytest.fixture(scope="module")
def script(repository):
    specification = importlib.util.spec_from_file_location("detection", repository / "benchmarks" / "detection.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def scan(seed, shape=(32, 32, 4)):
    """Two squares in noise, one of each class."""
    rng = np.random.default_rng(seed)
    image, labels = rng.normal(0, 0.1, shape).astype(np.float32), np.zeros(shape, np.uint8)
    x, y = rng.integers(2, 6, 2)
    for number, (row, column) in enumerate(((x, y), (x + 14, y + 14)), start=1):
        labels[row : row + 9, column : column + 9, 1:3] = number
    return image + labels, labels


def test_boxes_are_those_of_the_structures(script):
    (first, second) = script.slices_of(*scan(0), number=2, size=32)
    _, labels = scan(0)
    for number in (1, 2):
        rows, columns, _ = np.nonzero(labels == number)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert first.boxes[first.labels == number].tolist() == [expected]
    assert first.image.shape == second.image.shape == (3, 32, 32)
    assert script.slices_of(np.zeros((8, 8, 2)), np.zeros((8, 8, 2)), number=2, size=8) == []


def test_average_precision_by_hand(script):
    box, other = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[20.0, 20, 30, 30]])
    nothing = torch.zeros(0, 4), torch.zeros(0)
    assert script.average_precision([box], [(box, torch.ones(1))]) == 1.0
    assert script.average_precision([box], [nothing]) == 0.0
    assert script.average_precision([box], [(torch.cat((other, box)), torch.tensor([0.9, 0.8]))]) == 0.5
    twice = torch.cat((box, box)), torch.tensor([0.9, 0.8])
    assert script.average_precision([torch.cat((box, other))], [twice]) == 0.5
    assert script.average_precision([box, nothing[0]], [nothing, (other, torch.ones(1))]) == 0.0


@pytest.mark.slow
def test_it_trains_on_an_exported_encoder(script, tmp_path):
    name, arguments = NETWORKS["ResNetUNet"]
    plan = {"configurations": {"2d": {"architecture": {"network_class_name": name, "arch_kwargs": arguments}}}}
    (tmp_path / "plans.json").write_text(json.dumps(plan))
    torch.manual_seed(0)
    torch.save(ResNetUNet(3, 2, **arguments).encoder.state_dict(), tmp_path / "encoder.pth")
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for case in range(6):
        for kind, volume in zip(("images", "labels"), scan(case), strict=True):
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / kind / f"case_{case}.nii.gz")
    training, evaluation, classes = script.read_cases(tmp_path, number=1, size=64)
    assert (len(training), len(evaluation), classes) == (4, 2, 2)
    network = script.detector(tmp_path / "encoder.pth", classes=classes, size=64)
    before = network.backbone.body.conv1.weight.clone()
    losses = script.train(network, training, epochs=2, lr=1e-3, batch_size=2)
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert not torch.equal(network.backbone.body.conv1.weight, before)
    assert 0 <= script.mean_average_precision(network, evaluation, classes) <= 1
