"""FoldkvWindowUpdate: the sliding window's ring, read and written in one step.

The ring keeps the row of position ``p`` at slot ``p mod W``. ``rows`` is the old ring followed by the chunk's
rows, in the ring's type, so a token has the same values in its own chunk and later. Attention reads ``rows``.
This operator is the only reader of the old ring, so the new ring can use the same buffer.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset20 as op
from torch import Tensor

from .registry import OPSET, operator


def ring_sources(slots: int, chunk: int, positions: Tensor, num_tokens: Tensor) -> Tensor:
    """For each ring slot, the row of ``[ring | chunk]`` that it has after the chunk: [B, slots] int64.

    The last position written to slot ``s`` is the largest ``t < positions + num_tokens`` with
    ``t mod slots == s``. It comes from the chunk if ``t >= positions``; otherwise the slot keeps its row.
    """
    del chunk
    slot = torch.arange(slots, device=positions.device)
    last = (positions + num_tokens).long()[:, None] - 1
    held = last - torch.remainder(last - slot, slots)
    new = held - positions.long()[:, None]
    return torch.where(new >= 0, slots + new, slot)


def _eager(window: Tensor, kv: Tensor, positions: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """window [B, W, D], kv [B, S, D], positions and num_tokens [B] int32 -> rows [B, W+S, D], window [B, W, D]."""
    rows = torch.cat((window, kv.to(window.dtype)), dim=1)
    source = ring_sources(window.shape[1], kv.shape[1], positions, num_tokens)
    return rows, torch.take_along_dim(rows, source[:, :, None], dim=1)


@script(OPSET, default_opset=op)
def FoldkvRingSources(state: FLOAT, positions: INT32, num_tokens: INT32):  # type: ignore[no-untyped-def]
    slots = op.Shape(state, start=1, end=2)
    slot = op.Unsqueeze(op.Range(op.Constant(value_int=0), op.Squeeze(slots), op.Constant(value_int=1)), [0])
    start = op.Unsqueeze(op.Cast(positions, to=7), [1])
    last = start + op.Unsqueeze(op.Cast(num_tokens, to=7), [1]) - 1
    # `last - slot` may be negative by at most `slots`: adding it once keeps Mod's operands positive.
    new = last - op.Mod(last - slot + slots, slots) - start
    return op.Where(new >= 0, slots + new, slot)


@script(OPSET, default_opset=op)
def FoldkvTakeRows(table: FLOAT, rows: INT32):  # type: ignore[no-untyped-def]
    return op.GatherND(table, op.Unsqueeze(rows, [-1]), batch_dims=1)


@script(OPSET, default_opset=op)
def FoldkvReadRows(rows: FLOAT):  # type: ignore[no-untyped-def]
    # Rows of a cache as float32. A graph with packed rows has the decoder of their format here (optimize/passes/functions.py).
    return op.Cast(rows, to=1)


@script(OPSET, default_opset=op)
def FoldkvWindowUpdate(window: FLOAT, kv: FLOAT, positions: INT32, num_tokens: INT32):  # type: ignore[no-untyped-def]
    rows = op.Concat(window, op.CastLike(kv, window), axis=1)
    source = FoldkvRingSources(window, positions, num_tokens)
    return rows, FoldkvTakeRows(rows, source)


window_update = operator("FoldkvWindowUpdate", eager=_eager, function=FoldkvWindowUpdate)
