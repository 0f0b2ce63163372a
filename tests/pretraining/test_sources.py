"""Several datasets in one pretraining: which one a step draws from, and that nothing else changes for it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from fake_dataset import NAME, write_fake_dataset
from pretraining_harness import assert_same, make_trainer, run, state_of
from ranks import on_two_ranks
from toy_method import ToyPretrainer
from toy_variants import SLICES, SOURCES, MixedPretrainer, write_slices

from nnssl_plugin.checkpoints.format.files import read_checkpoint
from nnssl_plugin.checkpoints.sharing.export import export_checkpoint
from nnssl_plugin.checkpoints.sources.inspection import inspect_file, screen
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.pretraining.sources import sources_of_steps

VOLUMES = NAME
BLOCK = {"epochs": 2, "iterations_per_epoch": 6, "validation_iterations": 1, "sources": SOURCES}


@pytest.fixture(autouse=True)
def datasets(nnunet_environment, monkeypatch, request):
    """Volumes of two channels, and other images of one channel whose plan is 2D, with other spacing and patch."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in ("draw_progress", "draw_pictures") if "draws" not in request.node.name else ():
        monkeypatch.setattr(f"nnssl_plugin.pretraining.pretrainer.{name}", lambda *arguments, **named: None)
    write_fake_dataset(channels=2)
    plan = write_slices()
    plan["configurations"]["2d"] |= {"patch_size": [20, 24], "spacing": [0.5, 0.5]}
    write_json(folder_of(SLICES) / "nnUNetPlans.json", plan)
    described = read_json(folder_of(SLICES) / "dataset.json") | {"licence": "CC-BY-4.0"}
    write_json(folder_of(SLICES) / "dataset.json", described)


def folder_of(name):
    return Path(os.environ["nnUNet_preprocessed"], name)


def test_steps_share_the_sources_by_their_weights_in_every_stretch():
    order = sources_of_steps([1, 2, 5], seed=3, steps=4000)
    for first in range(0, 3900, 97):
        shares = np.bincount(order[first : first + 80], minlength=3) / 80
        np.testing.assert_allclose(shares, [1 / 8, 2 / 8, 5 / 8], atol=0.05)
    assert np.array_equal(order[:100], sources_of_steps([1, 2, 5], seed=3, steps=100))  # of (seed, step) alone
    assert not np.array_equal(order, sources_of_steps([1, 2, 5], seed=4, steps=4000))
    assert set(sources_of_steps([0.3], seed=0, steps=50)) == {0}


def test_batches_differ_in_shape_and_a_short_source_cycles():
    trainer = make_trainer(trainer_class=MixedPretrainer, pretraining=BLOCK | {"epochs": 6})
    trainer.initialize()
    train, validation = trainer.get_dataloaders()
    shapes = {"volume": (2, 2, 16, 16, 16), "slice": (3, 1, 20, 24)}
    drawn = {"volume": [], "slice": []}
    for _ in range(36):
        batch = next(train)
        assert batch["image"].shape == shapes[batch["kind"]]
        drawn[batch["kind"]] += batch["cases"]
    assert len(drawn["slice"]) / 3 == pytest.approx(24, abs=1)  # twice as many steps
    for kind, cases in (("volume", 6), ("slice", 4)):
        names = drawn[kind]
        assert len(set(names)) == cases
        assert max(map(names.count, names)) - min(map(names.count, names)) <= len(names) // cases  # in passes
    assert [next(validation)["kind"] for _ in range(4)] == ["volume", "slice"] * 2


def test_the_means_of_the_half_epoch_before_a_stop_are_kept_for_each_kind():
    reference = run(trainer_class=MixedPretrainer, pretraining=BLOCK)
    trainer = make_trainer(trainer_class=MixedPretrainer, pretraining=BLOCK)
    trainer.interruption.requested = lambda: trainer.step == 4
    with pytest.raises(SystemExit):
        trainer.run_training()
    resumed = make_trainer(trainer_class=MixedPretrainer, pretraining=BLOCK, resume="checkpoint_latest.pth")
    resumed.run_training()
    assert_same(state_of(reference), state_of(resumed))
    for name in ("train_losses", "train/contrast/slice", "train/total/volume", "val/size/slice"):
        found, expected = (each.log.history()[name] for each in (resumed, reference))
        assert len(found) == 2 and np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_numbers_are_told_for_each_kind_and_the_total_for_all():
    trainer = make_trainer(trainer_class=MixedPretrainer, pretraining=BLOCK | {"epochs": 1})
    add, terms = trainer.sums.add, []
    trainer.sums.add = lambda values, *rest: (
        terms.append((values["contrast"].item(), values["total"].item(), rest[1])),
        add(values, *rest),
    )[1]
    trainer.run_training()
    history = trainer.log.history()
    for kind in ("volume", "slice"):
        expected = np.mean([contrast for contrast, _, of in terms if of == kind])
        assert history[f"train/contrast/{kind}"][0] == pytest.approx(expected, rel=1e-5)
        assert f"val/contrast/{kind}" in history and f"diagnostics/queue_norm/{kind}" in history
    assert history["train_losses"][0] == pytest.approx(np.mean([total for _, total, _ in terms]), rel=1e-5)
    assert "train/contrast" not in history


