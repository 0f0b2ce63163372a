"""A loss that counts for some samples only: the mean over those that count, in chunks and on two ranks alike."""

from contextlib import nullcontext

import pytest
import torch
from ranks import RANKS, on_two_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnssl_plugin.pretraining.pretext import PretextTask
from nnssl_plugin.pretraining.virtual_batch import backward_in_chunks
from nnssl_plugin.training.distributed import gather_samples


class Partial(PretextTask):
    """The recipe of the contract's page, without a network."""

    def __init__(self):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4).double()
        self.gather = lambda outputs: outputs

    def encode(self, views):
        return {"distance": self.layer(views["x"]).square().sum(1), "counts": views["counts"]}, {}

    def loss(self, outputs, progress):
        counts = outputs["counts"]
        return {"distance": torch.where(counts, outputs["distance"], 0.0).sum() / counts.sum().clamp(min=1)}


COUNTS = {"uneven": [1, 0, 0, 0, 1, 1], "one": [0, 0, 0, 0, 0, 1], "none": [0] * 6}


def views_of(kind):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"x": x, "counts": torch.tensor(COUNTS[kind], dtype=torch.bool)}


def expected(kind):
    """Naive: the mean over the samples that count, and its gradient."""
    task, views = Partial(), views_of(kind)
    values = [task.layer(x).square().sum() for x, counts in zip(views["x"], views["counts"], strict=True) if counts]
    mean = sum(values) / max(len(values), 1) if values else task.layer.weight.sum() * 0
    mean.backward()
    gradient = task.layer.weight.grad
    return mean.detach(), gradient


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_it_is_the_mean_over_the_samples_that_count(kind, chunk):
    task, views = Partial(), views_of(kind)
    if chunk is None:
        terms = task(views, 0.0)
        terms["total"].backward()
    else:
        terms = backward_in_chunks(
            task, views, 0.0, chunk_size=chunk, seed=0, precision=nullcontext, scale=lambda total: total
        )
    value, gradient = expected(kind)
    torch.testing.assert_close(terms["distance"].detach(), value)
    torch.testing.assert_close(task.layer.weight.grad, gradient)


def on_a_rank(rank):
    results = []
    for kind in COUNTS:
        task = Partial()
        task.gather = gather_samples
        own = {name: view[3 * rank : 3 * rank + 3] for name, view in views_of(kind).items()}
        wrapped = DistributedDataParallel(task)  # kept: its hooks average the gradients
        terms = wrapped(own, 0.0)
        terms["total"].backward()
        results.append((terms["distance"].detach(), task.layer.weight.grad))
    return results


@pytest.mark.slow
def test_ranks_of_which_one_has_fewer_that_count_have_the_same_mean(tmp_path):
    ranks = on_two_ranks(on_a_rank, tmp_path)
    assert len(ranks) == RANKS
    for results in ranks:
        for kind, (value, gradient) in zip(COUNTS, results, strict=True):
            torch.testing.assert_close((value, gradient), expected(kind))
