"""Copies weights from files to a GPU through pinned memory: while one half of it goes over, the other is filled from the file."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..plugins.cuda import Device, check

_HALF = 32 << 20  # bytes


class WeightUpload:
    """Pinned memory, a stream and two events of one GPU, whose context must be current in every call."""

    def __init__(self, device: Device, total: int, say: Callable[[int, int, float], None]) -> None:
        """Take what copying needs.

        Args:
            device: the GPU.
            total: bytes that will be copied.
            say: called after every half with the bytes copied, the total, and bytes per second.

        Raises:
            InputError: the machine cannot pin that much memory.
        """
        self._driver, self._total, self._say = device.driver, total, say
        self._half = max(1, min(_HALF, total))
        self._opened: list[Callable[[], object]] = []
        self._copied, self._start, self._turn = 0, time.monotonic(), 0
        try:
            status, address = self._driver.cuMemAllocHost(2 * self._half)
            if int(status) != 0:
                raise InputError(f"the machine cannot pin {2 * self._half} bytes of memory. Free some.")
            self._pinned = int(address)
            self._opened.append(lambda: check(self._driver, self._driver.cuMemFreeHost(self._pinned)))
            self._stream = check(self._driver, self._driver.cuStreamCreate(0))
            self._opened.append(lambda: check(self._driver, self._driver.cuStreamDestroy(self._stream)))
            self._events: list[Any] = []
            for _ in range(2):
                event = check(self._driver, self._driver.cuEventCreate(0))
                self._events.append(event)
                self._opened.append(functools.partial(self._destroy, event))
        except BaseException:
            self.close()
            raise

    def _destroy(self, event: Any) -> None:
        check(self._driver, self._driver.cuEventDestroy(event))

    def copy(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueue the copy of an array, whose bytes may be overwritten afterwards."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, data.nbytes, self._half):
            part = data[start : start + self._half]
            half, event = self._pinned + self._turn * self._half, self._events[self._turn]
            check(self._driver, self._driver.cuEventSynchronize(event))  # what lay there has gone over
            ctypes.memmove(half, part.ctypes.data, part.nbytes)
            check(self._driver, self._driver.cuMemcpyHtoDAsync(address + start, half, part.nbytes, self._stream))
            check(self._driver, self._driver.cuEventRecord(event, self._stream))
            self._turn = 1 - self._turn
            self._copied += part.nbytes
            self._say(self._copied, self._total, self._copied / max(time.monotonic() - self._start, 1e-9))

    def finish(self) -> None:
        """Wait until everything is on the GPU."""
        check(self._driver, self._driver.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        """Give everything back when nothing is on its way any more; closing twice is fine."""
        if len(self._opened) > 1:
            self._driver.cuStreamSynchronize(self._stream)  # unchecked: after an error only the first one matters
        while self._opened:
            self._opened.pop()()
