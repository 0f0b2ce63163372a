"""Retrieval and probes on hand-made galleries, where every number is known."""

import csv

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from nnssl_plugin.cli.main import main
from nnssl_plugin.data.vector_store import writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json
from nnssl_plugin.tasks.retrieval.evaluation import evaluate_retrieval
from nnssl_plugin.tasks.retrieval.probe import _measured, evaluate_probe
from nnssl_plugin.tasks.retrieval.relevance import parse_rule
from nnssl_plugin.tasks.retrieval.standardisation import statistics_of


def make_index(folder, vectors, rows, parts=("mean",)):
    vectors = np.asarray(vectors, dtype=np.float32)
    with writing(folder, {"dimensions": vectors.shape[1], "encoder": {"parts": list(parts)}, "made": {}}) as store:
        store.append(vectors, [{"part": "", "image": "", **row} for row in rows])
        store.freeze(statistics_of(vectors))
    return folder


def on_a_circle(*degrees):
    angles = np.deg2rad(degrees)
    return np.stack((np.cos(angles), np.sin(angles)), 1)


@pytest.fixture
def circle(tmp_path):
    """Five images, seen from the first: its own subject, then b, then a, then b, then a without subject."""
    rows = [
        {"case": "q", "subject": "s", "kind": "a", "tags": "x;y", "size": "10"},
        {"case": "own", "subject": "s", "kind": "a", "tags": "x", "size": "10"},
        {"case": "b1", "subject": "1", "kind": "b", "tags": "z", "size": "40"},
        {"case": "a1", "subject": "2", "kind": "a", "tags": "y;x", "size": "14"},
        {"case": "b2", "subject": "3", "kind": "b", "tags": "none", "size": ""},
        {"case": "a2", "subject": "4", "kind": "a", "tags": "y", "size": "30"},
    ]
    return make_index(tmp_path / "circle", on_a_circle(0, 5, 20, 30, 40, 60), rows)


def of_query(folder, case):
    with open(folder / "queries.csv", newline="") as file:
        return {row["by"]: row for row in csv.DictReader(file) if row["case"] == case}


@pytest.mark.slow
def test_a_gallery_by_hand(circle, tmp_path):
    by = ["kind", "tags:any", "tags:exact", "size:within=1.5", "subject"]
    evaluate_retrieval({"i": circle}, tmp_path / "o", by, queries=["case=q"])
    rows = of_query(tmp_path / "o", "q")
    assert rows["kind"]["rank"] == "2" and rows["kind"]["relevant"] == "2"  # b1, a1, b2, a2
    assert float(rows["kind"]["average_precision"]) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert rows["tags:any"]["relevant"] == "2" and rows["tags:any"]["rank"] == "2"
    assert rows["tags:exact"]["relevant"] == "1" and rows["tags:exact"]["rank"] == "2"
    assert rows["size:within=1.5"]["relevant"] == "1" and rows["size:within=1.5"]["rank"] == "2"
    assert rows["subject"]["relevant"] == "1" and rows["subject"]["rank"] == "1"
    result = read_json(tmp_path / "o" / "retrieval.json")["results"]["i"]
    assert result["kind"]["metrics"]["recall@1"]["value"] == 0 and result["kind"]["metrics"]["recall@5"]["value"] == 1
    assert result["kind"]["chance"]["recall@1"] == pytest.approx(1 / 2)
    assert result["kind"]["metrics"]["map"]["interval"] == [None, None]  # one subject
    assert result["size:within=1.5"]["gallery"] == 5
    assert (tmp_path / "o" / "retrieval.png").stat().st_size > 5000


def test_queries_and_gallery_apart_and_queries_without_an_answer_counted(circle, tmp_path):
    found = evaluate_retrieval({"i": circle}, tmp_path / "o", ["kind"], gallery=["kind=b"])
    result = found.results["i"]["kind"]
    assert result["queries"] == 2 and result["without_relevant"] == 4 and result["gallery"] == 2
    with pytest.raises(UserError, match="nothing in the gallery"):
        evaluate_retrieval({"i": circle}, tmp_path / "o", ["kind"], queries=["kind=a"], gallery=["kind=b"])
    with pytest.raises(UserError, match="0 queries"):
        evaluate_retrieval({"i": circle}, tmp_path / "o", ["kind"], queries=["kind=c"])


