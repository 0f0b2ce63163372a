"""Which files are images of one case."""

from pathlib import Path

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.grouping import group_scans, parse_modalities

ROOT = Path("/scans")


def grouped(names, specs, **options):
    return group_scans([ROOT / name for name in names], ROOT, parse_modalities(specs, **options))


def cases(found):
    return {group.name: {s.channels[0]: s.relative.as_posix() for s in group.images} for group in found.groups}


@pytest.mark.parametrize(
    ("names", "patterns", "keys"),
    [
        (["p1/t1n.nii.gz", "p1/t2w.nii.gz"], ["*t1n*", "*t2w*"], ["p1"]),
        (["B-1/B-1-t1n.nii.gz", "B-1/B-1-t2w.nii.gz"], ["*t1n*", "*t2w*"], ["B-1/B-1"]),
        (["T1/a.nii", "T2/a.nii", "T2/b.nii"], ["T1/*", "T2/*"], ["a", "b"]),
        (["a_T1_v1.mha", "a_T2_v1.mha"], ["*_T1_*", "*_T2_*"], ["a_v1"]),
        (["x/t1.nii.gz", "x/t2.nii.gz"], ["t1.nii.gz", "t2.nii.gz"], ["x"]),
        (["s1_T1.nii.gz", "s2_T1.nii.gz"], ["s?_T1*", "s?_T2*"], ["1", "2"]),
        (["pa_T1.nii.gz", "pb_T1.nii.gz", "pc_T1.nii.gz"], ["p[ab]_T1*", "p[!ab]_T*"], ["a", "b", "c_1"]),
        (["t1/x/t1.nii.gz", "t1/x/t2.nii.gz"], ["*t1*", "*t2*"], ["t1/x"]),
    ],
)
def test_what_the_wildcards_match_names_the_case(names, patterns, keys):
    found = grouped(names, [f"{name}={pattern}" for name, pattern in zip("AB", patterns, strict=True)])
    assert sorted(cases(found)) == keys and found.refusals == () and found.left_out == 0


def test_the_pattern_with_most_letters_takes_a_file_and_equal_ones_refuse_it():
    found = grouped(["a_t1.nii.gz", "a_t1ce.nii.gz", "b.nii.gz"], ["T1=*_t1*", "T1CE=*_t1ce*"])
    assert cases(found) == {"a": {0: "a_t1.nii.gz", 1: "a_t1ce.nii.gz"}} and found.left_out == 1
    found = grouped(["a_t1_t2.nii.gz"], ["T1=*_t1*", "T2=*_t2*"])
    assert found.groups == () and "T1 and T2 match it alike" in found.refusals[0].reason


def test_a_modality_may_have_several_patterns_and_a_folder_may_be_the_case():
    found = grouped(
        ["p/003_T1w.nii", "q/004_t1n.nii", "q/009_T2.nii"], ["T1=*T1w*", "T1=*t1n*", "T2=*T2*"], cases_by="folder"
    )
    assert cases(found) == {"p": {0: "p/003_T1w.nii"}, "q": {0: "q/004_t1n.nii", 1: "q/009_T2.nii"}}


def test_two_images_of_one_modality_refuse_the_case_and_a_mask_beside_does_not():
    found = grouped(["p/a_T1.nii", "p/b_T1.nii", "p/c_T2.nii"], ["T1=*T1*", "T2=*T2*"], cases_by="folder")
    assert found.groups == () and len(found.refusals) == 3
    assert all("several images of T1 for one case: p" in refusal.reason for refusal in found.refusals)
    found = grouped(["p/T1.nii", "p/T1_mask.nii"], ["T1=*T1*"], cases_by="folder")
    assert len(found.groups) == 1 and found.refusals == ()  # the mask is set aside by its name when it is read


def test_labels_belong_to_their_case_and_a_case_without_one_is_refused():
    names = ["images/a_T1.nii", "images/b_T1.nii", "labels/a.nii", "labels/c.nii"]
    found = grouped(names, ["T1=images/*_T1*"], labels=["labels/*"])
    assert [(g.name, g.label.relative.as_posix()) for g in found.groups] == [("a", "labels/a.nii")]
    assert {r.source[7:]: r.reason for r in found.refusals} == {
        "images/b_T1.nii": "no segmentation for its case: b",
        "labels/c.nii": "a segmentation without an image",
    }


def test_a_table_names_files(tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text(f"case,subject,CT,PET,label\none,s,x/1.nii,{ROOT}/x/2.nii,y/3.nii\ntwo,s,,x/4.nii,y/5.nii\n")
    names = [f"x/{k}.nii" for k in (1, 2, 4, 6)] + ["y/3.nii", "y/5.nii"]
    found = grouped(names, [str(table)])
    assert cases(found) == {"one": {0: "x/1.nii", 1: "x/2.nii"}, "two": {1: "x/4.nii"}} and found.left_out == 1
    assert [group.label.relative.as_posix() for group in found.groups] == ["y/3.nii", "y/5.nii"]
    with pytest.raises(UserError, match="not below"):
        grouped(names[1:], [str(table)])
    for text, problem in {
        "case,label\na,x/1.nii\n": "names no images",
        "case,T1\na,\n": "has no image",
        "case,T1,label\na,x/1.nii,\n": "has no label",
        "case,T1\na,x/1.nii\nb,x/1.nii\n": "twice",
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=problem):
            grouped(names, [str(table)])


def test_patterns_that_are_none_or_match_nothing_are_refused():
    for specs in (["T1"], ["=*"], ["T1="]):
        with pytest.raises(UserError, match="--modalities"):
            parse_modalities(specs)
    with pytest.raises(UserError, match="No pattern") as caught:
        grouped(["a.nii"], ["T1=*t1*"])
    assert "'a.nii'" in caught.value.remedy
    with pytest.raises(UserError, match="which files belong together"):
        parse_modalities(["cases.csv"], labels=["*"])
