"""Files with weights, mapped into memory: each opened once, checked, and never copied.

Pages are read when a step needs them, and the system shares them between processes. A file is checked through the
descriptor that is mapped, so nobody can put another one in its place in between.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArtifactError, InputError
from ..export.contract.chain import Bound
from ..export.contract.lock import LockedFile

#: numpy's storage of a type, and ONNX's number for it; numpy has no narrow floats, so integers hold their bits.
TYPES: dict[str, tuple[npt.DTypeLike, int]] = {
    "float32": (np.float32, 1), "bfloat16": (np.uint16, 16), "float16": (np.float16, 10), "int64": (np.int64, 7),
    "int32": (np.int32, 6), "int8": (np.int8, 3), "float8e4m3fn": (np.uint8, 17),
    "uint8": (np.uint8, 2), "float8e8m0": (np.uint8, 24),
}  # fmt: skip


@dataclass(frozen=True)
class _Mapped:
    path: Path
    bytes: npt.NDArray[np.uint8]


class WeightFiles:
    """The mapped files of one model."""

    def __init__(self) -> None:
        self._files: dict[str, _Mapped] = {}

    def open(self, name: str, path: Path, locked: LockedFile | None = None) -> None:
        """Map a file.

        Args:
            name: under which weights name it.
            path: where it is; links are followed.
            locked: what the lock says of it, for a file of the checkpoint.

        Raises:
            InputError: it cannot be read, or is not the locked file.
        """
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if locked is not None:
                    _check(path, file.read(locked.header_bytes), status.st_size, locked)
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path} cannot be read: {reason}. Fetch or copy it again.") from None
        self._files[name] = _Mapped(path, np.frombuffer(data, np.uint8))

    def hold(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Take bytes [n] in memory for a file."""
        self._files[name] = _Mapped(Path(name), data)

    def close(self) -> None:
        """Drop all files; arrays over them keep theirs."""
        self._files = {}

    def view(self, bound: Bound) -> npt.NDArray[Any]:
        """A weight as an array over the mapped file: nothing is read or copied.

        Raises:
            ArtifactError: the file ends within the weight.
        """
        part = self.range(bound.file, bound.offset, bound.bytes)
        return part.view(np.dtype(TYPES[bound.dtype][0])).reshape(bound.shape)

    def range(self, file: str, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """A range of bytes of a mapped file: nothing is read or copied.

        Raises:
            ArtifactError: the file ends within the range.
        """
        data = self._files[file].bytes
        if offset + size > len(data):
            raise ArtifactError(
                f"{self._files[file].path} has {len(data)} bytes; a weight ends at {offset + size}. Make the bundle again."
            )
        return data[offset : offset + size]

    @property
    def bytes(self) -> int:
        """Bytes of all mapped files."""
        return sum(len(file.bytes) for file in self._files.values())


def _check(path: Path, head: bytes, size: int, locked: LockedFile) -> None:
    if size != locked.bytes:
        raise InputError(f"{path} has {size} bytes; the lock says {locked.bytes}. Fetch or copy it again.")
    if hashlib.sha256(head).hexdigest() != locked.header_sha256:
        raise InputError(f"{path} has other tensors than the lock says (its header differs). Fetch the right one.")


def check_indices(table: npt.NDArray[Any], end: int, what: str, path: Mapping[str, str] | str) -> None:
    """Check that every index of a table is from 0 to ``end`` - 1.

    Raises:
        InputError: one is not.
    """
    if table.size and (int(table.min()) < 0 or int(table.max()) >= end):
        raise InputError(f"{what} in {path} has indices from {table.min()} to {table.max()}; expected 0 to {end - 1}.")
