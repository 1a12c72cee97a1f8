"""FoldkvCompress: CSA's compression. Its windows overlap; the rows of windows that are not closed yet are carried.

The projections have two series side by side. Window ``i`` is the tokens ``[i * ratio, (i + 1) * ratio)``. Entry ``i`` is the
gated sum of the first series of window ``i - 1`` and the second of window ``i``: a softmax over both windows' tokens, per
channel, of ``gate + bias``; then RMSNorm, then RoPE at position ``i * ratio`` (V4 report 2.3, equations 9 to 12).

The carries are rings of raw projected rows: ``carry[p mod R]`` for position ``p``. ``R = 2 * ratio`` is the number
of tokens that an entry reads. HCA's windows do not overlap and carry less: operators/compress_online.py.

FoldkvCompressFp8 and FoldkvCompressFp4 also do what deployed systems do to an entry before it is written. Main
entries are quantised as ``fp8_ds_mla`` rows. The indexer's are rotated by a Hadamard matrix and quantised as
``index_fp4`` rows (the released code's ``act_quant``, ``rotate_activation`` and ``fp4_act_quant``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset20 as op
from torch import Tensor

from .entries import FoldkvFinishEntries, FoldkvWriteEntries, finish_entries, write_entries
from .quantize import FoldkvQuantizeFp4, FoldkvQuantizeFp8, quantized_fp4, quantized_fp8
from .registry import OPSET, operator
from .window import FoldkvRingSources, FoldkvTakeRows, ring_sources


def _chunk(
    entries: Tensor,
    carry_kv: Tensor,
    carry_gate: Tensor,
    kv: Tensor,
    gate: Tensor,
    bias: Tensor,
    norm: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    num_tokens: Tensor,
    ratio: int,
    eps: float,
    finish: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of compression; ``finish`` changes a turned entry before it is written.

    entries [B, E, D]; carry_kv, carry_gate [B, 2 * ratio, 2 * D]; kv, gate [B, S, 2 * D]; bias [ratio, 2 * D]; norm [D];
    inv_freq [rope/2]; positions, num_tokens [B] int32. Returns entries, carry_kv, carry_gate after the chunk.
    """
    span, chunk, width = carry_kv.shape[1], kv.shape[1], entries.shape[2]
    start = positions.long()
    windows = (chunk + ratio - 1) // ratio  # no more can close in this chunk
    begins = (start[:, None] // ratio + torch.arange(windows, device=start.device)) * ratio  # [B, N]
    token = begins[:, :, None] + torch.arange(-ratio, ratio, device=start.device)  # [B, N, R]
    past = token < start[:, None, None]
    source = torch.where(past, token % span, span + (token - start[:, None, None]).clamp(0, chunk - 1))
    all_kv, all_gate = torch.cat((carry_kv, kv), dim=1), torch.cat((carry_gate, gate), dim=1)
    batch = torch.arange(kv.shape[0], device=kv.device)[:, None, None]
    place = torch.arange(span, device=kv.device) % ratio
    picked, score = all_kv[batch, source], all_gate[batch, source] + bias[place]
    picked = torch.cat((picked[:, :, :ratio, :width], picked[:, :, ratio:, width:]), dim=2)
    score = torch.cat((score[:, :, :ratio, :width], score[:, :, ratio:, width:]), dim=2)
    absent = (token < 0)[..., None]
    weights = score.masked_fill(absent, -torch.inf).softmax(dim=2)
    merged = (picked.masked_fill(absent, 0.0) * weights).sum(dim=2)
    new = finish(finish_entries(merged, begins, norm, inv_freq, eps))
    updated = write_entries(entries, new, positions, num_tokens, ratio)
    keep = ring_sources(span, chunk, positions, num_tokens)[..., None]
    return updated, torch.take_along_dim(all_kv, keep, dim=1), torch.take_along_dim(all_gate, keep, dim=1)


def _eager(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _chunk(
        entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, ratio, eps, lambda x: x
    )


def _fp8_eager(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, rope_dim: int, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _chunk(
        entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, ratio, eps,
        lambda x: quantized_fp8(x, rope_dim),
    )  # fmt: skip


def _fp4_eager(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, hadamard: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _chunk(
        entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, ratio, eps,
        lambda x: quantized_fp4(torch.matmul(x, hadamard)),
    )  # fmt: skip


@script(OPSET, default_opset=op)
def FoldkvSplitSeries(x: FLOAT, width: INT32, ratio: int):  # type: ignore[no-untyped-def]
    # The first `width` channels from the rows of the window before, the last from the window's own rows.
    r = op.Reshape(op.Constant(value_int=1) * ratio, [1])
    before = op.Slice(op.Slice(x, [0], r, [2]), [0], width, [3])
    own = op.Slice(op.Slice(x, r, [9223372036854775807], [2]), width, [9223372036854775807], [3])
    return op.Concat(before, own, axis=2)


@script(OPSET, default_opset=op)
def FoldkvMergeWindows(  # type: ignore[no-untyped-def]
    carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, positions: INT32, ratio: int
):  # fmt: skip
    # The gated sums of all windows that can close in this chunk, and the positions of their first tokens.
    zero = op.Constant(value_int=0)
    r = op.Constant(value_int=1) * ratio
    span = r + r
    chunk = op.Squeeze(op.Shape(kv, start=1, end=2))
    start = op.Cast(positions, to=7)
    nth = op.Range(zero, (chunk + r - 1) / r, op.Constant(value_int=1))
    begins = (op.Unsqueeze(start / r, [1]) + op.Unsqueeze(nth, [0])) * r
    token = op.Unsqueeze(begins, [2]) + op.Reshape(op.Range(zero - r, r, op.Constant(value_int=1)), [1, 1, -1])
    first = op.Unsqueeze(start, [1, 2])
    within = op.Max(op.Min(token - first, chunk - 1), zero)
    # Tokens before the first are masked below; adding the span keeps Mod's operand positive.
    source = op.Where(token < first, op.Mod(token + span, span), span + within)
    bias_row = op.Mod(op.Range(zero, span, op.Constant(value_int=1)), r)
    all_gate = op.Concat(carry_gate, gate, axis=1)
    width = op.Shape(norm)
    picked = FoldkvSplitSeries(FoldkvTakeRows(op.Concat(carry_kv, kv, axis=1), source), width, ratio)
    score = FoldkvSplitSeries(FoldkvTakeRows(all_gate, source) + op.Gather(bias, bias_row, axis=0), width, ratio)
    absent = op.Unsqueeze(token < 0, [3])
    weights = op.Softmax(op.Where(absent, op.Constant(value_float=float("-inf")), score), axis=2)
    return op.ReduceSum(op.Where(absent, 0.0, picked) * weights, [2], keepdims=0), begins


@script(OPSET, default_opset=op)
def FoldkvCarry(carry: FLOAT, chunk: FLOAT, positions: INT32, num_tokens: INT32):  # type: ignore[no-untyped-def]
    return FoldkvTakeRows(op.Concat(carry, chunk, axis=1), FoldkvRingSources(carry, positions, num_tokens))


@script(OPSET, default_opset=op)
def FoldkvNewEntries(  # type: ignore[no-untyped-def]
    carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, inv_freq: FLOAT,
    positions: INT32, ratio: int, eps: float,
):  # fmt: skip
    merged, begins = FoldkvMergeWindows(carry_kv, carry_gate, kv, gate, bias, norm, positions, ratio)
    return FoldkvFinishEntries(merged, begins, norm, inv_freq, eps)


@script(OPSET, default_opset=op)
def FoldkvAdvance(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, new: FLOAT, positions: INT32,
    num_tokens: INT32, ratio: int,
):  # fmt: skip
    # The state after the chunk; `new` has the entry to write for every window that can close.
    updated = FoldkvWriteEntries(entries, new, positions, num_tokens, ratio)
    kept_kv = FoldkvCarry(carry_kv, kv, positions, num_tokens)
    return updated, kept_kv, FoldkvCarry(carry_gate, gate, positions, num_tokens)


@script(OPSET, default_opset=op)
def FoldkvCompress(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT,
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    updated, kept_kv, kept_gate = FoldkvAdvance(
        entries, carry_kv, carry_gate, kv, gate, new, positions, num_tokens, ratio
    )
    return updated, kept_kv, kept_gate


@script(OPSET, default_opset=op)
def FoldkvCompressFp8(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT,
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, rope_dim: int, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    new = FoldkvQuantizeFp8(new, rope_dim)
    updated, kept_kv, kept_gate = FoldkvAdvance(
        entries, carry_kv, carry_gate, kv, gate, new, positions, num_tokens, ratio
    )
    return updated, kept_kv, kept_gate


@script(OPSET, default_opset=op)
def FoldkvCompressFp4(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT,
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, hadamard: FLOAT, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    new = FoldkvQuantizeFp4(op.MatMul(new, hadamard))
    updated, kept_kv, kept_gate = FoldkvAdvance(
        entries, carry_kv, carry_gate, kv, gate, new, positions, num_tokens, ratio
    )
    return updated, kept_kv, kept_gate


compress = operator("FoldkvCompress", eager=_eager, function=FoldkvCompress)
compress_fp8 = operator("FoldkvCompressFp8", eager=_fp8_eager, function=FoldkvCompressFp8)
compress_fp4 = operator("FoldkvCompressFp4", eager=_fp4_eager, function=FoldkvCompressFp4)
