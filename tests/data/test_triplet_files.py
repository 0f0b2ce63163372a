"""The two files that training reads: round trips, and what a damaged or stale file says."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from nnssl_plugin.data.triplets import (
    Embeddings,
    Triplet,
    by_case,
    describe_encoders,
    load_embeddings,
    place_of,
    read_embeddings,
    read_triplets,
    text_sha256,
    write_embeddings,
    write_triplets,
)
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import write_json

ONE = Triplet("a", "axial", 3, 9, "Über dem Zwerchfell.", "template", 4, "chest")
TWO = Triplet("b", "sagittal", 0, 1, "A slice.", "me")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "Dataset042_Test"
    path.mkdir()
    return path


def rows(*triplets, size=5):
    rng = np.random.default_rng(0)
    return Embeddings(
        case=np.array([t.case for t in triplets]),
        text_sha256=np.array([text_sha256(t.text) for t in triplets]),
        key=np.array(["k" * 64 for _ in triplets]),
        image=rng.normal(size=(len(triplets), size)).astype(np.float32),
        text=rng.normal(size=(len(triplets), size)).astype(np.float32),
        weights="some model",
    )


def with_places(*triplets):
    return replace(rows(*triplets), place=np.array([place_of(t) for t in triplets]))


def test_triplets_come_back_as_written_in_their_order(folder):
    write_triplets(folder, [TWO, ONE])
    assert read_triplets(folder) == [TWO, ONE]
    assert "Über" in (folder / "triplets.jsonl").read_text(encoding="utf-8")


def test_lines_with_the_six_fields_alone_or_with_foreign_ones_are_read(folder):
    line = {"case": "a", "plane": "coronal", "slice": 2, "n_slices": 5, "text": "x", "captioner": "me", "more": 1}
    (folder / "triplets.jsonl").write_text(json.dumps(line) + "\n\n")
    assert read_triplets(folder) == [Triplet("a", "coronal", 2, 5, "x", "me")]


def test_several_slices_of_a_case_are_grouped_by_it(folder):
    other, same_index = replace(ONE, slice=4), replace(ONE, plane="coronal")
    write_triplets(folder, [ONE, TWO, other, same_index])
    assert by_case(read_triplets(folder)) == {"a": [ONE, other, same_index], "b": [TWO]}
    assert len({triplet.key for triplet in (ONE, TWO, other, same_index)}) == 4


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_every_character_of_a_text_comes_back(folder, separator):
    odd = replace(ONE, text=f"One{separator}two.", body_part=f"left{separator}knee")
    write_triplets(folder, [odd, TWO])
    assert read_triplets(folder) == [odd, TWO]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"plane": "oblique"}, "plane 'oblique'"),
        ({"slice": 5}, "slice 5 of 5"),
        ({"slice": -1}, "slice -1 of 5"),
        ({"slice": "x"}, "ValueError"),
        ({"text": " "}, "text is empty"),
        ({"case": None}, "occurs twice"),
    ],
)
def test_damaged_lines_name_their_number(folder, change, problem):
    good = {"case": None, "plane": "axial", "slice": 2, "n_slices": 5, "text": "x", "captioner": "me"}
    lines = (good, {**good, "case": 1, **change})
    (folder / "triplets.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(UserError, match=problem) as caught:
        read_triplets(folder)
    assert "line 2" in caught.value.problem


@pytest.mark.parametrize("line", ["{", "[]", "{}", "3"])
def test_lines_that_are_no_triplet_are_refused(folder, line):
    (folder / "triplets.jsonl").write_text(line)
    with pytest.raises(UserError, match="line 1"):
        read_triplets(folder)


def test_absent_files_name_the_command(folder):
    with pytest.raises(UserError) as caught:
        read_triplets(folder)
    assert caught.value.remedy == "Run: nnssl_plugin caption -d 042"
    with pytest.raises(UserError) as caught:
        read_embeddings(folder, [ONE])
    assert caught.value.remedy == "Run: nnssl_plugin caption -d 042"


def test_embeddings_come_back_by_slice(folder):
    other = replace(ONE, slice=4)
    stored = with_places(ONE, TWO, other)
    write_embeddings(folder, stored)
    back = read_embeddings(folder, [other, TWO])
    assert list(back) == [other.key, TWO.key]
    for row, triplet in ((2, other), (1, TWO)):
        np.testing.assert_array_equal(back[triplet.key][0], stored.image[row])
        np.testing.assert_array_equal(back[triplet.key][1], stored.text[row])
    assert load_embeddings(folder).weights == "some model"


def test_files_of_before_there_was_a_place_serve_cases_with_one_slice(folder):
    stored = rows(ONE, TWO)
    write_embeddings(folder, stored)
    back = read_embeddings(folder, [TWO, ONE])
    np.testing.assert_array_equal(back[ONE.key][0], stored.image[0])
    assert list(read_embeddings(folder, [replace(ONE, slice=4)])) == [("a", "axial", 4)]  # nothing there says otherwise
    with pytest.raises(UserError, match=r"no embedding of a \(axial 3/9\), a \(axial 4/9\)"):
        read_embeddings(folder, [ONE, replace(ONE, slice=4)])


def test_missing_and_stale_rows_name_slice_and_command(folder):
    write_embeddings(folder, with_places(ONE))
    with pytest.raises(UserError, match=r"no embedding of b \(sagittal 0/1\)") as caught:
        read_embeddings(folder, [ONE, TWO])
    assert "caption -d 042" in caught.value.remedy
    with pytest.raises(UserError, match=r"text of a \(axial 3/9\) has changed"):
        read_embeddings(folder, [replace(ONE, text="Other words.")])
    with pytest.raises(UserError, match=r"c \(axial 0/1\), d .*, e .* and 2 more"):
        read_embeddings(folder, [Triplet(name, "axial", 0, 1, "x", "me") for name in "cdefg"])


def test_rows_of_another_slice_or_plane_do_not_serve(folder):
    write_embeddings(folder, with_places(ONE))
    assert load_embeddings(folder).place.tolist() == ["axial 3/9"]
    assert list(read_embeddings(folder, [ONE])) == [ONE.key]
    for change in ({"slice": 4}, {"plane": "coronal"}, {"n_slices": 10}):
        with pytest.raises(UserError, match="no embedding of a") as caught:
            read_embeddings(folder, [replace(ONE, **change)])
        assert "caption -d 042" in caught.value.remedy


def test_encoders_are_described_with_what_they_know(folder):
    assert "know nothing of what they show" in describe_encoders(folder, "random-small sha256:12")
    assert describe_encoders(folder, "ViT-B-32 a.pt sha256:12") == "ViT-B-32 a.pt sha256:12"
    assert describe_encoders(folder, "clip_pair sha256:12") == "clip_pair sha256:12"  # of another dataset
    record = folder / "clip_pair" / "clip_pair.json"
    for base, said in (("random-small sha256:9", "from scratch"), ("ViT-B-32 a.pt sha256:9", "from ViT-B-32 a.pt")):
        write_json(record, {"base_weights": base})
        assert said in describe_encoders(folder, "clip_pair sha256:12")


def test_damaged_archive_is_refused_and_pickles_are_never_read(folder):
    path = folder / "clip_embeddings.npz"
    for content in (b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load_embeddings(folder)
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(path, case=objects, text_sha256=objects, key=objects, image=objects, text=objects, weights="w")
    with pytest.raises(UserError, match="cannot be read"):
        load_embeddings(folder)
    table = {name: value for name, value in vars(rows(ONE, TWO)).items() if value is not None}
    np.savez(path, **{**table, "image": table["image"][:1]})
    with pytest.raises(UserError, match="differ in length"):
        load_embeddings(folder)
    np.savez(path, **{name: value for name, value in table.items() if name != "key"})
    with pytest.raises(UserError, match="cannot be read"):
        load_embeddings(folder)


def test_reading_needs_neither_open_clip_nor_torch():
    heavy = "{'open_clip', 'torch', 'SimpleITK'}"
    code = f"import sys, nnssl_plugin.data.triplets; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r\n", "\n"])
def test_a_text_with_any_character_is_read_again(folder, inside):
    triplet = replace(ONE, text=f"left{inside}right")
    write_triplets(folder, [triplet, TWO])
    assert read_triplets(folder) == [triplet, TWO]


def test_a_byte_order_mark_is_skipped_and_latin_1_is_told(folder):
    path = write_triplets(folder, [ONE])
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert read_triplets(folder) == [ONE]
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_triplets(folder)
