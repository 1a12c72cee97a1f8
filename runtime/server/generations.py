"""The answers to the prompts of one request of HTTP, in the order in which their pieces come."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence

from ...errors import QueueFullError
from ..completion import Completion, Finish
from ..serving.engine import Engine, Generation
from ..serving.request import Request

#: Seconds after which a prompt asks again for a place in a full queue, when others of its request have one.
_AGAIN = 0.05
#: Seconds that a request has which is late already: the engine ends it before the next step.
_NONE_LEFT = 1e-9


class Generations:
    """Requests that belong together. The engine takes the first at once, and as many as it has slots side by side.

    So a client with many prompts is not sent away by a queue that is shorter than they are many, and leaves room for others.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], deadline: float | None = None) -> None:
        """Give the first request to the engine. All must have ended by ``deadline``, a time of ``time.monotonic``; None is any time.

        Raises:
            QueueFullError: it takes no more now.
            InputError: the request is wrong.
        """
        self._engine, self._requests, self._deadline = engine, requests, deadline
        self._taken = [self._submitted(requests[0])]
        self._cancelled = False

    def cancel(self) -> None:
        """End what runs, and begin nothing more. What has ended is not changed."""
        self._cancelled = True
        for one in self._taken:
            one.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Completion]]:
        """Pieces, each with the number of its request. One that had not begun when somebody cancelled, or in time, has one
        piece, which says so.

        Raises:
            FoldkvError: the engine failed.
        """
        if len(self._requests) == 1:
            async for piece in self._taken[0]:
                yield 0, piece
            return
        came: asyncio.Queue[tuple[int, Completion | BaseException | None]] = asyncio.Queue()
        places = asyncio.Semaphore(self._engine.slots)

        async def follow(number: int) -> None:
            try:
                async with places:
                    generation = self._taken[0] if number == 0 else await self._begun(self._requests[number])
                    if generation is None:
                        reason: Finish = "cancelled" if self._cancelled else "timeout"
                        came.put_nowait((number, Completion(0, "", (), reason)))
                    else:
                        async for piece in generation:
                            came.put_nowait((number, piece))
                came.put_nowait((number, None))
            except Exception as error:  # noqa: BLE001 - raised where the pieces are read
                came.put_nowait((number, error))

        tasks = [asyncio.create_task(follow(number)) for number in range(len(self._requests))]
        try:
            left = len(tasks)
            while left:
                number, found = await came.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    left -= 1
                else:
                    yield number, found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _begun(self, request: Request) -> Generation | None:
        while not self._cancelled and (self._deadline is None or time.monotonic() < self._deadline):
            try:
                self._taken.append(self._submitted(request))
            except QueueFullError:
                await asyncio.sleep(_AGAIN)
            else:
                return self._taken[-1]
        return None

    def _submitted(self, request: Request) -> Generation:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            request = dataclasses.replace(request, timeout=max(left, _NONE_LEFT))
        return self._engine.submit(request)
