"""Threads beside the event loop, for what takes a while: bodies are parsed and encoded there, and grammars compiled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .problems import stopping, too_many

_Made = TypeVar("_Made")


class Pool:
    """So many threads, and so many requests that have or wait for one, at most. Its methods are called on the event loop."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        """Threads are started when they are needed; their names begin with ``name``."""
        self._threads, self._most, self._count = ThreadPoolExecutor(threads, thread_name_prefix=name), most, 0
        self._waiting = set[asyncio.Future[Any]]()
        self._closed = False

    @property
    def count(self) -> int:
        """Requests that have or wait for a thread. One that nobody waits for any more has its own until it ends."""
        return self._count

    @property
    def full(self) -> bool:
        """Whether it takes no more."""
        return self._count >= self._most

    async def run(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns or raises on one of the threads.

        Raises:
            Problem: too many wait, or the server stops.
        """
        if self._closed:
            raise stopping()
        if self.full:
            raise too_many(f"{self._count} requests wait to be read")
        # The executor keeps what was cancelled until a thread comes to it, so it gets nothing that is large.
        work = [make]
        loop, making = asyncio.get_running_loop(), self._threads.submit(lambda: work.pop()())
        self._count += 1

        def end() -> None:
            self._count -= 1

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end)

        making.add_done_callback(ended)
        waiting = asyncio.wrap_future(making)
        self._waiting.add(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise stopping() from None
            raise
        finally:
            work.clear()
            self._waiting.discard(waiting)

    def close(self) -> None:
        """Begin nothing more, and wait for nothing that runs."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for waiting in list(self._waiting):
            waiting.cancel()
