"""FoldkvIndexTopk: the lightning indexer's scores over index entries and the k best per query.

``score = sum_h weight_h * relu(q_h . k)``; the scaling by head width and head count is folded into
``weights`` by the caller (V4 report 2.3.1, equations 13 to 17). A query at position ``t`` may choose
entry ``i`` iff ``i < (t + 1) // ratio``. Places that stay empty hold -1.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from foldkv.export.operators.registry import OPSET, operator


def visible_entries(positions: Tensor, chunk: int, ratio: int) -> Tensor:
    """How many entries each query sees: (t + 1) // ratio, [B, S] int64."""
    return (positions.long()[:, None] + torch.arange(1, chunk + 1)) // ratio


def active_entries(active_context: Tensor, capacity: int, ratio: int) -> int:
    """How many entry rows need be looked at for that many tokens."""
    return min(int(active_context) // ratio, capacity)


def _eager(
    q: Tensor, weights: Tensor, index_entries: Tensor, positions: Tensor, active_context: Tensor, ratio: int, topk: int
) -> Tensor:
    """q [B, S, Hi, Di], weights [B, S, Hi], index_entries [B, E, Di], positions [B] int32,
    active_context [1] int64 -> [B, S, topk] int32."""
    batch, chunk = q.shape[:2]
    active = active_entries(active_context, index_entries.shape[1], ratio)
    score = torch.einsum("bshd,bed->bshe", q, index_entries[:, :active].float()).relu()
    score = (score * weights[..., None]).sum(dim=2)
    visible = visible_entries(positions, chunk, ratio)[..., None]
    score = score.masked_fill(torch.arange(active) >= visible, -torch.inf)
    score = torch.cat((score, score.new_full((batch, chunk, topk), -torch.inf)), dim=-1)
    chosen = score.topk(topk, dim=-1).indices
    return torch.where(chosen < visible, chosen, -1).to(torch.int32)


def _fake(
    q: Tensor, weights: Tensor, index_entries: Tensor, positions: Tensor, active_context: Tensor, ratio: int, topk: int
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], topk), dtype=torch.int32)


@script(OPSET, default_opset=op)
def FoldkvVisibleEntries(x: FLOAT, positions: INT32, ratio: int):  # type: ignore[no-untyped-def]
    chunk = op.Squeeze(op.Shape(x, start=1, end=2))
    step = op.Unsqueeze(op.Range(op.Constant(value_int=1), chunk + 1, op.Constant(value_int=1)), [0])
    return (op.Unsqueeze(op.Cast(positions, to=7), [1]) + step) / ratio


@script(OPSET, default_opset=op)
def FoldkvActiveRows(entries: FLOAT, active_context: INT64, ratio: int):  # type: ignore[no-untyped-def]
    # At least one row, masked by the caller like any other that is not written: no tensor is ever empty.
    return op.Cast(op.Slice(entries, [0], op.Max(active_context / ratio, 1), [1]), to=1)


@script(OPSET, default_opset=op)
def FoldkvIndexTopk(  # type: ignore[no-untyped-def]
    q: FLOAT, weights: FLOAT, index_entries: FLOAT, positions: INT32, active_context: INT64, ratio: int, topk: int
):
    k = op.Reshape(op.Constant(value_int=1) * topk, [1])
    keys = FoldkvActiveRows(index_entries, active_context, ratio)
    flat = op.Reshape(q, op.Concat(op.Shape(q, start=0, end=1), [-1], op.Shape(q, start=3, end=4), axis=0))
    dots = op.Relu(op.MatMul(flat, op.Transpose(keys, perm=[0, 2, 1])))
    split = op.Reshape(dots, op.Concat(op.Shape(q, start=0, end=3), op.Shape(keys, start=1, end=2), axis=0))
    score = op.Squeeze(op.MatMul(op.Unsqueeze(weights, [2]), split), [2])
    visible = op.Unsqueeze(FoldkvVisibleEntries(q, positions, ratio), [2])
    nth = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(keys, start=1, end=2)), op.Constant(value_int=1))
    masked = op.Where(op.Reshape(nth, [1, 1, -1]) < visible, score, op.Constant(value_float=float("-inf")))
    # Padding makes room for k places even while there are fewer entries.
    padded = op.Pad(masked, op.Concat([0, 0, 0, 0, 0], k, axis=0), op.Constant(value_float=float("-inf")))
    _best, chosen = op.TopK(padded, k, axis=-1)
    return op.Cast(op.Where(chosen < visible, chosen, op.Constant(value_int=-1)), to=6)


index_topk = operator(
    "FoldkvIndexTopk",
    eager=_eager,
    fake=_fake,
    function=FoldkvIndexTopk,
    inputs=("q", "weights", "index_entries", "positions", "active_context"),
    attributes=("ratio", "topk"),
    outputs=("chosen",),
)
