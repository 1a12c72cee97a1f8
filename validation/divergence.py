"""Find where two models diverge: compare the residual streams of the bundle and the reference after every layer.

The streams are what flows from segment to segment, so they are there in every bundle that is a chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from ..errors import ArtifactError
from ..export.contract.chain import CHAIN, ChainTable
from ..export.segments import CHOSEN
from ..runtime.bundle import Bundle
from ..runtime.chain import ChainModel
from ..runtime.chain_executor import ChainExecutor, Observer

Streams = npt.NDArray[np.float32]
#: Relative error above which a layer counts as different from the reference's. Float32 in another
#: order of summation gives 1e-6 to 1e-5 after a few layers; the smallest planted damage gives above 1e-2.
DIVERGED = 1e-3


@dataclass(frozen=True)
class LayerFigure:
    """Difference of the streams after a layer, over the reference's root mean square there."""

    layer: int
    kind: str
    error: float

    @property
    def diverged(self) -> bool:
        """Whether the layer computes something else than the reference. NaN counts as diverged."""
        return not self.error <= DIVERGED


class Taps:
    """Looks into a bundle's chain: the streams between its segments, and the entries that indexers chose. All texts use one copy.

    Raises:
        ArtifactError: a segment with an indexer does not name what it chose.
    """

    def __init__(self, bundle: Bundle, csa_layers: Sequence[int], *, threads: int) -> None:
        self._csa = list(csa_layers)
        table = ChainTable.read(bundle.folder / CHAIN).in_stacks()
        kinds = {call.segment for call in table.calls if call.layer in self._csa}
        opened = {name: _with_choices(bundle.folder / table.segments[name]) for name in kinds}
        self._model = ChainModel(bundle, threads=threads, instead=opened)

    def chosen(self, tokens: Sequence[int]) -> dict[int, npt.NDArray[np.integer]]:
        """By layer, the entries [n, places] int32 (-1: none) that each query attends to, from one prefill of an empty state."""
        found: dict[int, npt.NDArray[np.integer]] = {}

        def keep(layer: int | None, streams: Streams, more: Mapping[str, npt.NDArray[Any]]) -> None:
            if layer in self._csa:
                found[layer] = more[CHOSEN][0].copy()

        self._prefill(tokens, keep)
        return found

    def streams(self, tokens: Sequence[int]) -> list[Streams]:
        """Streams [n, N, C] after every layer, from one prefill of an empty state."""
        found: list[Streams] = []

        def keep(layer: int | None, streams: Streams, more: Mapping[str, npt.NDArray[Any]]) -> None:
            if layer is not None:
                found.append(streams[0].copy())

        self._prefill(tokens, keep)
        return found

    def _prefill(self, tokens: Sequence[int], observe: Observer) -> None:
        count = len(tokens)
        executor = ChainExecutor(self._model, count, 1)
        executor.run(
            np.array([tokens], np.int64), np.zeros(1, np.int64), np.array([count]), count, np.zeros((1, 1), np.int64),
            observe=observe,
        )  # fmt: skip
        executor.close()


def _with_choices(file: Path) -> bytes:
    """A segment with the entries that its indexer chose as another output."""
    model = onnx.load(file)
    if not any(CHOSEN in node.output for node in model.graph.node):
        raise ArtifactError(f"{file} has no value {CHOSEN!r} to compare choices by. Make the bundle again.")
    model.graph.output.append(onnx.ValueInfoProto(name=CHOSEN))
    return bytes(model.SerializeToString())


def compare_layers(
    expected: Sequence[Streams], actual: Sequence[Streams], kinds: Sequence[str], *, typical: bool = False
) -> list[LayerFigure]:
    """One figure per layer: the largest difference, or with ``typical`` the median token's largest. NaN becomes infinite.

    ``typical`` is for computations that round to few bits, where a single token may correctly round either way.
    """
    figures = []
    for layer, (want, have, kind) in enumerate(zip(expected, actual, kinds, strict=True)):
        scale = math.sqrt(float(np.mean(np.square(want, dtype=np.float64)))) or 1.0
        largest = np.abs(have - want).max(axis=tuple(range(1, want.ndim)))
        difference = float(np.median(largest) if typical else largest.max()) / scale
        difference = difference if np.isfinite(have).all() else math.inf
        figures.append(LayerFigure(layer, kind, difference if math.isfinite(difference) else math.inf))
    return figures


def first_divergence(figures: Sequence[LayerFigure]) -> int | None:
    """The first layer that diverges, or None."""
    return next((figure.layer for figure in figures if figure.diverged), None)
