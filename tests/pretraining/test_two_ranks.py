"""Two ranks on CPU: gradients over all ranks' samples, equal weights, exact resume."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_dataset import write_fake_dataset
from pretraining_harness import assert_same, make_trainer, run
from ranks import RANKS, on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_plugin.methods.med3dinsight.trainer import Med3DInsightPretrainer
from nnssl_plugin.objectives.partial_transport import mpot_loss
from nnssl_plugin.training.distributed import gather_samples

SMALL = {
    "epochs": 2,
    "iterations_per_epoch": 3,
    "validation_iterations": 1,
    "batch_size": 2,
    "method": {"queries": 4, "dim": 16, "heads": 2, "layers": 1, "mask_block": 4},
}


class Coupled(nn.Module):
    """An encoder before the gathering and a metric after it, as in Med3DInsight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(5, 4).double()
        self.metric = nn.Parameter(torch.eye(4, dtype=torch.float64))
        self.gather = lambda outputs: outputs

    def forward(self, x, y):
        own = self.encoder(x)
        gathered = self.gather({"x": own, "y": y})
        coupled = mpot_loss(gathered["x"], gathered["y"], self.metric, mass=0.9, epsilon=0.1)
        return coupled + own.square().mean()


def pairs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * RANKS, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(2 * RANKS, 4, generator=generator, dtype=torch.float64)


def gradients_on_a_rank(rank):
    module = Coupled()
    module.gather = gather_samples
    x, y = (t[2 * rank : 2 * rank + 2] for t in pairs())
    wrapped = DistributedDataParallel(module)  # kept: its hooks average the gradients
    wrapped(x, y).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def train_toy(rank):
    trainer = make_trainer()
    trainer.run_training()
    return {"state": dict(trainer.task.state_dict()), "step": trainer.step}


def stop_toy(rank):
    """Rank 1 alone is asked to stop; both must stop, after the same step."""
    trainer = make_trainer(pretraining={"iterations_per_epoch": 12})
    trainer.interruption.requested = lambda: rank == 1 and trainer.step >= 3
    with pytest.raises(SystemExit):
        trainer.run_training()
    return trainer.step


def train_med3dinsight(rank):
    trainer = make_trainer(trainer_class=Med3DInsightPretrainer, pretraining=SMALL)
    trainer.initialize()
    seen = []
    loss = trainer.task.loss
    trainer.task.loss = lambda outputs, progress: (seen.append(len(outputs["volume"])), loss(outputs, progress))[1]
    trainer.run_training()
    cases = [trainer.dataloader_train.batches.cases_of_step(step) for step in range(6)]
    return {"state": dict(trainer.task.state_dict()), "seen": seen, "cases": cases}


@pytest.mark.slow
def test_gradients_equal_those_of_one_process_with_all_samples(tmp_path):
    module = Coupled()
    module(*pairs()).backward()
    for gradients in on_two_ranks(gradients_on_a_rank, tmp_path):
        for name, parameter in module.named_parameters():
            np.testing.assert_allclose(gradients[name], parameter.grad, rtol=1e-10, atol=1e-14, err_msg=name)


@pytest.fixture
def environment(nnunet_environment, monkeypatch):
    """The dataset is written once, before the ranks look for it."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    write_fake_dataset(channels=2)


@pytest.mark.slow
def test_med3dinsight_solves_one_transport_problem_over_both_ranks(environment, tmp_path):
    first, second = on_two_ranks(train_med3dinsight, tmp_path)
    assert_same(first["state"], second["state"])
    assert set(first["seen"]) == {2 * RANKS}
    for a, b in zip(first["cases"], second["cases"], strict=True):
        assert len({*a, *b}) == 2 * RANKS  # no case twice in one problem


@pytest.mark.slow
def test_toy_has_equal_state_on_both_ranks_and_stops_together(environment, tmp_path):
    first, second = on_two_ranks(train_toy, tmp_path)
    assert first["step"] == 20
    assert_same(first["state"], second["state"])
    assert on_two_ranks(stop_toy, tmp_path) == [10, 10]
    whole = run(pretraining={"iterations_per_epoch": 12}, resume="checkpoint_latest.pth")  # one rank can go on
    assert whole.step == 48


@pytest.mark.slow
def test_the_train_command_with_ranks_stops_with_75_goes_on_and_trains_once(nnunet_environment, tmp_path):
    write_fake_dataset(channels=1, pretraining=SMALL | {"iterations_per_epoch": 12})
    arguments = ["train", "901", "3d_fullres", "all", "-tr", "Med3DInsightPretrainer", "-device", "cpu", "--ranks", "2"]

    def train(*more):
        return subprocess.run(
            [sys.executable, "-m", "nnssl_plugin.cli.main", *arguments, *more],
            cwd=tmp_path,
            env=nnunet_environment | {"nnUNet_n_proc_DA": "0"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    stopped = train("--time-limit", "1s")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    fold = next(Path(nnunet_environment["nnUNet_results"]).glob("*/Med3DInsightPretrainer__*/fold_all"))
    checkpoint = torch.load(fold / "checkpoint_latest.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == 10  # the first step at which the ranks agree
    finished = train("--c")
    assert finished.returncode == 0, finished.stderr[-3000:]
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["ssl_state"]["step"] == 24
    assert (fold / "progress.png").is_file() and not list(fold.glob(".*"))
