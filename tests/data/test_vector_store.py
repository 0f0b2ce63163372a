"""The files of an index: they grow and shrink as a whole or not at all, whatever was killed where."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest

from nnssl_plugin.data import vector_store
from nnssl_plugin.data.vector_store import INDEX_FILE, VectorStore, writing
from nnssl_plugin.errors import UserError
from nnssl_plugin.io.files import read_json


def rows_of(*names, **cells):
    return [{"case": name, "part": "", "subject": name, "image": f"{name}.nii.gz", **cells} for name in names]


def vectors_of(*values):
    return np.array(values, dtype=np.float32)[:, None] * np.ones((1, 3), dtype=np.float32)


def cases_of(folder):
    return [row["case"] for row in VectorStore(folder).table()]


@pytest.fixture
def folder(tmp_path):
    with writing(tmp_path / "index", {"dimensions": 3}) as store:
        store.append(vectors_of(1, 2), rows_of("a", "b"))
        store.append(vectors_of(3), rows_of("c", modality='CT, "thin"\nslices'))
    return tmp_path / "index"


def test_what_was_appended_is_read_back_and_numpy_reads_the_file(folder):
    store = VectorStore(folder)
    assert store.rows == 3 and [row["case"] for row in store.table()] == ["a", "b", "c"]
    np.testing.assert_array_equal(store.vectors(), vectors_of(1, 2, 3))
    np.testing.assert_array_equal(np.load(folder / "vectors.npy", mmap_mode="r"), vectors_of(1, 2, 3))
    assert store.table()[0]["modality"] == "" and store.table()[2]["modality"] == 'CT, "thin" slices'
    with open(folder / "cases.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 4


def test_removing_keeps_the_others_and_appending_goes_on(folder):
    with writing(folder) as store:
        store.remove(np.array([True, False, True]))
        store.append(vectors_of(4), rows_of("d"))
    store = VectorStore(folder)
    np.testing.assert_array_equal(store.vectors(), vectors_of(1, 3, 4))
    assert [row["case"] for row in store.table()] == ["a", "c", "d"]
    assert sorted(path.name for path in folder.iterdir()) == ["cases_1.csv", "index.json", "vectors_1.npy"]
    np.testing.assert_array_equal(np.load(store.vectors_file), vectors_of(1, 3, 4))


@pytest.mark.parametrize("remove", [False, True])
def test_a_kill_at_every_write_leaves_the_state_before_or_after(folder, monkeypatch, remove):
    """Every step of a change fails in turn, as if the process had died there."""

    class Killed(BaseException):
        pass

    steps = ("_append", "_write_header", "write_json", "_as_csv", "atomic_path")
    for failing in range(1, 30):
        calls = []

        def dying(function, failing=failing, calls=calls):
            def call(*arguments, **options):
                calls.append(function)
                if len(calls) == failing:
                    if function.__name__ == "_append":  # half of it was written
                        function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise Killed
                return function(*arguments, **options)

            return call

        before = cases_of(folder)
        after = before[1:] if remove else [*before, f"new_{failing}"]
        with monkeypatch.context() as patch, writing(folder) as store:
            for name in steps:
                patch.setattr(vector_store, name, dying(getattr(vector_store, name)))
            try:
                if remove:
                    store.remove(np.arange(store.rows) > 0)
                else:
                    store.append(vectors_of(100 + failing), rows_of(f"new_{failing}", extra=str(failing)))
                finished = True
            except Killed:
                finished = False
        store = VectorStore(folder)
        cases = [row["case"] for row in store.table()]
        assert cases in (before, after) and store.vectors().shape == (len(cases), 3)
        with writing(folder) as store:  # repairs
            if remove and cases != before:
                store.append(vectors_of(float(failing)), rows_of(f"again_{failing}"))
        np.testing.assert_array_equal(np.load(VectorStore(folder).vectors_file), VectorStore(folder).vectors())
        by_case = dict(zip(cases_of(folder), VectorStore(folder).vectors()[:, 0], strict=True))
        assert all(by_case.get(name, value) == value for name, value in {"b": 2, "c": 3}.items())
        if finished:
            break
    assert finished and failing > 4


def test_two_writers_refuse_in_words(folder):
    code = (
        "import sys; from nnssl_plugin.data.vector_store import writing; from nnssl_plugin.errors import UserError\n"
        "try:\n    with writing(sys.argv[1]): print('written')\nexcept UserError as error: print(error)"
    )
    with writing(folder):
        said = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert f"Process {os.getpid()}" in said.stdout and "kill" in said.stdout


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="nnssl_plugin embed"):
        VectorStore(tmp_path)
    with pytest.raises(UserError, match="nnssl_plugin embed"), writing(tmp_path / "none"):
        pass
    with writing(folder) as store:
        for wrong in (np.ones((1, 4)), np.full((1, 3), np.nan), np.ones((2, 3))):
            with pytest.raises(UserError, match="do not fit"):
                store.append(wrong, rows_of("x"))
    (folder / "vectors.npy").write_bytes((folder / "vectors.npy").read_bytes()[:-8])
    with pytest.raises(UserError, match="Restore"):
        VectorStore(folder).vectors()
    with pytest.raises(UserError, match="Restore"), writing(folder):
        pass
    content = read_json(folder / INDEX_FILE) | {"format": 9}
    vector_store.write_json(folder / INDEX_FILE, content)
    with pytest.raises(UserError, match="format 9"):
        VectorStore(folder)
