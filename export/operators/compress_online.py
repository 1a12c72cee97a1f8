"""FoldkvCompressOnline: HCA's compression with a carry that does not grow with the window.

Entry ``i`` is the gated sum of the tokens ``[i * ratio, (i + 1) * ratio)``: a softmax over tokens, per channel, of
``gate + bias``; then RMSNorm, then RoPE at position ``i * ratio`` (V4 report 2.3, equations 20 to 23). For a window that
is not closed yet, the carry keeps the three rows of an online softmax (Milakov and Gimelshein 2018, algorithm 3):

    carry[0] = max of the scores,  carry[1] = sum of exp(score - max),  carry[2] = sum of exp(score - max) * kv

In a layer of V4 this is 6 KiB instead of 512 KiB of raw rows. At positions that are multiples of ``ratio`` no window is
open, and the carry is never read. This works because windows do not overlap; otherwise it needs their rows (compress.py).

FoldkvCompressOnlineFp8 also does what deployed systems do to an entry before it is written: it quantises it as a
``fp8_ds_mla`` row (the released code's ``act_quant``).
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset20 as op
from torch import Tensor

from .entries import FoldkvFinishEntries, FoldkvWriteEntries, finish_entries, write_entries
from .quantize import FoldkvQuantizeFp8, quantized_fp8
from .registry import OPSET, operator
from .window import FoldkvTakeRows


def _merged(
    carry: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, positions: Tensor, num_tokens: Tensor, ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The windows that a chunk touches.

    carry [B, 3, D]; kv, gate [B, S, D]; bias [ratio, D]; positions, num_tokens [B] int32.
    Returns the gated sums [B, N, D] and first tokens [B, N] of the N windows that can close, and the carry after the chunk.
    """
    start, end = positions.long()[:, None], (positions + num_tokens).long()[:, None]
    windows = -(-kv.shape[1] // ratio) + 1  # one more than can close: the last may be open
    nth = torch.arange(windows, device=positions.device)
    begins = (start // ratio + nth) * ratio  # [B, N + 1]
    first = torch.maximum(begins, start)
    token = first[:, :, None] + torch.arange(min(ratio, kv.shape[1]), device=positions.device)  # [B, N + 1, R]
    inside = ((token < begins[:, :, None] + ratio) & (token < end[:, :, None]))[..., None]
    source = (token - start[:, :, None]).clamp(max=kv.shape[1] - 1)
    sequence = torch.arange(kv.shape[0], device=positions.device)[:, None, None]
    score = torch.where(inside, gate[sequence, source] + bias[token % ratio], -torch.inf)
    value = torch.where(inside, kv[sequence, source], 0.0)
    # The carry joins the first window, if that is open, like one more token of that weight.
    open_ = ((nth == 0) & (start % ratio > 0))[..., None]  # [B, N + 1, 1]
    held_top = torch.where(open_, carry[:, :1], -torch.inf)
    held_total, held_sum = torch.where(open_, carry[:, 1:2], 0.0), torch.where(open_, carry[:, 2:], 0.0)
    top = torch.maximum(score.amax(dim=2), held_top)
    top = torch.where(top > -torch.inf, top, 0.0)  # for a window without tokens
    weight, decay = torch.exp(score - top[:, :, None]), torch.exp(held_top - top)
    total = held_total * decay + weight.sum(dim=2)
    summed = held_sum * decay + (weight * value).sum(dim=2)
    last = (end // ratio - start // ratio)[..., None]
    after = torch.cat([torch.take_along_dim(part, last, dim=1) for part in (top, total, summed)], dim=1)
    after = torch.where((end > start)[..., None], after, carry)  # without tokens not a bit changes
    # The largest score of a window has weight 1, so only a window without tokens has less.
    return (summed / total.clamp(min=1.0))[:, :-1], begins[:, :-1], after


def _eager(
    entries: Tensor, carry: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor, inv_freq: Tensor,
    positions: Tensor, num_tokens: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """entries [B, E, D], carry [B, 3, D] and a chunk as :func:`_merged` has it -> entries, carry after the chunk."""
    merged, begins, after = _merged(carry, kv, gate, bias, positions, num_tokens, ratio)
    new = finish_entries(merged, begins, norm, inv_freq, eps)
    return write_entries(entries, new, positions, num_tokens, ratio), after


def _fp8_eager(
    entries: Tensor, carry: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor, inv_freq: Tensor,
    positions: Tensor, num_tokens: Tensor, rope_dim: int, ratio: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :func:`_eager`, with entries quantised."""
    merged, begins, after = _merged(carry, kv, gate, bias, positions, num_tokens, ratio)
    new = quantized_fp8(finish_entries(merged, begins, norm, inv_freq, eps), rope_dim)
    return write_entries(entries, new, positions, num_tokens, ratio), after


@script(OPSET, default_opset=op)
def FoldkvOnlineSums(carry: FLOAT, score: FLOAT, value: FLOAT, carried: INT32):  # type: ignore[no-untyped-def]
    # The three rows of every window, from its tokens in this chunk and, where `carried`, from the carry.
    nothing = op.Constant(value_float=float("-inf"))
    carry_top, carry_total, carry_sum = op.Split(carry, num_outputs=3, axis=1)
    held_top = op.Where(carried, carry_top, nothing)
    top = op.Max(op.ReduceMax(score, [2], keepdims=0), held_top)
    top = op.Where(top > nothing, top, 0.0)
    weight = op.Exp(score - op.Unsqueeze(top, [2]))
    decay = op.Exp(held_top - top)
    total = op.Where(carried, carry_total, 0.0) * decay + op.ReduceSum(weight, [2], keepdims=0)
    summed = op.Where(carried, carry_sum, 0.0) * decay + op.ReduceSum(weight * value, [2], keepdims=0)
    return top, total, summed


@script(OPSET, default_opset=op)
def FoldkvMergeOnline(  # type: ignore[no-untyped-def]
    carry: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, positions: INT32, num_tokens: INT32, ratio: int
):  # fmt: skip
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    r = one * ratio
    chunk = op.Squeeze(op.Shape(kv, start=1, end=2))
    start = op.Unsqueeze(op.Cast(positions, to=7), [1])
    end = start + op.Unsqueeze(op.Cast(num_tokens, to=7), [1])
    nth = op.Unsqueeze(op.Range(zero, (chunk + r - 1) / r + 1, one), [0])
    begins = (start / r + nth) * r
    slots = op.Reshape(op.Range(zero, op.Min(chunk, r), one), [1, 1, -1])
    token = op.Unsqueeze(op.Max(begins, start), [2]) + slots
    inside = op.And(token < op.Unsqueeze(begins + r, [2]), token < op.Unsqueeze(end, [2]))
    inside = op.Unsqueeze(inside, [3])
    source = op.Min(token - op.Unsqueeze(start, [2]), chunk - 1)
    score = FoldkvTakeRows(gate, source) + op.Gather(bias, op.Mod(token, r), axis=0)
    score = op.Where(inside, score, op.Constant(value_float=float("-inf")))
    value = op.Where(inside, FoldkvTakeRows(kv, source), 0.0)
    carried = op.Unsqueeze(op.And(nth == 0, op.Mod(start, r) > 0), [2])
    top, total, summed = FoldkvOnlineSums(carry, score, value, carried)
    last = end / r - start / r
    after = op.Concat(FoldkvTakeRows(top, last), FoldkvTakeRows(total, last), FoldkvTakeRows(summed, last), axis=1)
    after = op.Where(op.Unsqueeze(end > start, [2]), after, carry)  # without tokens not a bit changes
    merged = op.Slice(summed / op.Max(total, 1.0), [0], [-1], [1])
    return merged, op.Slice(begins, [0], [-1], [1]), after


@script(OPSET, default_opset=op)
def FoldkvCompressOnline(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, inv_freq: FLOAT,
    positions: INT32, num_tokens: INT32, ratio: int, eps: float,
):  # fmt: skip
    merged, begins, after = FoldkvMergeOnline(carry, kv, gate, bias, positions, num_tokens, ratio)
    new = FoldkvFinishEntries(merged, begins, norm, inv_freq, eps)
    return FoldkvWriteEntries(entries, new, positions, num_tokens, ratio), after


@script(OPSET, default_opset=op)
def FoldkvCompressOnlineFp8(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, inv_freq: FLOAT,
    positions: INT32, num_tokens: INT32, rope_dim: int, ratio: int, eps: float,
):  # fmt: skip
    merged, begins, after = FoldkvMergeOnline(carry, kv, gate, bias, positions, num_tokens, ratio)
    new = FoldkvQuantizeFp8(FoldkvFinishEntries(merged, begins, norm, inv_freq, eps), rope_dim)
    return FoldkvWriteEntries(entries, new, positions, num_tokens, ratio), after


compress_online = operator("FoldkvCompressOnline", eager=_eager, function=FoldkvCompressOnline)
compress_online_fp8 = operator("FoldkvCompressOnlineFp8", eager=_fp8_eager, function=FoldkvCompressOnlineFp8)
