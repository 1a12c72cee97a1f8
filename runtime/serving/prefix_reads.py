"""Kept states that threads read from disk for answers that wait for them, so that nobody else waits for the disk.

Only one thread uses an object of this kind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from .answer import Answer
from .prefix_files import Key
from .prefixes import Hit, PrefixIndex

LOG = logging.getLogger("foldkv.serving")
#: States that are read at once, at most.
_THREADS = 4


class PrefixReads:
    """The reads that are going on, each for one answer or several."""

    def __init__(self, prefixes: PrefixIndex, wake: Callable[[], object]) -> None:
        """Nothing is being read.

        Args:
            prefixes: whose states are read.
            wake: called by another thread when a read is done.
        """
        self._prefixes, self._wake = prefixes, wake
        self._reads: dict[tuple[Key, bool], Future[Hit | None]] = {}
        self._waiting: dict[Answer, Future[Hit | None]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="foldkv-prefixes")

    def close(self) -> None:
        """Wait for what is being read. Closing twice is fine."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def begin(self, answer: Answer, tokens: npt.NDArray[Any], *, exact: bool) -> bool:
        """Have the state read that a prompt begins with; False if there is none, or if it is in memory.

        Args:
            answer: who waits for it. Those that wait for the same state wait for the same read.
            tokens: the prompt.
            exact: look for exact states only.
        """
        if (key := self._prefixes.on_disk(tokens, exact=exact)) is None:
            return False
        read = self._reads.get((key, exact))
        if read is None:
            # No more of the prompt than all who share this read have in common: a longer state that is kept meanwhile is of this one alone.
            common = tokens[: key[0] + 1]
            read = self._reads[key, exact] = self._threads.submit(self._prefixes.fetch, common, exact=exact)
            read.add_done_callback(lambda _: self._wake())
        self._waiting[answer] = read
        return True

    def waits(self, answer: Answer) -> bool:
        """Whether an answer waits for a read that is not done."""
        return answer in self._waiting and not self._waiting[answer].done()

    def done(self) -> list[tuple[Answer, Hit | None]]:
        """The answers whose reads are done, which wait no more, and what was read; None if that failed."""
        found = list[tuple[Answer, Hit | None]]()
        for answer, read in [(answer, read) for answer, read in self._waiting.items() if read.done()]:
            if (error := read.exception()) is not None:
                LOG.error("request %s: reading a kept state failed", answer.group.id, exc_info=error)
            found.append((answer, None if error is not None else read.result()))
            self.drop(answer)
        return found

    def drop(self, answer: Answer) -> None:
        """Let an answer wait no more. A read that nobody waits for is forgotten, with the state that it got."""
        read = self._waiting.pop(answer, None)
        if read is not None and read not in self._waiting.values():
            self._reads = {key: one for key, one in self._reads.items() if one is not read}
            read.cancel()
