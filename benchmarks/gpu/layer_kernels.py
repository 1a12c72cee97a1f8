"""The kernels of one layer's plugins, one after the other in a CUDA graph, where engines of TensorRT-RTX do not run.

They are what reads weights and state in an engine: products, experts, routing, hyper-connections and all of attention. What the
library computes between them (norms, RoPE, activations) is left out, and inputs are random, so it is a lower bound of a layer's time
and no layer. Windows close with every token, which is the most expensive step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from cases import Geometry
from device import Device
from step_speed import Call, make, make_experts, make_product, ours, replay, timed

from foldkv.export.contract.geometry import CSA, HCA, SLIDING, ModelSpec
from foldkv.export.contract.layouts import LAYOUTS
from foldkv.export.contract.operators import BLOCK_LINEAR, PACKED_EXPERTS
from foldkv.export.contract.products import layer_products
from foldkv.export.contract.rows import DENSE
from foldkv.plugins.model import RELEASED_EXPERTS

#: Steps that are timed when enqueued.
ENQUEUED = 16


def layer_operators(kind: str, layout: str) -> list[tuple[str, str]]:
    """Operators and row formats of a layer's plugins, in the order of a layer; products are in :func:`layer_calls`.

    Args:
        kind: of the layer's attention.
        layout: of the cache rows.
    """
    window, entries, index = (
        LAYOUTS[layout].format_of(group) or DENSE for group in ("window", "entries", "index_entries")
    )
    attention = {
        SLIDING: [("FoldkvWindowAttention", window)],
        CSA: [("FoldkvCompress", entries), ("FoldkvCompress", index), ("FoldkvIndexScores", index),
              ("FoldkvIndexSelect", DENSE), ("FoldkvSparseAttention", entries)],
        HCA: [("FoldkvCompressOnline", entries), ("FoldkvDenseAttention", entries)],
    }[kind]  # fmt: skip
    mixing = [("FoldkvHcPost", DENSE), ("FoldkvHcPre", DENSE)]
    routed = [("FoldkvRoute", DENSE), (RELEASED_EXPERTS, DENSE)]
    return [mixing[1], ("FoldkvWindowUpdate", window), *attention, *mixing, *routed, mixing[0]]


def layer_calls(
    device: Device, of: Geometry, spec: ModelSpec, kind: str, layout: str, context: int, batch: int
) -> list[Call]:
    """The calls of a layer's plugins in a decode step at the end of a context, with random inputs.

    Args:
        device: where.
        of: the model's sizes.
        spec: the model.
        kind: of the layer's attention.
        layout: of the cache rows.
        context: tokens of a sequence.
        batch: sequences.
    """
    calls = [make_product(device, product, batch) for product in layer_products(spec, kind)]
    for operator, rows in layer_operators(kind, layout):
        if operator in PACKED_EXPERTS.values():
            calls.append(make_experts(device, spec, operator, batch))
        else:
            calls.append(make(device, operator, rows, of, context, batch))
    return calls


def layer_row(device: Device, calls: list[Call]) -> dict[str, Any]:
    """Milliseconds of a layer's calls, replayed and enqueued, the kernels that they launch, and the calls by operator."""
    made = [ours(device, call) for call in calls]

    def layer() -> None:
        for launch, _ in made:
            launch()

    return {
        "ms": 1e3 * replay(device, [layer]), "enqueued_ms": 1e3 * _timed(device, layer),
        "launches": sum(len(steps.launches) for _, steps in made),
        "calls": dict(Counter(call.operator for call in calls)), "products": sum(c.operator == BLOCK_LINEAR for c in calls),
    }  # fmt: skip


def _timed(device: Device, layer: Callable[[], None]) -> float:
    """Median seconds of a layer that is enqueued."""
    if device.torch_device == "cuda":
        return timed(layer, ENQUEUED)
    start = time.perf_counter()  # a rehearsal
    layer()
    return time.perf_counter() - start
