"""A chain of graphs on the CPU, one layer at a time over all texts, as the reference goes (layered.py).

A model that is larger than memory is read from the disk again for every chunk, because a chunk asks for most of the experts. Here all
chunks of all texts go through a layer before any goes through the next, so each weight is read once. The segments, their weights and
the chunks are those of a session; so are the results, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..artifact import MANIFEST, sha256_file, sha256_json
from ..export.contract.chain import CHAIN, ChainTable
from ..export.roles import EMBED, HEAD
from ..export.segments import CHOSEN
from ..progress import Say, silent
from ..runtime.bundle import Bundle
from ..runtime.chain_executor import ChainExecutor
from ..runtime.model import Model
from .jobs import Job
from .layered import edges_of
from .layered_answers import Answers
from .mapped import mapped
from .runners import CHUNK, Logits, Look, SessionRunner, Subject


class LayeredSubject:
    """What a bundle's chain makes of texts; read by :func:`~foldkv.validation.layered.read_layered`."""

    def __init__(self, bundle: Bundle, executor: ChainExecutor, *, name: str, way: str) -> None:
        """Take an opened chain.

        Args:
            bundle: the bundle.
            executor: runs its segments, with state for one sequence that is as long as the longest text.
            name: tells apart what is kept of it.
            way: how the chain computes (:attr:`~foldkv.runtime.chain.ChainModel.way`), which changes the last bits, and so what may be kept.
        """
        self._bundle, self._executor = bundle, executor
        self._name, self._way = name, way
        table = ChainTable.read(bundle.folder / CHAIN)
        self._sizes = {owner: sum(one.bytes for one in roles.values()) for owner, roles in table.weights.items()}
        self.num_layers: int = bundle.model.num_layers

    def key(self, jobs: Sequence[Job]) -> str:
        """A digest of everything that the streams of these jobs depend on."""
        manifest = sha256_file(self._bundle.folder / MANIFEST)
        return sha256_json([self._name, manifest, self._way, [job.key for job in jobs]])

    def layer_bytes(self, layer: int) -> int:
        """Bytes of a layer's weights."""
        return self._sizes.get(_owner(layer), 0)

    def embedded(self, job: Job) -> Tensor:
        """The streams [n, N, C] before the first layer."""
        return self._run(EMBED, job, None)[0]

    def layers(self, jobs: Sequence[Job], streams: Sequence[Tensor], *, first: int = 0) -> Iterator[list[Tensor]]:
        """The streams of every job after each layer; what else jobs keep is added to them.

        Args:
            jobs: the texts.
            streams: of each, before the layer ``first``: float32 [n, N, C].
            first: the layer to begin with.

        Yields:
            The streams after the next layer, [n, N, C] of every job.

        Raises:
            FoldkvError: ONNX Runtime failed.
        """
        now = list(streams)
        for layer in range(first, self.num_layers):
            for at, job in enumerate(jobs):
                self._executor.buffers.clear(0, len(job.tokens))
                now[at], more = self._run(_owner(layer), job, now[at])
                if job.keep_streams:
                    job.streams.append(now[at].numpy())
                if CHOSEN in more:
                    job.entries[layer] = more[CHOSEN]
                if job.keep_rows:
                    self._keep_rows(layer, job)
            yield now

    def logits(self, job: Job, streams: Tensor) -> npt.NDArray[np.float32]:
        """Logits [n, V], or those of the last tokens [job.last, V], from the streams [n, N, C] after the last layer."""
        start = 0 if job.last is None else len(job.tokens) - job.last
        logits: npt.NDArray[np.float32] = self._run(HEAD, job, streams, after=start)[0].numpy()
        return logits[start - len(job.tokens) :]

    def _run(
        self, owner: str, job: Job, streams: Tensor | None, *, after: int = 0
    ) -> tuple[Tensor, dict[str, npt.NDArray[Any]]]:
        """One call over the chunks of a text that reach beyond the first ``after`` tokens."""
        count = len(job.tokens)
        ids, made, more = np.array([job.tokens], np.int64), [], dict[str, list[npt.NDArray[Any]]]()
        for start, end in itertools.pairwise([0, *(job.edges or ()), count]):
            if start == end or end <= after:
                continue
            size = end - start
            out, extra = self._executor.run_call(
                owner, ids[:, start:end], np.array([start]), np.array([size]), end, np.arange(size)[None],
                None if streams is None else streams[None, start:end].numpy(),
            )  # fmt: skip
            made.append(torch.from_numpy(out[0]))
            for name, value in extra.items():
                more.setdefault(name, []).append(value[0])
        return torch.cat(made), {name: np.concatenate(parts) for name, parts in more.items()}

    def _keep_rows(self, layer: int, job: Job) -> None:
        rows = self._executor.buffers.copy_slot(0, len(job.tokens))
        tensors = self._bundle.state.tensors
        job.rows |= {one.name: copy for one, copy in zip(tensors, rows, strict=True) if one.layer == layer}


def _owner(layer: int) -> str:
    return f"layers.{layer}"


