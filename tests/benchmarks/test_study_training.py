"""What the runs of a study share, and the generated anatomy."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnssl_plugin.quickstart.phantoms import phantom

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
study_training, phantom_data = (__import__(name) for name in ("study_training", "phantom_data"))


class Loader:
    """Batches as nnU-Net's loader gives them, from all three global sources of randomness."""

    def __next__(self):
        import random

        data = torch.rand(2, 1, 3, 3, 3) + np.random.rand() + random.random()
        return {"data": data, "target": [data > 1.5, data[:, :, ::2] > 1.5], "keys": ["a", "b"]}


def taken(kept, number):
    return [next(kept) for _ in range(number)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_run_of_a_fold_reads_the_same_batches(workers):
    kept = study_training.Kept(Loader(), seed=3, workers=workers)
    first = taken(kept, 3)
    kept.place = 0
    again = taken(kept, 5)  # longer than the run before it
    assert all(one["data"] is other["data"] for one, other in zip(first, again[:3], strict=True))
    assert len({float(batch["data"].sum()) for batch in again}) == 5
    other = taken(study_training.Kept(Loader(), seed=3, workers=workers), 5)
    assert all(torch.equal(one["data"], two["data"]) for one, two in zip(again, other, strict=True))
    assert all(torch.equal(one["target"][1], two["target"][1]) for one, two in zip(again, other, strict=True))
    another = taken(study_training.Kept(Loader(), seed=4, workers=workers), 1)
    assert not torch.equal(another[0]["data"], again[0]["data"])


def test_norms_of_the_encoder_are_noted_every_few_of_the_first_steps():
    network = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 1)})
    network.encoder = torch.nn.Linear(2, 3)
    network["head"](network.encoder(torch.ones(4, 2))).sum().backward()
    weights, gradients = ([getattr(p, name) for p in network.encoder.parameters()] for name in ("data", "grad"))
    trainer = SimpleNamespace(network=network, step=0, first_steps=[])
    for trainer.step in range(130):
        study_training.StudyTrainer._look_at_encoder(trainer)
    assert [found["step"] for found in trainer.first_steps] == list(range(0, 100, 10))
    for key, of in (("weights", weights), ("gradients", gradients)):
        expected = float(torch.cat([each.flatten() for each in of]).norm())
        assert trainer.first_steps[3][key] == pytest.approx(expected)
    network.encoder.zero_grad(set_to_none=True)  # a frozen encoder keeps its weights and has no gradient
    trainer.step, trainer.first_steps = 0, []
    study_training.StudyTrainer._look_at_encoder(trainer)
    norm = float(torch.cat([each.flatten() for each in weights]).norm())
    assert trainer.first_steps == [{"step": 0, "weights": pytest.approx(norm), "gradients": 0.0}]


def test_generated_anatomy_holds_every_named_structure():
    settings = {"shape": phantom_data.SHAPE, "spacing_mm": phantom_data.SPACING}
    _, labels = phantom(np.random.default_rng(0), organs=phantom_data.organs(), **settings)
    counts = np.bincount(labels.ravel(), minlength=9)
    assert len(counts) == 1 + len(phantom_data.NAMES) and counts.min() > 0 and counts[1:].max() < 0.1 * labels.size
