"""Losses that stay on their own rank: no sample is sent, gradients are averaged, and state stays equal."""

import pytest
import torch
from fake_dataset import fake_plan, write_fake_dataset
from pretraining_harness import assert_same, make_trainer
from ranks import RANKS, on_two_ranks
from torch.nn.parallel import DistributedDataParallel
from toy_method import Settings
from toy_variants import OwnRankPretrainer

from nnssl_plugin.networks.backbone import Backbone
from nnssl_plugin.nnunet.plans import build_network
from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.training.distributed import gather_samples

SAMPLES = 3
"""Per rank."""
CHUNKS = {"epochs": 2, "batch_size": 3, "chunk_size": 2}


class Spread(PretextTask):
    """A loss that is no mean over samples: the variance of the features of a batch."""

    trained_parts = ("encoder",)
    gathers = False

    def encode(self, views):
        return {"pooled": self.backbone.pooled(self.backbone.features(views["image"]))}, {}

    def loss(self, outputs, progress):
        self.rows = len(outputs["pooled"])
        return {"spread": outputs["pooled"].var(0).sum()}


def spread_task():
    torch.manual_seed(0)
    dataset_json = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "body": 1}}
    return Spread(Backbone(build_network(fake_plan(), "3d_fullres", dataset_json), 1), Settings()).double()


def images(rank):
    return torch.randn(SAMPLES, 1, 8, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def gradients_of(task):
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def on_a_rank(rank):
    task = spread_task()
    task.gather = gather_samples
    wrapped = DistributedDataParallel(task, find_unused_parameters=True)
    wrapped({"image": images(rank)}, 0.0)["total"].backward()
    trained = {}
    for name, block in (("whole", {"epochs": 2}), ("chunks", CHUNKS)):
        trainer = make_trainer(trainer_class=OwnRankPretrainer, pretraining=block, fold="all")
        trainer.output_folder += f"_{name}"
        trainer.run_training()
        trained[name] = {"state": dict(trainer.task.state_dict()), "rows": trainer.task.rows}
    return {"gradients": gradients_of(task), "rows": task.rows, **trained}


@pytest.fixture(autouse=True)
def quiet(nnunet_environment, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


@pytest.mark.slow
def test_two_ranks_solve_a_problem_each_and_learn_from_the_mean_of_both(tmp_path):
    write_fake_dataset(channels=2)
    task = spread_task()
    losses = [task({"image": images(rank)}, 0.0)["total"] for rank in range(RANKS)]
    (sum(losses) / RANKS).backward()
    expected = gradients_of(task)
    ranks = on_two_ranks(on_a_rank, tmp_path)
    for found in ranks:
        assert found["rows"] == SAMPLES and found["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-9, atol=1e-12)
    for name, rows in (("whole", 2), ("chunks", 3)):
        assert ranks[0][name]["rows"] == rows
        assert_same(ranks[0][name]["state"], ranks[1][name]["state"])  # the queue, too
