"""The three attentions: window only, window and chosen entries (CSA), window and all entries (HCA).

One KV head serves all query heads, and keys are values. A learned sink per head only enters the
denominator of the softmax. The scale is ``head_dim ** -0.5``. The output is turned back by RoPE at the
query's position, because the values have RoPE (V4 report 2.3). ``rows`` is the old window ring followed
by the chunk (see window.py). Rows and entries that were never written can contain anything, even NaN.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from .index import FoldkvActiveRows, FoldkvVisibleEntries, active_entries, visible_entries
from .registry import OPSET, operator
from .rope import FoldkvRope
from .rope import _eager as rope
from .window import FoldkvReadRows


def _window_keys(
    rows: Tensor, chunk: int, positions: Tensor, num_tokens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys of ``rows`` with unwritten ones set to zero, and the mask [B, S, 1, W+S] of what a query sees."""
    size = rows.shape[1] - chunk
    start, slot = positions.long()[:, None], torch.arange(size, device=positions.device)
    query = start + torch.arange(chunk, device=positions.device)
    held = start - 1 - torch.remainder(start - 1 - slot, size)
    token = torch.cat((held, query), dim=1)
    written = (token >= 0) & (token < start + num_tokens.long()[:, None])
    key, at = token[:, None], query[:, :, None]
    seen = written[:, None] & (key <= at) & (key > at - size)
    return rows.to(dtype).masked_fill(~written[..., None], 0.0), seen[:, :, None]


