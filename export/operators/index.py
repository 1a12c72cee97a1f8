"""FoldkvIndexScores and FoldkvIndexSelect: the lightning indexer's scores, and the k best entries per query.

``score = sum_h weight_h * relu(q_h . k)``; the scaling by head width and head count is folded into
``weights`` by the caller (V4 report 2.3.1, equations 13 to 17). A query at position ``t`` can choose
entry ``i`` iff ``i < (t + 1) // ratio``. Among equal scores it chooses the lowest index. The order of
chosen entries is not specified; empty places are -1. The scores of entries that a query cannot choose
can be anything.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from .registry import OPSET, operator


def visible_entries(positions: Tensor, chunk: int, ratio: int) -> Tensor:
    """How many entries each query sees: (t + 1) // ratio, [B, S] int64."""
    return (positions.long()[:, None] + torch.arange(1, chunk + 1, device=positions.device)) // ratio


def active_entries(active_context: Tensor, capacity: int, ratio: int) -> int:
    """How many entry rows to look at for that many tokens."""
    return min(int(active_context) // ratio, capacity)


def _scores_eager(
    q: Tensor, weights: Tensor, index_entries: Tensor, positions: Tensor, active_context: Tensor, ratio: int
) -> Tensor:
    """q [B, S, Hi, Di], weights [B, S, Hi], index_entries [B, E, Di], positions [B] int32,
    active_context [1] int64 -> [B, S, N] float32, with at least as many columns as a query can choose from; here N = E."""
    active = active_entries(active_context, index_entries.shape[1], ratio)
    score = torch.einsum("bshd,bed->bshe", q, index_entries[:, :active].to(q.dtype)).relu()
    score = (score * weights[..., None]).sum(dim=2)
    rest = score.new_full((*score.shape[:2], index_entries.shape[1] - active), -torch.inf)
    return torch.cat((score, rest), dim=-1)


def _select_eager(scores: Tensor, positions: Tensor, ratio: int, topk: int) -> Tensor:
    """scores [B, S, E], positions [B] int32 -> [B, S, topk] int32; among equal scores the lowest index."""
    visible = visible_entries(positions, scores.shape[1], ratio)[..., None]
    nth = torch.arange(scores.shape[2], device=scores.device)
    score = scores.masked_fill(nth >= visible, -torch.inf)
    score = torch.cat((score, score.new_full((*score.shape[:2], topk), -torch.inf)), dim=-1)
    chosen = score.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    return torch.where(chosen < visible.clamp(max=scores.shape[2]), chosen, -1).to(torch.int32)


@script(OPSET, default_opset=op)
def FoldkvVisibleEntries(x: FLOAT, positions: INT32, ratio: int):  # type: ignore[no-untyped-def]
    chunk = op.Squeeze(op.Shape(x, start=1, end=2))
    step = op.Unsqueeze(op.Range(op.Constant(value_int=1), chunk + 1, op.Constant(value_int=1)), [0])
    return (op.Unsqueeze(op.Cast(positions, to=7), [1]) + step) / ratio


@script(OPSET, default_opset=op)
def FoldkvActiveRows(entries: FLOAT, active_context: INT64, ratio: int):  # type: ignore[no-untyped-def]
    # At least one row, so no tensor is ever empty; the caller masks it like any other unwritten row.
    return op.Cast(op.Slice(entries, [0], op.Max(active_context / ratio, 1), [1]), to=1)


@script(OPSET, default_opset=op)
def FoldkvIndexScores(  # type: ignore[no-untyped-def]
    q: FLOAT, weights: FLOAT, index_entries: FLOAT, positions: INT32, active_context: INT64, ratio: int
):
    # Only the active entries are scored, so there may be fewer columns than entries.
    keys = FoldkvActiveRows(index_entries, active_context, ratio)
    flat = op.Reshape(q, op.Concat(op.Shape(q, start=0, end=1), [-1], op.Shape(q, start=3, end=4), axis=0))
    dots = op.Relu(op.MatMul(flat, op.Transpose(keys, perm=[0, 2, 1])))
    split = op.Reshape(dots, op.Concat(op.Shape(q, start=0, end=3), op.Shape(keys, start=1, end=2), axis=0))
    return op.Squeeze(op.MatMul(op.Unsqueeze(weights, [2]), split), [2])


@script(OPSET, default_opset=op)
def FoldkvIndexSelect(scores: FLOAT, positions: INT32, ratio: int, topk: int):  # type: ignore[no-untyped-def]
    k = op.Reshape(op.Constant(value_int=1) * topk, [1])
    columns = op.Shape(scores, start=2, end=3)
    visible = op.Min(op.Unsqueeze(FoldkvVisibleEntries(scores, positions, ratio), [2]), columns)
    nth = op.Range(op.Constant(value_int=0), op.Squeeze(columns), op.Constant(value_int=1))
    masked = op.Where(op.Reshape(nth, [1, 1, -1]) < visible, scores, op.Constant(value_float=float("-inf")))
    # Padding makes room for k places even while there are fewer entries.
    padded = op.Pad(masked, op.Concat([0, 0, 0, 0, 0], k, axis=0), op.Constant(value_float=float("-inf")))
    _best, chosen = op.TopK(padded, k, axis=-1)
    return op.Cast(op.Where(chosen < visible, chosen, op.Constant(value_int=-1)), to=6)


index_scores = operator("FoldkvIndexScores", eager=_scores_eager, function=FoldkvIndexScores)
index_select = operator("FoldkvIndexSelect", eager=_select_eager, function=FoldkvIndexSelect)
