"""The answers to several requests, in the order in which their pieces come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from ..completion import Completion
from ..serving.engine import Engine
from ..serving.request import Request


class Generations:
    """Requests that an engine has taken, all of them or none."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        """Give the requests to the engine.

        Raises:
            QueueFullError: it takes no more now.
            InputError: a request is wrong.
        """
        self._taken = []
        try:
            for request in requests:
                self._taken.append(engine.submit(request))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs. What has ended is not changed."""
        for one in self._taken:
            one.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Completion]]:
        """Pieces, each with the number of its request."""
        if len(self._taken) == 1:
            async for piece in self._taken[0]:
                yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Completion | BaseException | None]] = asyncio.Queue()

        async def follow(number: int) -> None:
            try:
                async for piece in self._taken[number]:
                    queue.put_nowait((number, piece))
                queue.put_nowait((number, None))
            except Exception as error:  # noqa: BLE001 - raised where the pieces are read
                queue.put_nowait((number, error))

        tasks = [asyncio.create_task(follow(number)) for number in range(len(self._taken))]
        try:
            left = len(tasks)
            while left:
                number, found = await queue.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield number, found
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
