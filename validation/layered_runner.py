"""The layered reference as what a report asks (runners.py): it is told all questions first, and answers them one by one.

A question that was not announced costs a pass through all weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backends import FLOAT32
from ..export.checkpoint.reader import Checkpoint
from ..progress import Say, silent
from .jobs import Job
from .layered import LayeredReference, edges_of
from .layered_answers import Answers
from .mapped import mapped
from .runners import Alone, Logits, Reading
from .selection import Ints

#: Tokens of a chunk in which a long context goes through the reference.
CHUNK = 256


class LayeredRunner:
    """transformers, of which one layer is in memory at a time: the reference in float32, or the yardstick in bfloat16."""

    def __init__(
        self, checkpoint: Checkpoint, *, precision: str = FLOAT32, folder: Path | None = None, progress: Say = silent
    ) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            precision: float32, or bfloat16 as transformers itself computes in it.
            folder: where a pass keeps what it has after every layer, so that it goes on after an interruption.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
            MissingDependencyError: transformers is not installed.
        """
        self._reference = LayeredReference(checkpoint, precision=precision)
        what = "the reference" if precision == FLOAT32 else "the yardstick"
        self._answers = Answers(self._reference, what, _last, folder=folder, progress=progress)
        self.prepare = self._answers.prepare
        self.name, self.in_memory = self._reference.name, False

    def read(self, tokens: Sequence[int], chosen: Mapping[int, Ints], *, streams: bool = False) -> Reading:
        """As :meth:`foldkv.validation.runners.TransformersRunner.read`."""
        job, last = self._answers.of(Job(tokens, chosen=chosen, keep_streams=streams))
        return Reading(self._logits(last), job.streams, job.selections)

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """One pass over all tokens, without a cache; logits after the ``last`` of them, or after all."""
        return self._logits(self._answers.of(Job(tokens, last=last))[1])

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """The tokens in chunks through transformers' own cache, then the tail in one."""
        edges = [*edges_of(CHUNK, len(tokens)), len(tokens)]
        return self._logits(self._answers.of(Job([*tokens, *tail], edges=edges, last=len(tail)))[1])

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`foldkv.validation.runners.TransformersRunner.alone`; with ``keys`` without streams."""
        job, _ = self._answers.of(Job(tokens, given=given, keys=keys, keep_streams=keys is None))
        return Alone(job.streams, job.entries)

    def _logits(self, streams: Tensor) -> Logits:
        return mapped(self._reference.logits(streams).numpy(), self._answers.folder)


def _last(job: Job, streams: Tensor) -> Tensor:
    """The streams of the tokens whose logits are wanted."""
    return streams if job.last is None else streams[-job.last :].clone()
