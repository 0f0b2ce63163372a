"""dataset.json in the forms that it must not have."""

import json

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.nnunet.dataset_json import read_dataset_file

GOOD = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1, "b": [1, 2]}, "file_ending": ".nii.gz"}


def test_a_file_of_version_2_is_read_as_it_is(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert read_dataset_file(tmp_path / "dataset.json", needed=("labels", "file_ending")) == GOOD


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"modality": {"0": "MR"}, "labels": {"0": "background", "1": "a"}, "training": []}, "nnU-Net v1"),
        (GOOD | {"labels": {"0": "background", "1": "a"}}, "as nnU-Net v1 did"),
        (GOOD | {"labels": ["background", "a"]}, '"labels" is no object'),
        (GOOD | {"channel_names": ["MR"]}, '"channel_names" is no object'),
        (GOOD | {"file_ending": None}, '"file_ending" is no text'),
        ({"labels": {}}, 'has no "file_ending"'),
        ([GOOD], "holds a list"),
    ],
)
def test_other_forms_are_refused_with_the_file(tmp_path, content, said):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        read_dataset_file(tmp_path / "dataset.json", needed=("file_ending",))
    assert "dataset.json" in error.value.problem
