"""The layered reference as what a report asks (runners.py): it is told all questions first, and answers them one by one.

A question that was not announced costs a pass through all weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..export.checkpoint.reader import Checkpoint
from ..progress import Progress, Say, silent
from .jobs import Job, in_batches
from .layered import LayeredReference, edges_of, read_layered
from .runners import Alone, Logits, Reading
from .selection import Ints

_CHUNK = 256


class LayeredRunner:
    """transformers in float32, of which one layer is in memory at a time."""

    def __init__(self, checkpoint: Checkpoint, *, folder: Path | None = None, progress: Say = silent) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            folder: where a pass keeps what it has after every layer, so that it goes on after an interruption.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
            MissingDependencyError: transformers is not installed.
        """
        self._reference = LayeredReference(checkpoint)
        self._folder, self._progress = folder, Progress.of(progress)
        self._known: dict[str, tuple[Job, Tensor]] = {}
        self.name, self.in_memory = self._reference.name, False

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Answer these questions now, in as few passes through the weights as memory allows."""
        new = {job.key: job for job in jobs if job.key not in self._known}
        batches = list(in_batches(list(new.values())))
        for number, batch in enumerate(batches):
            self._progress(
                f"the reference, layer by layer: pass {number + 1} of {len(batches)}, {sum(len(job.tokens) for job in batch)} tokens"
            )
            streams = read_layered(
                self._reference, batch, folder=self._folder, progress=self._progress, pass_=(number, len(batches))
            )
            for job, one in zip(batch, streams, strict=True):
                self._known[job.key] = job, one if job.last is None else one[-job.last :].clone()

    def read(self, tokens: Sequence[int], chosen: Mapping[int, Ints], *, streams: bool = False) -> Reading:
        """As :meth:`foldkv.validation.runners.TransformersRunner.read`."""
        job, last = self._answer(Job(tokens, chosen=chosen, keep_streams=streams))
        return Reading(self._logits(last), job.streams, job.selections)

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """One pass over all tokens, without a cache; logits after the ``last`` of them, or after all."""
        return self._logits(self._answer(Job(tokens, last=last))[1])

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """The tokens in chunks through transformers' own cache, then the tail in one."""
        edges = [*edges_of(_CHUNK, len(tokens)), len(tokens)]
        return self._logits(self._answer(Job([*tokens, *tail], edges=edges, last=len(tail)))[1])

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`foldkv.validation.runners.TransformersRunner.alone`."""
        job, _ = self._answer(Job(tokens, given=given, keys=keys, keep_streams=True))
        return Alone(job.streams, job.entries)

    def _answer(self, job: Job) -> tuple[Job, Tensor]:
        if job.key not in self._known:
            self.prepare([job])
        return self._known[job.key]

    def _logits(self, streams: Tensor) -> Logits:
        result: Logits = self._reference.logits(streams).numpy()
        return result
