"""Both of M3Ret's trainers on planned networks: what is trained, channels, 2D, chunks, exact resume."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from method_checks import assert_resumes_exactly
from pretraining_harness import make_trainer
from small_patch_vit import with_patch_vit

from nnssl_plugin.io.files import write_json
from nnssl_plugin.methods.m3ret.mae.trainer import M3RetMAEPretrainer
from nnssl_plugin.methods.m3ret.simdino.trainer import M3RetSimDINOPretrainer

TRAINING = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 1, "batch_size": 2, "warmup_epochs": 0}
METHOD = {
    M3RetMAEPretrainer: {"decoder_width": 24, "decoder_blocks": 1, "decoder_heads": 2},
    M3RetSimDINOPretrainer: {"hidden": 16, "width": 8, "local_views": 1},
}
BOTH = pytest.mark.parametrize("trainer_class", METHOD)


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)


def transformer(trainer_class, more=(), *, method=(), **dataset):
    """The trainer of a plan with the small transformer."""
    block = TRAINING | dict(more) | {"method": METHOD[trainer_class] | dict(method)}
    return make_trainer(trainer_class=trainer_class, network=with_patch_vit, pretraining=block, **dataset)


@BOTH
@pytest.mark.parametrize(
    ("dimensions", "channels", "method"),
    [(3, 1, {}), (3, 2, {"channels": 3}), (2, 2, {}), (3, 2, {"intensity": "unit"})],
)
def test_the_encoder_alone_is_trained(trainer_class, dimensions, channels, method):
    trainer = transformer(trainer_class, dimensions=dimensions, channels=channels, method=method)
    trainer.initialize()
    network = trainer.task.backbone.network
    assert network.encoder.patch_embed.proj.in_channels == method.get("channels", channels)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    trainer.run_training()
    moved = {k for k, v in network.state_dict().items() if not torch.equal(before[k], v)}
    assert moved and all(key.startswith("encoder.") for key in moved)
    history = trainer.log.history()
    assert history["skipped_steps"] == [0.0] and np.isfinite(history["train_losses"]).all()


@BOTH
def test_chunks_give_the_gradient_of_the_batch(trainer_class):
    whole, chunked = (transformer(trainer_class, {"chunk_size": size}) for size in (None, 1))
    weights = []
    for trainer in (whole, chunked):
        trainer.run_training()
        weights.append(trainer.task.backbone.network.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-3, atol=1e-5)


@BOTH
def test_resume(trainer_class):
    block = {"batch_size": 2, "warmup_epochs": 0, "method": METHOD[trainer_class]}
    assert_resumes_exactly(trainer_class, channels=1, pretraining=block, network=with_patch_vit)


SOURCES = [
    {"dataset": "901", "kind": "MR", "batch_size": 2},
    {"dataset": "902", "kind": "video", "batch_size": 2},
    {"dataset": "903", "configuration": "2d", "kind": "ultrasound", "batch_size": 3},
]


@pytest.fixture
def three_kinds():
    """Volumes of two modalities beside a video of six frames in colour and grey images of another size."""
    for name, channels, dimensions, patch, shape in (
        ("Dataset902_Video", 3, 3, [6, 16, 16], (6, 20, 17)),
        ("Dataset903_Ultrasound", 1, 2, [16, 24], (1, 30, 41)),
    ):
        plan = write_fake_dataset(name=name, cases=4, channels=channels, dimensions=dimensions, shape=shape)
        next(iter(plan["configurations"].values()))["patch_size"] = patch
        write_json(Path(os.environ["nnUNet_preprocessed"], name, "nnUNetPlans.json"), plan)


@pytest.mark.slow
@BOTH
def test_volumes_videos_and_images_pretrain_one_network_and_resume_exactly(trainer_class, three_kinds):
    block = {
        "epochs": 2,
        "iterations_per_epoch": 4,
        "warmup_epochs": 0,
        "sources": SOURCES,
        "method": METHOD[trainer_class] | {"frames": 4},
    }
    assert_resumes_exactly(trainer_class, stop_after=6, channels=2, pretraining=block, network=with_patch_vit)


@BOTH
def test_every_kind_has_its_own_numbers_and_pictures(trainer_class, three_kinds, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "nnssl_plugin.pretraining.pretrainer.draw_pictures", lambda images, path, *others: drawn.append(Path(path).name)
    )
    trainer = transformer(trainer_class, {"iterations_per_epoch": 9, "sources": SOURCES}, channels=2)
    trainer.run_training()
    assert trainer.task.backbone.input_channels == 3
    history = trainer.log.history()
    for kind in ("MR", "video", "ultrasound"):
        assert np.isfinite([values for name, values in history.items() if name.endswith(f"/{kind}")]).all()
        assert any(f"_{kind}_" in name for name in drawn)
    assert history["skipped_steps"] == [0.0]