def test_vectors_that_are_all_alike_come_out_last(tmp_path):
    rows = [{"case": f"c{n}", "subject": f"s{n}", "kind": "ab"[n % 2]} for n in range(8)]
    index = make_index(tmp_path / "same", np.ones((8, 4)), rows)
    found = evaluate_retrieval({"i": index}, tmp_path / "o", ["kind"]).results["i"]["kind"]["metrics"]
    assert found["median_rank"]["value"] == 5 and found["recall@1"]["value"] == 0


@pytest.mark.parametrize("text", ["kind:some", "kind:within=x", "kind:within=0.5", ":any", ""])
def test_rules_that_say_nothing_are_refused(text):
    with pytest.raises(UserError, match="--by"):
        parse_rule(text)


def clusters(number=60, spread=0.3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(number) // 2 % 3  # two rows per subject
    vectors = np.eye(3)[labels] * 3 + spread * rng.normal(size=(number, 3))
    rows = [{"case": f"c{n}", "subject": f"s{n // 2}", "kind": "abc"[labels[n]]} for n in range(number)]
    return vectors, rows


@pytest.mark.parametrize("parts", [("mean",), ("mean", "maximum")])
def test_probes_tell_clusters_and_noise_apart(tmp_path, parts):
    vectors, rows = clusters()
    noise = np.random.default_rng(1).normal(size=vectors.shape)
    indexes = {
        "clusters": make_index(tmp_path / "a", vectors, rows, parts),
        "noise": make_index(tmp_path / "b", noise, rows, parts),
    }
    found = evaluate_probe(indexes, "kind", output=tmp_path / "probe.json", samples=100)
    assert found == read_json(tmp_path / "probe.json") and found["folds"] == 5 and found["classes"]["a"] == 20
    for probe in ("knn", "linear"):
        good, bad = (found["results"][name][probe] for name in ("clusters", "noise"))
        assert all(good[metric]["value"] > 0.97 for metric in good)
        assert bad["accuracy"]["value"] < 0.6 and 0.25 < bad["auroc"]["value"] < 0.75
        assert bad["accuracy"]["interval"][0] <= bad["accuracy"]["value"] <= bad["accuracy"]["interval"][1]


def test_scores_are_scikit_learns():
    rng = np.random.default_rng(0)
    for classes in ("ab", "abc"):
        labels = rng.choice(list(classes), 80)
        probabilities = rng.dirichlet(np.ones(len(classes)), 80).round(1)  # ties
        found = _measured(probabilities, labels, np.ones((1, 80)))
        predicted = np.array(list(classes))[probabilities.argmax(1)]
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
        assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
        each = [roc_auc_score(labels == name, probabilities[:, k]) for k, name in enumerate(classes)]
        assert found["auroc"] == pytest.approx(each[1] if len(classes) == 2 else np.mean(each))


def test_a_subject_is_never_on_both_sides(tmp_path):
    """Each subject has a place of its own and a class at random: only its own other rows could tell it."""
    rng = np.random.default_rng(0)
    places, kinds = rng.normal(size=(30, 8)), rng.permutation(["a", "b"] * 15)
    rows = [{"case": f"c{n}", "subject": f"s{n // 4}", "kind": kinds[n // 4]} for n in range(120)]
    index = make_index(tmp_path / "i", places[np.arange(120) // 4] + 0.01 * rng.normal(size=(120, 8)), rows)
    found = evaluate_probe({"i": index}, "kind", neighbours=3, samples=10)["results"]["i"]
    assert found["knn"]["accuracy"]["value"] < 0.75


def test_targets_that_cannot_be_predicted_are_refused(tmp_path):
    vectors, rows = clusters(12)
    rows = [row | {"one": "x", "rare": "y" if n < 2 else "x"} for n, row in enumerate(rows)]
    index = make_index(tmp_path / "i", vectors, rows)
    for target in ("one", "rare"):
        with pytest.raises(UserError, match="subjects per class"):
            evaluate_probe({"i": index}, target)
    with pytest.raises(UserError, match="no column"):
        evaluate_probe({"i": index}, "age")


def test_the_commands_print_tables(circle, tmp_path, capsys):
    vectors, rows = clusters()
    index = str(make_index(tmp_path / "i", vectors, rows))
    arguments = ["evaluate", "retrieval", "--index", f"mine={index}", index, "--by", "kind", "-o", str(tmp_path / "o")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "60 queries, gallery of 60" in said and "chance" in said and said.count("1.000") >= 2
    assert main(["evaluate", "probe", "--index", index, "--target", "kind"]) == 0
    assert "linear" in capsys.readouterr().out
    assert main(["evaluate", "retrieval", "--index", index, index, "--by", "kind", "-o", str(tmp_path / "o")]) == 2
