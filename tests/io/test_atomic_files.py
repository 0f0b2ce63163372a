"""Files that are whole or absent: leftovers of killed processes, kept copies, and disks that refuse."""

import errno
import os

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.io import files


def test_only_our_own_leftovers_are_removed(tmp_path):
    left = [".a.pth.x1y2z3_4.pth", ".a.b.pth.abcdefgh.pth", ".c.nii.gz.abcdefgh.nii.gz", ".d_1.png.abcdefgh.png"]
    kept = ["a.pth", ".a.pth", ".a.pth.pth", ".a.pth.abcdefgh.png", ".a.pth.abcdefghi.pth", ".training.lock", ".bashrc"]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    files.remove_temporary_files(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_what_atomic_path_leaves_when_killed_is_what_is_removed(tmp_path, monkeypatch):
    for name in ("a.pth", "b.json", "c.nii.gz", "progress_1.png"):
        monkeypatch.setattr(files.Path, "unlink", lambda *given, **more: None)  # nothing runs after a SIGKILL
        with pytest.raises(KeyError), files.atomic_path(tmp_path / name) as temporary:
            raise KeyError
        monkeypatch.undo()
        assert temporary.is_file()
        files.remove_temporary_files(tmp_path)
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_kept_file_has_the_content_and_later_writes_do_not_reach_it(tmp_path, monkeypatch, links):
    def refuse(*given):
        raise OSError(errno.ENOTSUP, "no hard links")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, kept = tmp_path / "a", tmp_path / "b"
    for content, before in (("1", None), ("2", "1"), ("3", "2")):
        if before:
            files.keep_file(path, kept)
        with files.atomic_path(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content and (not before or kept.read_text() == before)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_disk_errors_become_words_and_others_stay():
    with pytest.raises(UserError, match="/there: No space") as error, files.disk_errors_in_words("/there"):
        raise OSError(errno.ENOSPC, "…")
    assert "--c" in error.value.remedy
    with pytest.raises(UserError, match="/file: Read-only file system"), files.disk_errors_in_words("/there"):
        raise OSError(errno.EROFS, "…", "/file")
    with pytest.raises(FileNotFoundError), files.disk_errors_in_words("/there"):
        raise FileNotFoundError(errno.ENOENT, "…")
