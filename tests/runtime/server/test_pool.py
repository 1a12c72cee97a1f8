"""Threads beside the event loop: what waits for one is bounded, also where nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref

import pytest

from foldkv.runtime.server.pool import Pool
from foldkv.runtime.server.problems import Problem


class Body:
    """Something large."""


def test_what_nobody_waits_for_is_not_kept() -> None:
    """The executor keeps its place in the queue, and must not keep the body with it."""
    free, kept = threading.Event(), list[weakref.ref[Body]]()

    async def give_up(pool: Pool) -> None:
        body = Body()
        kept.append(weakref.ref(body))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await pool.run(lambda: id(body))
                raise AssertionError("it waits")

    async def ask() -> None:
        pool = Pool("t", 1, 4)
        busy = asyncio.ensure_future(pool.run(lambda: free.wait(30)))
        await asyncio.sleep(0)
        for _ in range(6):  # more than may wait at once
            await give_up(pool)
        await asyncio.sleep(0.01)  # the last one is forgotten by the loop, too
        gc.collect()
        assert not any(one() for one in kept)
        free.set()
        assert await busy
        assert await pool.run(lambda: 5) == 5
        pool.close()

    asyncio.run(ask())


def test_too_many_are_refused_and_a_close_ends_those_that_wait() -> None:
    free = threading.Event()

    async def ask() -> None:
        pool = Pool("t", 1, 2)
        waiting = [asyncio.ensure_future(pool.run(lambda: free.wait(30))) for _ in range(2)]
        await asyncio.sleep(0)
        assert pool.full and pool.count == 2
        with pytest.raises(Problem, match="2 requests wait"):
            await pool.run(lambda: 1)
        pool.close()
        for one in waiting:
            with pytest.raises(Problem, match="stopping"):
                await one
        free.set()

    asyncio.run(ask())
