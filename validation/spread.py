"""The sides of a validation in front of the workers of a Ray cluster: what is announced is answered there.

A question is a text from an empty state, so its answer does not depend on who gives it: the figures are those of a run without. The sides
here answer what is about streams after layers, which are hundreds of times as large as logits, and what goes on from a state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cluster import Cluster
from ..progress import Say, silent
from .inside import Choices
from .jobs import Job
from .runners import Alone, Logits, Look, Oracle, Reading, Reference, Subject
from .selection import Ints
from .sides import Sides
from .spread_worker import CHOICES, ORACLE, REFERENCE, SUBJECT, YARDSTICK, Sources, answer

#: Questions of a share, of models in memory. A lost worker loses no more than this.
SHARE = 8
#: Shares for each worker, so that none waits long for the last.
_SHARES_EACH = 4


def spread(sides: Sides, cluster: Cluster, sources: Sources) -> Sides:
    """The same sides, of which the workers answer what can be asked of them. A bundle for a GPU answers here."""
    shared = cluster.shared(sources)

    def questions(side: str) -> _Questions:
        return _Questions(cluster, sources, shared, side)

    if not sides.subject.bundle.backend.gpu:
        sides = replace(
            sides,
            subject=_Subject(sides.subject, questions(SUBJECT)),
            choices=None if sides.choices is None else _Choices(sides.choices, questions(CHOICES)),
        )
    return replace(
        sides,
        reference=_Reference(sides.reference, questions(REFERENCE)),
        oracle=None if sides.oracle is None else _Oracle(sides.oracle, questions(ORACLE)),
        yardstick=None if sides.yardstick is None else _Reference(sides.yardstick, questions(YARDSTICK)),
    )


class _Questions:
    """What the workers were asked about one side."""

    def __init__(self, cluster: Cluster, sources: Sources, shared: Any, side: str) -> None:
        self._cluster, self._sources, self._shared, self._side = cluster, sources, shared, side
        self._given: dict[str, Any] = {}

    def give(self, jobs: Sequence[Job]) -> list[Job]:
        """Ask the workers, and return the jobs that they do not get."""
        new = {job.key: job for job in jobs if not _inside(job)}
        threads = self._sources.threads
        workers = max(1, self._cluster.processors // threads)
        # Each pass through a model that goes a layer at a time reads all weights.
        parts, most = (_SHARES_EACH * workers, SHARE) if self._sources.whole else (workers, len(new))
        for share in shares(
            [(key, len(job.tokens)) for key, job in new.items() if key not in self._given], parts, most
        ):
            found = self._cluster.give(
                answer, self._shared, self._side, [new[key] for key in share], processors=threads, answers=len(share)
            )
            self._given |= dict(zip(share, found, strict=True))
        return [job for job in jobs if _inside(job)]

    def answer(self, job: Job) -> Any:
        """What a worker answers; None if none was asked."""
        given = self._given.get(job.key)
        return None if given is None else self._cluster.wait(given, f"questions to {self._side}")


def _inside(job: Job) -> bool:
    """Whether a question is about what is inside of a model."""
    return job.keep_streams or job.given is not None


def shares(sizes: Sequence[tuple[str, int]], parts: int, most: int) -> list[list[str]]:
    """Split things into parts of about the same size, in order.

    Args:
        sizes: names and sizes, in order.
        parts: how many, unless parts would get too long.
        most: things of a part.
    """
    found, total, seen, last = list[list[str]](), sum(size for _, size in sizes), 0, -1
    for name, size in sizes:
        part = seen * parts // total
        if part != last or len(found[-1]) == most:
            found.append([])
        found[-1].append(name)
        seen, last = seen + size, part
    return found


class _Subject:
    """See :class:`~foldkv.validation.runners.Subject`."""

    def __init__(self, own: Subject, questions: _Questions) -> None:
        self._own, self._questions = own, questions
        self.name, self.model, self.bundle = own.name, own.model, own.bundle
        self.context, self.state_bytes, self.in_memory = own.context, own.state_bytes, own.in_memory
        self.kept: Path | None = own.kept

    def announce(
        self, *, looks: Sequence[Sequence[int]] = (), pieces: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        logits: Sequence[tuple[Sequence[int], int | None]] = (),
    ) -> None:  # fmt: skip
        jobs = [_fed(tokens, sizes) for tokens, sizes in pieces]
        self._questions.give([*jobs, *(Job(tokens, last=last) for tokens, last in logits)])
        self._own.announce(looks=looks)

    def look(self, tokens: Sequence[int]) -> Look:
        return self._own.look(tokens)

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        found: Logits | None = self._questions.answer(Job(tokens, last=last))
        return self._own.logits(tokens, last=last) if found is None else found

    def logits_in(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        found: Logits | None = self._questions.answer(_fed(tokens, sizes))
        return self._own.logits_in(tokens, sizes) if found is None else found

    def again(self, tokens: Sequence[int]) -> tuple[Logits, Logits]:
        return self._own.again(tokens)

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        return self._own.tail_logits(tokens, tail)

    def at(self, context: int) -> AbstractContextManager[Subject]:
        return self._own.at(context)


class _Choices:
    """See :class:`~foldkv.validation.inside.Choices`."""

    ahead = True

    def __init__(self, own: Choices, questions: _Questions) -> None:
        self._own, self._questions = own, questions

    def prepare(self, texts: Sequence[Sequence[int]], *, folder: Path | None = None, progress: Say = silent) -> None:
        self._questions.give([Job(tokens) for tokens in texts])

    def chosen(self, tokens: Sequence[int]) -> dict[int, Ints]:
        found: dict[int, Ints] | None = self._questions.answer(Job(tokens))
        return self._own.chosen(tokens) if found is None else found

    def close(self) -> None:
        self._own.close()


class _Reference:
    """See :class:`~foldkv.validation.runners.Reference`."""

    def __init__(self, own: Reference, questions: _Questions) -> None:
        self._own, self._questions = own, questions
        self.name, self.in_memory = own.name, own.in_memory

    def prepare(self, jobs: Sequence[Job]) -> None:
        self._own.prepare(self._questions.give(jobs))

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        found: Reading | None = self._questions.answer(Job(tokens, last=last))
        return self._own.logits(tokens, last=last) if found is None else found.logits

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        return self._own.tail_logits(tokens, tail)

    def read(self, tokens: Sequence[int], chosen: Mapping[int, Ints], *, streams: bool = False) -> Reading:
        found: Reading | None = self._questions.answer(Job(tokens, chosen=chosen, keep_streams=streams))
        return self._own.read(tokens, chosen, streams=streams) if found is None else found

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        return self._own.alone(tokens, given, keys)


class _Oracle:
    """See :class:`~foldkv.validation.runners.Oracle`."""

    def __init__(self, own: Oracle, questions: _Questions) -> None:
        self._own, self._questions = own, questions
        self.name = own.name

    @property
    def deployments(self) -> tuple[str, ...]:
        return self._own.deployments

    def prepare(self, jobs: Sequence[Job]) -> None:
        self._own.prepare(self._questions.give(jobs))

    def read(self, tokens: Sequence[int], *, deployment: str = "", streams: bool = False) -> Reading:
        found: Reading | None = self._questions.answer(Job(tokens, deployment=deployment, keep_streams=streams))
        return self._own.read(tokens, deployment=deployment, streams=streams) if found is None else found

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        return self._own.alone(tokens, given, keys)


def _fed(tokens: Sequence[int], sizes: Sequence[int]) -> Job:
    """The question how a subject answers that is fed in pieces of these sizes."""
    return Job(tokens, edges=list(itertools.accumulate(sizes))[:-1])
