"""The three attentions: window, window and chosen entries (CSA), window and all entries (HCA).

One program has BH heads of one query and goes through its keys in blocks of BN: first the W window positions
that end at the query, then its entries. Keys are values. If only few programs would run, the keys are
split over programs in spans of fixed length, and ``combine`` merges them. The length depends on neither
batch nor capacity, so a result does not either.

Without a split the program writes the final rows: the softmax includes the sink, the output is turned back by RoPE.
"""

import triton
import triton.language as tl

from .rotation import rotate
from .rows import read_rows

WINDOW = tl.constexpr(0)
CHOSEN = tl.constexpr(1)
CLOSED = tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q, rows, entries, chosen, sinks, inv_freq, positions, num_tokens, chunk, capacity, out, lse,
    FAR: tl.constexpr, K: tl.constexpr, RATIO: tl.constexpr, W: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr,
    SPAN: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """Grid (S * ceil(H / BH), splits, B). SPAN 0: one split, final rows in ``out`` [B, S, H, D]. Otherwise

    ``out`` [B, S, H, splits, D] has each span's normalized sum, and ``lse`` [B, S, H, splits] its log2-sum-exp2.
    """
    HEAD_BLOCKS: tl.constexpr = (H + BH - 1) // BH
    # The window takes whole blocks, so each block is in one buffer: one base, and offsets of 32 bits.
    NEAR: tl.constexpr = (W + BN - 1) // BN * BN
    s = tl.program_id(0) // HEAD_BLOCKS
    h = tl.program_id(0) % HEAD_BLOCKS * BH + tl.arange(0, BH)
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start, real = tl.load(positions + b), tl.load(num_tokens + b)
    at = start + s
    row = b * chunk + s
    d = tl.arange(0, BD)
    kind: tl.constexpr = rows.dtype.element_ty if FORMAT == "dense" else tl.bfloat16
    asked = (h < H)[:, None] & (d < D)[None, :]
    query = tl.load(q + row * H * D + (h[:, None] * D + d[None, :]), mask=asked, other=0.0).to(kind)
    splits = tl.num_programs(1) if SPAN > 0 else 1
    target = out + (row * H * splits + split) * D
    if PARKED:
        # wgmma reads a computed query from registers, and then has too few of them; a loaded query it reads from
        # shared memory. So the query goes through this program's own part of the output.
        parked = target.to(tl.pointer_type(kind), bitcast=True) + ((h * splits * (2 * D))[:, None] + d[None, :])
        tl.store(parked, query, mask=asked)
        tl.debug_barrier()
        query = tl.load(parked, mask=asked, other=0.0)
        tl.debug_barrier()

    if FAR == CHOSEN:
        total = NEAR + K
    elif FAR == CLOSED:
        total = NEAR + tl.minimum(tl.minimum((at + 1) // RATIO, (start + real) // RATIO), capacity)
    else:
        total = NEAR
    low, high = 0, total
    if SPAN > 0:
        low = split * SPAN
        high = tl.minimum(total, low + SPAN)
    rows_b = rows + b * (W + chunk) * ROW
    entries_b = entries + b * capacity * ROW
    best = tl.full((BH,), float("-inf"), tl.float32)
    weight = tl.zeros((BH,), tl.float32)
    acc = tl.zeros((BH, BD), tl.float32)
    for n in range(low, high, BN):
        j = n + tl.arange(0, BN)
        token = at - W + 1 + j
        place = tl.where(token < start, (token + W) % W, W + token - start)
        seen = (j < W) & (token >= 0) & (token < start + real)
        base = rows_b
        if FAR != WINDOW:
            near = n < NEAR
            index = j - NEAR
            far = (j >= NEAR) & (j < high)
            if FAR == CHOSEN:
                index = tl.load(chosen + row * K + index, mask=far, other=-1)
                far = far & (index >= 0) & (index < capacity)
            seen = tl.where(near, seen, far)
            place = tl.where(near, place, index)
            base = tl.where(near, rows_b, entries_b)
        key = read_rows(base, place, seen, D, BD, ROW, ROTARY, FORMAT)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * (LOG2_E / D**0.5)
        logits = tl.where(seen[None, :], logits, float("-inf"))
        top = tl.maximum(best, tl.max(logits, axis=1))
        safe = tl.where(top == float("-inf"), 0.0, top)
        share = tl.exp2(logits - safe[:, None])
        decay = tl.exp2(best - safe)
        weight = weight * decay + tl.sum(share, axis=1)
        acc = tl.dot(share.to(kind), key, acc * decay[:, None], input_precision="ieee")
        best = top

    place_out = (h * splits * D)[:, None] + d[None, :]
    if SPAN > 0:
        some = weight > 0.0
        log = tl.where(some, best + tl.log2(tl.where(some, weight, 1.0)), float("-inf"))
        tl.store(lse + row * H * splits + h * splits + split, log, mask=h < H)
        tl.store(target + place_out, acc * (1.0 / tl.where(some, weight, 1.0))[:, None], mask=asked)
    else:
        sink = tl.load(sinks + h, mask=h < H, other=0.0) * LOG2_E
        top = tl.maximum(best, sink)
        decay = tl.exp2(best - top)
        tl.store(target + place_out, acc * (decay / (weight * decay + tl.exp2(sink - top)))[:, None], mask=asked)
        # The rotated channels are read back in pairs: cheaper than shuffling the whole tile.
        tl.debug_barrier()
        pair = tl.arange(0, HALF)
        angle = at.to(tl.float32) * tl.load(inv_freq + pair)
        cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        turning = target + ((h * D)[:, None] + (D - 2 * HALF + 2 * pair)[None, :])
        even = tl.load(turning, mask=(h < H)[:, None], other=0.0)
        odd = tl.load(turning + 1, mask=(h < H)[:, None], other=0.0)
        tl.debug_barrier()
        tl.store(turning, even * cos + odd * sin, mask=(h < H)[:, None])
        tl.store(turning + 1, odd * cos - even * sin, mask=(h < H)[:, None])


@triton.jit
def window_attention(
    q, rows, sinks, inv_freq, positions, num_tokens, chunk, out, lse,
    W: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr,
    ROTARY: tl.constexpr, FORMAT: tl.constexpr, SPAN: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    PARKED: tl.constexpr,
):  # fmt: skip
    """q [B, S, H, D] float32, rows [B, W + S, ROW] state type; see ``_attend`` for grid and outputs."""
    _attend(
        q, rows, rows, positions, sinks, inv_freq, positions, num_tokens, chunk, 0, out, lse,
        WINDOW, 0, 1, W, H, D, BD, HALF, ROW, ROTARY, FORMAT, SPAN, BH, BN, PARKED,
    )  # fmt: skip


@triton.jit
def sparse_attention(
    q, rows, entries, chosen, sinks, inv_freq, positions, num_tokens, chunk, capacity, out, lse,
    K: tl.constexpr, W: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, SPAN: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """Like ``window_attention``, plus entries [B, E, ROW], of which chosen [B, S, K] int32 are read (-1: none)."""
    _attend(
        q, rows, entries, chosen, sinks, inv_freq, positions, num_tokens, chunk, capacity, out, lse,
        CHOSEN, K, 1, W, H, D, BD, HALF, ROW, ROTARY, FORMAT, SPAN, BH, BN, PARKED,
    )  # fmt: skip


@triton.jit
def dense_attention(
    q, rows, entries, sinks, inv_freq, positions, num_tokens, active_context, chunk, capacity, out, lse,
    RATIO: tl.constexpr, W: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
    ROW: tl.constexpr, ROTARY: tl.constexpr, FORMAT: tl.constexpr, SPAN: tl.constexpr, BH: tl.constexpr,
    BN: tl.constexpr, PARKED: tl.constexpr,
):  # fmt: skip
    """Like ``window_attention``, plus every entry [B, E, ROW] that closed before or with the query."""
    _attend(
        q, rows, entries, positions, sinks, inv_freq, positions, num_tokens, chunk, capacity, out, lse,
        CLOSED, 0, RATIO, W, H, D, BD, HALF, ROW, ROTARY, FORMAT, SPAN, BH, BN, PARKED,
    )  # fmt: skip


@triton.jit
def combine(
    partial, lse, sinks, inv_freq, positions, chunk, splits, out,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """partial [B, S, H, splits, D], lse [B, S, H, splits] float32 -> out [B, S, H, D]. Grid (S * H, B)."""
    s, h = tl.program_id(0) // H, tl.program_id(0) % H
    b = tl.program_id(1).to(tl.int64)
    row = (b * chunk + s) * H + h
    d = tl.arange(0, BD)
    sink = tl.load(sinks + h) * LOG2_E
    top = sink
    for i in range(splits):
        top = tl.maximum(top, tl.load(lse + row * splits + i))
    weight = tl.exp2(sink - top)
    acc = tl.zeros((BD,), tl.float32)
    for i in range(splits):
        share = tl.exp2(tl.load(lse + row * splits + i) - top)
        weight += share
        acc += share * tl.load(partial + (row * splits + i) * D + d, mask=d < D, other=0.0)
    turned = rotate(acc / weight, -(tl.load(positions + b) + s), inv_freq, D, BD, HALF)
    tl.store(out + row * D + d, turned, mask=d < D)
