"""Slices of a case: which, how they look, and what the template says of them."""

import itertools
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from nnssl_plugin.captions.captioners import SliceFacts, modality_of
from nnssl_plugin.captions.journal import JOURNAL_FILE, RECORD_FILE, merge_journal
from nnssl_plugin.captions.rendering import Volume
from nnssl_plugin.captions.template import TemplateCaptioner, TemplateOptions
from nnssl_plugin.captions.triplets import caption_dataset, choose_slices, triplet_pictures
from nnssl_plugin.data.triplets import Triplet, by_case, read_triplets, write_triplets
from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.planes import PLANES, RAS_AXIS
from nnssl_plugin.nnunet.raw_folders import training_files


def stored(ras_array, ras_affine, codes):
    """The same volume, stored in another orientation."""
    image = nibabel.Nifti1Image(ras_array, ras_affine)
    ras = nibabel.orientations.axcodes2ornt("RAS")
    turned = image.as_reoriented(nibabel.orientations.ornt_transform(ras, nibabel.orientations.axcodes2ornt(codes)))
    return Volume(turned.get_fdata(dtype=np.float32), turned.affine)


PLANES_OF = {"R": "sagittal", "L": "sagittal", "A": "coronal", "P": "coronal", "S": "axial", "I": "axial"}


def first_slice(*arguments, seed):
    return choose_slices(*arguments, seed=seed, count=1)[0]


def lines_of(folder):
    """Case → its only triplet."""
    lines = by_case(read_triplets(folder))
    assert all(len(slices) == 1 for slices in lines.values())
    return {case: slices[0] for case, slices in lines.items()}


