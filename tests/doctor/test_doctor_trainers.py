"""What nnU-Net's own finder makes of the trainers, and which module stands in its way.

Quick tests run nnU-Net's finder (its source files, unchanged) over a stand-in for its trainers, which imports at once.
"""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from nnssl_plugin.doctor.asking import Answer, ask_nnunet
from nnssl_plugin.doctor.finding import OK, PROBLEM, WARNING
from nnssl_plugin.doctor.trainers import expected_trainers, own_folder, path_findings, trainer_findings

FINDER = ("paths.py", "utilities/find_objects.py", "utilities/find_class_by_name.py")


@pytest.fixture
def own(tmp_path):
    """A folder with two re-exports, and a package that defines what they re-export."""
    (tmp_path / "own").mkdir()
    (tmp_path / "plugin.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class First(nnUNetTrainer): pass\nclass Second(nnUNetTrainer): pass\n"
    )
    (tmp_path / "own" / "f_first.py").write_text("from plugin import First\n")
    (tmp_path / "own" / "s_second.py").write_text("from plugin import Second as Second\n")
    return tmp_path / "own"


@pytest.fixture
def nnunet(tmp_path):
    """nnU-Net with its own finder and one trainer."""
    real = Path(find_spec("nnunetv2").submodule_search_locations[0])
    trainers = tmp_path / "nnunetv2" / "training" / "nnUNetTrainer"
    trainers.mkdir(parents=True)
    (tmp_path / "nnunetv2" / "utilities").mkdir()
    for name in FINDER:
        shutil.copy(real / name, tmp_path / "nnunetv2" / name)
    for folder in (trainers, trainers.parent, trainers.parent.parent, tmp_path / "nnunetv2" / "utilities"):
        (folder / "__init__.py").write_text("")
    (trainers / "nnUNetTrainer.py").write_text("class nnUNetTrainer: pass\n")
    return trainers


@pytest.fixture
def search(nnunet, own, tmp_path):
    """Look for First and Second with these folders on nnUNet_extTrainer; topic → finding."""
    expected = {"First": "plugin", "Second": "plugin"}

    def look(*folders):
        environment = {
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "nnUNet_extTrainer": os.pathsep.join(str(folder) for folder in folders),
        }
        answer = ask_nnunet(environment, list(expected))
        return {f.topic: f for f in trainer_findings(answer, expected, own, environment)}

    return look


def folder_with(tmp_path, **modules):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_found_trainers_are_listed_with_the_file_that_defines_them(search, own, tmp_path):
    findings = search(own)
    assert {name: (f.status, f.message) for name, f in findings.items()} == {
        name: (OK, str(tmp_path / "plugin.py")) for name in ("First", "Second")
    }


def test_a_path_without_the_shelf_is_a_problem(search, tmp_path):
    (finding,) = search(tmp_path / "absent").values()
    assert finding.status == PROBLEM and finding.message == "First, Second"
    assert finding.remedy == 'eval "$(nnssl_plugin env)"'


def test_a_broken_module_of_this_package_hides_what_sorts_after_it(search, own):
    (own / "g_broken.py").write_text("import some_missing_optional_dep\n")
    findings = search(own)
    assert findings["First"].status == OK and "Second" not in findings
    broken = findings["g_broken"]
    assert broken.status == PROBLEM and str(own / "g_broken.py") in broken.message
    assert "hides Second" in broken.message and "No module named 'some_missing_optional_dep'" in broken.message
    assert broken.remedy.startswith("pip install some_missing_optional_dep")


@pytest.mark.parametrize("source", ["raise ValueError('on import')", "def (:", "raise SystemExit(3)"])
def test_whatever_a_module_of_another_folder_raises_is_named(source, search, own, tmp_path):
    folder = folder_with(tmp_path, broken=source)
    findings = search(folder, own)
    assert set(findings) == {"broken"} and "hides First, Second" in findings["broken"].message
    assert str(folder / "broken.py") in findings["broken"].remedy
    after = search(own, folder)
    assert after["First"].status == after["Second"].status == OK and after["broken"].status == WARNING


def test_a_trainer_of_the_same_name_in_an_earlier_folder_is_a_clash(search, own, tmp_path):
    source = (
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\nclass First(nnUNetTrainer):\n"
        "    def train(self): pass\n"
    )
    folder = folder_with(tmp_path, another=source)
    findings = search(folder, own)
    assert findings["First"].status == PROBLEM and str(folder / "another.py") in findings["First"].message
    assert findings["First"].remedy == f'export nnUNet_extTrainer="{own}{os.pathsep}{folder}"'
    assert findings["Second"].status == OK and search(own, folder)["First"].status == OK


def test_a_trainer_of_the_same_name_within_nnunet_is_a_clash(search, own, nnunet):
    (nnunet / "zz.py").write_text("from .nnUNetTrainer import nnUNetTrainer\nclass Second(nnUNetTrainer): pass\n")
    finding = search(own)["Second"]
    assert finding.status == PROBLEM and str(nnunet / "zz.py") in finding.message


def test_a_broken_torchvision_behind_nnunets_own_trainers_hides_all(search, own, nnunet):
    (nnunet / "primus.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (finding,) = search(own).values()
    assert finding.status == PROBLEM and "torchvision::nms" in finding.message and "torchvision" in finding.remedy


def test_an_nnunet_that_does_not_import_is_a_problem(search, own, nnunet):
    (nnunet.parent.parent / "utilities" / "find_objects.py").write_text("import batchgeneratorsv0\n")
    (finding,) = search(own).values()
    assert finding.status == PROBLEM and "batchgeneratorsv0" in finding.message


def test_a_search_that_dies_is_a_problem(own):
    (finding,) = trainer_findings(Answer(error="no answer within 120 s"), {"First": "plugin"}, own, {})
    assert finding.status == PROBLEM and "no answer within 120 s" in finding.message


def test_the_path_must_be_set_and_lead_to_the_own_folder(own, tmp_path):
    def look(*folders):
        value = os.pathsep.join(str(folder) for folder in folders)
        return path_findings({"nnUNet_extTrainer": value}, ["First"], own)

    (unset,) = path_findings({}, ["First"], own)
    assert unset.status == PROBLEM and "First" in unset.message and unset.remedy == 'eval "$(nnssl_plugin env)"'
    assert look()[0].status == PROBLEM
    assert [f.status for f in look(own)] == [OK] and [f.status for f in look(tmp_path, f"{own}/")] == [OK]
    (missing,) = look(tmp_path / "gone", own)
    assert missing.status == WARNING and missing.remedy == f'export nnUNet_extTrainer="{own}"'
    (gone,) = look(tmp_path / "gone")
    assert gone.remedy == 'unset nnUNet_extTrainer; eval "$(nnssl_plugin env)"'
    (lacking,) = look(tmp_path)
    assert lacking.status == WARNING and str(own) in lacking.message


def test_the_expected_trainers_are_those_of_the_shelf_and_the_registry():
    expected = expected_trainers(own_folder())
    assert expected["Med3DInsightPretrainer"] == "nnssl_plugin.methods.med3dinsight.trainer"
    assert expected["PretrainedSegmentationTrainer"] == "nnssl_plugin.tasks.segmentation.trainer"


@pytest.mark.slow
def test_nnunet_itself_finds_every_trainer_of_this_package():
    own = own_folder()
    expected = expected_trainers(own)
    environment = {**os.environ, "nnUNet_extTrainer": str(own)}
    findings = trainer_findings(ask_nnunet(environment, list(expected)), expected, own, environment)
    assert {f.topic: f.status for f in findings} == dict.fromkeys(expected, OK)
