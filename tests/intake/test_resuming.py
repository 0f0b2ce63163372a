"""A run that is killed is gone on with, and several runs share the work: the result is always that of one run."""

import json
import os
import random
import subprocess
import sys
import time

import nibabel
import numpy as np
import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake import case_ledger, examination
from nnssl_plugin.intake.grouping import parse_modalities
from nnssl_plugin.intake.journal import INCOMING
from nnssl_plugin.intake.unlabelled import Part, prepare_dataset


class Killed(BaseException):
    """Stands for a signal that lets nothing run any more."""


@pytest.fixture
def scans(source, save):
    """Eight cases of two channels, some absent, one file damaged, one case twice."""
    for case in range(8):
        for channel in (1, 2):
            if (case, channel) not in ((3, 1), (5, 2)):
                save(f"{case}_t{channel}.nii.gz", seed=10 * case + channel)
    for channel in (1, 2):
        save(f"7_t{channel}.nii.gz", seed=10 + channel)
    (source / "4_t2.nii.gz").write_bytes(b"damaged")
    return source


def prepare(source, name="Scans", dataset_id=501, **options):
    modalities = parse_modalities(["T1=*_t1*", "T2=*_t2*"])
    return prepare_dataset(source, dataset_id, name, **{"modalities": modalities, "processes": 1, **options})


def content(folder):
    """Every file of a dataset, links by their target."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in files
    }


def killed_run(source, monkeypatch, module, function, after):
    """A run that ends at a call of a function without its ``finally`` clauses having an effect."""
    original, calls = getattr(module, function), []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, function, counted)
        patch.setattr("nnssl_plugin.intake.case_ledger.CaseLedger.save", lambda self, groups: None)
        patch.setattr("nnssl_plugin.intake.journal.Journal.remove", lambda self: None)
        prepare(source)


@pytest.mark.parametrize("after", [0, 1, 3, 6])
@pytest.mark.parametrize(("module", "function"), [(examination, "examine"), (case_ledger, "_place")])
def test_a_killed_run_is_gone_on_with(raw, scans, monkeypatch, module, function, after):
    whole = content(prepare(scans, "Whole", 502).folder)
    killed_run(scans, monkeypatch, module, function, after)
    seen, examine = [], examination.examine
    monkeypatch.setattr(examination, "examine", lambda task: seen.append(task.group.name) or examine(task))
    assert content(prepare(scans).folder) == whole
    if module is examination:
        assert len(seen) == 8 - after  # what was found out is not found out again


def test_a_broken_journal_costs_no_more_than_its_last_line(raw, scans, monkeypatch):
    whole = content(prepare(scans, "Whole", 502).folder)
    killed_run(scans, monkeypatch, examination, "examine", 4)
    journal = raw / "Dataset501_Scans" / INCOMING / "findings.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    assert content(prepare(scans).folder) == whole


def test_files_of_a_case_that_is_gone_after_a_kill_are_removed(raw, scans, monkeypatch):
    killed_run(scans, monkeypatch, examination, "examine", 4)
    for channel in (1, 2):
        (scans / f"2_t{channel}.nii.gz").unlink()
    folder = prepare(scans).folder
    assert not list(folder.rglob("2_*")) and not list(folder.rglob("2.*"))
    assert content(folder) == content(prepare(scans, "Whole", 502).folder)


def test_a_source_that_changed_after_a_kill_is_examined_anew(raw, scans, monkeypatch, save):
    killed_run(scans, monkeypatch, examination, "examine", 4)
    save("0_t1.nii.gz", seed=77)
    assert content(prepare(scans).folder) == content(prepare(scans, "Whole", 502).folder)


def test_parts_make_the_dataset_of_one_run_once_all_are_complete(raw, scans):
    whole = content(prepare(scans, "Whole", 502).folder)
    assert prepare(scans, part=Part(2, 3)).added == ()
    prepare(scans, part=Part(0, 3))
    with pytest.raises(UserError, match="not complete: 1 ") as caught:
        prepare(scans, part=Part(None, 3))
    assert "-num_parts 3 -part_id 1" in caught.value.remedy
    folder = raw / "Dataset501_Scans"
    assert not (folder / "imagesTr").exists() and json.loads((folder / "dataset.json").read_text())["numTraining"] == 0
    prepare(scans, part=Part(1, 3))
    assert content(prepare(scans, part=Part(None, 3)).folder) == whole


def test_a_part_takes_nothing_back(raw, scans, save):
    folder = prepare(scans).folder
    before = content(folder)
    save("0_t1.nii.gz", seed=77)
    prepare(scans, part=Part(0, 1))
    assert {name: data for name, data in content(folder).items() if INCOMING not in name} == before
    assert prepare(scans, part=Part(None, 1)).added == ("0",)


@pytest.mark.parametrize("part", [(3, 3), (-1, 3), (0, 0)])
def test_parts_that_are_none_are_refused(part):
    with pytest.raises(UserError, match="Part"):
        Part(*part)


def test_two_runs_do_not_write_into_one_dataset(raw, scans):
    from nnssl_plugin.intake.unlabelled import LOCK_FILE

    folder = prepare(scans).folder
    assert not (folder / LOCK_FILE).exists()
    (folder / LOCK_FILE).write_text(json.dumps({"host": "another", "pid": 1, "since": "today"}))
    with pytest.raises(UserError, match="on another works in"):
        prepare(scans)


@pytest.mark.nightly
def test_twenty_kills_at_random_moments_change_nothing(raw, tmp_path):
    scans = tmp_path / "many"
    scans.mkdir()
    rng = np.random.default_rng(0)
    for case in range(150):
        array = np.pad(rng.uniform(50, 100, (24, 24, 24)), 4).astype(np.float32)
        ending = ".nii.gz" if case % 3 else ".nii"
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), scans / f"{case}{ending}")
    (scans / "damaged.nii.gz").write_bytes(b"damaged")
    whole = content(prepare_dataset(scans, 502, "Whole", processes=2).folder)
    command = [sys.executable, "-m", "nnssl_plugin.cli.main", "prepare", "-i", str(scans), "-d", "501", "-n", "Scans"]
    moments, kills, ended = random.Random(1), 0, False
    while kills < 20 and not ended:
        run = subprocess.Popen([*command, "-np", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run.wait(moments.uniform(0.8, 2.2))
            ended = True
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
            time.sleep(0.05)
    while subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode not in (0, 1):
        pass
    found = content(raw / "Dataset501_Scans")
    assert found.pop("histograms.png")  # which the run in this process does not draw
    assert kills >= 5 and found == whole
