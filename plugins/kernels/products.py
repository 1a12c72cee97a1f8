"""Products of few rows with a small matrix, in float32: parts of the sums, one per span of channels.

One program per token would leave most of a GPU idle, and read the whole matrix through one multiprocessor. So programs divide
the channels, and the kernel that needs the products adds the parts, in order. The spans do not depend on the number of tokens,
and every token has a row of its own, so a result depends on nothing but its own inputs.
"""

import triton
import triton.language as tl


@triton.jit
def partial_products(
    x, weight, tokens, partial,
    M: tl.constexpr, K: tl.constexpr, SQUARES: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """x [T, K] float32, weight [M, K] of any float type -> partial [ceil(K / SPAN), T, M + SQUARES] float32.

    SQUARES is 1 for a last column with the sums of squares of x. Grid (ceil(K / SPAN), ceil(M / BM), ceil(T / BT)).
    """
    part, block = tl.program_id(0), tl.program_id(1)
    t = tl.program_id(2) * BT + tl.arange(0, BT)
    m = block * BM + tl.arange(0, BM)
    row = t.to(tl.int64) * K
    total = tl.zeros((BT, BM), tl.float32)
    squares = tl.zeros((BT,), tl.float32)
    for low in range(0, SPAN, BK):
        k = part * SPAN + low + tl.arange(0, BK)
        a = tl.load(x + row[:, None] + k[None, :], mask=(t < tokens)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(weight + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b.to(tl.float32)), total, input_precision="ieee")
        if SQUARES:
            squares += tl.sum(a * a, axis=1)
    out = partial + (part.to(tl.int64) * tokens + t) * (M + SQUARES)
    tl.store(out[:, None] + m[None, :], total, mask=(t < tokens)[:, None] & (m < M)[None, :])
    if SQUARES:
        tl.store(out + M, squares, mask=(t < tokens) & (block == 0))
