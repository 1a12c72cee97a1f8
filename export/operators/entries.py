"""Shared by the compressing operators: a merged window becomes an entry, and entries are written where they close.

Rows of ``entries`` whose windows do not close keep their bits. Deployed systems quantise an entry between these two steps
(operators/compress.py, operators/compress_online.py).
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset20 as op
from torch import Tensor

from .registry import OPSET
from .rope import FoldkvRope
from .rope import _eager as rope
from .window import FoldkvTakeRows


def finish_entries(merged: Tensor, begins: Tensor, norm: Tensor, inv_freq: Tensor, eps: float) -> Tensor:
    """RMSNorm, then RoPE at the window's first token.

    merged [B, N, D], begins [B, N] int64, norm [D], inv_freq [rope/2] -> [B, N, D].
    """
    normed = merged * torch.rsqrt(merged.square().mean(dim=-1, keepdim=True) + eps) * norm
    return rope(normed[:, :, None], begins, inv_freq, 0)[:, :, 0]


def write_entries(entries: Tensor, new: Tensor, positions: Tensor, num_tokens: Tensor, ratio: int) -> Tensor:
    """entries [B, E, D], new [B, N, D] of the windows from ``positions`` on -> entries after the chunk.

    This always writes N rows. If they would pass the end, they start earlier. Rows whose windows did not close are written
    with their old values.
    """
    start, windows = positions.long(), new.shape[1]
    first = start[:, None] // ratio
    rows = first.clamp(max=entries.shape[1] - windows) + torch.arange(windows, device=first.device)
    from_entry = rows - first
    closes = (from_entry >= 0) & (rows < ((start + num_tokens.long()) // ratio)[:, None])
    taken = torch.take_along_dim(new, from_entry.clamp(min=0)[..., None], dim=1).to(entries.dtype)
    old = torch.take_along_dim(entries, rows[..., None], dim=1)
    return entries.scatter(1, rows[..., None].expand_as(old), torch.where(closes[..., None], taken, old))


@script(OPSET, default_opset=op)
def FoldkvFinishEntries(merged: FLOAT, begins: INT32, norm: FLOAT, inv_freq: FLOAT, eps: float):  # type: ignore[no-untyped-def]
    scale = op.Sqrt(op.ReduceMean(merged * merged, [-1], keepdims=1) + eps)
    normed = merged / scale * norm
    return op.Squeeze(FoldkvRope(op.Unsqueeze(normed, [2]), begins, inv_freq, inverse=0), [2])


@script(OPSET, default_opset=op)
def FoldkvWriteEntries(entries: FLOAT, new: FLOAT, positions: INT32, num_tokens: INT32, ratio: int):  # type: ignore[no-untyped-def]
    # Always N rows that fit, as in the eager body; rows that did not close are written with their old values.
    zero = op.Constant(value_int=0)
    r = op.Constant(value_int=1) * ratio
    windows = op.Squeeze(op.Shape(new, start=1, end=2))
    start = op.Cast(positions, to=7)
    first = op.Unsqueeze(start / r, [1])
    base = op.Min(first, op.Squeeze(op.Shape(entries, start=1, end=2)) - windows)
    rows = base + op.Unsqueeze(op.Range(zero, windows, op.Constant(value_int=1)), [0])
    from_entry = rows - first
    end = op.Unsqueeze((start + op.Cast(num_tokens, to=7)) / r, [1])
    closes = op.Unsqueeze(op.And(from_entry >= 0, rows < end), [2])
    taken = op.CastLike(FoldkvTakeRows(new, op.Max(from_entry, zero)), entries)
    old = FoldkvTakeRows(entries, rows)
    sequence = op.Unsqueeze(op.Range(zero, op.Squeeze(op.Shape(positions)), op.Constant(value_int=1)), [1])
    target = op.Concat(op.Unsqueeze(op.Expand(sequence, op.Shape(rows)), [2]), op.Unsqueeze(rows, [2]), axis=2)
    return op.ScatterND(entries, target, op.Where(closes, taken, old))
