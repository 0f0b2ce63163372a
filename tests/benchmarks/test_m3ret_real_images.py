"""The measures of the study of M3Ret on real images."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl_plugin.diagnostics.separation import cosine_gap

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
from m3ret_real_images import PICTURES, SHUFFLES, VOLUMES, separation, shuffled


def test_the_gap_is_that_of_all_pairs_and_an_order_that_is_right_has_an_area_of_one():
    vectors = np.random.default_rng(0).normal(size=(12, 5))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    labels, subjects = np.arange(12) % 3, np.arange(12) // 2
    found = separation(unit @ unit.T, labels, np.ones((12, 12), dtype=bool), subjects)
    assert found["gap"] == pytest.approx(cosine_gap(torch.tensor(vectors), torch.tensor(labels)).item(), abs=1e-6)
    assert found["interval"][0] < found["gap"] < found["interval"][1]
    apart = separation((labels[:, None] == labels).astype(float), labels, np.ones((12, 12), dtype=bool), subjects)
    assert apart["gap"] == pytest.approx(1) and apart["auroc"] == 1


def test_only_pairs_that_count_are_compared():
    cosines = np.random.default_rng(0).uniform(-1, 1, (6, 6))
    cosines = (cosines + cosines.T) / 2
    labels, among = np.array([0, 0, 1, 1, 2, 2]), np.arange(6)[:, None] % 2 != np.arange(6) % 2
    same, other = [], []
    for one in range(6):
        for two in range(6):
            if one != two and among[one, two]:
                (same if labels[one] == labels[two] else other).append(cosines[one, two])
    found = separation(cosines, labels, among, labels)
    assert found["gap"] == pytest.approx(np.mean(same) - np.mean(other))


@pytest.mark.parametrize(("dataset", "target"), [(VOLUMES, "modality"), (PICTURES, "diagnosis")])
def test_shuffled_labels_are_the_labels_of_others(dataset, target, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    (tmp_path / dataset).mkdir()
    rows = [(f"case_{number}", f"subject_{number // 3}", "abc"[number % 3]) for number in range(30)]
    with (tmp_path / dataset / "classification.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case", "subject", target), *rows])
    with shuffled(dataset, tmp_path / "shuffled.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["case"] for row in table] == [case for case, _, _ in rows]
    for number in range(SHUFFLES):
        column = [row[f"shuffled_{number}"] for row in table]
        assert sorted(column) == sorted(label for *_, label in rows) and column != [label for *_, label in rows]
        of_subjects = [sorted(column[start : start + 3]) for start in range(0, 30, 3)]
        assert (of_subjects == [["a", "b", "c"]] * 10) == (dataset == VOLUMES)
