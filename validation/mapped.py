"""Large arrays of a run that goes a layer at a time: mapped from files, so that the system may drop them from memory.

A run has thousands of them, more than a process may have files open. So a mapping keeps no descriptor: numpy's would keep one each.
"""

from __future__ import annotations

import errno
import math
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import system_failure


class Gathered:
    """An array [n, ...] that comes in parts, one after the other. The file has no name: it is gone when nobody has the array."""

    def __init__(self, folder: Path | None) -> None:
        """Args: folder: of the file; made if there is none. None keeps the parts in memory."""
        self._folder = folder
        self._parts: list[npt.NDArray[Any]] = []
        self._file: IO[bytes] | None = None

    def add(self, part: npt.NDArray[Any]) -> None:
        """Append rows; the array may be written to afterwards.

        Raises:
            SystemFailure: the disk is full or cannot be written.
        """
        if self._folder is None:
            self._parts.append(part.copy())
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open until all parts are there
            self._file.write(np.ascontiguousarray(part).data)
        except OSError as error:
            raise system_failure(error, self._folder) from None
        self._parts.append(part[:0].copy())

    def array(self) -> npt.NDArray[Any]:
        """All rows.

        Raises:
            SystemFailure: as of :meth:`add`.
        """
        empty: npt.NDArray[Any] = np.concatenate(self._parts)
        if self._file is None or self._folder is None:
            return empty
        try:
            with self._file as file:
                file.flush()
                size, row = file.tell(), empty.itemsize * math.prod(empty.shape[1:])
                if not size:
                    return empty
                return _bytes_of(file, size).view(empty.dtype).reshape(size // row, *empty.shape[1:])
        except OSError as error:
            raise system_failure(error, self._folder) from None


def mapped(values: npt.NDArray[Any], folder: Path | None) -> npt.NDArray[Any]:
    """The same values, mapped from a file in a folder; None, and an array without values, leaves them in memory.

    Raises:
        SystemFailure: the disk is full or cannot be written.
    """
    if folder is None or not values.size:
        return values
    gathered = Gathered(folder)
    gathered.add(values)
    return gathered.array()


def _bytes_of(file: IO[bytes], size: int) -> npt.NDArray[np.uint8]:
    """The bytes of an open file, mapped; they stay when it is closed.

    Raises:
        OSError: the system maps no more.
    """
    import torch  # late, because those that open no reference do without it

    try:
        # The file has no name, but the system has one for its descriptor.
        found = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size, dtype=torch.uint8)
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, f"an array of {size} bytes cannot be mapped: {error}") from None
    array: npt.NDArray[np.uint8] = found.numpy()
    return array
