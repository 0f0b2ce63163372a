"""The label-efficiency study: which cases it takes, which commands it runs and resumes, and its statistics."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json, write_json
from nnssl_plugin.quickstart.phantoms import write_phantoms

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts, not a package
study_figures, study_file, study_page, study_prediction, study_results, study_runner, study_steps = (
    __import__(f"study_{name}") for name in ("figures", "file", "page", "prediction", "results", "runner", "steps")
)

OF_FROZEN_FEATURES = "frozen-"
"""How the names of studies begin that another script reads."""
STUDIES = [p for p in sorted((BENCHMARKS / "studies").glob("*.json")) if not p.name.startswith(OF_FROZEN_FEATURES)]
STUDY = {
    "name": "small",
    "question": "Does it run?",
    "data": {
        "title": "phantoms",
        "licence": "none",
        "label_kind": "phantom",
        "images": "images",
        "labels": "labels",
        "label_names": ["first", "second"],
    },
    "cases": {"unlabelled": 12, "pool": 4, "evaluation": 2},
    "fractions": [1.0, 0.5],
    "seeds": [0, 3],
    "captions": {"captioner": "template"},
    "plan": {"configurations.3d_fullres.batch_size": 2},
    "pretrainings": {"med3d": {"trainer": "Med3DInsightPretrainer", "edits": {"epochs": 1}}},
    "finetuning": {"epochs": 2},
    "arms": [{"name": "pretrained", "pretraining": "med3d"}, {"name": "scratch", "pretraining": None}],
}


def read(tmp_path, **changes):
    write_json(tmp_path / "study.json", STUDY | changes)
    return study_file.read_study(tmp_path / "study.json")


@pytest.fixture
def data(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "data" / folder / f"case_{number:02d}.nii.gz").touch()
    return tmp_path / "data"


def test_evaluation_cases_are_never_trained_on(tmp_path, data):
    study = read(tmp_path)
    chosen = study_file.choose_cases(study, data)
    assert (len(chosen.unlabelled), len(chosen.pool), len(chosen.evaluation)) == (12, 4, 2)
    assert not set(chosen.evaluation) & {*chosen.unlabelled, *chosen.pool}
    assert set(chosen.pool) <= set(chosen.unlabelled)
    for fold in study_file.split_folds(study, chosen):
        assert fold["val"] == list(chosen.evaluation)
        assert set(fold["train"]) <= set(chosen.pool)


def test_folds_grow_with_the_fraction_and_differ_by_seed(tmp_path, data):
    study = read(tmp_path, cases={"unlabelled": 16, "pool": 10, "evaluation": 2})
    folds = study_file.split_folds(study, study_file.choose_cases(study, data))
    assert study.folds == [(0, 0.5), (0, 1.0), (3, 0.5), (3, 1.0)]
    assert [len(fold["train"]) for fold in folds] == [5, 10, 5, 10]
    assert set(folds[0]["train"]) < set(folds[1]["train"]) and folds[0]["train"] != folds[2]["train"]


def test_a_study_that_needs_more_cases_than_there_are_is_refused(tmp_path, data):
    study = read(tmp_path, cases={"unlabelled": 19, "pool": 4, "evaluation": 2})
    with pytest.raises(UserError, match="hold 20 cases"):
        study_file.choose_cases(study, data)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epochs": 3}, "unknown key 'epochs'"),
        ({"cases": {"unlabelled": 4, "pool": 2}}, "no 'evaluation'"),
        ({"arms": [{"name": "a", "pretraining": "med3d"}]}, "no arm is from scratch"),
        ({"arms": [{"name": "a", "pretraining": "other"}, {"name": "b", "pretraining": None}]}, "'other'"),
        ({"arms": [{"name": "a__b", "pretraining": None}]}, "'a__b'"),
        ({"fractions": [0.0]}, "fractions"),
        ({"cases": {"unlabelled": 4, "pool": 5, "evaluation": 1}}, "pool <= unlabelled"),
        ({"plan": {"epochs": 3}}, "keys of plan"),
        ({"finetuning": {"seed": 3}}, "seed"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"data": []}, "not a block"),
        ({"data": STUDY["data"] | {"images": "{case}/{case}.nii.gz"}}, "pattern"),
        ({"data": STUDY["data"] | {"labels": "{case}/mask.nrrd"}}, "pattern"),
        ({"separation": {"patch": 4}}, "unknown key 'patch'"),
        ({"clip": {}, "captions": None}, "clip needs captions"),
        ({"clip": {"device": "cuda"}}, "clip may hold"),
        ({"shift": {"gamma": 1.5}}, "no 'coarser'"),
        ({"recipes": {"a": {}, "b": {}}}, "tuning cases"),
        ({"recipes": {"a": {"seed": 3}}}, "seed"),
        ({"pretrainings": STUDY["pretrainings"] | {"scratch": {"trainer": "MAEPretrainer"}}}, "called scratch"),
    ],
)
def test_a_study_that_does_not_hold_together_is_refused(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        read(tmp_path, **changes)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_can_be_read(path):
    assert study_file.read_study(path).name == path.stem


def test_files_may_be_named_by_a_pattern(tmp_path, data):
    for case in ("S_2", "S_10", "S_3"):
        for name in ("MR_image", "MR_mask", "CT_image")[: 2 if case == "S_3" else 3]:
            path = tmp_path / "other [1]" / case / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = study_file.files_by_case(tmp_path, "other [1]/{case}/MR_image.nii.gz")
    assert found == {case: tmp_path / "other [1]" / case / "MR_image.nii.gz" for case in ("S_2", "S_10", "S_3")}
    places = {"images": "other [1]/{case}/MR_image.nii.gz", "labels": "other [1]/{case}/MR_mask.nii.gz"}
    study = read(tmp_path, data=STUDY["data"] | places, cases={"unlabelled": 2, "pool": 1, "evaluation": 1})
    chosen = study_file.choose_cases(study, tmp_path)
    study_steps.lay_out(study, chosen, data=tmp_path, folder=tmp_path / "run")
    for case in chosen.unlabelled:
        assert (tmp_path / "run" / "scans" / f"{case}.nii.gz").resolve() == found[case].resolve()
    raw = tmp_path / "run" / "nnUNet_raw" / study_steps.LABELLED
    assert (raw / "labelsTr" / f"{chosen.evaluation[0]}.nii.gz").resolve().name == "MR_mask.nii.gz"
    by_folder = study_file.files_by_case(data, "images")
    assert by_folder["case_07"] == data / "images" / "case_07.nii.gz" and len(by_folder) == 20


def test_frozen_encoders_are_read_on_the_tuning_cases(tmp_path):
    cases = {"unlabelled": 8, "pool": 4, "evaluation": 4, "tuning": 8}
    assert study_steps.probe_steps(read(tmp_path, cases=cases), tmp_path, device="cpu") == []
    study = read(tmp_path, cases=cases, probe={"labelled": 2, "seeds": [0, 1]}, pretraining_seeds=2)
    (step,) = study_steps.probe_steps(study, tmp_path, device="cpu")
    words = " ".join(step.command)
    assert f"-f {len(study.folds)} --labelled 2 --seeds 0 1" in words
    assert all(f" med3d-{seed}={tmp_path}" in words for seed in (0, 1))
    with pytest.raises(UserError, match="cases for tuning"):
        read(tmp_path, probe={"labelled": 2})


def test_separation_is_measured_only_where_asked_for(tmp_path):
    assert study_steps.separation_steps(read(tmp_path), tmp_path, device="cpu") == []
    (step,) = study_steps.separation_steps(read(tmp_path, separation={"stride": 4}), tmp_path, device="cpu")
    trained = study_steps.pretraining_folder(read(tmp_path), tmp_path, "med3d") / "checkpoint_final.pth"
    flags = dict(zip(step.command[3::2], step.command[4::2], strict=True))
    assert step.command[:3] == ("nnssl_plugin", "evaluate", "tokens")
    assert (flags["-w"], flags["--stride"], flags["-f"], flags["-d"]) == (str(trained), "4", "0", "502")


def test_a_pair_of_encoders_is_trained_after_captioning_where_asked_for(tmp_path):
    titles = [step.title for step in study_steps.planning_steps(read(tmp_path), tmp_path)]
    assert "caption" in titles and "clip" not in titles
    steps = study_steps.planning_steps(read(tmp_path, clip={"epochs": 3}), tmp_path, device="cuda")
    titles = [step.title for step in steps]
    assert titles.index("clip") == titles.index("caption") + 1
    expected = ("nnssl_plugin", "clip", "-d", "501", "-device", "cuda", "--epochs", "3")
    assert steps[titles.index("clip")].command == expected


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_find_their_cases(path, data_folder):
    study, counts = study_file.read_study(path), study_file.read_study(path).cases
    if study.data.label_kind.endswith("generated"):
        pytest.skip("its data are generated: benchmarks/phantom_data.py")
    chosen = study_file.choose_cases(study, data_folder)
    apart = {*chosen.unlabelled, *chosen.evaluation, *chosen.tuning}
    assert len(apart) == counts.unlabelled + counts.evaluation + counts.tuning


def all_steps(study, folder):
    return [
        *study_steps.planning_steps(study, folder),
        *study_steps.pretraining_steps(study, folder, device="cpu"),
        *study_steps.separation_steps(study, folder, device="cpu"),
        *study_steps.adaptation_steps(study, folder),
    ]


def test_a_study_runs_the_packages_and_nnunets_commands(tmp_path):
    steps = all_steps(read(tmp_path), tmp_path)
    assert len({step.title for step in steps}) == len(steps)
    assert all(step.command[0] == "nnssl_plugin" or step.command[0].startswith("nnUNetv2_") for step in steps)
    assert [step.title for step in steps if step.results is not None] == ["pretrain-med3d"]


def selection():
    names = [f"case_{number:02d}" for number in range(20)]
    return study_file.Selection(tuple(names[:8]), tuple(names[:4]), tuple(names[8:10]), tuple(names[10:18]))


def runs_planned(study, **chosen):
    chosen = {arm.name: None for arm in study.arms} | chosen
    return [run for of in study_steps.finetuning_runs(study, selection(), chosen).values() for run in of]


def test_arms_of_a_fold_differ_in_their_weights_alone(tmp_path):
    study = read(tmp_path)
    runs = runs_planned(study)
    assert len({run["name"] for run in runs}) == len(runs) == 2 * 2 * 2  # seeds, fractions, arms
    for seed, fraction in study.folds:
        one, other = (run for run in runs if (run["seed"], run["fraction"]) == (seed, fraction))
        assert one["settings"] == other["settings"] == {"epochs": 2, "seed": seed}
        assert one["fold"] == other["fold"] == study.folds.index((seed, fraction))
        assert {one["plan"], other["plan"]} == {"nnUNetPlans-study-med3d", "nnUNetPlans-study-scratch"}
    adapt = {step.title: step.command for step in study_steps.adaptation_steps(study, tmp_path)}
    assert "-w" in adapt["adapt-med3d"] and "--from-scratch" in adapt["adapt-scratch"]


def test_each_seed_may_have_a_pretraining_of_its_own(tmp_path):
    study = read(tmp_path, pretraining_seeds=2, seeds=[0, 1, 2])
    trainings = study_steps.pretraining_steps(study, tmp_path, device="cpu")
    assert [step.title for step in trainings] == ["pretrain-med3d-0", "pretrain-med3d-1"]
    assert [each.edits["seed"] for each in study.trained.values()] == [0, 1]
    plans = {run["seed"]: run["plan"] for run in runs_planned(study) if run["arm"] == "pretrained"}
    assert plans == {seed: f"nnUNetPlans-study-med3d-{seed % 2}" for seed in (0, 1, 2)}
    assert read(tmp_path).trained == read(tmp_path).pretrainings


def test_an_arm_may_have_settings_of_its_own_beside_those_of_its_recipe(tmp_path):
    arms = [
        {"name": "frozen", "pretraining": "med3d", "finetuning": {"frozen_encoder_epochs": 1, "epochs": 3}},
        {"name": "scratch", "pretraining": None},
    ]
    study = read(tmp_path, arms=arms, recipes={"slow": {"lr": 0.1}})
    settings = {run["arm"]: run["settings"] for run in runs_planned(study, frozen="slow", scratch="slow")}
    assert settings["frozen"] == {"frozen_encoder_epochs": 1, "epochs": 3, "lr": 0.1, "seed": 3}
    assert settings["scratch"] == {"epochs": 2, "lr": 0.1, "seed": 3}


def test_recipes_are_chosen_on_cases_that_nothing_else_uses(tmp_path):
    counts = {"unlabelled": 8, "pool": 4, "evaluation": 2, "tuning": 8}
    study = read(tmp_path, cases=counts, recipes={"slow": {"lr": 0.1}, "fast": {"lr": 1.0}})
    trials = study_steps.tuning_runs(study, selection())
    assert {recipe: [run["arm"] for run in runs] for recipe, runs in trials.items()} == {
        "slow": ["pretrained", "scratch"],
        "fast": ["pretrained", "scratch"],
    }
    fold = study_file.split_folds(study, selection())[trials["fast"][0]["fold"]]
    assert set(fold["train"]) | set(fold["val"]) == set(selection().tuning) and len(fold["train"]) == 4
    assert set(trials["fast"][0]["cases"]) == set(fold["val"]) and not set(fold["train"]) & set(fold["val"])
    for other in study_file.split_folds(study, selection())[:-1]:
        assert set(other["val"]) == set(fold["val"]) and set(other["train"]) <= set(selection().pool)


def test_the_best_recipe_of_each_arm_is_taken(tmp_path):
    study = read(
        tmp_path,
        cases={"unlabelled": 8, "pool": 4, "evaluation": 2, "tuning": 8},
        recipes={"slow": {}, "fast": {}},
    )
    for arm, recipe, dice in (
        ("pretrained", "slow", 0.4),
        ("pretrained", "fast", 0.3),
        ("scratch", "slow", 0.1),
        ("scratch", "fast", 0.2),
    ):
        write_run(tmp_path, f"tune-{recipe}-{arm}", arm=arm, recipe=recipe, fraction=None, dice=[dice, dice])
    assert study_results.choose_recipes(study, study_results.collect(tmp_path)) == {
        "pretrained": "slow",
        "scratch": "fast",
    }
    assert study_results.choose_recipes(read(tmp_path), []) == {"pretrained": None, "scratch": None}


def test_short_schedules_have_the_labels_of_the_largest_fraction(tmp_path):
    runs = [run for run in runs_planned(read(tmp_path, schedules=[1])) if run["schedule"]]
    assert {run["settings"]["epochs"] for run in runs} == {1} and {run["fraction"] for run in runs} == {1.0}
    assert len(runs) == 2 * 2


def test_another_look_keeps_the_grid_and_the_ends_of_the_intensities():
    voxels = np.random.default_rng(0).random((9, 8, 7)).astype(np.float32)
    same = study_steps.with_another_look(voxels, study_file.Shift(gamma=1.0, coarser=1))
    low, high = np.percentile(voxels, (0.5, 99.5))
    np.testing.assert_allclose(same, np.clip(voxels, low, high), rtol=1e-4)
    darker = study_steps.with_another_look(voxels, study_file.Shift(gamma=2.0, coarser=1))
    scaled = (np.clip(voxels, low, high) - low) / (high - low)
    np.testing.assert_allclose(darker, low + (high - low) * scaled**2, rtol=1e-4)
    coarse = study_steps.with_another_look(voxels, study_file.Shift(gamma=1.0, coarser=2))
    assert coarse.shape == voxels.shape and coarse.std() < 0.6 * voxels.std()
    flat = study_steps.with_another_look(np.full((4, 4, 4), 3.0, np.float32), study_file.Shift(gamma=2.0, coarser=2))
    np.testing.assert_allclose(flat, 3.0)


def test_images_with_another_look_are_cases_of_their_own(tmp_path):
    data = tmp_path / "data"
    write_phantoms(data / "images", 6, seed=0, labels_folder=data / "labels", shape=(16, 16, 16), spacing_mm=(4, 4, 4))
    for image in (data / "images").glob("*_0000.nii.gz"):
        image.rename(image.with_name(image.name.replace("_0000", "")))
    study = read(
        tmp_path, cases={"unlabelled": 4, "pool": 2, "evaluation": 2}, shift={"gamma": 1.5, "coarser": 2}, captions=None
    )
    chosen = study_file.choose_cases(study, data)
    study_steps.lay_out(study, chosen, data=data, folder=tmp_path / "run")
    raw = tmp_path / "run" / "nnUNet_raw" / study_steps.LABELLED
    names = {path.name for path in (raw / "labelsTr").iterdir()}
    assert {f"{case}-shifted.nii.gz" for case in chosen.evaluation} <= names and len(names) == 2 + 2 + 2
    assert len(list((raw / "imagesTr").glob("*-shifted_0000.nii.gz"))) == 2
    assert read_json(raw / "dataset.json")["numTraining"] == 6
    assert not any("shifted" in case for fold in study_file.split_folds(study, chosen) for case in fold["train"])


@pytest.mark.parametrize(("checkpoint", "goes_on"), [("final", True), ("latest", True), ("best", False)])
def test_a_training_goes_on_only_from_a_state_of_itself(tmp_path, checkpoint, goes_on):
    (tmp_path / f"checkpoint_{checkpoint}.pth").touch()
    step = study_steps.Step("t", "fine-tuning", ("nnUNetv2_train", "502"), results=tmp_path)
    assert ("--c" in study_steps.executable(step, one_thread=False)) == goes_on
    alone = study_steps.executable(step, one_thread=True)
    assert alone[:3] == [sys.executable, str(study_steps.ONE_THREAD), "502"]


def test_planning_is_never_given_the_value_that_breaks_it(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert "nnUNet_n_proc_DA" not in study_steps.environment(tmp_path, one_thread=True)
    assert study_steps.training_environment("pretraining", device="cpu", one_thread=False) == {"nnUNet_n_proc_DA": "0"}
    assert study_steps.training_environment("fine-tuning", device="cuda", one_thread=False)["nnUNet_n_proc_DA"] == "0"


def python_step(title, code):
    return study_steps.Step(title, "planning", (sys.executable, "-c", code))


def runner(folder):
    return study_runner.Runner(folder, device="cpu", total=4)


def test_a_finished_step_is_not_run_again(tmp_path):
    step = python_step("once", "open('runs', 'a').write('x')")
    runner(tmp_path).run([step])
    runner(tmp_path).run([step])
    assert (tmp_path / "runs").read_text() == "x"
    with pytest.raises(UserError, match="another command"):
        runner(tmp_path).run([dataclasses.replace(step, command=(sys.executable, "-c", "pass"))])


def test_cpu_time_of_a_command_and_its_children_is_counted(tmp_path):
    burn = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.4: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    runner(tmp_path).run([python_step("parent", child), python_step("idle", "import time; time.sleep(0.3)")], jobs=2)
    state = read_json(tmp_path / "state.json")
    assert state["parent"]["cpu_seconds"] >= 0.4
    assert state["idle"]["cpu_seconds"] < 0.3 <= state["idle"]["seconds"]
    cost = study_runner.cost(state)
    assert cost["cpu_minutes"] == pytest.approx(sum(step["cpu_seconds"] for step in state.values()) / 60)


def test_the_most_labels_come_first_and_the_short_schedules_last(tmp_path):
    study = read(tmp_path, schedules=[3, 1])
    runs = study_steps.finetuning_runs(study, selection(), {arm.name: None for arm in study.arms})
    for seed, of_seed in runs.items():
        told = [(run["seed"], run["fraction"], run["schedule"], run["fold"]) for run in of_seed]
        folds = {fraction: study.folds.index((seed, fraction)) for fraction in study.fractions}
        order = [(1.0, None), (0.5, None), (1.0, 1), (1.0, 3)]
        assert told == [(seed, fraction, epochs, folds[fraction]) for fraction, epochs in order for _ in study.arms]


def test_a_failing_step_is_named_with_its_log_and_runs_again(tmp_path):
    step = python_step("broken", "raise SystemExit('it is broken')")
    with pytest.raises(UserError, match="it is broken") as error:
        runner(tmp_path).run([step])
    assert str(tmp_path / "logs" / "broken.log") in error.value.remedy
    spent = read_json(tmp_path / "state.json")["broken"]["cpu_seconds"]
    with pytest.raises(UserError):
        runner(tmp_path).run([step])
    assert read_json(tmp_path / "state.json")["broken"]["cpu_seconds"] > spent  # what failed attempts cost counts too


def test_an_early_stop_is_no_failure_and_ends_the_others(tmp_path):
    steps = [python_step("stops", "raise SystemExit(75)"), python_step("long", "import time; time.sleep(60)")]
    with pytest.raises(study_runner.StoppedEarly):
        runner(tmp_path).run(steps, jobs=2)
    ended = read_json(tmp_path / "state.json")["long"]
    assert not ended["done"] and 0 < ended["seconds"] < 50


def write_run(folder, name, *, arm, fraction, dice, recipe=None, seed=0, schedule=None, steps=10, pseudo=(0.1, 0.5)):
    """The file that a training leaves; ``dice`` are those of the cases, the same of both labels."""
    cases = {f"case_{number}": value for number, value in enumerate(dice)}
    content = {
        "name": name,
        "arm": arm,
        "recipe": recipe,
        "seed": seed,
        "schedule": schedule,
        "steps": steps,
        "dice": {"first": cases, "second": cases},
        "dice_shifted": {"first": {}, "second": {}},
        "pseudo_dice": list(pseudo),
        "seconds": {"training": 1.0, "prediction": 1.0},
    }
    write_json(folder / "runs" / f"{name}.json", content | ({} if fraction is None else {"fraction": fraction}))


def runs_of(study, folder, scores, **more):
    """Runs with given scores: (arm, seed, fraction) → Dice of the cases."""
    for (arm, seed, fraction), dice in scores.items():
        write_run(folder, f"{arm}-{seed}-{fraction}", arm=arm, seed=seed, fraction=fraction, dice=dice, **more)
    return study_results.collect(folder)


@pytest.fixture
def small(tmp_path):
    study = read(tmp_path, fractions=[0.5, 1.0])
    rng = np.random.default_rng(0)
    scores = {(arm.name, seed, fraction): rng.random(6) for seed, fraction in study.folds for arm in study.arms}
    return study, scores, runs_of(study, tmp_path, scores)


def test_statistics_agree_with_a_direct_calculation(small):
    study, scores, runs = small
    rows = study_results.summarise(study, runs)
    row = next(r for r in rows if (r["fraction"], r["arm"], r["label"]) == (0.5, "pretrained", "second"))
    assert {r["look"] for r in rows} == {"as trained"}
    own = [scores["pretrained", seed, 0.5] for seed in (0, 3)]
    other = [scores["scratch", seed, 0.5] for seed in (0, 3)]
    assert row["mean"] == pytest.approx(np.mean(own))
    assert row["sd_over_seeds"] == pytest.approx(np.std([own[0].mean(), own[1].mean()], ddof=1))
    assert row["labelled_cases"] == 2
    difference = row["difference_to_scratch"]
    assert difference["mean"] == pytest.approx(np.mean(own) - np.mean(other))
    assert difference["low"] < difference["mean"] < difference["high"] and difference["pairs"] == 2 * 6


def test_the_table_has_a_row_for_each_fraction_and_label(small):
    study, _, runs = small
    lines = study_page.table(study, study_results.summarise(study, runs)).splitlines()
    assert len(lines) == 2 + 2 * 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].count("−") == 1  # the arm from scratch is not compared with itself


def test_other_pretrainings_are_compared_with_masked_reconstruction_too(tmp_path):
    arms = [{"name": "MAE", "pretraining": "med3d"}, *STUDY["arms"]]
    study = read(tmp_path, fractions=[1.0], arms=arms)
    found = {"MAE": [0.4, 0.6], "pretrained": [0.5, 0.9], "scratch": [0.1, 0.1]}
    runs = runs_of(study, tmp_path, {(arm, seed, 1.0): dice for arm, dice in found.items() for seed in (0, 3)})
    rows = [row for row in study_results.summarise(study, runs) if row["label"] == "mean"]
    beside = {row["arm"]: row["difference_to_mae"] and row["difference_to_mae"]["mean"] for row in rows}
    assert beside == {"MAE": None, "scratch": None, "pretrained": pytest.approx(0.2)}
    assert "| pretrained | 4 | as trained | +0.200" in study_page._beside_mae(rows)
    assert study_page._beside_mae([row | {"difference_to_mae": None} for row in rows]) == ""


def test_what_predicts_the_gain_is_ranked_over_the_pretrainings_of_a_method(tmp_path):
    own = {"name": "frozen-first", "pretraining": "med3d", "finetuning": {"frozen_encoder_epochs": 1}}
    study = read(
        tmp_path, fractions=[1.0], seeds=[0, 1, 2, 3], pretraining_seeds=4, arms=[own, *STUDY["arms"]]
    )  # what is fine-tuned in another way does not count
    gains = [0.1, 0.3, 0.2, 0.4]
    scores = {("scratch", seed, 1.0): [0.5 + 0.01 * seed] for seed in range(4)}
    scores |= {("pretrained", seed, 1.0): [0.5 + 0.01 * seed + gain] for seed, gain in enumerate(gains)}
    scores |= {("frozen-first", seed, 1.0): [0.9 - gain] for seed, gain in enumerate(gains)}
    runs = runs_of(study, tmp_path, scores)
    for seed, gain in enumerate(gains):
        quality = {"val_losses": -gain, "seconds_waiting": gain, "constant": 1.0}
        write_json(study_steps.pretraining_folder(study, tmp_path, f"med3d-{seed}") / "quality.json", quality)
    probed = {f"med3d-{seed}": {"dice": dice} for seed, dice in enumerate((0.1, 0.2, 0.3, 0.4))}
    write_json(study_steps.probe_file(tmp_path), {"arms": probed})
    rows = study_prediction.predictions(study, tmp_path, runs)
    assert {row["number"]: row["rho"] for row in rows} == {
        "val_losses": pytest.approx(-1.0),
        study_prediction.PROBE: pytest.approx(0.8),
    }
    assert {row["n"] for row in rows} == {4}
    write_json(study_steps.probe_file(tmp_path), {"arms": {}})  # what is not known counts nowhere
    assert {row["number"] for row in study_prediction.predictions(study, tmp_path, runs)} == {"val_losses"}
    assert len(study_prediction._finite([1, None, 3], [1, 2, float("nan")])) == 1
    *_, first, second = study_prediction.prediction_table(study, rows, {1.0: 4}).splitlines()
    assert "val_losses | 4 | -1.00" in first and "+0.80" in second
    assert study_prediction.rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert study_prediction.rank_correlation([1, 2, None, 3], [1, 2, 3, 4]) is None


def test_norms_of_the_first_steps_are_means_over_the_runs_of_an_arm(tmp_path):
    study = read(tmp_path, fractions=[1.0])
    runs = runs_of(study, tmp_path, {("scratch", seed, 1.0): [0.5] for seed in (0, 3)})
    assert study_results.first_steps(study, runs) == [] and study_page._first_steps([]) == ""
    noted = [[{"step": step, "weights": 20.0 + seed, "gradients": 1.0} for step in (0, 10)] for seed in (0, 3)]
    runs = [dataclasses.replace(run, first_steps=notes) for run, notes in zip(runs, noted, strict=True)]
    trial = dataclasses.replace(runs[0], fraction=None, first_steps=[{"step": 0, "weights": 99.0, "gradients": 9.0}])
    rows = study_results.first_steps(study, [*runs, trial])
    assert [(row["arm"], row["step"], row["weights"], row["runs"]) for row in rows] == [
        ("scratch", 0, 21.5, 2),
        ("scratch", 10, 21.5, 2),
    ]
    assert "| scratch | 21.50 | 21.50 | 21.50 | 1.00 | 1.00 | 1.00 |" in study_page._first_steps(rows)


def test_one_seed_has_no_spread(tmp_path):
    study = read(tmp_path, seeds=[0])
    scores = {(arm.name, 0, f): [0.5, 0.7] for arm in study.arms for f in study.fractions}
    runs = runs_of(study, tmp_path, scores)
    rows = study_results.summarise(study, runs)
    assert {row["sd_over_seeds"] for row in rows} == {None}
    assert "±" not in study_page.table(study, rows) and "(one seed)" in study_page.table(study, rows)
    assert {row["converged"] for row in study_results.calibration(study, runs)} == {None}


def test_a_study_that_was_cut_off_pairs_the_seeds_that_both_arms_have(small, tmp_path):
    study, scores, runs = small
    left = [run for run in runs if (run.arm, run.seed) != ("scratch", 3)]
    rows = study_results.summarise(study, left)
    row = next(r for r in rows if (r["fraction"], r["arm"], r["label"]) == (0.5, "pretrained", "mean"))
    assert row["seeds"] == 1 and len(row["per_seed"]) == 2
    expected = np.mean(scores["pretrained", 0, 0.5]) - np.mean(scores["scratch", 0, 0.5])
    assert row["difference_to_scratch"]["mean"] == pytest.approx(expected)
    only_one = [run for run in runs if run.arm == "pretrained"]
    assert {row["difference_to_scratch"] for row in study_results.summarise(study, only_one)} == {None}
    assert "–" in study_page.table(study, study_results.summarise(study, only_one))


@pytest.mark.parametrize(("last", "converged"), [(0.51, True), (0.58, False)])
def test_a_twin_that_still_rises_has_not_converged(tmp_path, last, converged):
    study = read(tmp_path, fractions=[1.0])
    scores = {("scratch", 0, 1.0): [0.4, 0.4], ("scratch", 3, 1.0): [0.6, 0.6]}  # standard deviation 0.14
    runs = runs_of(study, tmp_path, scores, pseudo=[0.1, 0.2, 0.3, 0.4, 0.4, 0.45, 0.5, 0.5, 0.52, last])
    (row,) = study_results.calibration(study, runs)
    assert row["gain_in_last_fifth"] == pytest.approx(last - 0.5)
    assert row["sd_over_seeds"] == pytest.approx(0.02**0.5) and row["converged"] is converged


def test_steps_to_the_twins_result(tmp_path):
    study = read(tmp_path, fractions=[1.0], seeds=[0], schedules=[1, 2])
    for arm, values in (("scratch", (0.3, 0.6, 0.8)), ("pretrained", (0.5, 0.77, 0.79))):
        for schedule, dice in zip((1, 2, None), values, strict=True):
            steps = 100 if schedule is None else 10 * schedule
            write_run(tmp_path, f"{arm}{schedule}", arm=arm, fraction=1.0, dice=[dice], schedule=schedule, steps=steps)
    rows = study_results.steps_to_twin(study, study_results.collect(tmp_path))
    found = {row["arm"]: row["reached_after"] for row in rows}
    assert found == {"pretrained": 20, "scratch": 100} and rows[0]["goal"] == pytest.approx(0.95 * 0.8)
    apart = {steps: found["mean"] for steps, found in rows[0]["difference_to_scratch"].items()}
    assert apart == {10: pytest.approx(0.2), 20: pytest.approx(0.17), 100: pytest.approx(-0.01)}
    assert rows[1]["difference_to_scratch"] == {}
    assert "pretrained − scratch after 10 steps: +0.200 (one seed)" in study_page._steps(rows)
    (row,) = study_results.calibration(study, study_results.collect(tmp_path))
    assert row["seeds"] == 1  # the short schedules are no further seeds


def test_a_label_that_is_nowhere_is_left_out():
    dice = study_results.with_mean({"first": {"case_1-shifted": 0.5}, "second": {"case_1-shifted": None}})
    assert dice["mean"] == {"case_1": 0.5} and np.isnan(dice["second"]["case_1"])
    run = study_results.Run("n", "a", None, 0, 1.0, None, 3, dice, {}, [], {})
    assert run.as_json()["dice"]["second"] == {"case_1": None} and run.as_json()["mean_dice"] == 0.5


def test_figures_are_drawn(small, tmp_path):
    study, _, runs = small
    study_figures.draw_label_efficiency(study, runs, study_results.summarise(study, runs), tmp_path / "a.png")
    study_figures.draw_learning(study, runs, tmp_path / "b.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


@pytest.mark.slow
@pytest.mark.nightly
def test_a_miniature_study_from_scans_to_its_page(tmp_path):
    data = tmp_path / "data"
    write_phantoms(
        data / "images", 14, seed=1, labels_folder=data / "labels", shape=(24, 32, 24), spacing_mm=(2.5, 2.5, 2.5)
    )
    for image in (data / "images").glob("*_0000.nii.gz"):
        image.rename(image.with_name(image.name.replace("_0000", "")))
    network = "configurations.3d_fullres.architecture.arch_kwargs"
    short = {"epochs": 1, "iterations_per_epoch": 2, "validation_iterations": 1, "batch_size": 2}
    study = STUDY | {
        "cases": {"unlabelled": 6, "pool": 2, "evaluation": 2, "tuning": 4},
        "fractions": [1.0],
        "seeds": [0, 1],
        "recipes": {"slow": {"lr": 0.001}, "fast": {"lr": 0.1}},
        "schedules": [1],
        "shift": {"gamma": 1.5, "coarser": 2},
        "plan": {"configurations.3d_fullres.batch_size": 2, f"{network}.features_per_stage": [4, 8, 16]},
        "pretrainings": {
            "med3d": {
                "trainer": "Med3DInsightPretrainer",
                "edits": short | {"method.queries": 8, "method.dim": 16, "method.heads": 2},
            },
            "s2dc": {
                "trainer": "S2DCPretrainer",
                "edits": short
                | {
                    "warmup_epochs": 0,
                    "method.token_stride": 4,
                    "method.hidden": 8,
                    "method.dim": 8,
                    "method.queue": 8,
                },
            },
        },
        "finetuning": {"epochs": 2, "iterations_per_epoch": 2, "validation_iterations": 1},
        "separation": {"stride": 4},
    }
    write_json(tmp_path / "small.json", study)
    command = [
        sys.executable,
        str(BENCHMARKS / "label_efficiency.py"),
        str(tmp_path / "small.json"),
        "-o",
        str(tmp_path / "run"),
        "--data",
        str(data),
    ]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-4000:]
    result = read_json(tmp_path / "run" / "result.json")
    whole = [run for run in result["runs"] if run["fraction"] == 1.0 and run["schedule"] is None]
    assert [len(run["dice"]["mean"]) for run in whole] == [2] * 4 == [len(run["dice_shifted"]["mean"]) for run in whole]
    assert {run["steps"] for run in whole} == {4} and len(result["runs"]) == 2 * 2 + 2 * 2 + 2 * 2
    assert result["cost"]["cpu_minutes"] > 0 and set(result["chosen"].values()) <= {"slow", "fast"}
    assert {row["labelled_cases"] for row in result["calibration"]} == {2} and len(result["steps_to_twin"]) == 2
    for separation in (result["separation"][name] for name in ("med3d", "s2dc")):
        assert separation["before"] != separation["after"] and len(separation["cases"]) == 2
    page = (tmp_path / "run" / "study.md").read_text()
    assert "| labels among themselves | cosine gap |" in page
    assert (tmp_path / "run" / "table.md").read_text() in page
    write_json(tmp_path / "small.json", study | {"finetuning": {"epochs": 9}})
    changed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert changed.returncode == 2 and "another study" in changed.stderr
