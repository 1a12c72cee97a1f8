"""FoldkvWindowUpdate in one launch: ``rows`` gets the old ring and the chunk, the ring its newest rows.

One program per row of ``rows``. The program of a ring slot reads the slot before it writes it, and no
other program touches it: input and output may be one buffer.
"""

import triton
import triton.language as tl


@triton.jit
def window_update(
    window, kv, positions, num_tokens, chunk, rows, window_out, W: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """window [B, W, D] state type, kv [B, S, D] float32 -> rows [B, W + S, D], window_out = window, in place.

    Grid (W + S, B).
    """
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    kind: tl.constexpr = window.dtype.element_ty
    kv_b = kv + b * chunk * D
    target = rows + (b * (W + chunk) + row) * D + d
    if row < W:
        slot = window + (b * W + row) * D + d
        tl.store(target, tl.load(slot, mask=inside), mask=inside)
        start = tl.load(positions + b)
        last = start + tl.load(num_tokens + b) - 1
        # The newest position of this slot is `last - (last - row) mod W`; W is added so that nothing is negative.
        fresh = last - (last - row + W) % W - start
        if fresh >= 0:
            new = tl.load(kv_b + fresh.to(tl.int64) * D + d, mask=inside)
            tl.store(window_out + (b * W + row) * D + d, new.to(kind), mask=inside)
    else:
        new = tl.load(kv_b + (row - W).to(tl.int64) * D + d, mask=inside)
        tl.store(target, new.to(kind), mask=inside)