def _attend(q: Tensor, sinks: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax over all parts and the sink; a part is keys [B, S or 1, K, D] and a mask [B, S, 1, K]."""
    scale = q.shape[-1] ** -0.5
    logits = [(torch.matmul(q, keys.transpose(-1, -2)) * scale).masked_fill(~seen, -torch.inf) for keys, seen in parts]
    sink = sinks[:, None].expand(*q.shape[:3], 1)
    weights = torch.cat((*logits, sink), dim=-1).softmax(dim=-1)
    pieces = weights.split([*(keys.shape[2] for keys, _ in parts), 1], dim=-1)
    out = torch.matmul(pieces[0], parts[0][0])
    for piece, (keys, _) in zip(pieces[1:-1], parts[1:], strict=True):
        out = out + torch.matmul(piece, keys)
    return out


def _query_positions(q: Tensor, positions: Tensor) -> Tensor:
    return positions.long()[:, None] + torch.arange(q.shape[1], device=positions.device)


def _window_eager(
    q: Tensor, rows: Tensor, sinks: Tensor, inv_freq: Tensor, positions: Tensor, num_tokens: Tensor
) -> Tensor:
    """q [B, S, H, D], rows [B, W+S, D], sinks [H] -> [B, S, H, D]."""
    keys, seen = _window_keys(rows, q.shape[1], positions, num_tokens, q.dtype)
    return rope(_attend(q, sinks, [(keys[:, None], seen)]), _query_positions(q, positions), inv_freq, 1)


def _sparse_eager(
    q: Tensor, rows: Tensor, entries: Tensor, chosen: Tensor, sinks: Tensor, inv_freq: Tensor, positions: Tensor,
    num_tokens: Tensor,
) -> Tensor:  # fmt: skip
    """q [B, S, H, D], rows [B, W+S, D], entries [B, E, D], chosen [B, S, K] int32 (-1: none) -> [B, S, H, D]."""
    keys, seen = _window_keys(rows, q.shape[1], positions, num_tokens, q.dtype)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    some = chosen >= 0
    picked = entries[batch, chosen.clamp(min=0).long()].to(q.dtype).masked_fill(~some[..., None], 0.0)
    parts = [(keys[:, None], seen), (picked, some[:, :, None])]
    return rope(_attend(q, sinks, parts), _query_positions(q, positions), inv_freq, 1)


def _dense_eager(
    q: Tensor, rows: Tensor, entries: Tensor, sinks: Tensor, inv_freq: Tensor, positions: Tensor, num_tokens: Tensor,
    active_context: Tensor, ratio: int,
) -> Tensor:  # fmt: skip
    """q [B, S, H, D], rows [B, W+S, D], entries [B, E, D], active_context [1] int64 -> [B, S, H, D]."""
    keys, seen = _window_keys(rows, q.shape[1], positions, num_tokens, q.dtype)
    active = active_entries(active_context, entries.shape[1], ratio)
    nth = torch.arange(active, device=positions.device)
    closed = nth < ((positions.long() + num_tokens.long()) // ratio)[:, None]
    read = entries[:, :active].to(q.dtype).masked_fill(~closed[..., None], 0.0)
    visible = nth < visible_entries(positions, q.shape[1], ratio)[..., None]
    parts = [(keys[:, None], seen), (read[:, None], (visible & closed[:, None])[:, :, None])]
    return rope(_attend(q, sinks, parts), _query_positions(q, positions), inv_freq, 1)


@script(OPSET, default_opset=op)
def FoldkvQueryPositions(q: FLOAT, positions: INT32):  # type: ignore[no-untyped-def]
    chunk = op.Squeeze(op.Shape(q, start=1, end=2))
    step = op.Unsqueeze(op.Range(op.Constant(value_int=0), chunk, op.Constant(value_int=1)), [0])
    return op.Unsqueeze(op.Cast(positions, to=7), [1]) + step


@script(OPSET, default_opset=op)
def FoldkvWindowKeys(q: FLOAT, rows: FLOAT, positions: INT32, num_tokens: INT32):  # type: ignore[no-untyped-def]
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    size = op.Squeeze(op.Shape(rows, start=1, end=2) - op.Shape(q, start=1, end=2))
    start = op.Unsqueeze(op.Cast(positions, to=7), [1])
    slot = op.Unsqueeze(op.Range(zero, size, one), [0])
    held = start - 1 - op.Mod(start - 1 - slot + size, size)
    query = FoldkvQueryPositions(q, positions)
    token = op.Concat(held, query, axis=1)
    end = start + op.Unsqueeze(op.Cast(num_tokens, to=7), [1])
    written = op.And(token >= 0, token < end)
    key = op.Unsqueeze(token, [1])
    at = op.Unsqueeze(query, [2])
    seen = op.And(op.Unsqueeze(written, [1]), op.And(key <= at, key > at - size))
    keys = op.Where(op.Unsqueeze(written, [2]), op.Cast(rows, to=1), 0.0)
    return keys, op.Unsqueeze(seen, [2])


@script(OPSET, default_opset=op)
def FoldkvScale(q: FLOAT):  # type: ignore[no-untyped-def]
    return q / op.Sqrt(op.Cast(op.Shape(q, start=3, end=4), to=1))


@script(OPSET, default_opset=op)
def FoldkvSharedLogits(q: FLOAT, keys: FLOAT, seen: INT64):  # type: ignore[no-untyped-def]
    # Heads and queries share the keys: one matrix product over both instead of one per query.
    flat = op.Reshape(q, op.Concat(op.Shape(q, start=0, end=1), [-1], op.Shape(q, start=3, end=4), axis=0))
    dots = op.MatMul(flat, op.Transpose(keys, perm=[0, 2, 1]))
    split = op.Reshape(dots, op.Concat(op.Shape(q, start=0, end=3), op.Shape(keys, start=1, end=2), axis=0))
    return op.Where(seen, split, op.Constant(value_float=float("-inf")))


@script(OPSET, default_opset=op)
def FoldkvSharedSum(weights: FLOAT, keys: FLOAT):  # type: ignore[no-untyped-def]
    shape = op.Shape(weights)
    flat = op.Reshape(weights, op.Concat(shape[0:1], [-1], shape[3:4], axis=0))
    return op.Reshape(op.MatMul(flat, keys), op.Concat(shape[0:3], op.Shape(keys, start=2, end=3), axis=0))


@script(OPSET, default_opset=op)
def FoldkvSinkColumn(q: FLOAT, sinks: FLOAT):  # type: ignore[no-untyped-def]
    return op.Expand(op.Reshape(sinks, [1, 1, -1, 1]), op.Concat(op.Shape(q, start=0, end=3), [1], axis=0))


@script(OPSET, default_opset=op)
def FoldkvWindowAttention(  # type: ignore[no-untyped-def]
    q: FLOAT, rows: FLOAT, sinks: FLOAT, inv_freq: FLOAT, positions: INT32, num_tokens: INT32
):
    keys, seen = FoldkvWindowKeys(q, rows, positions, num_tokens)
    logits = FoldkvSharedLogits(FoldkvScale(q), keys, seen)
    weights = op.Softmax(op.Concat(logits, FoldkvSinkColumn(q, sinks), axis=-1), axis=-1)
    out = FoldkvSharedSum(op.Slice(weights, [0], [-1], [3]), keys)
    return FoldkvRope(out, FoldkvQueryPositions(q, positions), inv_freq, inverse=1)


@script(OPSET, default_opset=op)
def FoldkvAttendPicked(  # type: ignore[no-untyped-def]
    q: FLOAT, rows: FLOAT, gathered: FLOAT, some: INT64, sinks: FLOAT, inv_freq: FLOAT, positions: INT32,
    num_tokens: INT32,
):  # fmt: skip
    # gathered [B, S, K, D] float32: only valid where `some`.
    keys, seen = FoldkvWindowKeys(q, rows, positions, num_tokens)
    scaled = FoldkvScale(q)
    near = FoldkvSharedLogits(scaled, keys, seen)
    picked = op.Where(op.Unsqueeze(some, [3]), gathered, 0.0)
    far = op.Where(op.Unsqueeze(some, [2]), op.MatMul(scaled, op.Transpose(picked, perm=[0, 1, 3, 2])),
                   op.Constant(value_float=float("-inf")))  # fmt: skip
    weights = op.Softmax(op.Concat(near, far, FoldkvSinkColumn(q, sinks), axis=-1), axis=-1)
    cut = op.Shape(near, start=3, end=4)
    out = FoldkvSharedSum(op.Slice(weights, [0], cut, [3]), keys) + op.MatMul(op.Slice(weights, cut, [-1], [3]), picked)
    return FoldkvRope(out, FoldkvQueryPositions(q, positions), inv_freq, inverse=1)


@script(OPSET, default_opset=op)
def FoldkvSparseAttention(  # type: ignore[no-untyped-def]
    q: FLOAT, rows: FLOAT, entries: FLOAT, chosen: INT32, sinks: FLOAT, inv_freq: FLOAT, positions: INT32,
    num_tokens: INT32,
):  # fmt: skip
    index = op.Cast(chosen, to=7)
    some = index >= 0
    safe = op.Max(index, op.Constant(value_int=0))
    gathered = FoldkvReadRows(op.GatherND(entries, op.Unsqueeze(safe, [-1]), batch_dims=1))
    return FoldkvAttendPicked(q, rows, gathered, some, sinks, inv_freq, positions, num_tokens)


@script(OPSET, default_opset=op)
def FoldkvDenseAttention(  # type: ignore[no-untyped-def]
    q: FLOAT, rows: FLOAT, entries: FLOAT, sinks: FLOAT, inv_freq: FLOAT, positions: INT32, num_tokens: INT32,
    active_context: INT64, ratio: int,
):  # fmt: skip
    keys, seen = FoldkvWindowKeys(q, rows, positions, num_tokens)
    scaled = FoldkvScale(q)
    near = FoldkvSharedLogits(scaled, keys, seen)
    active = FoldkvActiveRows(entries, active_context, ratio)
    nth = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(active, start=1, end=2)), op.Constant(value_int=1))
    total = (op.Cast(positions, to=7) + op.Cast(num_tokens, to=7)) / ratio
    closed = op.Unsqueeze(nth, [0]) < op.Unsqueeze(total, [1])
    read = op.Where(op.Unsqueeze(closed, [2]), active, 0.0)
    visible = op.Reshape(nth, [1, 1, -1]) < op.Unsqueeze(FoldkvVisibleEntries(q, positions, ratio), [2])
    far = FoldkvSharedLogits(scaled, read, op.Unsqueeze(op.And(visible, op.Unsqueeze(closed, [1])), [2]))
    weights = op.Softmax(op.Concat(near, far, FoldkvSinkColumn(q, sinks), axis=-1), axis=-1)
    cut = op.Shape(near, start=3, end=4)
    out = FoldkvSharedSum(op.Slice(weights, [0], cut, [3]), keys) + FoldkvSharedSum(
        op.Slice(weights, cut, [-1], [3]), read
    )
    return FoldkvRope(out, FoldkvQueryPositions(q, positions), inv_freq, inverse=1)


window_attention = operator("FoldkvWindowAttention", eager=_window_eager, function=FoldkvWindowAttention)
sparse_attention = operator("FoldkvSparseAttention", eager=_sparse_eager, function=FoldkvSparseAttention)
dense_attention = operator("FoldkvDenseAttention", eager=_dense_eager, function=FoldkvDenseAttention)
