"""Keys of the API: who may ask.

The keys are read once, from a file that only its owner can read, and kept as digests. A comparison takes as long for a
key that is nearly right as for one that is all wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ...errors import InputError, system_failure


class Keys:
    """The keys that a server accepts."""

    def __init__(self, keys: Iterable[str]) -> None:
        """``keys`` as clients send them."""
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def from_file(cls, path: Path) -> Keys:
        """Read keys, one in a line. Empty lines, and lines that begin with ``#``, are none.

        Raises:
            InputError: the file cannot be read, others than its owner can, it has no key, or a line is no key.
        """
        try:
            with Path(path).open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # of the file that is read
                if mode & (stat.S_IRWXG | stat.S_IRWXO):
                    raise InputError(
                        f"{path} holds keys, and others than its owner have access to it (mode {mode:o}). Run `chmod 600 {path}`."
                    )
                text = file.read().decode("ascii")
        except OSError as error:
            raise system_failure(error, path) from None
        except UnicodeDecodeError:
            raise InputError(f"{path} has signs that are not ASCII; HTTP cannot carry them. Use other keys.") from None
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        found = [(number, line) for number, line in lines if line and not line.startswith("#")]
        for number, line in found:
            if not line.isprintable() or " " in line:
                raise InputError(
                    f"{path}, line {number}: a key has no spaces and control signs. Write one key in a line."
                )
        if not found:
            raise InputError(f"{path} has no key. Write one in a line, for example what `openssl rand -hex 32` prints.")
        return cls(line for _, line in found)

    def allow(self, authorization: str | None) -> bool:
        """Whether the value of an ``Authorization`` header is ``Bearer`` and one of the keys."""
        scheme, _, given = (authorization or "").partition(" ")
        digest, found = _digest(given.strip()), False
        for known in self._digests:  # all of them, so that the time says nothing of where a key stands
            found |= hmac.compare_digest(digest, known)
        return found and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
