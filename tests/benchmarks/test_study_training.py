"""What the runs of a study share, and how a classification bed and the picture of all beds sum up."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from nnssl_plugin.io.files import write_json
from nnssl_plugin.quickstart.phantoms import phantom

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
study_training, classification_bed, forest_plot, phantom_data = (
    __import__(name) for name in ("study_training", "classification_bed", "forest_plot", "phantom_data")
)


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


def bed_runs(folder, arms=("MAE", "scratch"), seeds=(0, 1, 2)):
    rng = np.random.default_rng(0)
    truth = {f"val_{i}": bool(i % 3 == 0) for i in range(30)}
    made = {}
    for arm in arms:
        for seed in seeds:
            score = {
                case: float(rng.normal() + (0.8 if arm == "MAE" else 0.2) * positive)
                for case, positive in truth.items()
            }
            auroc = float(roc_auc_score(list(truth.values()), list(score.values())))
            made[arm, seed] = auroc
            run = {"arm": arm, "seed": seed, "fraction": 0.05, "lr": 1e-3, "score": score, "truth": truth}
            write_json(folder / f"{arm}{seed}.json", run | {"auroc": auroc, "curve": [0.5] * 9 + [auroc], "seconds": 1})
    return made


def test_a_classification_bed_pairs_seeds_and_cases(tmp_path):
    made = bed_runs(tmp_path)
    found = classification_bed.summarise(tmp_path, [0.05, 1.0])
    mae = next(row for row in found["rows"] if row["arm"] == "MAE")
    expected = np.mean([made["MAE", seed] - made["scratch", seed] for seed in (0, 1, 2)])
    difference = mae["difference_to_scratch"]
    assert difference["mean"] == pytest.approx(expected) and difference["low"] < expected < difference["high"]
    assert (mae["labelled_cases"], mae["seeds"]) == (50, 3) and {row["arm"] for row in found["rows"]} == {
        "MAE",
        "scratch",
    }
    (twin,) = found["calibration"]
    gains = [made["scratch", seed] - 0.5 for seed in (0, 1, 2)]
    assert twin["gain_in_last_fifth"] == pytest.approx(np.mean(gains))
    assert twin["converged"] is bool(np.mean(gains) < np.std(gains, ddof=1) / 3)


def test_the_picture_of_all_beds_has_a_line_for_each_difference(tmp_path):
    bed_runs(tmp_path / "runs")
    write_json(tmp_path / "adrenal.json", classification_bed.summarise(tmp_path / "runs", [0.05]))
    ((title, arm, difference),) = forest_plot.lines_of(tmp_path)
    assert "50 labels" in title and "AUROC" in title and arm == "MAE" and difference["low"] is not None
    forest_plot.draw([(title, arm, difference)] * 3, tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000


def test_generated_anatomy_holds_every_named_structure():
    settings = {"shape": phantom_data.SHAPE, "spacing_mm": phantom_data.SPACING}
    _, labels = phantom(np.random.default_rng(0), organs=phantom_data.organs(), **settings)
    counts = np.bincount(labels.ravel(), minlength=9)
    assert len(counts) == 1 + len(phantom_data.NAMES) and counts.min() > 0 and counts[1:].max() < 0.1 * labels.size
