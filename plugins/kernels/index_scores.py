"""FoldkvIndexScores: the lightning indexer's score of every entry that a query can choose.

Entries are in the state's type, or packed and then exact in bfloat16. Queries are float32. Their high and low halves are
multiplied separately, so a score has float32's accuracy and not the state type's: the choice of entries depends on it.
"""

import triton
import triton.language as tl

from .rows import read_index_rows


@triton.jit
def index_scores(
    q, weights, index_entries, positions, active_context, chunk, capacity, span, scores,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, RATIO: tl.constexpr, BN: tl.constexpr,
    ROW: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """q [B, S, H, D], weights [B, S, H] float32, index_entries [B, E, ROW] state type -> scores [B, S, E] float32.

    Grid (ceil(E / span), S, B); the span changes no score. Places of entries that the query cannot choose stay unchanged.
    """
    s = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    visible = tl.minimum((tl.load(positions + b) + s + 1) // RATIO, capacity)
    first = tl.program_id(0) * span
    if first < visible:
        h, d = tl.arange(0, BH), tl.arange(0, BD)
        row = b * chunk + s
        asked = (h < H)[:, None] & (d < D)[None, :]
        query = tl.load(q + row * H * D + (h[:, None] * D + d[None, :]), mask=asked, other=0.0)
        weight = tl.load(weights + row * H + h, mask=h < H, other=0.0)
        kind: tl.constexpr = index_entries.dtype.element_ty if FORMAT == "dense" else tl.bfloat16
        high = query.to(kind)
        rest = (query - high.to(tl.float32)).to(kind)
        entries_b = index_entries + b * capacity * ROW
        for low in range(first, tl.minimum(first + span, visible), BN):
            n = low + tl.arange(0, BN)
            key, factor = read_index_rows(entries_b, n, n < visible, D, BD, ROW, FORMAT)
            # Entries are the rows of the product: the query stays where it is, and heads are summed within a thread.
            dots = tl.dot(key, tl.trans(high), input_precision="ieee")
            if kind != tl.float32:
                dots = tl.dot(key, tl.trans(rest), dots)
            # A factor is positive, so it can come after the relu.
            score = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], axis=1) * factor
            tl.store(scores + row * capacity + n, score, mask=n < visible)
