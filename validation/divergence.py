"""Find where two models diverge: compare the residual streams of the bundle's graph and the reference after every layer.

The compared values are inside the graph, which names them for this purpose (docs/artifacts.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..errors import ArtifactError
from ..export.model.decoder import CHOSEN, TAP
from ..runtime.backend import map_outside
from ..runtime.buffers import StateBuffers
from ..runtime.bundle import Bundle

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
    """Values inside a bundle's graph, made outputs of a copy in memory. All texts use one copy.

    Raises:
        ArtifactError: the graph was made without taps.
    """

    def __init__(self, bundle: Bundle, csa_layers: Sequence[int], *, threads: int) -> None:
        self._bundle = bundle
        self._chosen = {layer: CHOSEN.format(layer=layer) for layer in csa_layers}
        self._streams = [TAP.format(layer=layer) for layer in range(bundle.model.num_layers)]
        self._session = _tapped(bundle, [*self._streams, *self._chosen.values()], threads)

    def chosen(self, tokens: Sequence[int]) -> dict[int, npt.NDArray[np.integer]]:
        """By layer, the entries [n, places] int32 (-1: none) that each query attends to, from one prefill of an empty state."""
        return dict(zip(self._chosen, self._values(tokens, list(self._chosen.values())), strict=True))

    def streams(self, tokens: Sequence[int]) -> list[Streams]:
        """Streams [n, N, C] after every layer, from one prefill of an empty state."""
        return self._values(tokens, self._streams)

    def _values(self, tokens: Sequence[int], names: list[str]) -> list[Any]:
        if not names:
            return []
        bundle, count = self._bundle, len(tokens)
        state = StateBuffers(bundle.state, count, 1)
        feeds: dict[str, Any] = {tensor.input: state.arrays[tensor.name] for tensor in bundle.state.tensors}
        feeds |= {
            bundle.io.input_ids: np.array([tokens], np.int64),
            bundle.io.positions: np.zeros(1, np.int32),
            bundle.io.num_tokens: np.array([count], np.int32),
            bundle.io.active_context: np.array([count], np.int64),
            bundle.io.logit_indices: np.zeros((1, 1), np.int64),
        }
        known = {value.name for value in self._session.get_inputs()}
        return [value[0] for value in self._session.run(names, {k: v for k, v in feeds.items() if k in known})]


def _tapped(bundle: Bundle, names: list[str], threads: int) -> Any:
    model = onnx.load(bundle.engine, load_external_data=False)
    inside = {name for node in model.graph.node for name in node.output}
    if missing := [name for name in names if name not in inside]:
        raise ArtifactError(f"{bundle.engine} has no value {missing[0]!r} to compare layers by. Export it again.")
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(Path(bundle.engine).parent.resolve())
    )
    weights = map_outside(options, bundle, (Path(bundle.engine).parent,))
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    finally:
        for mapped in weights:
            mapped.close()


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
