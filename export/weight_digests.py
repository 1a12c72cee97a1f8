"""Whether weights are, byte for byte, those of a lock.

Export and build read only headers of weight files, because hashing 800 GiB takes minutes. Here whole files are read: when a user
asks, when they are packed, and while they are copied to GPUs. A lock says which of its files have been hashed.
Standard library only: the runtime uses it too.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, listing, system_failure
from ..progress import BYTES, Progress, Say, silent
from .contract.lock import LockedFile, WeightsLock

_CHUNK = 16 << 20
# A file of the Hugging Face cache that lies in the large-file storage is named by its sha256.
_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Hashed:
    """The sha256 of a weight file, and what it should be; ``source`` says who says so ("" if nobody does)."""

    name: str
    bytes: int
    sha256: str
    expected: str | None
    source: str

    @property
    def holds(self) -> bool:
        """Whether the file is what it should be, as far as anyone says."""
        return self.expected in (None, self.sha256)


def expectation(file: LockedFile, path: Path) -> tuple[str | None, str]:
    """The sha256 that a file should have, and who says so: its lock, or the Hugging Face cache that it lies in; or nobody (None, "")."""
    if file.sha256:
        return file.sha256, "lock"
    blob = path.resolve().name
    return (blob, "cache") if _BLOB.fullmatch(blob) else (None, "")


def verify_weights(
    lock: WeightsLock, files: Mapping[str, Path], *, jobs: int | None = None, progress: Say = silent
) -> list[Hashed]:
    """Hash every file of a lock, several at once.

    What a file should be is what the lock says. Where it says nothing, it is the name of the file in the Hugging Face cache.

    Args:
        lock: of an artifact.
        files: path of every file.
        jobs: files at once; the default is the processors that this process may use.
        progress: a :class:`~foldkv.progress.Progress` gets the bytes.

    Raises:
        SystemFailure: a file cannot be read.
    """
    report, total, done, counting = (
        Progress.of(progress),
        sum(f.bytes for f in lock.files.values()),
        [0],
        threading.Lock(),
    )

    def advance(size: int) -> None:
        with counting:
            done[0] += size
            report.steps(done[0], total, BYTES)

    def one(name: str) -> Hashed:
        expected, source = expectation(lock.files[name], files[name])
        return Hashed(name, lock.files[name].bytes, _sha256(files[name], advance), expected, source)

    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, lock.files))


def refuse_others(rows: list[Hashed]) -> None:
    """Refuse files that are not what they should be.

    Raises:
        InputError: there are some; all are listed.
    """
    wrong = [
        f"{row.name} has sha256 {row.sha256}; the {row.source} says {row.expected}" for row in rows if not row.holds
    ]
    if wrong:
        raise InputError(listing("weight files were changed or damaged", wrong, "Fetch these files again."))


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_CHUNK):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        raise system_failure(error, path) from None
    return digest.hexdigest()
