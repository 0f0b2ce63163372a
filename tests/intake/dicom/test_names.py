"""Names are keyed hashes, and the key is its owner's."""

import hashlib
import hmac
import stat

import pytest

from nnssl_plugin.errors import UserError
from nnssl_plugin.intake.dicom.names import Names, read_or_make_key


def test_names_are_hmac_sha256_of_kind_and_identifier():
    expected = hmac.new(bytes(32), b"study:1.2.3", hashlib.sha256).hexdigest()[:12]
    assert Names(bytes(32)).of("study", "1.2.3") == expected
    assert Names(bytes(32)).of("patient", "1.2.3") != expected != Names(bytes(31) + b"\1").of("study", "1.2.3")


def test_a_key_is_made_once_and_for_its_owner_alone(tmp_path):
    path = tmp_path / "new" / "key"
    first = read_or_make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(first.key) == 32
    assert read_or_make_key(path) == first != read_or_make_key(tmp_path / "other")
    assert [file.name for file in path.parent.iterdir()] == ["key"]


@pytest.mark.parametrize("content", ["", "too short\n", "g" * 64])
def test_a_file_that_is_no_key_is_refused(content, tmp_path):
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UserError, match="no key"):
        read_or_make_key(path)


def test_a_key_that_others_may_read_is_refused(tmp_path):
    path = tmp_path / "key"
    read_or_make_key(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="Others may read"):
        read_or_make_key(path)