@pytest.mark.slow
def test_it_draws_each_kind():
    trainer = run(trainer_class=MixedPretrainer, pretraining=BLOCK | {"epochs": 2})
    folder = Path(trainer.output_folder)
    assert sorted(p.name for p in (folder / "figures").iterdir()) == [
        "toy_slice_epoch_0001.png",
        "toy_volume_epoch_0001.png",
    ]
    assert (folder / "progress.png").stat().st_size > 10_000


def test_provenance_inspect_and_the_model_card_name_every_dataset(tmp_path):
    trainer = run(trainer_class=MixedPretrainer, pretraining=BLOCK | {"epochs": 1})
    path = Path(trainer.output_folder, "checkpoint_final.pth")
    provenance = read_checkpoint(path)["provenance"]
    assert provenance["licence"] == ["not stated", "CC-BY-4.0"]
    first, second = provenance["data"]
    assert (first["dataset"], first["cases"], first["kind"]) == (VOLUMES, 6, "volume")
    assert second["spacing_mm"] == [0.5, 0.5] and second["patch_size"] == [20, 24] and second["weight"] == 2
    assert second["configuration"] == "2d" and second["channels"] == ["MR"]
    said = " ".join(screen(inspect_file(path)).split())
    assert f"{VOLUMES}, 6 cases; {SLICES}, 4 cases" in said and "not stated, CC-BY-4.0" in said
    export_checkpoint(path, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    assert "pretrained without labels on 10 cases" in card and f"{SLICES}: 4 cases, channels MR" in card


def test_a_single_source_is_the_same_as_the_dataset_alone():
    """Also with a kind: one dataset needs no numbers of its own."""
    alone = run(pretraining={"epochs": 1})
    named = run(pretraining={"epochs": 1, "sources": [{"dataset": "901", "kind": "brain"}]})
    assert_same(state_of(alone), state_of(named))
    assert set(alone.log.history()) == set(named.log.history())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "903"}, "no dataset 903"),
        ({"plans": "other"}, "no plan .*other"),
        ({"configuration": "3d_fullres"}, "no configuration 3d_fullres"),
        ({"fold": 7}, "has no fold 7"),
        ({}, "is 2D with 1 channel.* reads 3D with 2 channel"),
        (
            {"dataset": "901", "configuration": "3d_fullres", "plans": "odd"},
            r"patch \[16, 18, 16\].*multiples of \[4, 4, 4\]",
        ),
        ({"kind": "a/b"}, "kind 'a/b'"),
        ({"weight": 0}, "'sources'.*each entry a block of dataset, plans, configuration, kind"),
        ({"wieght": 2}, "'sources'"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused_in_words(change, said):
    plan = read_json(folder_of(VOLUMES) / "nnUNetPlans.json")
    plan["configurations"]["3d_fullres"]["patch_size"] = [16, 18, 16]
    write_json(folder_of(VOLUMES) / "odd.json", plan | {"plans_name": "odd"})
    kind = MixedPretrainer if "fold" in change else ToyPretrainer
    with pytest.raises(UserError, match=said) as error:
        make_trainer(
            trainer_class=kind, pretraining=BLOCK | {"sources": [SOURCES[0], SOURCES[1] | change]}
        ).run_training()
    assert error.value.remedy


def test_the_plan_command_writes_and_checks_them(capsys):
    text = json.dumps(SOURCES)
    assert main(["plan", "-d", "901", "-n", "both", "--set", f"sources={text}", "epochs=2"]) == 0
    assert read_json(folder_of(VOLUMES) / "both.json")["pretraining"]["sources"] == SOURCES
    assert main(["plan", "-d", "901", "-n", "bad", "--set", 'sources=[{"kind":"x"}]']) == 2
    assert "a block of dataset, plans" in capsys.readouterr().err


def train_mixed(rank):
    trainer = make_trainer(trainer_class=MixedPretrainer, pretraining=BLOCK)
    trainer.run_training()
    return {"state": dict(trainer.task.state_dict()), "seen": [kind for kind, _ in trainer.task.seen]}


@pytest.mark.slow
def test_two_ranks_see_one_kind_per_step_and_keep_the_same_state(tmp_path):
    first, second = on_two_ranks(train_mixed, tmp_path)
    assert first["seen"] == second["seen"] and set(first["seen"]) == {"volume", "slice"}
    assert_same(first["state"], second["state"])


@pytest.mark.slow
def test_workers_give_the_same_weights(monkeypatch):
    reference = state_of(run(trainer_class=MixedPretrainer, pretraining=BLOCK))
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    assert_same(reference, state_of(run(trainer_class=MixedPretrainer, pretraining=BLOCK)))