#: Tokens of a text beyond which streams would take too much memory: 128 KiB each at V4-Flash's width, before and after a layer.
LONGEST = 32_768
#: Tokens of a text that a session reads to compare steps after a restored snapshot: each of its steps reads many weights again.
_AGAIN = 24


class LayeredSubjectRunner:
    """A bundle whose chain goes a layer at a time; what it is asked is announced first, as for the reference (layered_runner.py)."""

    in_memory = False

    def __init__(
        self, model: Model, *, context: int, folder: Path | None = None, progress: Say = silent, chunk: int = CHUNK
    ) -> None:  # fmt: skip
        """Open a chain for texts of up to ``context`` tokens, in chunks of ``chunk``.

        Args:
            model: a bundle for ONNX Runtime.
            context: tokens of the longest text.
            folder: where a pass keeps what it has after every layer, so that it goes on after an interruption.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.
            chunk: tokens of a chunk, where a question does not say it.

        Raises:
            InputError: the state does not fit into memory.
        """
        self.model, self.bundle, self._chunk = model, model.bundle, chunk
        self.name = f"{self.bundle.target} bundle"
        self.kept, self._progress = folder, progress
        self.context = max(context, self.bundle.smallest("context"))
        buffers, executor = model.open(self.context, 1)
        self.state_bytes = buffers.bytes
        assert isinstance(executor, ChainExecutor)
        self._executor = executor
        assert model.chain is not None
        self._side = LayeredSubject(self.bundle, executor, name="subject", way=model.chain.way)
        self._answers = Answers(
            self._side, "the bundle", lambda job, streams: mapped(self._side.logits(job, streams), folder), folder=folder,
            progress=progress,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._executor.close()

    def at(self, context: int) -> AbstractContextManager[Subject]:
        """The same for texts of up to ``context`` tokens; longer ones go through a session."""
        if context > LONGEST:
            return SessionRunner(self.model, context=context, chunk=self._chunk)
        return LayeredSubjectRunner(
            self.model, context=context, folder=self.kept, progress=self._progress,
            chunk=self._chunk,
        )  # fmt: skip

    def announce(
        self, *, looks: Sequence[Sequence[int]] = (), pieces: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
        logits: Sequence[tuple[Sequence[int], int | None]] = (),
    ) -> None:  # fmt: skip
        """Answer these questions now, in as few passes through the weights as memory allows. See :class:`Subject`."""
        jobs = [self._job(tokens, inside=True) for tokens in looks]
        jobs += [self._job(tokens, sizes) for tokens, sizes in pieces]
        self._answers.prepare(jobs + [self._job(tokens, last=last) for tokens, last in logits])

    def _job(
        self,
        tokens: Sequence[int],
        sizes: Sequence[int] | None = None,
        *,
        last: int | None = None,
        inside: bool = False,
    ) -> Job:
        edges = self._edges(sizes or [len(tokens)])
        return Job(tokens, edges=edges, last=last, keep_streams=inside, keep_rows=inside)

    def logits(self, tokens: Sequence[int], *, last: int | None = None) -> Logits:
        """See :class:`Subject`."""
        return self._answers.of(self._job(tokens, last=last))[1]

    def look(self, tokens: Sequence[int]) -> Look:
        """See :class:`Subject`."""
        job, logits = self._answers.of(self._job(tokens, inside=True))
        return Look(logits, job.streams, job.rows, self._side.embedded(job).numpy())

    def logits_in(self, tokens: Sequence[int], sizes: Sequence[int]) -> Logits:
        """See :class:`Subject`."""
        return self._answers.of(self._job(tokens, sizes))[1]

    def again(self, tokens: Sequence[int]) -> tuple[Logits, Logits]:
        """See :class:`Subject`; of the first tokens, in a session."""
        with SessionRunner(self.model, context=_AGAIN, chunk=self._chunk) as session:
            return session.again(tokens[:_AGAIN])

    def tail_logits(self, tokens: Sequence[int], tail: Sequence[int]) -> Logits:
        """See :class:`Subject`."""
        edges = self._edges([len(tokens), len(tail)])
        return self._answers.of(Job([*tokens, *tail], edges=edges, last=len(tail)))[1]

    def _edges(self, sizes: Sequence[int]) -> list[int]:
        """Where chunks end when pieces of these sizes are fed one after the other, as a session cuts them; without the last."""
        edges, start = [], 0
        for size in sizes:
            edges += [start + edge for edge in (*edges_of(self._chunk, size), size)]
            start += size
        return edges[:-1]


def open_subject(
    model: Model, *, context: int, layered: bool, folder: Path | None = None, progress: Say = silent
) -> AbstractContextManager[Subject]:
    """What measures a bundle: its chain a layer at a time, if that is wanted and it runs on the CPU, else a session.

    Raises:
        InputError: the state does not fit into memory.
    """
    backend = model.bundle.backend
    if layered and not backend.engine and not backend.gpu:
        return LayeredSubjectRunner(model, context=context, folder=folder, progress=progress)
    return SessionRunner(model, context=context, folder=folder if layered else None)
