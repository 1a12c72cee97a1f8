"""FoldkvCompress: windows that close in this chunk become compressed entries; the rest is carried.

Entry ``i`` is the gated sum of the tokens ``[i * ratio, (i + 1) * ratio)``: a softmax over tokens, per
channel, of ``gate + bias``; then RMSNorm, then RoPE at position ``i * ratio`` (V4 report 2.3, equations
9 to 12 and 20 to 23). With ``overlap`` (CSA and its indexer) the projections hold two series side by
side, and entry ``i`` joins the first series of window ``i - 1`` with the second of window ``i``.

The carries are rings of raw projected rows, ``carry[p mod R]`` for position ``p``, where ``R`` is the
number of tokens that an entry reads. Rows of ``entries`` that do not close keep their bits.

FoldkvCompressFp8 and FoldkvCompressFp4 are what deployed systems do to an entry before it is written: main
entries are quantised as ``fp8_ds_mla`` rows; the indexer's are rotated by a Hadamard matrix and quantised as
``index_fp4`` rows (the released code's ``act_quant``, ``rotate_activation`` and ``fp4_act_quant``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnxscript import FLOAT, INT32, script
from onnxscript import opset20 as op
from torch import Tensor

from foldkv.export.operators.quantize import (
    FoldkvPackFp4,
    FoldkvPackFp8,
    FoldkvQuantizeFp4,
    FoldkvQuantizeFp8,
    quantized_fp4,
    quantized_fp8,
)
from foldkv.export.operators.registry import OPSET, operator
from foldkv.export.operators.rope import FoldkvRope
from foldkv.export.operators.rope import _eager as rope
from foldkv.export.operators.window import FoldkvRingSources, FoldkvTakeRows, ring_sources


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
    """One chunk of compression; ``finish`` is what becomes of a turned entry before it is written.

    entries [B, E, D]; carry_kv, carry_gate [B, R, C]; kv, gate [B, S, C]; bias [ratio, C]; norm [D];
    inv_freq [rope/2]; positions, num_tokens [B] int32. R = ratio and C = D, or twice both with overlap.
    Returns entries, carry_kv, carry_gate after the chunk.
    """
    span, chunk, width = carry_kv.shape[1], kv.shape[1], entries.shape[2]
    start = positions.long()
    windows = (chunk + ratio - 1) // ratio  # no more can close in this chunk
    entry = start[:, None] // ratio + torch.arange(windows)  # [B, N]
    token = entry[:, :, None] * ratio + torch.arange(ratio - span, ratio)  # [B, N, R]
    past = token < start[:, None, None]
    source = torch.where(past, token % span, span + (token - start[:, None, None]).clamp(0, chunk - 1))
    all_kv, all_gate = torch.cat((carry_kv, kv), dim=1), torch.cat((carry_gate, gate), dim=1)
    batch = torch.arange(kv.shape[0])[:, None, None]
    picked, score = all_kv[batch, source], all_gate[batch, source] + bias[torch.arange(span) % ratio]
    if span != ratio:
        picked = torch.cat((picked[:, :, :ratio, :width], picked[:, :, ratio:, width:]), dim=2)
        score = torch.cat((score[:, :, :ratio, :width], score[:, :, ratio:, width:]), dim=2)
    absent = (token < 0)[..., None]
    weights = score.masked_fill(absent, -torch.inf).softmax(dim=2)
    merged = (picked.masked_fill(absent, 0.0) * weights).sum(dim=2)
    merged = merged * torch.rsqrt(merged.square().mean(dim=-1, keepdim=True) + eps) * norm
    merged = finish(rope(merged[:, :, None], entry * ratio, inv_freq, 0)[:, :, 0])

    # Write a run of `windows` rows that always fits: where the run would pass the end it is moved back,
    # and rows outside what closed are written with what they held.
    base = torch.minimum(entry[:, :1], torch.tensor(entries.shape[1] - windows))
    rows = base + torch.arange(windows)
    from_entry = rows - entry[:, :1]
    closes = (from_entry >= 0) & (rows < ((start + num_tokens.long()) // ratio)[:, None])
    new = torch.take_along_dim(merged, from_entry.clamp(min=0)[..., None], dim=1).to(entries.dtype)
    old = torch.take_along_dim(entries, rows[..., None], dim=1)
    updated = entries.scatter(1, rows[..., None].expand_as(old), torch.where(closes[..., None], new, old))
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
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, rotary: int, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _chunk(
        entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, ratio, eps,
        lambda x: quantized_fp8(x, rotary),
    )  # fmt: skip


def _fp4_eager(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, hadamard: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _chunk(
        entries, carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, num_tokens, ratio, eps,
        lambda x: quantized_fp4(torch.matmul(x, hadamard)),
    )  # fmt: skip


def _fake(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(entries), torch.empty_like(carry_kv), torch.empty_like(carry_gate)


def _fp8_fake(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, rotary: int, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(entries), torch.empty_like(carry_kv), torch.empty_like(carry_gate)


def _fp4_fake(
    entries: Tensor, carry_kv: Tensor, carry_gate: Tensor, kv: Tensor, gate: Tensor, bias: Tensor, norm: Tensor,
    inv_freq: Tensor, positions: Tensor, num_tokens: Tensor, hadamard: Tensor, ratio: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(entries), torch.empty_like(carry_kv), torch.empty_like(carry_gate)


@script(OPSET, default_opset=op)
def FoldkvSplitSeries(x: FLOAT, width: INT32, ratio: int):  # type: ignore[no-untyped-def]
    # Two series: the first `width` channels of the rows before the window, the last of the window's own.
    # Without overlap there are no rows before it, and both slices are empty or the whole.
    r = op.Reshape(op.Constant(value_int=1) * ratio, [1])
    before = op.Slice(op.Slice(x, [0], op.Shape(x, start=2, end=3) - r, [2]), [0], width, [3])
    own = op.Slice(op.Slice(x, op.Shape(x, start=2, end=3) - r, [9223372036854775807], [2]),
                   op.Shape(x, start=3, end=4) - width, [9223372036854775807], [3])  # fmt: skip
    return op.Concat(before, own, axis=2)


@script(OPSET, default_opset=op)
def FoldkvMergeWindows(  # type: ignore[no-untyped-def]
    carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, positions: INT32,
    ratio: int, eps: float,
):  # fmt: skip
    # The normed gated sum of every window that can close in this chunk, and the position of its first token.
    zero = op.Constant(value_int=0)
    r = op.Constant(value_int=1) * ratio
    span = op.Squeeze(op.Shape(carry_kv, start=1, end=2))
    chunk = op.Squeeze(op.Shape(kv, start=1, end=2))
    start = op.Cast(positions, to=7)
    nth = op.Range(zero, (chunk + r - 1) / r, op.Constant(value_int=1))
    begins = (op.Unsqueeze(start / r, [1]) + op.Unsqueeze(nth, [0])) * r
    token = op.Unsqueeze(begins, [2]) + op.Reshape(op.Range(r - span, r, op.Constant(value_int=1)), [1, 1, -1])
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
    merged = op.ReduceSum(op.Where(absent, 0.0, picked) * weights, [2], keepdims=0)
    scale = op.Sqrt(op.ReduceMean(merged * merged, [-1], keepdims=1) + eps)
    return merged / scale * norm, begins


@script(OPSET, default_opset=op)
def FoldkvWriteEntries(entries: FLOAT, new: FLOAT, positions: INT32, num_tokens: INT32, ratio: int):  # type: ignore[no-untyped-def]
    # A run of rows that always fits, as the eager body says; rows that did not close are written with what they held.
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


@script(OPSET, default_opset=op)
def FoldkvCarry(carry: FLOAT, chunk: FLOAT, positions: INT32, num_tokens: INT32):  # type: ignore[no-untyped-def]
    return FoldkvTakeRows(op.Concat(carry, chunk, axis=1), FoldkvRingSources(carry, positions, num_tokens))


@script(OPSET, default_opset=op)
def FoldkvNewEntries(  # type: ignore[no-untyped-def]
    carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT, inv_freq: FLOAT,
    positions: INT32, ratio: int, eps: float,
):  # fmt: skip
    normed, begins = FoldkvMergeWindows(carry_kv, carry_gate, kv, gate, bias, norm, positions, ratio, eps)
    return op.Squeeze(FoldkvRope(op.Unsqueeze(normed, [2]), begins, inv_freq, inverse=0), [2])


@script(OPSET, default_opset=op)
def FoldkvAdvance(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, new: FLOAT, positions: INT32,
    num_tokens: INT32, ratio: int,
):  # fmt: skip
    # The state after the chunk: `new` holds what every window that can close becomes, as it is to be written.
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
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, rotary: int, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    new = FoldkvQuantizeFp8(new, rotary)
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


@script(OPSET, default_opset=op)
def FoldkvCompressPackedFp8(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT,
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, rotary: int, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    new = FoldkvPackFp8(new, rotary)
    updated, kept_kv, kept_gate = FoldkvAdvance(
        entries, carry_kv, carry_gate, kv, gate, new, positions, num_tokens, ratio
    )
    return updated, kept_kv, kept_gate


@script(OPSET, default_opset=op)
def FoldkvCompressPackedFp4(  # type: ignore[no-untyped-def]
    entries: FLOAT, carry_kv: FLOAT, carry_gate: FLOAT, kv: FLOAT, gate: FLOAT, bias: FLOAT, norm: FLOAT,
    inv_freq: FLOAT, positions: INT32, num_tokens: INT32, hadamard: FLOAT, ratio: int, eps: float,
):  # fmt: skip
    new = FoldkvNewEntries(carry_kv, carry_gate, kv, gate, bias, norm, inv_freq, positions, ratio, eps)
    new = FoldkvPackFp4(op.MatMul(new, hadamard))
    updated, kept_kv, kept_gate = FoldkvAdvance(
        entries, carry_kv, carry_gate, kv, gate, new, positions, num_tokens, ratio
    )
    return updated, kept_kv, kept_gate


_INPUTS = ("entries", "carry_kv", "carry_gate", "kv", "gate", "bias", "norm", "inv_freq", "positions", "num_tokens")
_OUTPUTS = ("entries", "carry_kv", "carry_gate")
compress = operator(
    "FoldkvCompress",
    eager=_eager,
    fake=_fake,
    function=FoldkvCompress,
    inputs=_INPUTS,
    attributes=("ratio", "eps"),
    outputs=_OUTPUTS,
)
compress_fp8 = operator(
    "FoldkvCompressFp8",
    eager=_fp8_eager,
    fake=_fp8_fake,
    function=FoldkvCompressFp8,
    inputs=_INPUTS,
    attributes=("rotary", "ratio", "eps"),
    outputs=_OUTPUTS,
)
compress_fp4 = operator(
    "FoldkvCompressFp4",
    eager=_fp4_eager,
    fake=_fp4_fake,
    function=FoldkvCompressFp4,
    inputs=(*_INPUTS, "hadamard"),
    attributes=("ratio", "eps"),
    outputs=_OUTPUTS,
)
