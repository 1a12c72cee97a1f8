"""FoldkvRope: interleaved rotary embedding of the last channels, forward or inverse.

Pairs ``(2j, 2j+1)`` of the trailing ``2 * len(inv_freq)`` channels turn by ``position * inv_freq[j]``.
The inverse turns by the negative angle: it removes RoPE from an attention output whose values had
it (V4 report 2.3; transformers `apply_rotary_pos_emb`). Angles, cosines and sines are float32: below
2**20 tokens a float64 angle would differ by up to 2**-5 rad from the angle in training.
"""

from __future__ import annotations

import torch
from onnxscript import FLOAT, INT64, script
from onnxscript import opset20 as op
from torch import Tensor

from .registry import OPSET, operator


def _eager(x: Tensor, positions: Tensor, inv_freq: Tensor, inverse: int) -> Tensor:
    """x [B, S, H, D] float, positions [B, S] int64, inv_freq [R/2] float32 -> [B, S, H, D] float32."""
    width = 2 * inv_freq.shape[0]
    angle = positions.float()[:, :, None, None] * inv_freq
    cos, sin = angle.cos(), angle.sin() * (-1.0 if inverse else 1.0)
    keep, turn = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :]
    even, odd = turn[..., 0::2], turn[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((keep, turned), dim=-1)


@script(OPSET, default_opset=op)
def FoldkvRope(x: FLOAT, positions: INT64, inv_freq: FLOAT, inverse: int):  # type: ignore[no-untyped-def]
    sign = op.Cast(op.Constant(value_int=1) - 2 * inverse, to=1)
    angle = op.Unsqueeze(op.Cast(positions, to=1), [2, 3]) * inv_freq
    cos = op.Unsqueeze(op.Cos(angle), [-1])
    sin = op.Unsqueeze(op.Sin(angle) * sign, [-1])
    half = op.Shape(inv_freq)
    start = op.Shape(x, start=3, end=4) - 2 * half
    keep = op.Slice(x, [0], start, [3])
    turn = op.Slice(x, start, [9223372036854775807], [3])
    pairs = op.Reshape(turn, op.Concat(op.Shape(x, start=0, end=3), half, [2], axis=0))
    even, odd = op.Split(pairs, num_outputs=2, axis=-1)
    turned = op.Concat(even * cos - odd * sin, odd * cos + even * sin, axis=-1)
    flat = op.Reshape(turned, op.Concat(op.Shape(x, start=0, end=3), 2 * half, axis=0))
    return op.Concat(keep, flat, axis=-1)


rope = operator("FoldkvRope", eager=_eager, function=FoldkvRope)
