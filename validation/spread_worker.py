"""In a worker of a Ray cluster: the sides of a validation, each opened once, answer questions.

A worker whose files, packages or processor would compute otherwise is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..artifact import scratch_folder
from ..backends import FLOAT32
from ..cluster import refuse_others
from ..export.checkpoint.reader import Checkpoint
from ..runtime.bundle import load_bundle
from ..runtime.model import Model
from .environment import environment, instructions
from .inside import Choices
from .jobs import Job
from .layered_subject import open_subject
from .runners import Oracle, Reading, Reference, Subject, torch_threads
from .selection import Ints
from .sides import open_choices, open_oracle, open_transformers

#: Names of the sides.
SUBJECT, CHOICES, REFERENCE, ORACLE, YARDSTICK = (
    "the bundle",
    "its choices",
    "the reference",
    "the oracle",
    "the yardstick",
)


@dataclass(frozen=True)
class Sources:
    """What a worker opens, and what it must find.

    Attributes:
        bundle, checkpoint: folders, which all workers see under the same path. A bundle for a GPU is only looked at: workers answer for
            its references.
        digest: of the bundle.
        identity: of the checkpoint.
        allowed: keys of the checkpoint's config.json to ignore.
        environment: versions of Python and of the packages that a worker computes with.
        instructions: of the processor, as :func:`~foldkv.validation.environment.instructions` gives them.
        threads: of all sides.
        whole: models in memory, else a layer at a time.
        context: tokens of the longest question.
        matrices: how the bundle's matrices are read.
    """

    bundle: str
    checkpoint: str
    digest: str
    identity: str
    allowed: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    instructions: frozenset[str]
    threads: int
    whole: bool
    context: int
    matrices: str


def answer(sources: Sources, side: str, jobs: Sequence[Job]) -> Any:
    """The answers of a side to questions from an empty state; that of one question is not in a list.

    Of the subject and its choices these are logits [n, V] and the entries by layer, of the others a :class:`~.runners.Reading`.

    Args:
        sources: what to open.
        side: its name.
        jobs: the questions; of the subject, ``edges`` are where the pieces end in which it is fed.

    Raises:
        InputError: this worker would compute something else.
    """
    worker = _opened.get(sources)
    if worker is None:
        for other in _opened.values():
            other.close()
        _opened.clear()
        worker = _opened[sources] = Worker(sources)
    with torch_threads(sources.threads):
        found = worker.answers(side, jobs)
    return found if len(found) > 1 else found[0]


class Worker:
    """What a worker has opened. A side is opened when it is first asked."""

    def __init__(self, sources: Sources) -> None:
        """Read what the bundle and the checkpoint are, and compare it with what is expected.

        Raises:
            InputError: this worker would compute something else; all differences are named.
        """
        self._sources, self._whole = sources, sources.whole
        self._checkpoint = Checkpoint(Path(sources.checkpoint), allow_unknown_keys=sources.allowed)
        self._bundle, self._stack = load_bundle(Path(sources.bundle)), ExitStack()
        here = instructions()
        others = ["another bundle"] if self._bundle.digest != sources.digest else []
        others += ["another checkpoint"] if self._checkpoint.identity() != sources.identity else []
        if here != sources.instructions:
            more, less = sorted(here - sources.instructions), sorted(sources.instructions - here)
            others.append(
                f"another processor, with {', '.join(more) or 'nothing more'}, without {', '.join(less) or 'nothing'}"
            )
        refuse_others(
            dict(sources.environment), environment(self._bundle), others,
            step="Give all nodes the same processors, the same packages and the same files under the same paths.",
        )  # fmt: skip
        # Where sides that go a layer at a time keep what a machine's memory is not counted to hold (room.py).
        self._folder = None if self._whole else self._stack.enter_context(_own_folder())

    def answers(self, side: str, jobs: Sequence[Job]) -> list[Any]:
        """As :func:`answer`. Arrays of sides that go a layer at a time are mapped from files that have no name any more."""
        try:
            return self._answers(side, jobs)
        finally:
            # Ray ends an idle worker without a word, so nothing stays until then. What is mapped stays readable.
            if self._folder is not None:
                _empty(self._folder)

    def _answers(self, side: str, jobs: Sequence[Job]) -> list[Any]:
        if side == SUBJECT:
            pieces = [(job.tokens, _sizes(job)) for job in jobs if job.edges is not None]
            self._subject.announce(pieces=pieces, logits=[(job.tokens, job.last) for job in jobs if job.edges is None])
            return [
                self._subject.logits(job.tokens, last=job.last)
                if job.edges is None
                else self._subject.logits_in(job.tokens, _sizes(job))
                for job in jobs
            ]
        if side == CHOICES:
            if self._choices.ahead:
                self._choices.prepare([job.tokens for job in jobs], folder=self._folder)
            return [self._choices.chosen(job.tokens) for job in jobs]
        if side == ORACLE:
            self._oracle.prepare(jobs)
            return [self._oracle.read(job.tokens, deployment=job.deployment) for job in jobs]
        runner = self._reference if side == REFERENCE else self._yardstick
        runner.prepare(jobs)
        return [
            Reading(runner.logits(job.tokens, last=job.last))
            if job.chosen is None
            else runner.read(job.tokens, _own(job.chosen))
            for job in jobs
        ]

    @cached_property
    def _subject(self) -> Subject:
        opened = open_subject(self._model, context=self._sources.context, layered=not self._whole, folder=self._folder)
        return self._stack.enter_context(opened)

    @cached_property
    def _model(self) -> Model:
        sources = self._sources
        return self._stack.enter_context(Model(self._bundle.folder, threads=sources.threads, matrices=sources.matrices))

    @cached_property
    def _choices(self) -> Choices:
        found = open_choices(self._model, self._checkpoint, whole=self._whole)
        assert found is not None
        self._stack.callback(found.close)
        return found

    @cached_property
    def _reference(self) -> Reference:
        return open_transformers(self._checkpoint, FLOAT32, whole=self._whole, folder=self._folder)

    @cached_property
    def _yardstick(self) -> Reference:
        return open_transformers(self._checkpoint, self._bundle.precision, whole=self._whole, folder=self._folder)

    @cached_property
    def _oracle(self) -> Oracle:
        return open_oracle(self._checkpoint, whole=self._whole, folder=self._folder)

    def close(self) -> None:
        """Free the bundle, and remove the folder."""
        self._stack.close()


#: In a worker: what it has opened.
_opened: dict[Sources, Worker] = {}


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """A scratch folder of this process; those of workers that were killed are removed."""
    above = Path(tempfile.gettempdir()).resolve()
    with ExitStack() as stack:
        # One worker at a time, lest one takes the folder for a left one that another has made and not locked yet.
        with _locked(above, wait=True):
            for left in above.glob("foldkv-worker-*"):
                with contextlib.suppress(OSError), _locked(left):
                    shutil.rmtree(left, ignore_errors=True)
            folder = stack.enter_context(scratch_folder("worker"))
            stack.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder until the end of this process at the latest.

    Args:
        folder: no link.
        wait: until nobody else holds it.

    Raises:
        OSError: another worker holds it, or it is no folder that this user may read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for inner in folder.iterdir():
        shutil.rmtree(inner, ignore_errors=True)


def _own(chosen: Mapping[int, Ints]) -> dict[int, Ints]:
    """A copy that can be written: what Ray gives is mapped from its store."""
    return {layer: entries.copy() for layer, entries in chosen.items()}


def _sizes(job: Job) -> list[int]:
    """Of the pieces in which a job's tokens are fed."""
    edges = [0, *(job.edges or ()), len(job.tokens)]
    return [end - start for start, end in itertools.pairwise(edges)]
