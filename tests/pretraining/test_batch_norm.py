"""Networks with batch normalisation: statistics survive skipped steps, resume exactly and are equal on two ranks."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from method_checks import assert_resumes_exactly
from pretraining_harness import assert_same, make_trainer, run
from ranks import on_two_ranks
from torch import nn
from toy_method import ToyPretrainer

from nnssl_plugin.errors import UserError
from nnssl_plugin.pretraining.batch_norm import RunningStatistics, check_batch_norm
from nnssl_plugin.pretraining.settings import TrainingSettings
from nnssl_plugin.training.distributed import wrapping_for

ONE_EPOCH = {"epochs": 1, "iterations_per_epoch": 3, "validation_iterations": 1}


@pytest.fixture(autouse=True)
def in_process(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures"):
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments: None)


def statistics(trainer):
    """Running means, variances and counters of the encoders of student and teacher."""
    named = [(name, value) for name, value in trainer.task.state_dict().items() if ".encoder." in name]
    kept = {name: value.clone() for name, value in named if "running_" in name or "num_batches" in name}
    assert any("backbone.network" in name for name in kept) and any("teacher" in name for name in kept)
    return kept


def watch(trainer):
    """Statistics before the first and after every step."""
    trainer.initialize()
    seen, step = [statistics(trainer)], trainer.train_step
    trainer.train_step = lambda batch: (step(batch), seen.append(statistics(trainer)))[0]
    return seen


@pytest.mark.parametrize(("residual", "dimensions"), [(True, 3), (False, 2)])
def test_it_resumes_exactly(residual, dimensions):
    assert_resumes_exactly(ToyPretrainer, batch_norm=True, residual=residual, dimensions=dimensions)


def test_steps_move_the_statistics_as_pytorch_does():
    trainer = make_trainer(batch_norm=True, pretraining=ONE_EPOCH)
    seen = watch(trainer)
    norm = next(m for m in trainer.task.backbone.network.modules() if isinstance(m, nn.BatchNorm3d))
    inputs = []
    norm.register_forward_hook(lambda module, given, _: inputs.append(given[0].detach()) if module.training else None)
    trainer.run_training()
    mean = torch.zeros(norm.num_features)
    for x in inputs:
        mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3, 4))
    assert len(inputs) == 3 and norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, mean)
    assert not torch.equal(seen[0].popitem()[1], seen[1].popitem()[1])


@pytest.mark.parametrize("broken", [0, 1])
def test_a_skipped_step_leaves_every_statistic_bit_equal(broken):
    trainer = make_trainer(
        batch_norm=True, pretraining=ONE_EPOCH | {"method": {"break_from": broken, "break_until": broken + 1}}
    )
    seen = watch(trainer)
    trainer.run_training()
    assert trainer.log.history()["skipped_steps"] == [1]
    for number, (before, after) in enumerate(pairwise(seen)):
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert (same == list(before)) if number == broken else not same, number


def test_a_batch_with_nan_leaves_no_trace():
    trainer = make_trainer(batch_norm=True, pretraining=ONE_EPOCH)
    seen, views = watch(trainer), trainer._views

    def poisoned(batch, purpose, step):
        made = views(batch, purpose, step)
        return made | {"student": made["student"] * torch.nan} if (purpose, step) == (0, 1) else made

    trainer._views = poisoned
    trainer.run_training()
    assert trainer.log.history()["skipped_steps"] == [1]
    assert_same(seen[1], seen[2])
    assert all(torch.isfinite(value).all() for value in seen[3].values())
    assert np.isfinite(trainer.log.history()["val_losses"]).all()


def test_a_single_sample_per_step_trains():
    trainer = run(batch_norm=True, pretraining=ONE_EPOCH | {"batch_size": 1})
    assert np.isfinite(trainer.log.history()["train_losses"]).all()


@pytest.mark.parametrize("chunk", [1, 8])
def test_chunks_are_refused_in_words(chunk):
    with pytest.raises(UserError, match="PlainConvUNet has batch normalisation, and with chunk_size") as error:
        make_trainer(batch_norm=True, pretraining={"chunk_size": chunk}).initialize()
    assert "chunk_size=null" in error.value.remedy
    make_trainer(pretraining={"chunk_size": chunk}).initialize()


def test_synchronised_layers_are_for_several_ranks_on_cuda():
    trainer = make_trainer(batch_norm=True, pretraining={"batch_norm": "synchronised"})
    trainer.initialize()  # one rank has nothing to synchronise
    check_batch_norm(trainer.task, trainer.training_settings, device=torch.device("cuda"), several_ranks=True)
    without = make_trainer(pretraining={"batch_norm": "synchronised"})
    without.initialize()
    for task, said in ((trainer.task, pytest.raises(UserError, match="CUDA alone")), (without.task, nullcontext())):
        with said:
            check_batch_norm(task, trainer.training_settings, device=torch.device("cpu"), several_ranks=True)


@pytest.mark.parametrize("synchronised", [True, False])
def test_nnunets_synchronised_layers_come_where_they_are_wanted_and_share_the_statistics(synchronised):
    trainer = make_trainer(batch_norm=True)
    trainer.initialize()
    task = trainer.task
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with wrapping_for(torch.device("cuda", 0), synchronised=synchronised):
        assert nn.SyncBatchNorm.convert_sync_batchnorm(task) is task
    layers = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert layers and {isinstance(m, nn.SyncBatchNorm) for m in layers} == {synchronised}
    assert_same(before, dict(task.state_dict()))
    kept = RunningStatistics(task)
    kept.remember()
    next(m for m in layers if m.training).running_mean.fill_(7)
    kept.settle(torch.tensor(False))
    assert_same(before, dict(task.state_dict()))
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(2)), nn.SyncBatchNorm)


def test_a_task_without_such_layers_has_nothing_to_keep():
    kept = RunningStatistics(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))
    kept.remember()
    kept.settle(torch.tensor(False))
    assert TrainingSettings().batch_norm == "averaged"


def train_on_a_rank(rank):
    """Statistics after a step that one rank's batch breaks for both, and after the next."""
    trainer = make_trainer(batch_norm=True, pretraining=ONE_EPOCH)
    seen, views = watch(trainer), trainer._views
    own = []

    def poisoned(batch, purpose, step):
        made = views(batch, purpose, step)
        return made | {"student": made["student"] * torch.nan} if (purpose, step, rank) == (0, 1, 1) else made

    trainer._views = poisoned
    settle = trainer.running_statistics.settle
    trainer.running_statistics.settle = lambda applied: (own.append(statistics(trainer)), settle(applied))
    trainer.run_training()
    return {"seen": seen, "own": own, "state": dict(trainer.task.state_dict())}


@pytest.mark.slow
def test_ranks_have_the_mean_of_their_statistics(nnunet_environment, tmp_path):
    write_fake_dataset(channels=2, batch_norm=True)
    first, second = on_two_ranks(train_on_a_rank, tmp_path)
    assert_same(first["seen"], second["seen"])
    assert_same(first["state"], second["state"])
    assert_same(first["seen"][1], first["seen"][2])  # rank 1's NaN
    for step in (0, 2):
        for name, value in first["seen"][step + 1].items():
            a, b = first["own"][step][name], second["own"][step][name]
            expected = (a + b) / 2 if value.is_floating_point() else a
            torch.testing.assert_close(value, expected)
    assert any(not torch.equal(value, second["own"][0][name]) for name, value in first["own"][0].items())
