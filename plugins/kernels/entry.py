"""Shared by the compressing kernels: a step of the gated sum; for a merged window, norm, RoPE, rounding and write."""

import triton
import triton.language as tl

from .mixing import mix
from .rotation import rotate
from .rows import rounded, write_row


@triton.jit
def gather_scored(best, weight, total, score, value):
    """One step of an online softmax: adds score, value [BM, BD] to the largest score, sum of weights and weighted sum [BD].

    A score of -inf has no weight, even if there is no other score yet.
    """
    top = tl.maximum(best, tl.max(score, axis=0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp(score - safe)
    decay = tl.exp(best - safe)
    return top, weight * decay + tl.sum(share, axis=0), total * decay + tl.sum(share * value, axis=0)


@triton.jit
def write_entry(
    entries_out, merged, norm, inv_freq, matrix, b, entry, capacity,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """merged [BD], zero from D on, is the window that starts at token ``entry * RATIO``.

    VALUES names the packed format to whose values dense rows are rounded; packing rounds by itself. MIXED
    multiplies a turned row by matrix [D, D] before that.
    """
    d = tl.arange(0, BD)
    merged = merged * tl.rsqrt(tl.sum(merged * merged, axis=0) / D + EPS)
    merged = merged * tl.load(norm + d, mask=d < D, other=0.0)
    turned = rotate(merged, entry * RATIO, inv_freq, D, BD, HALF)
    if MIXED:
        turned = mix(turned, matrix, D)
    turned = rounded(turned, D, BD, ROTARY, VALUES)
    write_row(entries_out + (b * capacity + entry) * ROW, turned, D, BD, ROW, ROTARY, FORMAT)
