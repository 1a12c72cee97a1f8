"""Hashes weight files while they are read for something else, and compares them with what they should be.

The bytes are those of the mapped files, so nobody can put other ones in their place between the check and the use. Whoever reads
a page first takes it from the disk, and the other from memory.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from ..errors import InputError, listing
from ..export.contract.lock import LockedFile
from ..export.weight_digests import Hashed, expectation, refuse_others
from .backend import default_threads
from .weight_files import WeightFiles

_CHUNK = 16 << 20


class WeightCheck:
    """Threads that hash files, in the order in which they were named. A context manager; leaving it ends them."""

    def __init__(
        self,
        files: WeightFiles,
        locked: Mapping[str, LockedFile],
        paths: Mapping[str, Path],
        *,
        threads: int | None = None,
    ) -> None:
        """Begin.

        Args:
            files: the mapped files.
            locked: what the lock says of each.
            paths: where each is; a file that the lock does not know by its sha256 may lie in the Hugging Face cache.
            threads: files at once; the default leaves a processor for whoever reads them.

        Raises:
            InputError: nobody says what a file should be; all are listed. Nothing was read.
        """
        self._files, self._paths, self._locked = files, dict(paths), locked
        expected = {name: expectation(locked[name], path) for name, path in self._paths.items()}
        unknown = [str(path) for name, path in self._paths.items() if expected[name][0] is None]
        if unknown:
            raise InputError(
                listing(
                    "weight files cannot be verified, because the lock has no sha256 of them", unknown,
                    "Make a folder with `foldkv pack --with-weights`, which has them, or open the model without verification.",
                )
            )  # fmt: skip
        self._expected, self._stop = expected, threading.Event()
        self._pool = ThreadPoolExecutor(threads or max(1, default_threads() - 1), "foldkv-hash")
        self._found: dict[str, Future[str]] = {name: self._pool.submit(self._digest, name) for name in self._paths}

    def finish(self) -> dict[str, str]:
        """Wait until all files are hashed; their sha256 by name.

        Raises:
            InputError: a file is not what it should be; all are listed.
        """
        digests = {name: future.result() for name, future in self._found.items()}
        rows = [
            Hashed(name, self._locked[name].bytes, digest, *self._expected[name]) for name, digest in digests.items()
        ]
        refuse_others(rows)
        return digests

    def close(self) -> None:
        """End the threads, whatever is left to hash; closing twice is fine."""
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _digest(self, name: str) -> str:
        digest, size = hashlib.sha256(), self._locked[name].bytes
        for start in range(0, size, _CHUNK):
            if self._stop.is_set():
                break
            digest.update(self._files.range(name, start, min(_CHUNK, size - start)).data)
        return digest.hexdigest()
