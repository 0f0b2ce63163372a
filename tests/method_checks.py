"""Checks that every pretraining method must pass, to be called from its tests: naive loop, constant input, resume."""

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from pretraining_harness import assert_same, make_trainer, run, state_of
from torch import Tensor

from nnssl_plugin.pretraining.pretext import PretextTask

TWO_EPOCHS = {"epochs": 2, "iterations_per_epoch": 2, "validation_iterations": 1}


def assert_equals_naive_loop(
    function: Callable[..., Tensor],
    naive: Callable[..., Tensor],
    draw: Callable[[torch.Generator], Iterable[Tensor]],
    *,
    seeds: Iterable[int] = range(3),
) -> None:
    """The value of a vectorised function, and its gradients, are those of a loop beside the paper's equation.

    Args:
        function: what the package computes.
        naive: the same, written as loops over samples, tokens or voxels.
        draw: generator → the arguments of both, floating-point ones in float64.
        seeds: one random input for each.
    """
    for seed in seeds:
        drawn = list(draw(torch.Generator().manual_seed(seed)))
        assert all(x.dtype == torch.float64 for x in drawn if x.is_floating_point()), "draw in float64"
        results = []
        for each in (function, naive):
            inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in drawn]
            value = each(*inputs)
            value.sum().backward()
            results.append((value.detach(), [x.grad for x in inputs]))
        torch.testing.assert_close(*results)


def assert_views_have_a_row_per_sample(task: PretextTask, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Every view has B rows: a virtual batch cuts all of them into chunks of samples. Returns the views."""
    views = task.views(batch, torch.Generator().manual_seed(0))
    assert {name: len(view) for name, view in views.items()} == dict.fromkeys(views, len(batch["image"]))
    assert not any(view.requires_grad for view in views.values())
    return views


def assert_constant_input_is_harmless(task: PretextTask, batch: dict[str, Any], *, value: float = 0.0) -> None:
    """Where every voxel of every sample is ``value``, all terms and gradients are finite.

    Such windows are drawn from the air around the body; norms, standard deviations and cosines divide by 0 there.
    """
    views = assert_views_have_a_row_per_sample(task, batch | {"image": torch.full_like(batch["image"], value)})
    terms = task(views, 0.5)
    assert [name for name, term in terms.items() if not torch.isfinite(term)] == []
    terms["total"].backward()
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    assert gradients and [name for name, g in gradients.items() if not torch.isfinite(g).all()] == []


def assert_resumes_exactly(trainer_class: type, *, stop_after: int = 3, **arguments) -> None:
    """A run that a signal stops in the middle of an epoch and that goes on ends with the same numbers, bit for bit.

    Weights, the method's own state (teacher, queue, counters) and the optimiser's are compared. What is a plain
    attribute of the task and no buffer is lost at the stop: then this fails.

    Args:
        trainer_class: the method's trainer.
        stop_after: steps before the stop; not a multiple of the steps of an epoch.
        arguments: of ``pretraining_harness.make_trainer``; ``pretraining`` holds the settings.
    """
    arguments["pretraining"] = TWO_EPOCHS | arguments.get("pretraining", {})
    reference = state_of(run(trainer_class=trainer_class, **arguments))
    trainer = make_trainer(trainer_class=trainer_class, **arguments)
    step = trainer.train_step

    def stopping(batch):
        if trainer.step == stop_after - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.train_step = stopping
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert trainer.step == stop_after
    resumed = make_trainer(trainer_class=trainer_class, resume="checkpoint_latest.pth", **arguments)
    assert resumed.step == stop_after
    resumed.run_training()
    assert_same(reference, state_of(resumed))
