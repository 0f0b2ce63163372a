"""The list of commands of the quickstart, and how it runs one. The whole road runs in test_end_to_end.py."""

import shlex
import sys

import pytest

from nnssl_plugin import quickstart
from nnssl_plugin.cli.main import main
from nnssl_plugin.errors import UserError
from nnssl_plugin.files import read_json
from nnssl_plugin.quickstart import Step, learning_steps, planning_steps, run, walk, write_scans

FEATURES = [32, 64, 128, 256]
PLAN = {"configurations": {"3d_fullres": {"architecture": {"arch_kwargs": {"features_per_stage": FEATURES}}}}}


def commands(folder):
    return [step.command for step in [*planning_steps(folder), *learning_steps(folder, PLAN, device="cpu")]]


def test_the_road_goes_through_nnunets_own_commands(tmp_path):
    names = [command[0] for command in commands(tmp_path)]
    assert {"nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"} <= set(names)
    assert set(names) <= {"nnssl_plugin"} | {name for name in names if name.startswith("nnUNetv2_")}


def test_each_step_has_its_own_log(tmp_path):
    steps = [*planning_steps(tmp_path), *learning_steps(tmp_path, PLAN, device="cpu")]
    assert len({step.title for step in steps}) == len(steps)


def test_workers_are_switched_off_for_training_only(tmp_path):
    # nnUNet_n_proc_DA=0 crashes nnU-Net's planning
    for step in learning_steps(tmp_path, PLAN, device="cpu"):
        assert ("nnUNet_n_proc_DA" in dict(step.environment)) == (step.command[0] == "nnUNetv2_train")


def test_both_arms_differ_in_their_weights_alone(tmp_path):
    arms = {arm: [c for c in commands(tmp_path) if arm in " ".join(c)] for arm in quickstart.ARMS}
    adapt = {arm: next(c for c in lines if c[1] == "adapt") for arm, lines in arms.items()}
    assert adapt["scratch"][-1] == "--from-scratch"
    assert [*(word.replace("scratch", "pretrained") for word in adapt["scratch"][:-1])] == list(adapt["pretrained"])
    train = {arm: next(c for c in lines if c[0] == "nnUNetv2_train") for arm, lines in arms.items()}
    assert [w.replace("scratch", "pretrained") for w in train["scratch"]] == list(train["pretrained"])


def test_the_small_network_keeps_the_planned_number_of_stages(tmp_path):
    shrink = next(c for c in commands(tmp_path) if c[1] == "plan")
    assert "configurations.3d_fullres.architecture.arch_kwargs.features_per_stage=[8,16,32,64]" in shrink
    assert "epochs=4" in shrink and "method.queries=32" in shrink


def test_the_device_reaches_training_and_prediction(tmp_path):
    on_device = [s.command for s in learning_steps(tmp_path, PLAN, device="cuda") if "-device" in s.command]
    assert [c[c.index("-device") + 1] for c in on_device] == ["cuda"] * 5


def test_scans_are_written_as_a_user_would_bring_them(tmp_path):
    write_scans(tmp_path)
    target = tmp_path / "nnUNet_raw" / quickstart.TARGET
    assert len(list((tmp_path / "scans").glob("*.nii.gz"))) == quickstart.UNLABELLED
    assert len(list((target / "imagesTs").iterdir())) == len(list((target / "labelsTs").iterdir())) == quickstart.TEST
    assert read_json(target / "dataset.json")["numTraining"] == len(list((target / "imagesTr").iterdir()))


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        walk(tmp_path, device="cpu", trainers="", say=print)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def environment():
    return quickstart.environment_for(quickstart.Path("quick"), "shelf")


def test_a_step_is_shown_before_it_runs_and_its_output_kept(tmp_path):
    said = []
    code = "import os; print(os.environ['nnUNet_n_proc_DA'], os.environ['nnUNet_extTrainer'])"
    step = Step("hello", (sys.executable, "-c", code), environment=(("nnUNet_n_proc_DA", "0"),))
    run(step, tmp_path / "logs", number=3, environment=environment(), say=said.append)
    assert said[0].startswith("$ nnUNet_n_proc_DA=0 ")
    assert shlex.split(said[0])[2:] == list(step.command)
    assert (tmp_path / "logs" / "03-hello.log").read_text().split() == ["0", "shelf"]


def test_a_failing_step_names_the_command_and_the_log(tmp_path):
    step = Step("broken", (sys.executable, "-c", "print('before'); raise SystemExit('it is broken')"))
    with pytest.raises(UserError) as error:
        run(step, tmp_path, number=1, environment=environment(), say=lambda line: None)
    assert "raise SystemExit" in error.value.problem and "it is broken" in error.value.problem
    assert str(tmp_path / "01-broken.log") in error.value.remedy
    assert "before" in (tmp_path / "01-broken.log").read_text()


def test_a_missing_command_is_named(tmp_path):
    with pytest.raises(UserError, match="nnUNetv2_no_such"):
        run(Step("x", ("nnUNetv2_no_such",)), tmp_path, number=1, environment=environment(), say=lambda line: None)


def test_a_value_that_breaks_planning_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert "nnUNet_n_proc_DA" not in environment()


def test_the_command_turns_an_error_into_two_lines_and_an_exit_code(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main(["quickstart", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"nnssl_plugin quickstart: {tmp_path} is not empty.",
        "Choose another folder with -o, or remove this one.",
    ]
