"""FoldkvWindowUpdate in one launch: ``rows`` gets the old ring and the chunk, the ring its newest rows.

There is one program per row of ``rows``. The program of a ring slot reads the slot before it writes it, and no
other program touches the slot, so input and output can be one buffer.
"""

import triton
import triton.language as tl

from .rows import write_row


@triton.jit
def window_update(
    window, kv, positions, num_tokens, chunk, rows, window_out,
    W: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROW: tl.constexpr, BR: tl.constexpr, ROTARY: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """window [B, W, ROW] state type, kv [B, S, D] float32 -> rows [B, W + S, ROW], window_out = window, in place.

    Grid (W + S, B).
    """
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    d, r = tl.arange(0, BD), tl.arange(0, BR)
    kv_b = kv + b * chunk * D
    target = rows + (b * (W + chunk) + row) * ROW
    if row < W:
        slot = (b * W + row) * ROW
        tl.store(target + r, tl.load(window + slot + r, mask=r < ROW), mask=r < ROW)
        start = tl.load(positions + b)
        last = start + tl.load(num_tokens + b) - 1
        # The newest position of this slot is `last - (last - row) mod W`; adding W avoids negative numbers.
        fresh = last - (last - row + W) % W - start
        if fresh >= 0:
            new = tl.load(kv_b + fresh.to(tl.int64) * D + d, mask=d < D, other=0.0)
            write_row(window_out + slot, new, D, BD, ROW, ROTARY, FORMAT)
    else:
        new = tl.load(kv_b + (row - W).to(tl.int64) * D + d, mask=d < D, other=0.0)
        write_row(target, new, D, BD, ROW, ROTARY, FORMAT)
