"""JSON of every encoding that people save, and one kind of error for what cannot be read."""

import json

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json

CONTENT = {"naïve": [1, "µm\u2028"], "b": None}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_every_unicode_encoding(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes(json.dumps(CONTENT, ensure_ascii=False).encode(encoding))
    assert read_json(tmp_path / "a.json", dict) == CONTENT


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": [1, 2,],\n}', r"a\.json is not valid JSON, line 2, column"),
        (b"", "is not valid JSON, line 1"),
        (b'{"a": 1}\nand more', "line 2"),
        ('{\n"name": "Gehörgang"}'.encode("latin-1"), r"is not UTF-8 text, line 2(.|\n)*Save it as UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list at its top level where an object is expected"),
        (b"null", "holds null"),
    ],
)
def test_what_cannot_be_read_is_told_with_file_and_line(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "a.json", dict)


def test_absent_files_and_folders_are_told(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(UserError, match="cannot be read"):
            read_json(path)
