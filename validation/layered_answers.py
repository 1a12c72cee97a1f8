"""Questions to a side that goes a layer at a time: all are announced first, and answered in as few passes through its weights as can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from ..progress import Progress, Say, silent
from .jobs import Job, in_batches
from .layered import Layered, read_layered

Kept = TypeVar("Kept")


class Answers(Generic[Kept]):
    """What is known of a side. A question that was not announced costs a pass of its own."""

    def __init__(
        self, side: Layered, what: str, keep: Callable[[Job, Tensor], Kept], *, folder: Path | None = None,
        progress: Say = silent,
    ) -> None:  # fmt: skip
        """Begin with nothing.

        Args:
            side: answers.
            what: it is, in words.
            keep: gives what is kept of a job, from it and its streams [n, N, C] after the last layer.
            folder: where a pass keeps what it has after every layer, so that it goes on after an interruption.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.
        """
        self._side, self._what, self._keep = side, what, keep
        self.folder, self._progress = folder, Progress.of(progress)
        self._known: dict[str, tuple[Job, Kept]] = {}

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Answer these questions now."""
        new = {job.key: job for job in jobs if job.key not in self._known}
        batches = list(in_batches(list(new.values())))
        for number, batch in enumerate(batches):
            tokens = sum(len(job.tokens) for job in batch)
            self._progress(f"{self._what}, layer by layer: pass {number + 1} of {len(batches)}, {tokens} tokens")
            streams = read_layered(
                self._side, batch, folder=self.folder, progress=self._progress, pass_=(number, len(batches))
            )
            self._known |= {job.key: (job, self._keep(job, one)) for job, one in zip(batch, streams, strict=True)}

    def of(self, job: Job) -> tuple[Job, Kept]:
        """A job with what it was to keep, and what is kept of it."""
        if job.key not in self._known:
            self.prepare([job])
        return self._known[job.key]
