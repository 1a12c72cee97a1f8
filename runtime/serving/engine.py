"""Many conversations over one model: text or tokens in, pieces out, from any thread or event loop.

    with Engine(Path("bundle"), slots=8) as engine:
        for piece in engine.stream(Request("Once upon a time", max_new_tokens=64)):
            print(piece.text, end="")

One thread of the engine runs the model (:mod:`foldkv.runtime.serving.scheduler`). A request waits in a bounded queue until a slot is
free, and can be cancelled at any time; it then ends before the next step.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import FoldkvError, InputError, QueueFullError, short
from ..completion import Completion, joined
from ..model import Model
from ..session import Session
from ..tokenizer import Tokenizer
from .answer import Group
from .prefixes import PrefixIndex, PrefixStats, producer_of
from .request import Request, check_request
from .scheduler import Scheduler

LOG = logging.getLogger("foldkv.serving")
#: Seconds between two looks at time limits while nothing else is to be done.
_GLANCE = 0.02


@dataclass(frozen=True)
class Stats:
    """What an engine does and did.

    Attributes:
        slots: completions that can run at once.
        running: completions that have a slot.
        waiting: requests that have not begun.
        held_tokens: tokens in the caches of all slots, each of which has room for the engine's context.
        prompt_tokens: tokens of prompts that were begun.
        cached_tokens: those of them that were not fed.
        looked_up_tokens: tokens of prompts for which a kept state was looked for.
        new_tokens: tokens of completions.
        decode_steps, chunk_steps: steps of both kinds.
        seconds: in steps; model_seconds of them in the model.
        finished: completions by why they ended.
        state_bytes: of the state of all slots.
        prefixes: of the index of kept states, if there is one.
    """

    slots: int
    running: int
    waiting: int
    held_tokens: int
    prompt_tokens: int
    cached_tokens: int
    looked_up_tokens: int
    new_tokens: int
    decode_steps: int
    chunk_steps: int
    seconds: float
    model_seconds: float
    finished: dict[str, int]
    state_bytes: int
    prefixes: PrefixStats | None


class Generation:
    """A request that was taken on: its pieces as they come, for one consumer, which iterates over it with or without ``async``.

    Pieces of several completions come mixed; ``index`` tells them apart. After the last piece of all completions the iteration
    ends. Whoever stops early calls :meth:`cancel`, or leaves the ``with`` block.

    Attributes:
        id: of the request, for logs.
    """

    def __init__(self, id: str, completions: int) -> None:
        """Made by :meth:`Engine.submit`."""
        self.id = id
        self._left = completions
        self._given: deque[Completion | BaseException] = deque()
        self._changed = threading.Condition()
        self._sleeper: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None  # who waits in an event loop
        self._cancel: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """End it before the next step. What was given out by then is still there; the last pieces say "cancelled"."""
        self._cancel()

    def result(self) -> list[Completion]:
        """Wait for the end: all completions.

        Raises:
            FoldkvError: the request failed.
        """
        pieces: dict[int, list[Completion]] = {}
        for piece in self:
            pieces.setdefault(piece.index, []).append(piece)
        return [joined(parts) for _, parts in sorted(pieces.items())]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Completion]:
        return self

    def __next__(self) -> Completion:
        with self._changed:
            while not self._given and self._left:
                self._changed.wait()
            if not self._given:
                raise StopIteration
            return self._taken()

    def __aiter__(self) -> AsyncIterator[Completion]:
        return self

    async def __anext__(self) -> Completion:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        while True:
            with self._changed:
                if self._given:
                    return self._taken()
                if not self._left:
                    raise StopAsyncIteration
                woken.clear()
                self._sleeper = loop, woken
            await woken.wait()

    def _taken(self) -> Completion:
        given = self._given.popleft()
        if isinstance(given, BaseException):
            raise given
        return given

    def _give(self, given: Completion | BaseException) -> None:
        """Called by the engine's thread, which wakes the consumer later. After an error nothing is given."""
        with self._changed:
            if isinstance(given, BaseException):
                self._left = 0
            elif given.finish_reason is not None:
                self._left -= 1
            self._given.append(given)

    def _woken(self) -> tuple[asyncio.AbstractEventLoop, asyncio.Event] | None:
        """Wake a consumer that is a thread; returns one that waits in an event loop."""
        with self._changed:
            self._changed.notify_all()
            sleeper, self._sleeper = self._sleeper, None
        return sleeper


