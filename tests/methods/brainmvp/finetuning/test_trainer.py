"""BrainMVP's segmentation trainer: what a step sees, templates that stay, deep supervision, 2D, and exact resume."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from pretraining_harness import assert_same
from scipy.ndimage import gaussian_filter
from templated_dataset import SHORT, templates

from nnssl_plugin.checkpoints.format.spatial_arrays import read_spatial_arrays
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.methods.brainmvp.finetuning.trainer import BrainMVPSegmentationTrainer
from nnssl_plugin.tasks.segmentation.trainer import PretrainedSegmentationTrainer

LACKING = {f"case_{i:02d}": [c for c in range(4) if c != i % 4] for i in range(6)}


def trainer(folder, *, kind=BrainMVPSegmentationTrainer, resume=None, method=None, plan="nnUNetPlans-toy", **settings):
    plans = read_json(folder / f"{plan}.json")
    plans["finetuning"] |= SHORT | settings | ({} if method is None else {"method": method})
    plans["continue_training"] = resume is not None
    configuration = next(iter(plans["configurations"]))
    subject = kind(plans, configuration, "all", read_json(folder / "dataset.json"), device=torch.device("cpu"))
    if resume:
        subject.load_checkpoint(os.path.join(subject.output_folder, resume))
    return subject


def test_nnunet_finds_both_trainers_by_name():
    for name in ("BrainMVPSegmentationTrainer", "BrainMVPClassificationTrainer"):
        assert recursive_find_trainer_class_by_name(name).__name__ == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "arguments"), [(4, {"present": LACKING}), (1, {}), (4, {"dimensions": 2}), (4, {"residual": True})]
)
def test_a_run_ends_with_frozen_templates_and_predicts(adapted, channels, arguments):
    folder = adapted(channels, **arguments)
    subject = trainer(folder)
    subject.run_training()
    history = subject.log.history()
    assert np.isfinite(history["train_losses"]).all() and np.isfinite(history["val_losses"]).all()
    assert len(history["consistency"]) == 2 and min(history["consistency"]) > 0
    file = folder / read_json(folder / "nnUNetPlans-toy.json")["finetuning"]["weights"]
    before, after = (
        read_spatial_arrays(path)["templates"] for path in (file, Path(subject.output_folder, "checkpoint_final.pth"))
    )
    assert_same(vars(before), vars(after))
    assert not after.values.requires_grad
    size = (18, 20, 17)
    predictor = nnUNetPredictor(
        device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False, use_mirroring=False
    )
    predictor.initialize_from_trained_model_folder(subject.output_folder_base, ("all",), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(channels, *size))
    assert logits.shape == (2, *size) and torch.isfinite(logits).all()


def test_without_replacements_and_weight_the_loss_is_twice_the_ordinary_one(adapted):
    folder = adapted()
    losses = {}
    for kind, method in (
        (BrainMVPSegmentationTrainer, {"most_replaced": 0, "consistency": 0.0}),
        (PretrainedSegmentationTrainer, None),
    ):
        subject = trainer(folder, kind=kind, method=method)
        subject.on_train_start()
        subject.on_train_epoch_start()
        batch = next(subject.dataloader_train)
        losses[kind] = float(subject.train_step(batch)["loss"])
        if method:
            assert batch["data"].shape[1] == 8 and subject.loss.mean_difference() == 0
    assert losses[BrainMVPSegmentationTrainer] == pytest.approx(2 * losses[PretrainedSegmentationTrainer], rel=1e-5)


def test_the_loss_of_a_step_is_that_of_both_copies_and_their_consistency(adapted):
    subject = trainer(adapted(present=LACKING), method={"consistency": 2.0})
    subject.on_train_start()
    subject.on_train_epoch_start()
    batch = next(subject.dataloader_train)
    copies = subject.mixing.copies(batch["data"], batch["keys"], 0)
    ordinary = subject.loss.loss
    with torch.no_grad():
        maps = [subject.network.encoder(copy)[-1] for copy in copies.chunk(2)]
        supervised = sum(ordinary(subject.network(copy), batch["target"]) for copy in copies.chunk(2))
    expected = supervised + 2.0 * (maps[0] - maps[1]).square().mean()
    assert len(batch["target"]) > 1  # deep supervision
    assert float(subject.train_step(batch)["loss"]) == pytest.approx(expected.item(), rel=1e-5)


def test_templates_move_with_the_image_and_validation_has_none(adapted):
    """A dataset whose template is its image: whatever nnU-Net does to place both, they stay one."""
    folder = adapted()
    subject = trainer(folder)
    subject.templates = templates()
    dataset, validation = subject.get_tr_and_val_datasets()
    case = "case_00"
    noise = np.asarray(dataset.dataset.load_case(case)[0][:])
    image = torch.from_numpy(gaussian_filter(noise, (0, 2, 2, 2)))
    image = (image - image.mean((1, 2, 3), keepdim=True)) / image.std((1, 2, 3), keepdim=True, correction=0)
    object.__setattr__(dataset.templates, "values", image)
    transform = subject.get_training_transforms((16,) * 3, (-0.5, 0.5), None, (0, 1, 2), False)
    moved = []
    for seed in range(30):
        torch.manual_seed(seed)
        np.random.seed(seed)
        both = torch.from_numpy(dataset.load_case(case)[0][:])
        both[:4] = both[4:] = image
        seg = torch.zeros(1, *image.shape[1:])
        out = transform(image=both, segmentation=seg)["image"]
        assert out.shape == (8, 16, 16, 16)
        moved.append((out[:4], out[4:]))
    plain = [not torch.equal(a, b) for a, b in moved]
    assert 0 < sum(plain) < 30  # intensities of the image changed in some, and never the templates' alone
    for a, b in moved:
        for x, y in zip(a, b, strict=True):
            assert np.corrcoef(x.flatten(), y.flatten())[0, 1] > 0.7
    assert np.asarray(validation.load_case(case)[0][:]).shape[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 1])
def test_a_stopped_run_goes_on_bit_for_bit(adapted, channels, monkeypatch):
    folder = adapted(channels)

    def state(subject):
        return {"network": subject.network.state_dict(), "optimizer": subject.optimizer.state_dict()}

    # nnU-Net's loader is unordered: batches that depend on the step alone make a resume comparable
    def same_batches(subject):
        start = subject.on_train_start

        def started():
            start()
            subject.dataloader_train = _ByStep(subject, channels)

        subject.on_train_start = started
        return subject

    reference = same_batches(trainer(folder))
    reference.run_training()
    expected, kept = state(reference), reference.templates.values.clone()
    subject = same_batches(trainer(folder))
    step = subject.train_step

    def stopping(batch):
        if subject.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    subject.train_step = stopping
    with pytest.raises(SystemExit):
        subject.run_training()
    (folder / read_json(folder / "nnUNetPlans-toy.json")["finetuning"]["weights"]).unlink()  # is not needed again
    resumed = same_batches(trainer(folder, resume="checkpoint_latest.pth"))
    assert resumed.step == 3
    resumed.run_training()
    assert_same(state(resumed), expected)
    assert torch.equal(resumed.templates.values, kept)


class _ByStep:
    """Batches that the number of the step decides."""

    def __init__(self, subject, channels):
        self.subject, self.channels = subject, channels

    def __next__(self):
        generator = torch.Generator().manual_seed(self.subject.step)
        return {
            "data": torch.randn(2, 2 * self.channels, 16, 16, 16, generator=generator),
            "target": [(torch.rand(2, 1, s, s, s, generator=generator) > 0.5).float() for s in (16, 8)],
            "keys": ["case_00", "case_01"],
        }


@pytest.mark.slow
def test_the_loader_goes_to_processes_that_start_anew(adapted):
    """As nnU-Net sends it where processes are not forked: dataset, templates and augmentation."""
    subject = trainer(adapted(present=LACKING))
    subject.on_train_start()
    loader = subject.dataloader_train.data_loader
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        batch = pool.apply(nnUNetDataLoader.generate_train_batch, (loader,))
        assert batch["data"].shape == (2, 8, 16, 16, 16) and torch.isfinite(batch["data"]).all()


def test_what_cannot_be_done_is_said_with_a_remedy(adapted):
    folder = adapted(carried=False)
    subject = trainer(folder)
    with pytest.raises(UserError, match="holds no templates") as error:
        subject.on_train_start()
    assert "-tr PretrainedSegmentationTrainer" in error.value.remedy
    with pytest.raises(UserError, match="names no weights"):
        trainer(folder, weights=None).on_train_start()
    with pytest.raises(UserError, match="'consistence' in the method part of the finetuning block"):
        trainer(folder, method={"consistence": 1})
    folder = adapted(array=templates(("MRA", "ADC")))
    with pytest.raises(UserError, match="templates of MRA, ADC; the dataset's channels are T1, T2, FLAIR, PD"):
        trainer(folder).on_train_start()


def test_a_channel_without_a_template_is_named_and_never_replaced(adapted):
    subject = trainer(adapted(array=templates(("T2", "PD"))))
    subject.on_train_start()
    assert "no template of T1, FLAIR, never replaced" in Path(subject.log_file).read_text()
    assert subject.mixing.known == (False, True, False, True)
    batch = next(subject.dataloader_train)
    for step in range(20):
        copies = subject.mixing.copies(batch["data"], batch["keys"], step)
        for channel in (0, 2):
            assert torch.equal(copies[:, channel], batch["data"][:, channel].repeat(2, 1, 1, 1))
