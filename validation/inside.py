"""What a subject does inside of its segments: which entries its indexers chose.

A graph on the CPU says it: the runtime loads it with one more output. An engine is what it is, and a GPU has no room for a second
copy of a model. What the indexer chose is recomputed there, in float32, from what flows into the layer and from the index rows that
the bundle keeps, both of which can be read. An indexer that chooses otherwise than its rows say shows in the streams after its layer,
and not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from ..errors import ArtifactError
from ..export.contract.geometry import ModelSpec
from ..export.contract.layouts import cache_layout
from ..export.contract.rows import row_format_named
from ..export.operators.row_formats import unpack
from ..export.segments import CHOSEN
from ..progress import Say, silent
from ..runtime.backend import Observed
from ..runtime.bundle import Bundle
from ..runtime.chain import ChainModel
from ..runtime.chain_executor import ChainExecutor
from .jobs import Job, in_batches
from .layered import read_layered
from .layered_subject import LayeredSubject
from .selection import Ints


class Choices(Protocol):
    """Says which entries the indexers of a bundle chose."""

    #: Whether it is to be told of all texts before it is asked.
    ahead: bool

    def prepare(self, texts: Sequence[Sequence[int]], *, folder: Path | None = None, progress: Say = silent) -> None:
        """Find out now what is chosen in these texts."""

    def chosen(self, tokens: Sequence[int]) -> dict[int, Ints]:
        """As :meth:`GraphChoices.chosen`."""
        ...

    def close(self) -> None:
        """Free what was opened."""


class GraphChoices:
    """The entries that the indexers of a chain of graphs chose. All texts use one copy of the chain."""

    def __init__(self, chain: ChainModel, csa_layers: Sequence[int], *, ahead: bool = False) -> None:
        """Load the chain's segments once more, with what their indexers choose as outputs; weights are shared.

        Args:
            chain: of the subject, which stays open.
            csa_layers: layers with an indexer.
            ahead: whether :meth:`prepare` is to be called, because the model does not fit into memory.

        Raises:
            ArtifactError: a segment with an indexer does not name what it chose.
        """
        self._csa, self._bundle, table, self.ahead = list(csa_layers), chain.bundle, chain.table, ahead
        self._known: dict[tuple[int, ...], dict[int, Ints]] = {}
        kinds = {call.segment for call in table.calls if call.layer in self._csa}
        self._model = chain.with_graphs(
            {name: _with_choices(self._bundle.folder / table.segments[name]) for name in kinds}
        )

    def chosen(self, tokens: Sequence[int]) -> dict[int, Ints]:
        """By layer, the entries [n, places] int32 (-1: none) that each query attends to, from one prefill of an empty state."""
        if tuple(tokens) in self._known:
            return self._known[tuple(tokens)]
        found: dict[int, Ints] = {}

        def keep(seen: Observed) -> None:
            if seen.layer in self._csa:
                found[seen.layer] = seen.more[CHOSEN][0].copy()

        count = len(tokens)
        executor = ChainExecutor(self._model, count, 1)
        executor.run(
            np.array([tokens], np.int64), np.zeros(1, np.int64), np.array([count]), count, np.zeros((1, 1), np.int64),
            observe=keep,
        )  # fmt: skip
        executor.close()
        return found

    def prepare(self, texts: Sequence[Sequence[int]], *, folder: Path | None = None, progress: Say = silent) -> None:
        """Find out now what is chosen in these texts, a layer at a time over all of them (layered_subject.py).

        Args:
            texts: [n] tokens each.
            folder: where a pass keeps what it has after every layer.
            progress: a :class:`~foldkv.progress.Progress` gets the bytes of weights.
        """
        for batch in in_batches([Job(tokens, edges=[]) for tokens in texts]):
            executor = ChainExecutor(self._model, max(len(job.tokens) for job in batch), 1)
            side = LayeredSubject(self._bundle, executor, name="choices", way=self._model.way)
            read_layered(side, batch, folder=folder, progress=progress)
            executor.close()
            for job in batch:
                self._known[tuple(job.tokens)] = {layer: job.entries[layer] for layer in self._csa}

    def close(self) -> None:
        """Free the chain."""
        self._model.close()


def _with_choices(file: Path) -> bytes:
    """A segment with the entries that its indexer chose as another output."""
    model = onnx.load(file)
    if not any(CHOSEN in node.output for node in model.graph.node):
        raise ArtifactError(f"{file} has no value {CHOSEN!r} to compare choices by. Make the bundle again.")
    model.graph.output.append(onnx.ValueInfoProto(name=CHOSEN))
    return bytes(model.SerializeToString())


def index_keys(
    bundle: Bundle, spec: ModelSpec, rows: Mapping[str, npt.NDArray[np.generic]], tokens: int
) -> dict[int, torch.Tensor]:
    """The index rows of a session's state as values: by layer [entries, D] float32.

    Args:
        bundle: says how rows are stored.
        spec: the model.
        rows: the state's rows by name, as they are stored.
        tokens: that the state holds.
    """
    found = {}
    for tensor in bundle.state.tensors:
        if tensor.group != "index_entries":
            continue
        assert tensor.ratio is not None
        stored = torch.from_numpy(np.array(rows[tensor.name][: tokens // tensor.ratio]))
        format_ = row_format_named(cache_layout(bundle.manifest.layout).format_of(tensor.group) or "")
        if format_.packed:
            values = unpack(stored, format_.name, spec.index_head_dim, spec.rope_dim)
        else:
            values = (stored.view(torch.bfloat16) if tensor.dtype == "bfloat16" else stored).float()
        found[tensor.layer] = values
    return found
