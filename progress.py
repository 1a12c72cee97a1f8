"""Progress of long work: lines, how much is done, how long it may take. Standard library only.

Functions take any callable of one line, for example ``print``, and turn it into a :class:`Progress` with
:meth:`Progress.of`. The command line gives them one that shows bars and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

Say = Callable[[str], None]
BYTES = "bytes"


class Sink(Protocol):
    """Shows what happens. Parts of the work have names; the whole is the part "". Called from several threads."""

    def line(self, part: str, text: str) -> None:
        """A step of a part begins, or there is something to report."""

    def steps(self, part: str, done: float, total: float, unit: str) -> None:
        """``done`` of ``total`` of the part's current step is done; ``unit`` is a plural, or "bytes"."""

    def expect(self, part: str, low: float, high: float) -> None:
        """The part took between ``low`` and ``high`` seconds in comparable runs."""

    def end(self, part: str) -> None:
        """The part is over."""


class _Lines:
    """Passes lines on to a plain callable, and nothing else."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def line(self, part: str, text: str) -> None:
        self._say(f"{part}: {text}" if part else text)

    def steps(self, part: str, done: float, total: float, unit: str) -> None:
        return

    def expect(self, part: str, low: float, high: float) -> None:
        return

    def end(self, part: str) -> None:
        return


class Progress:
    """Reports on a piece of work. Calling it with a line says what begins now."""

    def __init__(self, sink: Sink, part: str = "") -> None:
        """Report on the part ``part`` to ``sink``."""
        self._sink, self._part = sink, part

    @staticmethod
    def of(say: Say) -> Progress:
        """``say`` itself if it is a Progress, else one that passes lines on to it."""
        return say if isinstance(say, Progress) else Progress(_Lines(say))

    def __call__(self, line: str) -> None:
        """Say what begins now."""
        self._sink.line(self._part, line)

    def steps(self, done: float, total: float, unit: str = "") -> None:
        """Say how much is done. ``unit`` is a plural such as "texts", or ``BYTES``."""
        self._sink.steps(self._part, done, total, unit)

    def expect(self, low: float, high: float) -> None:
        """Say how many seconds comparable runs took."""
        self._sink.expect(self._part, low, high)

    @contextmanager
    def part(self, name: str) -> Iterator[Progress]:
        """A Progress for one part of the work, with its own bar. Parts may run at the same time."""
        part = f"{self._part}: {name}" if self._part else name
        try:
            yield Progress(self._sink, part)
        finally:
            self._sink.end(part)


def silent(line: str) -> None:
    """Says nothing: the default of library functions."""