@pytest.fixture
def dataset(raw, phantom):
    """A raw dataset of three cases, the last stored sagittally, made by hand as any nnU-Net dataset."""
    folder = raw / "Dataset007_Any"
    for index, codes in enumerate(["RAS", "LPS", "PSR"]):
        volume = stored(phantom(index), np.diag([1.0, 2.0, 3.0, 1.0]), codes)
        for where, array in (("imagesTr/c{}_0000", volume.array), ("labelsTr/c{}", volume.array > 50)):
            path = folder / f"{where.format(index)}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), volume.affine), path)
    content = {"channel_names": {"0": "T2"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": 3}))
    return folder


def test_every_plane_and_every_slice_with_body_is_drawn_and_no_other():
    body = np.zeros((6, 7, 8), dtype=bool)
    body[1:3, 4:7, 5] = True
    drawn = {first_slice(f"c{n}", body, np.eye(4), seed=0)[:2] for n in range(400)}
    expected = {("sagittal", i) for i in (1, 2)} | {("coronal", j) for j in (4, 5, 6)} | {("axial", 5)}
    assert drawn == expected


@pytest.mark.slow
def test_planes_are_drawn_uniformly_and_slices_too():
    body = np.ones((4, 4, 4), dtype=bool)
    draws = [first_slice(f"c{n}", body, np.eye(4), seed=1)[:2] for n in range(1200)]
    counts = [draws.count(pair) for pair in itertools.product(PLANES, range(4))]
    assert sum(counts) == 1200
    assert all(58 < count < 142 for count in counts)  # 100 expected, 4.4 standard deviations


def test_draw_depends_on_seed_and_case_alone():
    body = np.ones((30, 31, 32), dtype=bool)
    first = [first_slice(f"c{n}", body, np.eye(4), seed=0) for n in range(20)]
    assert first == [first_slice(f"c{n}", body, np.eye(4), seed=0) for n in reversed(range(20))][::-1]
    assert first != [first_slice(f"c{n}", body, np.eye(4), seed=1) for n in range(20)]


def test_without_label_the_whole_image_counts():
    drawn = {first_slice(f"c{n}", np.zeros((3, 3, 3)), np.eye(4), seed=0)[:2] for n in range(200)}
    assert drawn == set(itertools.product(PLANES, range(3)))


def test_template_states_what_the_file_knows_and_no_more():
    facts = SliceFacts("c", "CT", "axial", 0.62, (350.0, 280.4), 1.5, "abdomen")
    bare = SliceFacts("c", "", "sagittal", 1.0, (3.0, 4.0), 1.0, "")
    first, second = TemplateCaptioner().describe([None, None], [facts, bare])
    assert first == (
        "An axial CT slice of the abdomen, in the middle third of the volume, 62% of the way from inferior to "
        "superior. It shows 350 mm by 280 mm; neighbouring slices are 1.5 mm apart."
    )
    assert second.startswith("A sagittal slice, in the right third of the volume, 100% of the way from left to right.")


def test_template_leaves_out_what_its_options_say():
    facts = SliceFacts("c", "CT", "axial", 0.62, (350.0, 280.4), 1.5, "abdomen")
    texts = {
        (place, size): TemplateCaptioner(TemplateOptions(place=place, size=size)).describe([None], [facts])[0]
        for place in (True, False)
        for size in (True, False)
    }
    assert texts[False, False] == "An axial CT slice of the abdomen."
    assert texts[True, False] == texts[True, True].split(". ")[0] + "."
    assert texts[False, True] == texts[False, False] + " " + texts[True, True].split(". ")[1]


def test_channel_names_that_choose_a_normalisation_are_no_modality():
    assert modality_of({"channel_names": {"0": "T1", "1": "T2"}}) == "T1"
    assert modality_of({"modality": {"0": "CT"}}) == "CT"
    assert [modality_of({"channel_names": {"0": n}}) for n in ("noNorm", "zscore", "rescale_to_0_1")] == [""] * 3


def test_every_plane_is_drawn_in_turn_without_repetition_and_more_slices_add_to_fewer():
    body = np.zeros((9, 9, 9), dtype=bool)
    body[1:8, 2:6, 3:5] = True  # 7, 4 and 2 slices with body
    for case in ("a", "b", "c", "d"):
        drawn = choose_slices(case, body, np.eye(4), seed=0, count=9)
        assert len(set(drawn)) == 9
        assert {plane: sum(p == plane for p, *_ in drawn[:6]) for plane in PLANES} == dict.fromkeys(PLANES, 2)
        for plane in PLANES:
            held = {index for p, index, _ in drawn if p == plane}
            others = tuple(axis for axis in range(3) if axis != RAS_AXIS[plane])
            assert held <= set(np.flatnonzero(body.any(axis=others)))
        assert all(choose_slices(case, body, np.eye(4), seed=0, count=n) == drawn[:n] for n in range(1, 9))
    assert len(choose_slices("a", body, np.eye(4), seed=0, count=99)) == 7 + 4 + 2


def test_any_dataset_gets_slices_with_label(dataset):
    summary = caption_dataset(dataset, TemplateCaptioner(), seed=3, body_part="knee")
    triplets = read_triplets(dataset)
    assert (summary.added, summary.kept) == (24, 0)
    assert {case: len(slices) for case, slices in by_case(triplets).items()} == {"c0": 8, "c1": 8, "c2": 8}
    for triplet in triplets:
        label = nibabel.load(dataset / "labelsTr" / f"{triplet.case}.nii.gz")
        axis = [PLANES_OF[code] for code in nibabel.aff2axcodes(label.affine)].index(triplet.plane)
        assert triplet.n_slices == label.shape[axis]
        assert np.take(label.get_fdata(), triplet.slice, axis=axis).any()
        assert "T2 slice of the knee" in triplet.text and triplet.captioner == "template"
    line = json.loads((dataset / "triplets.jsonl").read_text().splitlines()[0])
    assert {"case", "plane", "slice", "n_slices", "text", "captioner"} <= set(line)


def test_second_run_keeps_lines_and_adding_cases_never_changes_others(dataset):
    first = caption_dataset(dataset, TemplateCaptioner(), body_part="knee")
    before = read_triplets(dataset)
    assert caption_dataset(dataset, TemplateCaptioner()) == type(first)(first.path, added=0, kept=24)
    for where in ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"):
        (dataset / where.format("b")).write_bytes((dataset / where.format("c0")).read_bytes())
    summary = caption_dataset(dataset, TemplateCaptioner())
    after = by_case(read_triplets(dataset))
    assert (summary.added, summary.kept, list(after)) == (8, 24, ["b", "c0", "c1", "c2"])
    assert [line for case, slices in after.items() if case != "b" for line in slices] == before


def test_a_file_with_one_line_per_case_gets_the_other_slices(dataset):
    caption_dataset(dataset, TemplateCaptioner(), slices=1)
    before = read_triplets(dataset)
    assert [line.case for line in before] == ["c0", "c1", "c2"]
    summary = caption_dataset(dataset, TemplateCaptioner(), slices=3)
    assert (summary.added, summary.kept) == (6, 3)
    after = by_case(read_triplets(dataset))
    assert {line for slices in after.values() for line in slices} >= set(before)
    assert all({line.plane for line in slices} == set(PLANES) for slices in after.values())
    assert caption_dataset(dataset, TemplateCaptioner(), slices=2).added == 0  # more than asked for stay


def test_other_seed_options_or_body_part_rewrite_and_foreign_lines_stay(dataset):
    caption_dataset(dataset, TemplateCaptioner(), slices=1)
    lines = lines_of(dataset)
    mine = Triplet("c1", "axial", 3, 16, "I wrote this.", "radiologist")
    write_triplets(dataset, {**lines, "c1": mine}.values())
    assert caption_dataset(dataset, TemplateCaptioner(), seed=5, slices=1).added == 2
    assert caption_dataset(dataset, TemplateCaptioner(), seed=5, slices=1, body_part="hip").added == 2
    after = lines_of(dataset)
    assert after["c1"] == mine
    assert "of the hip" in after["c0"].text and after["c0"].seed == 5
    short = TemplateCaptioner(TemplateOptions(size=False))
    assert caption_dataset(dataset, short, seed=5, slices=2, body_part="hip").added == 4
    after = by_case(read_triplets(dataset))
    assert after["c1"] == [mine]
    assert [(line.captioner, "mm" in line.text) for line in after["c0"]] == [("template size=False", False)] * 2


def test_a_line_mended_by_hand_stays_beside_those_of_the_captioner(dataset):
    caption_dataset(dataset, TemplateCaptioner(), slices=4)
    lines = read_triplets(dataset)
    mended = replace(lines[0], text="Mended.", captioner="me")
    write_triplets(dataset, [mended, *lines[1:]])
    assert caption_dataset(dataset, TemplateCaptioner(), slices=4).added == 0
    assert caption_dataset(dataset, TemplateCaptioner(), slices=4, body_part="hip").added == 11
    assert by_case(read_triplets(dataset))["c0"][0] == mended


def test_dataset_dict_several_channels_and_absent_labels(raw, dataset, phantom):
    folder = raw / "Dataset008_Dict"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(phantom(8), np.eye(4)), folder / "second.nii.gz")
    image = dataset / "imagesTr" / "c2_0000.nii.gz"
    case = {"images": [str(image), "second.nii.gz"], "label": "absent.nii.gz"}
    names = {"0": "FLAIR", "1": "T1"}
    content = {"channel_names": names, "labels": {}, "file_ending": ".nii.gz", "dataset": {"x": case}}
    (folder / "dataset.json").write_text(json.dumps(content))
    caption_dataset(folder, TemplateCaptioner())
    shape = dict(zip((PLANES_OF[c] for c in "PSR"), nibabel.load(image).shape, strict=True))
    for triplet in read_triplets(folder):
        assert triplet.n_slices == shape[triplet.plane] and "FLAIR slice" in triplet.text


def test_the_first_channel_that_a_case_has_is_described(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    content["channel_names"] = {"0": "T1", "1": "FLAIR"}
    (dataset / "dataset.json").write_text(json.dumps(content))
    for image in list((dataset / "imagesTr").glob("*_0000.nii.gz")):
        second = image.with_name(image.name.replace("_0000", "_0001"))
        second.write_bytes(image.read_bytes())
    first = dataset / "imagesTr" / "c1_0000.nii.gz"
    stored = nibabel.load(first)
    nibabel.save(nibabel.Nifti1Image(np.zeros(stored.shape, dtype=np.uint8), stored.affine), first)
    (dataset / "modalities.json").write_text(json.dumps({"c1": [1]}))
    caption_dataset(dataset, TemplateCaptioner())
    lines = by_case(read_triplets(dataset))
    assert all("FLAIR slice" in line.text for line in lines["c1"])
    assert all("T1 slice" in line.text for case in lines if case != "c1" for line in lines[case])
    pictures = {triplet.case: picture for triplet, picture in triplet_pictures(dataset, read_triplets(dataset))}
    assert np.ptp(pictures["c1"]) > 0  # not the zeros of the absent channel


class Brightness:
    name = "brightness"

    def describe(self, slices, facts):
        assert all(picture.ndim == 3 and picture.shape[2] == 3 for picture in slices)
        return [f"  {f.plane},\nmean {p.mean():.1f}\n" for p, f in zip(slices, facts, strict=True)]


def test_other_captioner_sees_the_slices_of_a_case_and_its_texts_become_one_line(dataset):
    caption_dataset(dataset, Brightness(), slices=4)
    lines = read_triplets(dataset)
    assert len(lines) == 12 and all("\n" not in t.text and t.text.startswith(t.plane) for t in lines)


@pytest.mark.parametrize(("texts", "problem"), [(["one"], "1 texts for 2 slices of c0"), (["one", " "], "empty text")])
def test_a_captioner_that_fails_is_named(dataset, monkeypatch, texts, problem):
    monkeypatch.setattr(Brightness, "describe", lambda self, slices, facts: texts)
    with pytest.raises(UserError, match=problem):
        caption_dataset(dataset, Brightness(), slices=2)


def test_unreadable_image_is_an_error_that_keeps_earlier_lines(dataset):
    (dataset / "imagesTr" / "c1_0000.nii.gz").write_bytes(b"broken")
    with pytest.raises(UserError, match="c1_0000"):
        caption_dataset(dataset, TemplateCaptioner())
    assert list(by_case(read_triplets(dataset))) == ["c0"]


def test_a_text_is_on_the_disk_before_the_next_case_is_described(dataset):
    """A kill, after which nothing cleans up, loses nothing that was described."""
    seen = []

    class Slow(Brightness):
        def describe(self, slices, facts):
            seen.append(len((dataset / JOURNAL_FILE).read_text().splitlines()) - 1)
            return super().describe(slices, facts)

    caption_dataset(dataset, Slow(), slices=2)
    assert seen == [0, 2, 4] and not (dataset / JOURNAL_FILE).exists()


@pytest.mark.parametrize("torn", [b"", b'{"triplet": {"case": "c1", "pl', b"\0\0\0\n\0\n"])
def test_what_a_killed_run_wrote_down_is_taken_over_once(dataset, torn):
    """The journal of a run that had described one case, with what a kill or a failing disk may leave behind it."""
    line = Triplet("c1", "axial", 3, 16, "Kept.", "brightness", seed=0)
    header = {"id": "x", "run": {"captioner": "brightness", "seed": 0, "body_part": None}, "options": {"a": 1}}
    entry = {"triplet": vars(line), "cost": {"texts": 1, "requests": 3, "tokens_in": 5, "tokens_out": 7}}
    journal = "".join(json.dumps(content) + "\n" for content in (header, entry)).encode() + torn
    for _ in range(2):  # the second time as if the kill had come just before the journal was removed
        (dataset / JOURNAL_FILE).write_bytes(journal)
        merge_journal(dataset, set())
        assert read_triplets(dataset) == [line] and not (dataset / JOURNAL_FILE).exists()
        record = json.loads((dataset / RECORD_FILE).read_text())["captioners"]["brightness"]
        assert record == {"options": {"a": 1}, "cost": entry["cost"]}
    summary = caption_dataset(dataset, Brightness(), slices=1)
    assert (summary.added, summary.kept) == (2, 1) and line in read_triplets(dataset)


@pytest.mark.parametrize("torn", [b"", b'{"id": "x", "r'])
def test_a_run_killed_before_its_first_text_leaves_nothing(dataset, torn):
    (dataset / JOURNAL_FILE).write_bytes(torn)
    assert caption_dataset(dataset, TemplateCaptioner(), slices=1).added == 3


def test_two_processes_do_not_describe_one_dataset(dataset):
    holder = {"host": "another", "pid": 1, "since": "today"}
    (dataset / ".caption.lock").write_text(json.dumps(holder))
    with pytest.raises(UserError, match="Process 1 on another works in"):
        caption_dataset(dataset, TemplateCaptioner())


def test_fewer_than_one_slice_is_refused(dataset):
    with pytest.raises(UserError, match="--slices 0"):
        caption_dataset(dataset, TemplateCaptioner(), slices=0)


def test_training_files_are_those_that_nnunet_finds(dataset):
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    theirs = get_filenames_of_train_images_and_targets(str(dataset))
    ours = {case: (str(image), str(label)) for case, (image, label) in training_files(dataset).items()}
    assert ours == {case: (files["images"][0], files["label"]) for case, files in theirs.items()}
