"""Tries grammars in another process, within limits of time and memory, before anything of this process works on them."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from ...errors import InputError, QueueFullError
from . import grammar_worker
from .grammar_worker import framed, receive

_log = logging.getLogger(__name__)
#: What the grammars of one session may take: seconds of a processor, and bytes beside the tokenizer's.
SECONDS, MEMORY = 2.0, 256 << 20
#: Seconds that an answer may take where the machine is busy; with them the seconds in which the process starts and reads a tokenizer.
_PATIENCE = 20.0


class _EndedError(Exception):
    """The process ended by itself, or was interrupted."""


class TooComplexError(InputError):
    """A grammar takes more to compile than it may. Without the name of what it was compiled from.

    Attributes:
        lasting: it will be so the next time, too: it was not only that others kept the machine busy.
    """

    def __init__(self, much: str, *, lasting: bool = True) -> None:
        self.lasting = lasting
        super().__init__(
            f"it is too complex: compiling it takes more than {much}. Use fewer or shorter patterns, smaller numbers in multipleOf and in "
            "the bounds of repetitions, and fewer schemas that are combined"
        )


class Session:
    """Grammars that are tried one after the other and share the limits; what :meth:`Checker.session` gives."""

    def __init__(self, checker: Checker) -> None:
        self._checker, self._entered, self._spent = checker, False, ""
        self._era = checker.era

    def schema(self, schema: str) -> str:
        """What llguidance has against a schema, in its own words; "" for nothing.

        Raises:
            TooComplexError: it took too much, or one before it did.
            QueueFullError: the sessions were interrupted.
        """
        return str(self._ask({"schema": schema})["error"])

    def grammar(self, vocabulary: int, grammar: str, items: int, states: int) -> tuple[str, int]:
        """What llguidance has against a grammar, "" for nothing, and the bytes that it takes when it is compiled.

        Args:
            vocabulary: from :meth:`Checker.vocabulary`.
            grammar, items, states: as :func:`~foldkv.runtime.serving.grammar_worker.compiled` has them.

        Raises:
            TooComplexError: it took too much, or one before it did.
            QueueFullError: the sessions were interrupted.
        """
        found = self._ask({"vocabulary": vocabulary, "grammar": grammar, "items": items, "states": states})
        return str(found["error"]), int(found["bytes"])

    def _ask(self, message: dict[str, Any]) -> Any:
        if self._spent:
            raise TooComplexError(self._spent)
        if not self._entered:
            self._checker.lock.acquire()
            self._entered = True
        answer: dict[str, Any] = {}
        with contextlib.suppress(_EndedError):
            answer = self._checker.ask({**message, "limits": {"seconds": SECONDS, "memory": MEMORY}}, self._era)
        if self._era != self._checker.era:
            raise QueueFullError("no more grammars are tried here, because the process ends")
        if not answer:
            raise RuntimeError("the process that tries grammars ended; what it said stands above")
        limit = answer.get("limit")
        if limit is not None:
            self._spent = {
                "time": f"{SECONDS:g} s", "memory": f"{MEMORY >> 20} MiB of memory", "patience": f"{_PATIENCE:g} s on this busy machine"
            }[limit]  # fmt: skip
            raise TooComplexError(self._spent, lasting=limit != "patience")
        return answer

    def end(self) -> None:
        """Nothing more is tried."""
        if self._entered:
            self._entered = False
            try:
                with contextlib.suppress(_EndedError):  # it has forgotten the session with everything else
                    self._checker.ask({"end_session": True}, self._era)
            finally:
                self._checker.lock.release()


class Checker:
    """The process that tries grammars. It starts when it is first needed, and again if it had to be ended.

    There is one for all models of a process; sessions wait for each other. All methods may be called on any thread.

    Attributes:
        lock: whose session it is.
        era: sessions of an earlier one are over.
    """

    def __init__(self) -> None:
        self.lock, self.era = threading.Lock(), 0
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._vocabularies: dict[int, tuple[str, int, int]] = {}
        self._known: set[int] = set()

    def vocabulary(self, text: str, size: int, end: int) -> int:
        """A number for a tokenizer, as :func:`~foldkv.runtime.serving.grammar_worker.vocabulary_of` reads it."""
        number = next(self._numbers)
        self._vocabularies[number] = (text, size, end)
        return number

    def forget(self, number: int) -> None:
        """A tokenizer is not needed any more."""
        self._vocabularies.pop(number, None)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """What is tried together. Nothing waits or starts before it is asked something."""
        session = Session(self)
        try:
            yield session
        finally:
            session.end()

    def ask(self, message: dict[str, Any], era: int) -> Any:
        """An answer of the process for a session of an era; the caller has the lock. ``limit`` in it says what was reached."""
        end = time.monotonic() + _PATIENCE
        try:
            if self._process is None or self._process.poll() is not None:
                if "end_session" in message:
                    return {}
                self._start()
            if (
                self.era != era
            ):  # only now: an interruption ends a process that is there, and not one that starts after it
                raise _EndedError
            for old in self._known - self._vocabularies.keys():
                self._known.discard(old)
                self._exchange({"forget": old}, end)
            number = message.get("vocabulary")
            if number is not None and number not in self._known:
                text, size, token = self._vocabularies[number]
                self._exchange({"vocabulary": number, "text": text, "size": size, "end": token}, end)
                self._known.add(number)
            return self._exchange(message, end)
        except TimeoutError:
            _log.warning("a grammar did not compile within %g s; the process that tried it was ended", _PATIENCE)
            self.stop()
            return {"limit": "patience"}
        except BaseException:
            self.stop()
            raise

    def interrupt(self) -> None:
        """Break off the sessions that there are, on whatever threads: what they ask fails. Later ones work."""
        self.era += 1
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the process; the next question starts another. Nobody may be asking it."""
        process, self._process = self._process, None
        self._known = set()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the fork that works
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()

    def _start(self) -> None:
        self.stop()
        # A file and not a module: modules of foldkv take longer to import than most grammars to compile. Signals from a terminal are for us.
        self._process = subprocess.Popen(
            [sys.executable, "-P", grammar_worker.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            start_new_session=True,
        )  # fmt: skip

    def _exchange(self, message: dict[str, Any], end: float) -> Any:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        to, source = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            data = memoryview(framed(message))
            os.set_blocking(to, False)
            while data:
                _wait([], [to], end)
                with contextlib.suppress(BlockingIOError):
                    data = data[os.write(to, data) :]
        except BrokenPipeError:
            raise _EndedError from None

        def read(size: int) -> bytes:
            _wait([source], [], end)
            return os.read(source, size)

        answer = receive(read)
        if answer is None:
            raise _EndedError
        return answer


def _wait(reading: list[int], writing: list[int], end: float) -> None:
    poll = select.poll()  # select takes no large numbers of files, which a server may have
    for pipe in reading:
        poll.register(pipe, select.POLLIN)
    for pipe in writing:
        poll.register(pipe, select.POLLOUT)
    if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
        raise TimeoutError


#: For all models of this process.
checker = Checker()
atexit.register(checker.stop)
