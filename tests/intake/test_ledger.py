"""Tables hold paths of any bytes, as UTF-8 text that is read back."""

import os

import pytest

from nnssl_plugin.intake.ledger import Rejection, read_rows, write_rows


@pytest.mark.parametrize(
    "name", [b"M\xfcller", "Müller".encode(), b"\\udcfc", b"\\x5cudcfc\\", b'a,b\n"c"', b"\xff\\\xfe", b"C:\\udder\\x"]
)
def test_any_path_is_written_as_utf8_and_read_back(tmp_path, name):
    rows = [Rejection(source=os.fsdecode(name), reason="r", stamp="")]
    write_rows(tmp_path / "t.csv", Rejection, rows)
    (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert read_rows(tmp_path / "t.csv", Rejection) == rows
