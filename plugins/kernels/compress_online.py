"""FoldkvCompressOnline and FoldkvCompressOnlineFp8 in one launch: every window that closes, and the open one's carry.

Only window 0 of a chunk can have begun before it, so only program 0 reads the carry. It also is the only one to write it,
afterwards, so state can be updated in place within one launch.
"""

import triton
import triton.language as tl

from .entry import gather_scored, write_entry


@triton.jit
def _gather(
    carry, kv, gate, bias, b, entry, start, real, chunk,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of weights and weighted sum [BD] of a window's tokens so far, BM tokens of the chunk at a time."""
    d = tl.arange(0, BD)
    first = tl.maximum(entry * RATIO, start)
    end = tl.minimum((entry + 1) * RATIO, start + real)
    # The carry belongs to the window that was open at the chunk's start, if there was one.
    held = (d < D) & (entry * RATIO < start)
    best = tl.load(carry + b * 3 * D + d, mask=held, other=float("-inf"))
    weight = tl.load(carry + b * 3 * D + D + d, mask=held, other=0.0)
    total = tl.load(carry + b * 3 * D + 2 * D + d, mask=held, other=0.0)
    for m in range(first, end, BM):
        token = m + tl.arange(0, BM)
        inside = (token < end)[:, None] & (d < D)
        fresh = (b * chunk + token - start)[:, None] * D + d
        score = tl.load(gate + fresh, mask=inside, other=0.0)
        score += tl.load(bias + (token % RATIO * D)[:, None] + d, mask=inside, other=0.0)
        score = tl.where(inside, score, float("-inf"))
        value = tl.load(kv + fresh, mask=inside, other=0.0)
        best, weight, total = gather_scored(best, weight, total, score, value)
    return tl.where(best == float("-inf"), 0.0, best), weight, total


@triton.jit
def compress_online(
    entries, carry, kv, gate, bias, norm, inv_freq, positions, num_tokens, chunk, capacity, entries_out, carry_out,
    RATIO: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, VALUES: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """entries [B, E, ROW] state type, carry [B, 3, D], kv and gate [B, S, D] float32; all state is in place.

    Grid (ceil(S / RATIO), B): program n closes the nth window of the chunk, if that closes. VALUES: see write_entry.
    """
    nth = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    start, real = tl.load(positions + b), tl.load(num_tokens + b)
    entry = start // RATIO + nth
    last = (start + real) // RATIO  # the window that is open after the chunk, or would be opened next
    d = tl.arange(0, BD)
    if (entry < last) & (entry < capacity) | (nth == 0):
        best, weight, total = _gather(carry, kv, gate, bias, b, entry, start, real, chunk, RATIO, D, BD, BM)
        if (entry < last) & (entry < capacity):
            merged = tl.where(d < D, total / tl.where(d < D, weight, 1.0), 0.0)
            write_entry(
                entries_out, merged, norm, inv_freq, norm, b, entry, capacity,
                RATIO, D, BD, HALF, EPS, ROW, ROTARY, FORMAT, VALUES, False,
            )  # fmt: skip
        if (nth == 0) & (real > 0):  # without tokens no bit changes
            if entry < last:
                best, weight, total = _gather(carry, kv, gate, bias, b, last, start, real, chunk, RATIO, D, BD, BM)
            tl.debug_barrier()  # the carry was read by other threads of this program
            tl.store(carry_out + b * 3 * D + d, best, mask=d < D)
            tl.store(carry_out + b * 3 * D + D + d, weight, mask=d < D)
            tl.store(carry_out + b * 3 * D + 2 * D + d, total, mask=d < D)
