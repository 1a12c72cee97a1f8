"""Events on a GPU's stream between the calls of a step, so that every call's time is known, enqueued or captured alike.

The runtime is as services use it. Only its engines are wrapped: an execution context records an event after it has run. In a
step that is being captured the events become nodes of the graph, and every replay records them anew.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from foldkv.export.contract.chain import STEP
from foldkv.plugins.cuda import check
from foldkv.runtime.engine_part import EnginePart

# CU_EVENT_RECORD_EXTERNAL: the record is a node of the graph that is being captured, and not an order between streams.
_EXTERNAL = 1
_START = ""


class Marks:
    """Events for the calls of one part. A context manager: sessions are opened inside, and closed before it ends.

    Every segment must have one call, because a context knows only its segment.

    Attributes:
        enqueued: contexts that were executed so far; a step that is replayed from a graph executes none.
    """

    def __init__(self, part: EnginePart) -> None:
        """Wrap the engines of a part whose sessions are not open yet."""
        segments = [STEP, *(call.segment for call in part.calls)]
        if len(set(segments)) < len(segments):
            raise ValueError(f"segments are called twice: {segments}")
        self._part, self._driver, self._plain = part, part.device.driver, dict(part.engines)
        self.enqueued = 0
        self._segments = segments
        with part.device.current():
            self._events = {name: check(self._driver, self._driver.cuEventCreate(0)) for name in (_START, *segments)}
        for name, engine in self._plain.items():
            part.engines[name] = _Engine(engine, self, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._part.engines |= self._plain
        with self._part.device.current():
            for event in self._events.values():
                self._driver.cuEventDestroy(event)

    def execute(self, context: Any, segment: str, stream: int) -> bool:
        """Run a context between the events."""
        self.enqueued += 1
        if segment == STEP:
            self._record(_START, stream)
        done = bool(context.execute_async_v3(stream))
        self._record(segment, stream)
        return done

    def milliseconds(self) -> dict[str, float]:
        """By segment, how long the call of the last step took that is done; a gap before it counts as its own.

        Raises:
            FoldkvError: the events were not recorded.
        """
        found, before = {}, self._events[_START]
        with self._part.device.current():
            for segment in self._segments:
                after = self._events[segment]
                found[segment] = float(check(self._driver, self._driver.cuEventElapsedTime(before, after)))
                before = after
        return found

    def _record(self, name: str, stream: int) -> None:
        driver, event = self._driver, self._events[name]
        if int(check(driver, driver.cuStreamIsCapturing(stream))):
            check(driver, driver.cuEventRecordWithFlags(event, stream, _EXTERNAL))
        else:
            check(driver, driver.cuEventRecord(event, stream))


class _Wrapped:
    """Everything is the wrapped thing's own but what a subclass has."""

    def __init__(self, inner: Any, marks: Marks, segment: str) -> None:
        self._inner, self._marks, self._segment = inner, marks, segment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Engine(_Wrapped):
    def create_execution_context(self, *arguments: Any) -> Any:
        context = self._inner.create_execution_context(*arguments)
        return None if context is None else _Context(context, self._marks, self._segment)


class _Context(_Wrapped):
    def execute_async_v3(self, stream: int) -> bool:
        return self._marks.execute(self._inner, self._segment, stream)
