"""Copies weights from files to a GPU through pinned memory: while one half of it goes over, the other is filled from the file."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..plugins.cuda import NON_BLOCKING, Device, check

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
        self._copied, self._start, self._turn = 0, time.monotonic(), 0
        driver = self._driver
        with contextlib.ExitStack() as opened:
            status, address = driver.cuMemAllocHost(2 * self._half)
            if int(status) != 0:
                raise InputError(f"the machine cannot pin {2 * self._half} bytes of memory. Free some.")
            self._pinned = int(address)
            opened.callback(driver.cuMemFreeHost, self._pinned)
            self._stream = int(check(driver, driver.cuStreamCreate(NON_BLOCKING)))
            opened.callback(driver.cuStreamDestroy, self._stream)
            self._events: list[Any] = []
            for _ in range(2):
                self._events.append(check(driver, driver.cuEventCreate(0)))
                opened.callback(driver.cuEventDestroy, self._events[-1])
            opened.callback(driver.cuStreamSynchronize, self._stream)  # nothing is on its way when the rest goes
            self._opened = opened.pop_all()

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
        """Give everything back; closing twice is fine."""
        self._opened.close()
