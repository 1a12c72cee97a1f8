"""FoldkvIndexScores: the lightning indexer's score of every entry that a query may choose.

Entries are in the state's type and exact in it. Queries are float32; their high and low halves are
multiplied apart, so that a score has float32's accuracy and not the state type's: which entries are chosen hangs on it.
"""

import triton
import triton.language as tl


@triton.jit
def index_scores(
    q, weights, index_entries, positions, active_context, chunk, capacity, scores,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RATIO: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """q [B, S, H, D], weights [B, S, H] float32, index_entries [B, E, D] state type -> scores [B, S, E] float32.

    Grid (ceil(E / BN), S, B). Places of entries that the query may not choose are left as they are.
    """
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    visible = tl.minimum((tl.load(positions + b) + s + 1) // RATIO, capacity)
    low = tl.program_id(0) * BN
    if low < visible:
        h, d, n = tl.arange(0, BH), tl.arange(0, BD), low + tl.arange(0, BN)
        row = b * chunk + s
        kind: tl.constexpr = index_entries.dtype.element_ty
        asked = (h < H)[:, None] & (d < D)[None, :]
        query = tl.load(q + row * H * D + h[:, None] * D + d[None, :], mask=asked, other=0.0)
        held = (n < visible)[:, None] & (d < D)[None, :]
        key = tl.load(index_entries + b * capacity * D + n[:, None] * D + d[None, :], mask=held, other=0.0)
        if kind == tl.float32:
            dots = tl.dot(query, tl.trans(key), input_precision="ieee")
        else:
            high = query.to(kind)
            rest = (query - high.to(tl.float32)).to(kind)
            dots = tl.dot(rest, tl.trans(key), tl.dot(high, tl.trans(key)))
        weight = tl.load(weights + row * H + h, mask=h < H, other=0.0)
        score = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], axis=0)
        tl.store(scores + row * capacity + n, score, mask=n < visible)
