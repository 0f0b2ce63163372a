"""Names that lead back to nobody: keyed hashes of DICOM's identifiers (HMAC-SHA256), with a key that stays."""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nnssl_plugin.errors import UserError

CHARACTERS = 12
"""Of a hash, in hexadecimal: 48 bits; among a million studies two share a name with probability 0.002."""
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Names:
    """The same identifier gives the same name, in every dataset made with this key; without it nobody can tell."""

    key: bytes

    def of(self, kind: str, identifier: str) -> str:
        """The name of an identifier of a kind (``patient``, ``study``, ``series``)."""
        message = f"{kind}:{identifier}".encode()
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()[:CHARACTERS]


def read_or_make_key(path: Path) -> Names:
    """The key of a file that only its owner may read; made where there is none.

    Raises:
        UserError: the file holds something else, or others may read it.
    """
    if not path.exists():
        _make_key(path)
    try:
        text = path.read_text(encoding="ascii").strip()
        open_to_others = os.name == "posix" and path.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The key {path} cannot be read: {error}.", "Give another file: --key-file FILE") from error
    if not _KEY.fullmatch(text):
        raise UserError(
            f"{path} is no key: 64 hexadecimal digits are expected.", "Give another file: --key-file FILE (made if new)"
        )
    if open_to_others:
        raise UserError(f"Others may read the key {path}.", f"Run: chmod 600 {path}")
    return Names(bytes.fromhex(text))


def _make_key(path: Path) -> None:
    """Written aside and linked to its place: two runs at once agree on one key, and none is half written."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        Path(temporary).unlink(missing_ok=True)
