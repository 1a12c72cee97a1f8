"""Runs the engines of a bundle one after the other over the state of one session, on one or more GPUs.

Every GPU has some of the segments, in a row (runtime/engine_stage.py). Only the streams go from one to the next: by a copy between
the GPUs where they reach each other, else over the host's memory. An event orders the work: a GPU begins when the one before it is done.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..plugins.cuda import check
from .backend import FloatArray, IntArray, Observer
from .bundle import Bundle
from .device_buffers import DealtBuffers
from .engine_model import EngineModel
from .engine_stage import EngineStage, Given


class EngineExecutor:
    """Runs a bundle's engines; see :class:`foldkv.runtime.backend.Executor`."""

    def __init__(self, model: EngineModel, *, context: int, batch: int) -> None:
        """Allocate the state.

        Raises:
            InputError: context or batch are outside of what the engines were built for, or the state does not fit.
        """
        _check_shapes(model.bundle, context, batch)
        self._model, self._batch = model, batch
        with contextlib.ExitStack() as opened:
            self._stages: list[EngineStage] = []
            for part in model.parts:
                self._stages.append(EngineStage(model, part, context, batch))
                opened.callback(self._stages[-1].close)
            self._links: list[_Link] = []
            for stage, later in itertools.pairwise(self._stages):
                self._links.append(_Link(stage, later))
                opened.callback(self._links[-1].close)
            self._opened = opened.pop_all()
        self.buffers = DealtBuffers([stage.buffers for stage in self._stages])

    def run(
        self,
        input_ids: IntArray,
        positions: IntArray,
        num_tokens: IntArray,
        active_context: int,
        logit_indices: IntArray,
        *,
        trim: bool = False,
        observe: Observer | None = None,
    ) -> FloatArray:
        """See :meth:`foldkv.runtime.backend.Executor.run`; ``trim`` has no effect here.

        A chunk of several tokens runs one sequence after the other; sequences without a token in it get no logits (zeros).

        Raises:
            FoldkvError: an engine failed; the state may be half updated.
        """
        io = self._model.bundle.io
        given: dict[str, npt.NDArray[Any]] = {
            io.input_ids: np.ascontiguousarray(input_ids, np.int64),
            io.positions: np.ascontiguousarray(positions, np.int32),
            io.num_tokens: np.ascontiguousarray(num_tokens, np.int32),
            io.active_context: np.array([active_context], np.int64),
            io.logit_indices: np.ascontiguousarray(logit_indices, np.int64),
        }
        if input_ids.shape[1] == 1:
            return self._chunk(given, None, observe)
        shape = (self._batch, logit_indices.shape[1], self._model.bundle.model.vocab_size)
        logits = np.zeros(shape, np.float32)
        for slot in np.flatnonzero(num_tokens):
            own = {
                name: value if name == io.active_context else np.ascontiguousarray(value[slot : slot + 1])
                for name, value in given.items()
            }
            logits[slot] = self._chunk(own, int(slot), observe)[0]
        return logits

    def forget(self) -> None:
        """See :meth:`foldkv.runtime.backend.Executor.forget`."""
        for stage in self._stages:
            stage.forget()
        for link in self._links:
            link.forget()

    def close(self) -> None:
        """Free state and streams; closing twice is fine. The model keeps engines and weights."""
        self._opened.close()

    def _chunk(self, given: Given, slot: int | None, observe: Observer | None) -> FloatArray:
        """Feed a chunk to all sequences, or to the one of ``slot``; returns logits [batch or 1, L, V]."""
        try:
            for stage in self._stages:
                stage.prepare(given, slot)
            for number, stage in enumerate(self._stages):
                if number:
                    self._links[number - 1].hand_over(given, slot)
                stage.execute(slot, None if observe is None else (given, observe))
            logits = self._stages[-1].logits(given[self._model.bundle.io.logit_indices].shape[1], slot)
            for stage in self._stages[:-1]:  # what they copy back may still be on its way
                stage.wait()
        except BaseException:
            for stage in self._stages:  # what is still running reads memory that may be freed next
                stage.settle()
            raise
        return logits


class _Link:
    """Hands the streams over from one GPU to the next."""

    def __init__(self, source: EngineStage, target: EngineStage) -> None:
        self._source, self._target, self._driver = source, target, source.driver
        self.reaches = target.device.reaches(source.device)
        self._pinned, self._size = 0, 0
        with source.device.current():
            self._event = check(self._driver, self._driver.cuEventCreate(0))

    def hand_over(self, given: Given, slot: int | None) -> None:
        """Enqueue the copy: it begins when the source is done, and the target waits for it."""
        driver, source, target = self._driver, self._source, self._target
        (start, size), (end, _) = source.streams_out(given, slot), target.streams_in(given, slot)
        with source.device.current():
            if not self.reaches:
                self._pin(size)
                check(driver, driver.cuMemcpyDtoHAsync(self._pinned, start, size, source.stream))
            check(driver, driver.cuEventRecord(self._event, source.stream))
        with target.device.current():
            check(driver, driver.cuStreamWaitEvent(target.stream, self._event, 0))
            if self.reaches:
                there, here = target.device.context, source.device.context
                check(driver, driver.cuMemcpyPeerAsync(end, there, start, here, size, target.stream))
            else:
                check(driver, driver.cuMemcpyHtoDAsync(end, self._pinned, size, target.stream))

    def forget(self) -> None:
        """Give the host's copy of the streams back, so that nothing of the text stays."""
        self._source.settle()
        self._target.settle()
        self._unpin()

    def close(self) -> None:
        """Free the event and the host's copy when nothing uses them any more."""
        self.forget()
        with self._source.device.current():
            self._driver.cuEventDestroy(self._event)

    def _pin(self, size: int) -> None:
        if size > self._size:
            self.forget()
            status, address = self._driver.cuMemAllocHost(size)
            if int(status) != 0:
                raise InputError(f"the machine cannot pin {size} bytes of memory. Choose a smaller chunk or batch.")
            self._pinned, self._size = int(address), size

    def _unpin(self) -> None:
        if self._pinned:
            with self._source.device.current():
                self._driver.cuMemFreeHost(self._pinned)
        self._pinned, self._size = 0, 0


def _check_shapes(bundle: Bundle, context: int, batch: int) -> None:
    shapes = bundle.manifest.shapes
    for name, value, (low, _, high) in (("context", context, shapes.context), ("batch", batch, shapes.batch)):
        if not low <= value <= high:
            raise InputError(
                f"{name} is {value}; the engine in {bundle.folder} was built for {low} to {high}. "
                f"Choose one of these, or build it with other shapes."
            )