class Engine:
    """A model, slots of state, and a thread that answers requests. A context manager; ``close`` frees all of it.

    Attributes:
        model: the open model.
        tokenizer: of its bundle; None if it has none: then prompts are token ids and pieces have no text.
        context: tokens that a sequence can hold.
        slots: completions that run at once.
        chunk: tokens of a prompt that are fed in one step.
    """

    def __init__(
        self,
        model: Model | Path,
        *,
        tokenizer: Tokenizer | None = None,
        slots: int = 8,
        context: int | None = None,
        chunk: int = 256,
        max_queue: int = 256,
        prefixes: PrefixIndex | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """Open the model unless it is given open, allocate the state, and wait for requests.

        Args:
            model: an open model, which stays open, or the folder of one target, as ``foldkv build`` wrote it.
            tokenizer: None for the bundle's own.
            slots: completions that run at once; each takes the state of ``context`` tokens.
            context: tokens that a sequence can hold; see :class:`~foldkv.runtime.Session`.
            chunk: tokens of a prompt that are fed in one step. A larger one feeds faster, and others wait longer for it.
            max_queue: requests that may wait for a slot.
            prefixes: states to start from, and where to keep them, from :meth:`PrefixIndex.of` with this chunk. Whoever made it closes it.
            batch_invariant: compute every sequence's steps alone: its bits then do not depend on who else runs. Without it the
                sequences share matrix products, which rounds a little otherwise; with it a step takes as long as all of them one by one.

        Raises:
            ArtifactError: the bundle is damaged, incomplete, changed or of another version.
            InputError: an argument is out of range, weights are missing, or the state does not fit into memory.
            MissingDependencyError: a package or a device that the bundle's backend needs is missing.
        """
        for name, value in (("slots", slots), ("max_queue", max_queue)):
            if type(value) is not int or value < 1:
                raise InputError(f"{name} must be an integer of 1 or more, got {short(value)}.")
        if type(batch_invariant) is not bool:
            raise InputError(f"batch_invariant must be True or False, got {batch_invariant!r}.")
        self._own = None if isinstance(model, Model) else Model(model, context=context, batch=slots)
        self.model: Model = model if isinstance(model, Model) else self._own  # type: ignore[assignment]
        try:
            bundle = self.model.bundle
            self.tokenizer = tokenizer or (None if bundle.tokenizer is None else Tokenizer.from_bundle(bundle))
            self._session = Session(self.model, context=context, batch=slots, chunk=chunk)
            if prefixes is not None and prefixes.producer != (ours := producer_of(self.model, chunk)):
                self._session.close()
                raise InputError(
                    f"the index keeps states of {prefixes.producer!r}; this engine makes those of {ours!r}. "
                    f"Make it with PrefixIndex.of(model, chunk={chunk}, ...)."
                )
        except BaseException:
            if self._own is not None:
                self._own.close()
            raise
        self.context, self.slots, self.chunk = self._session.context, slots, self._session.chunk
        self._prefixes, self._max_queue = prefixes, max_queue
        self._changed = threading.Condition()
        self._scheduler = Scheduler(
            self._session, prefixes, batch_invariant=batch_invariant, wake=self._wake, hand_over=self._hand_over
        )
        self._given_to: dict[Generation, None] = {}  # whose consumers are to be woken
        self._inbox: deque[Group] = deque()
        self._numbers = itertools.count(1)
        self._refusing = self._stopping = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="foldkv-engine", daemon=True)
        self._thread.start()

    # Requests

    def submit(self, request: Request) -> Generation:
        """Take a request on; returns at once. Any thread may call it.

        Raises:
            CapacityError: prompt and answer do not fit into the context.
            InputError: a field is of the wrong type or out of range; or the engine is closed.
            QueueFullError: as many requests wait as may.
            FoldkvError: the engine failed and takes no more.
        """
        checked = check_request(request, self.model.bundle, self.tokenizer, self.context)
        id = request.id if request.id is not None else f"r{next(self._numbers)}"
        generation = Generation(id, request.n)

        def give(given: Completion | BaseException) -> None:
            generation._give(given)
            self._given_to[generation] = None

        group = Group(checked, id, self.tokenizer, give)

        def cancel() -> None:
            group.cancelled = True
            self._wake()

        generation._cancel = cancel
        with self._changed:
            if self._dead is not None:
                raise FoldkvError(f"the engine has failed and takes no more requests: {self._dead}. Open a new one.")
            if self._refusing:
                raise InputError("the engine is being closed and takes no more requests.")
            waiting = self._waiting()
            if waiting >= self._max_queue:
                raise QueueFullError(
                    f"{waiting} requests wait for a slot, as many as may (max_queue). Try again later."
                )
            self._inbox.append(group)
            self._changed.notify_all()
        return generation

    def _waiting(self) -> int:
        return len(self._inbox) + self._scheduler.waiting

    def _wake(self) -> None:
        """Have the engine's thread look what there is to do."""
        with self._changed:
            self._changed.notify_all()

    def _hand_over(self) -> None:
        """Wake who waits for what was given, each event loop once: a wake-up costs more than what it is for."""
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Generation, asyncio.Event]]] = {}
        for generation in self._given_to:
            if (sleeper := generation._woken()) is not None:
                loops.setdefault(sleeper[0], []).append((generation, sleeper[1]))
        self._given_to.clear()
        for loop, sleepers in loops.items():
            try:
                loop.call_soon_threadsafe(_set_all, [event for _, event in sleepers])
            except RuntimeError:  # the loop was closed: nobody waits any more
                for generation, _ in sleepers:
                    generation.cancel()

    async def generate(self, request: Request) -> AsyncIterator[Completion]:
        """The pieces of a request as they come. Leaving the loop early cancels it. Errors are those of :meth:`submit`."""
        with self.submit(request) as generation:
            async for piece in generation:
                yield piece

    def stream(self, request: Request) -> Iterator[Completion]:
        """The pieces of a request as they come; blocks meanwhile. Leaving the loop early cancels it. Errors: :meth:`submit`."""
        with self.submit(request) as generation:
            yield from generation

    def complete(self, request: Request) -> list[Completion]:
        """All completions of a request, when they are there. Errors are those of :meth:`submit`."""
        return self.submit(request).result()

    # The engine as a resource

    def stats(self) -> Stats:
        """What it does and did; any thread may ask at any time."""
        counts, scheduler = self._scheduler.counts, self._scheduler
        return Stats(
            self.slots, scheduler.running, self._waiting(), scheduler.held_tokens, counts.prompt_tokens, counts.cached_tokens,
            counts.looked_up_tokens, counts.new_tokens, counts.decode_steps, counts.chunk_steps, counts.seconds, counts.model_seconds,
            dict(Counter(counts.finished)), self._session.state_bytes, None if self._prefixes is None else self._prefixes.stats(),
        )  # fmt: skip

    def not_ready(self) -> tuple[str, ...]:
        """Why it should get no more requests; empty if it is ready. It failed, is being closed, or files of the bundle or its weights
        were written again, replaced or removed. Takes microseconds, so that a probe can ask often."""
        if self._dead is not None:
            return (f"the engine has failed: {self._dead}",)
        if self._refusing:
            return ("the engine is being closed",)
        return self.model.changes()

    def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait for those that are there, at most so many seconds; returns whether all have ended."""
        end = time.monotonic() + timeout
        with self._changed:
            self._refusing = True
            while self._inbox or self._scheduler.busy:
                left = end - time.monotonic()
                if left <= 0 or self._dead is not None:
                    return False
                self._changed.wait(min(left, 0.1))
        return True

    def close(self) -> None:
        """End what runs as cancelled, and free state and model. Closing twice is fine."""
        with self._changed:
            self._refusing = self._stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._scheduler.close()
        self._session.close()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        """The engine's thread: steps while there is something to do. It alone ends requests."""
        try:
            while True:
                with self._changed:
                    while not (self._inbox or self._scheduler.busy or self._stopping):
                        self._changed.wait()
                    if self._scheduler.busy and self._scheduler.idle and not (self._inbox or self._stopping):
                        # Whatever gives it something to do wakes it, but for a time limit, which need not be kept more exactly.
                        self._changed.wait(_GLANCE)
                    self._take_in()
                    if self._stopping:
                        break
                self._scheduler.step()
                if self._refusing:
                    with self._changed:
                        self._changed.notify_all()
            self._scheduler.end_all()
            self._hand_over()
        except BaseException as error:
            LOG.exception("the engine failed")
            failure = FoldkvError(f"the engine has failed: {error}. Open a new one.")
            with self._changed:
                self._dead = error
                self._take_in()
            self._scheduler.fail_all(failure)
            self._hand_over()

    def _take_in(self) -> None:
        while self._inbox:
            self._scheduler.add(self._inbox.popleft())


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
