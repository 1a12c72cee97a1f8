"""The oracle of the profile ``served`` (export/served.py) for checkpoints that fit into no memory: one layer at a time over all texts.

Experts answer one by one in the oracle, whether all of them are in memory or a group, so the results are those of the whole model, to
the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import sha256_json
from ..export.checkpoint.reader import Checkpoint
from ..export.contract.weights import EXPERTS
from ..export.model.decoder import Decoder, Layer
from ..export.served import OracleRun, after_experts, head_logits, until_experts
from ..progress import Say, silent
from .jobs import Job
from .layer_weights import GROUP_BYTES, LayerWeights
from .layered_answers import Answers
from .mapped import mapped
from .runners import Alone, Logits, Reading, roundings
from .selection import as_entries


class LayeredOracle:
    """The oracle, of which one layer is in memory at a time; read by :func:`~foldkv.validation.layered.read_layered`."""

    def __init__(self, checkpoint: Checkpoint, *, group_bytes: int = GROUP_BYTES) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            group_bytes: bytes of float32 weights of experts that are held at once; at least one expert is.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
        """
        self.weights = LayerWeights(checkpoint, group_bytes=group_bytes)
        self.roundings = roundings(checkpoint)
        self.layer_bytes = self.weights.layer_bytes
        self._spec = checkpoint.spec
        self.num_layers: int = checkpoint.spec.num_layers

    def key(self, jobs: Sequence[Job]) -> str:
        """A digest of everything that the streams of these jobs depend on; threads, which change the last bits, included."""
        return sha256_json(["oracle", self.weights.identity, torch.get_num_threads(), [job.key for job in jobs]])

    def embedded(self, job: Job) -> Tensor:
        """The streams [n, N, C] before the first layer."""
        rows = torch.nn.functional.embedding(torch.tensor(list(job.tokens)), self.weights.value("embed.weight"))
        return rows[:, None].expand(-1, self._spec.hc_mult, -1).contiguous()

    def layers(self, jobs: Sequence[Job], streams: Sequence[Tensor], *, first: int = 0) -> Iterator[list[Tensor]]:
        """As :meth:`foldkv.validation.layered.LayeredReference.layers`."""
        now = list(streams)
        with torch.no_grad():
            for index in range(first, self.num_layers):
                now = self._layer(index, jobs, now)
                yield now

    def logits(self, streams: Tensor) -> Tensor:
        """Logits [n, V] from streams [n, N, C] after the last layer."""
        with torch.device("meta"):
            head = Decoder(self._spec)
        names = [name for name in head.state_dict() if not name.startswith(("layers.", "embed."))]
        head.load_state_dict({name: self.weights.value(name) for name in names}, strict=False, assign=True)
        with torch.no_grad():
            return head_logits(head, streams)

    def _layer(self, index: int, jobs: Sequence[Job], streams: Sequence[Tensor]) -> list[Tensor]:
        prefix = f"layers.{index}."
        with torch.device("meta"):
            layer = Layer(self._spec, index).eval().requires_grad_(False)
        names = [name for name in layer.state_dict() if not name.startswith(f"{EXPERTS}.")]
        layer.load_state_dict({name: self.weights.value(prefix + name) for name in names}, strict=False, assign=True)
        asked = []
        for job, before in zip(jobs, streams, strict=True):
            given = before if job.given is None or not index else torch.from_numpy(job.given[index - 1])
            run, own = OracleRun(torch.empty(0)), (job.keys or {}).get(index)
            tokens, rounding = torch.tensor(list(job.tokens)), self.roundings[job.deployment]
            asked.append(until_experts(layer, index, given, tokens, run, keys=own, rounding=rounding))
            if job.given is not None:
                job.entries |= {at: as_entries(visible.numpy()) for at, visible in run.chosen.items()}
        for start, end in self.weights.groups({expert for one in asked for expert in one.wanted}):
            w13, w2 = self.weights.experts(index, start, end)
            for expert in range(start, end):
                for one in asked:
                    one.answer(expert, w13[expert - start], w2[expert - start])
            del w13, w2  # memory has one group, and the next is read now
        pairs = zip(jobs, asked, strict=True)
        after = [after_experts(layer, index, one, rounding=self.roundings[job.deployment]) for job, one in pairs]
        for job, own_streams in zip(jobs, after, strict=True):
            if job.keep_streams:
                job.streams.append(own_streams.numpy())
        return after


class LayeredOracleRunner:
    """The layered oracle as what a report asks: as :class:`~foldkv.validation.layered_runner.LayeredRunner` is of the reference."""

    name = "foldkv's oracle of the profile served, float32, layer by layer"

    def __init__(self, checkpoint: Checkpoint, *, folder: Path | None = None, progress: Say = silent) -> None:
        """Check the checkpoint's tensors; no weight is read.

        Args:
            checkpoint: the checkpoint, opened.
            folder: where a pass keeps what it has after every layer, so that it goes on after an interruption.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.

        Raises:
            CheckpointError: tensors are missing, unexpected or of a wrong shape.
        """
        self._side = LayeredOracle(checkpoint)
        self._answers = Answers(self._side, "the oracle", lambda _, streams: streams, folder=folder, progress=progress)
        self.deployments = tuple(name for name in self._side.roundings if name)
        self.prepare = self._answers.prepare

    def read(self, tokens: Sequence[int], *, deployment: str = "", streams: bool = False) -> Reading:
        """As :meth:`foldkv.validation.runners.OracleRunner.read`."""
        job, last = self._answers.of(Job(tokens, deployment=deployment, keep_streams=streams))
        return Reading(mapped(self._side.logits(last).numpy(), self._answers.folder), job.streams)

    def alone(self, tokens: Sequence[int], given: Sequence[Logits], keys: Mapping[int, Any] | None = None) -> Alone:
        """As :meth:`foldkv.validation.runners.OracleRunner.alone`; with ``keys`` without streams."""
        job, _ = self._answers.of(Job(tokens, given=given, keys=keys, keep_streams=keys is None))
        return Alone(job.streams, job.entries)
