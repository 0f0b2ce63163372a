"""A folder becomes a raw dataset: what is added, refused, named, kept, and never touched."""

import csv
import gzip
import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake import case_ledger, examination, workers
from nnssl_plugin.intake.ledger import Origin, read_rows
from nnssl_plugin.intake.unlabelled import prepare_dataset
from nnssl_plugin.io.scans import load_scan

READ_VOLUMES = examination._read_volumes


def prepare(source, **options):
    return prepare_dataset(source, 501, "Scans", **{"processes": 1, **options})


def table(folder, name):
    with (folder / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def hashes(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def mixed(source, save, phantom):
    """Four good scans in three containers, five bad ones, and a text file."""
    save("siteA/scan 1.nii.gz", seed=1)
    save("siteA/deep/er/two.nii", seed=2)
    for name, seed in (("siteB/three.nrrd", 3), ("siteB/four.mha", 4)):
        (source / name).parent.mkdir(exist_ok=True)
        image = SimpleITK.GetImageFromArray(phantom(seed).astype(np.int16))
        image.SetSpacing((1.0, 2.0, 3.0))
        SimpleITK.WriteImage(image, str(source / name))
    save("bad/copy.nii.gz", seed=2)
    save("bad/4d.nii.gz", np.ones((4, 4, 4, 2)))
    save("bad/constant.nii.gz", np.ones((4, 4, 4)))
    truncated = save("bad/truncated.nii.gz", seed=5)
    truncated.write_bytes(truncated.read_bytes()[:-20])
    (source / "bad/empty.nii.gz").touch()
    (source / "notes.txt").write_text("hello")
    (source / "._hidden.nii.gz").write_text("of a file browser")
    return source


def test_good_scans_become_cases_and_bad_ones_are_listed(raw, mixed):
    before = hashes(mixed)
    summary = prepare(mixed)
    assert hashes(mixed) == before
    assert summary.folder == raw / "Dataset501_Scans"
    assert sorted(summary.added) == ["bad_copy", "siteA_scan_1", "siteB_four", "siteB_three"]
    reasons = {row["source"].rsplit("/", 1)[1]: row["reason"] for row in table(summary.folder, "rejected.csv")}
    assert set(reasons) == {"two.nii", "4d.nii.gz", "constant.nii.gz", "truncated.nii.gz", "empty.nii.gz"}
    assert "duplicate content" in reasons["two.nii"] and "copy.nii.gz" in reasons["two.nii"]
    assert "4D" in reasons["4d.nii.gz"] and "truncated" in reasons["truncated.nii.gz"]
    assert summary.ignored == 2 and summary.known == 0 and len(summary.rejected) == 5
    assert not (summary.folder / ".incoming").exists()


def test_raw_dataset_is_what_nnunet_expects(raw, mixed):
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    folder = prepare(mixed).folder
    content = json.loads((folder / "dataset.json").read_text())
    assert content["channel_names"] == {"0": "MR"} and content["labels"] == {"background": 0, "body": 1}
    assert content["numTraining"] == 4 and content["file_ending"] == ".nii.gz"
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    files = get_filenames_of_train_images_and_targets(str(folder))
    assert len(files) == 4
    for case in files.values():
        image, properties = NibabelIOWithReorient().read_images(case["images"])
        label, label_properties = NibabelIOWithReorient().read_seg(case["label"])
        assert label.shape == image.shape and set(np.unique(label)) == {0.0, 1.0}
        assert label_properties["spacing"] == properties["spacing"]
        np.testing.assert_array_equal(
            label_properties["nibabel_stuff"]["reoriented_affine"], properties["nibabel_stuff"]["reoriented_affine"]
        )


@pytest.mark.slow
def test_nnunet_accepts_the_dataset(raw, save):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    save("a.nii.gz", seed=1, affine=np.diag([-1.0, -1.0, 2.0, 1.0]))
    path = save("b.nii.gz", seed=2)
    image = nibabel.load(path)
    image.header.set_zooms((1.004, 1.0, 1.0))  # within the tolerance, yet not the affine's
    (path).write_bytes(gzip.compress(image.to_bytes()))
    folder = prepare(path.parent).folder
    verify_dataset_integrity(str(folder), num_processes=1)  # raises where nnU-Net objects
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


def test_gzipped_nifti_is_linked_and_others_are_rewritten_with_their_type(raw, mixed):
    folder = prepare(mixed).folder
    rows = {row["case"]: row for row in table(folder, "provenance.csv")}
    link = folder / "imagesTr" / "siteA_scan_1_0000.nii.gz"
    assert rows["siteA_scan_1"]["status"] == "linked"
    assert link.is_symlink() and os.readlink(link) == str(mixed / "siteA/scan 1.nii.gz")
    written = folder / "imagesTr" / "siteB_three_0000.nii.gz"
    image, original = nibabel.load(written), SimpleITK.ReadImage(str(mixed / "siteB/three.nrrd"))
    assert not written.is_symlink() and rows["siteB_three"]["status"] == "rewritten"
    assert image.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(image.dataobj), SimpleITK.GetArrayFromImage(original).T)
    again = SimpleITK.ReadImage(str(written))
    assert again.GetSpacing() == original.GetSpacing() and again.GetDirection() == original.GetDirection()
    assert rows["siteB_three"]["spacing_mm"] == "1x2x3" and rows["siteB_three"]["shape"] == "16x18x20"
    assert rows["siteB_three"]["orientation"] == "LPS"
    source = (mixed / "siteB/three.nrrd").read_bytes()
    assert rows["siteB_three"]["sha256"] == hashlib.sha256(source).hexdigest()


def test_image_is_copied_where_links_are_not_possible(raw, source, save, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(case_ledger.os, "symlink", refuse)
    path = save("a.nii.gz")
    folder = prepare(source).folder
    copy = folder / "imagesTr" / "a_0000.nii.gz"
    assert not copy.is_symlink() and copy.read_bytes() == path.read_bytes()
    assert table(folder, "provenance.csv")[0]["status"] == "copied"


def test_second_run_changes_nothing_and_a_third_adds_only_what_is_new(raw, mixed, save):
    folder = prepare(mixed).folder
    before = {p: p.lstat().st_mtime_ns for p in folder.rglob("*Tr/*")}
    tables = (folder / "provenance.csv").read_bytes(), (folder / "rejected.csv").read_bytes()
    again = prepare(mixed)
    assert (again.added, again.known, len(again.rejected)) == ((), 4, 5)
    assert {p: p.lstat().st_mtime_ns for p in folder.rglob("*Tr/*")} == before
    assert ((folder / "provenance.csv").read_bytes(), (folder / "rejected.csv").read_bytes()) == tables
    save("siteC/new.nii.gz", seed=9)
    third = prepare(mixed)
    assert (third.added, third.known, len(third.rejected)) == (("siteC_new",), 4, 5)
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 5


def test_touched_file_is_recognised_by_its_content(raw, source, save):
    path = save("a.nii.gz")
    prepare(source)
    os.utime(path, (1, 1))
    assert (prepare(source).added, prepare(source).known) == ((), 1)


def test_mended_file_is_taken(raw, source, save):
    save("good.nii.gz", seed=1)
    (source / "bad.nii.gz").touch()
    assert len(prepare(source).rejected) == 1
    save("bad.nii.gz", seed=2)
    summary = prepare(source)
    assert (summary.added, summary.rejected) == (("bad",), ())
    assert table(summary.folder, "rejected.csv") == []


def test_changed_source_is_taken_anew_under_its_name(raw, source, save):
    save("a.nii.gz", seed=1)
    folder = prepare(source).folder
    label = (folder / "labelsTr" / "a.nii.gz").read_bytes()
    noise = np.random.default_rng(0).uniform(50, 100, (9, 9, 9))
    save("a.nii.gz", array=np.roll(np.pad(noise, 4), 3, axis=0))
    assert prepare(source).added == ("a",)
    assert (folder / "labelsTr" / "a.nii.gz").read_bytes() != label
    (source / "a.nii.gz").write_bytes(b"broken")
    summary = prepare(source)
    assert len(summary.rejected) == 1 and not any((folder / "imagesTr").iterdir())


def test_moved_source_keeps_its_case(raw, source, save):
    path = save("a.nii.gz", seed=1)
    save("b.nii.gz", seed=2)
    folder = prepare(source).folder
    (source / "sub").mkdir()
    path.rename(source / "sub" / "renamed.nii.gz")
    summary = prepare(source)
    assert (summary.added, summary.missing) == (("a",), ())
    assert (folder / "imagesTr" / "a_0000.nii.gz").resolve() == (source / "sub" / "renamed.nii.gz").resolve()
    assert len(table(folder, "provenance.csv")) == 2


def test_duplicate_steps_in_when_its_twin_is_gone(raw, source, save):
    first = save("a.nii.gz", seed=1)
    save("b.nii.gz", seed=1)
    prepare(source)
    first.unlink()
    summary = prepare(source)
    assert (summary.added, summary.rejected, summary.missing) == (("a",), (), ())


def test_lost_source_is_reported(raw, source, save):
    save("a.nii.gz", seed=1)
    save("b.nii.gz", seed=2)
    prepare(source)
    (source / "b.nii.gz").unlink()
    assert prepare(source).missing == ("b",)


def test_names_are_clean_unique_and_stable(raw, source, save):
    first = save("siteA/scan 1.nii.gz", seed=1)
    second = save("siteA_scan_1.nii.gz", seed=2)
    third = save("Sitea/SCAN (1).nii.gz", seed=3)
    fourth = save("Zürich/Kopf №1.nii.gz", seed=4)
    names = {row["source"]: row["case"] for row in table(prepare(source).folder, "provenance.csv")}
    tag = {path: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in (first, second, third)}
    assert names[str(third)] == "Sitea_SCAN_1"  # first in the order of paths
    assert names[str(first)] == f"siteA_scan_1_{tag[first]}"  # equal but for its case: some file systems see one file
    assert names[str(second)] == f"siteA_scan_1_{tag[second]}"
    assert names[str(fourth)] == "Z_rich_Kopf_1"
    assert {r["source"]: r["case"] for r in table(prepare(source).folder, "provenance.csv")} == names


def test_second_folder_joins_the_dataset_and_keeps_the_first_tables(raw, tmp_path, source, save):
    save("a.nii.gz", seed=1)
    (source / "bad.nii.gz").touch()
    prepare(source)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.nii.gz").write_bytes(save("tmp.nii.gz", seed=2).read_bytes())
    summary = prepare(other)
    assert len(summary.added) == 1 and summary.added[0].startswith("a_") and summary.rejected == ()
    assert len(table(summary.folder, "rejected.csv")) == 1


@pytest.mark.slow
def test_two_spawned_workers_give_the_same_tables_as_one(raw, mixed):
    one = prepare_dataset(mixed, 501, "One", processes=1).folder
    two = prepare_dataset(mixed, 502, "Two", processes=2).folder
    for name in ("provenance.csv", "rejected.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert hashes(one / "labelsTr") == hashes(two / "labelsTr")


def test_interruption_leaves_a_dataset_that_the_next_run_completes(raw, mixed, monkeypatch):
    examine, seen = examination.examine, []

    def interrupted(task):
        seen.append(task)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return examine(task)

    with monkeypatch.context() as patch:
        patch.setattr(examination, "examine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(mixed)
    folder = raw / "Dataset501_Scans"
    cases = table(folder, "provenance.csv")
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == len(cases) == 1
    assert not (folder / ".incoming").exists()
    assert len(prepare(mixed).added) == 3
    assert len(table(folder, "provenance.csv")) == 4 and len(table(folder, "rejected.csv")) == 5


def test_ct_is_named_ct(raw, source, save):
    array = np.full((8, 9, 10), -1000.0)
    array[2:6, 2:6, 2:6] = 50
    save("a.nii.gz", array)
    folder = prepare(source, modality="CT").folder
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "CT"}
    np.testing.assert_array_equal(nibabel.load(folder / "labelsTr" / "a.nii.gz").get_fdata(), array > -500)


def test_targets_that_are_not_ours_are_refused(raw, nnunet_environment, tmp_path, source, save, monkeypatch):
    save("a.nii.gz")
    (raw / "Dataset501_Scans").mkdir()
    with pytest.raises(UserError, match="not made by prepare"):
        prepare(source)
    assert not any((raw / "Dataset501_Scans").iterdir())
    with pytest.raises(UserError, match="already belongs to Dataset501_Scans"):
        prepare_dataset(source, 501, "Other")
    (Path(nnunet_environment["nnUNet_results"]) / "Dataset502_Old").mkdir()
    with pytest.raises(UserError, match="already belongs to Dataset502_Old"):
        prepare_dataset(source, 502, "New")
    prepare_dataset(source, 503, "Mr", processes=1)
    with pytest.raises(UserError, match="made with --modality MR"):
        prepare_dataset(source, 503, "Mr", modality="CT")
    with pytest.raises(UserError, match="lies inside the input folder"):
        prepare_dataset(tmp_path, 504, "Inside")
    assert not (raw / "Dataset504_Inside").exists()
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set") as caught:
        prepare(source)
    assert "export nnUNet_raw=" in caught.value.remedy


def test_arguments_that_make_no_dataset_are_refused(raw, tmp_path, source, save):
    with pytest.raises(UserError, match="not a folder"):
        prepare(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no scans"):
        prepare(source)
    save("a.nii.gz")
    for dataset_id, name in ((0, "A"), (1000, "A"), (5, "two words"), (5, "")):
        with pytest.raises(UserError):
            prepare_dataset(source, dataset_id, name)
    assert not any(raw.iterdir())


def reasons(summary, source):
    return {Path(row.source).relative_to(source).as_posix(): row.reason for row in summary.rejected}


def test_segmentations_and_other_modalities_are_set_aside_unless_kept(raw, source, save, phantom):
    save("imagesTr/a_0000.nii.gz", seed=1)
    save("labelsTr/a.nii.gz", (phantom(1) > 50).astype(np.uint8))
    save("other/a.nii.gz", (phantom(2) > 50).astype(np.uint8))
    save("other/b.nii.gz", phantom(3) - 1000)
    save("other/PET.nii.gz", seed=4)
    summary = prepare(source)
    assert summary.added == ("imagesTr_a_0000",) and summary.refused == () and len(summary.set_aside) == 4
    told = reasons(summary, source)
    assert "labels in labelsTr" in told["labelsTr/a.nii.gz"]
    assert "values are those of a segmentation" in told["other/a.nii.gz"]
    assert "looks like CT" in told["other/b.nii.gz"] and "says PET" in told["other/PET.nii.gz"]
    assert prepare(source).rejected == summary.rejected
    kept = prepare(source, keep=["other/*"])
    assert sorted(kept.added) == ["other_PET", "other_a", "other_b"]
    assert set(reasons(kept, source)) == {"labelsTr/a.nii.gz"}
    silent = prepare(source, exclude=["labelsTr/*"])
    assert (silent.rejected, silent.excluded, silent.known) == ((), 1, 4)
    assert table(silent.folder, "rejected.csv") == []


def test_a_dataset_without_a_case_may_become_one_of_another_modality(raw, source, save, phantom):
    save("a.nii.gz", phantom() - 1000)
    assert prepare(source).added == ()
    summary = prepare(source, modality="CT")
    assert (summary.added, summary.rejected) == (("a",), ())
    assert json.loads((summary.folder / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def test_binary_shapes_are_no_segmentations_where_they_are_asked_for(raw, source, save, phantom):
    save("a.nii.gz", (phantom(1) > 50).astype(np.uint8))
    assert prepare(source, modality="noNorm").added == ("a",)


def test_a_refusal_for_a_cause_outside_of_the_file_is_tried_again(raw, source, save, monkeypatch):
    save("a.nii.gz", seed=1)
    (source / "bad.nii.gz").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr("nnssl_plugin.io.refusals.available_memory", lambda: 1)
        first = prepare(source)
    assert first.added == () and "too large for the memory" in reasons(first, source)["a.nii.gz"]
    seen = []
    examine = examination.examine
    monkeypatch.setattr(examination, "examine", lambda task: seen.append(task.group.name) or examine(task))
    assert prepare(source).added == ("a",)
    assert seen == ["a"]  # the damaged file is damaged still


def test_names_of_any_bytes_and_length_are_taken_and_known_again(raw, source, save):
    long = "/".join(["x" * 200] * 3)
    save(f"{long}/a.nii.gz", seed=1)
    odd = os.path.join(os.fsencode(source), b"M\xfcller \xff.nii.gz")
    os.rename(save("b.nii.gz", seed=2), odd)
    summary = prepare(source)
    assert len(summary.added) == 2 and summary.rejected == ()
    assert os.fsdecode(odd) in {row.source for row in read_rows(summary.folder / "provenance.csv", Origin)}
    assert (summary.folder / "imagesTr" / "M_ller_0000.nii.gz").resolve() == Path(os.fsdecode(odd))
    assert (prepare(source).known, prepare(source).added) == (2, ())


def test_the_dataset_itself_is_not_taken_through_a_link(raw, source, save):
    save("a.nii.gz")
    (source / "raw").symlink_to(raw)
    prepare(source)
    again = prepare(source)
    assert (again.known, again.added, again.rejected) == (1, (), ())


def test_whatever_a_reader_raises_the_others_go_on(raw, source, save, monkeypatch):
    for name in ("a", "b"):
        save(f"{name}.nii.gz", seed=ord(name))

    def load(path):
        if path.name == "a.nii.gz":
            raise ReferenceError("of a kind nobody expects")
        return load_scan(path)

    monkeypatch.setattr(examination, "load_scan", load)
    summary = prepare(source)
    assert summary.added == ("b",) and "ReferenceError: of a kind" in summary.rejected[0].reason


@pytest.mark.slow
def test_a_file_that_kills_its_worker_ends_nothing_else(raw, source, save, monkeypatch):
    for number in range(5):
        save(f"{number}.nii.gz", seed=number)
    fork = multiprocessing.get_context("fork")  # spawned workers would not see the patched function
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _method: fork)
    monkeypatch.setattr(examination, "_read_volumes", _killed_by_2)
    summary = prepare(source, processes=2)
    assert sorted(summary.added) == ["0", "1", "3", "4"]
    assert "was killed" in summary.rejected[0].reason and summary.rejected[0].stamp == ""


def _killed_by_2(task, source):
    if source.path.name == "2.nii.gz":
        os.kill(os.getpid(), 9)
    return READ_VOLUMES(task, source)
