"""FoldkvHcPre and FoldkvHcPost: the mixing of residual streams before and after a sub-layer, all in float32.

FoldkvHcPre takes two launches. The first, in products.py, reads the streams and the weights once, with enough programs for a
GPU; the second adds the parts and mixes. FoldkvHcPost takes one.
"""

import triton
import triton.language as tl


@triton.jit
def _balance(matrix, EPS: tl.constexpr, ITERATIONS: tl.constexpr):
    """matrix [N, N], positive -> nearly doubly stochastic, by Sinkhorn's iterations: columns, then rows and columns."""
    matrix = matrix / (tl.sum(matrix, axis=0)[None, :] + EPS)
    for _ in range(ITERATIONS - 1):
        matrix = matrix / (tl.sum(matrix, axis=1)[:, None] + EPS)
        matrix = matrix / (tl.sum(matrix, axis=0)[None, :] + EPS)
    return matrix


@triton.jit
def hc_pre(
    streams, partial, base, scale, tokens, x, post, comb,
    N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, NORM_EPS: tl.constexpr,
    EPS: tl.constexpr, ITERATIONS: tl.constexpr,
):  # fmt: skip
    """streams [T, N, D], partial [PARTS, T, (2 + N) N + 1], base [(2 + N) N], scale [3] float32

    -> x [T, D], post [T, N], comb [T, N, N] float32. The last column of partial has sums of squares. N is a power of two.
    Grid (T, ceil(D / BC)); the first program of a token also writes post and comb.
    """
    M: tl.constexpr = (2 + N) * N
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, N)
    p = tl.arange(0, BP)
    row = partial + (p.to(tl.int64) * tokens + t) * (M + 1)
    there = p < PARTS
    squares = tl.sum(tl.load(row + M, mask=there, other=0.0), axis=0)
    factor = tl.rsqrt(squares / (N * D) + NORM_EPS)
    to_input = tl.sum(tl.load(row[:, None] + n[None, :], mask=there[:, None], other=0.0), axis=0)
    pre = tl.sigmoid(to_input * factor * tl.load(scale) + tl.load(base + n)) + EPS
    c = block * BC + tl.arange(0, BC)
    tile = tl.load(streams + (t * N + n)[:, None] * D + c[None, :], mask=(c < D)[None, :], other=0.0)
    tl.store(x + t * D + c, tl.sum(pre[:, None] * tile, axis=0), mask=c < D)
    if block == 0:
        to_share = tl.sum(tl.load(row[:, None] + (N + n)[None, :], mask=there[:, None], other=0.0), axis=0)
        share = 2 * tl.sigmoid(to_share * factor * tl.load(scale + 1) + tl.load(base + N + n))
        tl.store(post + t * N + n, share)
        place = 2 * N + n[:, None] * N + n[None, :]
        to_mix = tl.sum(tl.load(row[:, None, None] + place[None, :, :], mask=there[:, None, None], other=0.0), axis=0)
        logits = to_mix * factor * tl.load(scale + 2) + tl.load(base + place)
        grown = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        mix = _balance(grown / tl.sum(grown, axis=1)[:, None] + EPS, EPS, ITERATIONS)
        tl.store(comb + t * N * N + n[:, None] * N + n[None, :], mix)


@triton.jit
def hc_post(streams, out, post, comb, mixed, N: tl.constexpr, D: tl.constexpr, BC: tl.constexpr):
    """streams [T, N, D], out [T, D], post [T, N], comb [T, N, N] -> mixed [T, N, D], all float32; N is a power of two.

    Grid (T, ceil(D / BC)).
    """
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    given = tl.load(out + t * D + c, mask=c < D, other=0.0)
    total = tl.load(post + t * N + n)[:, None] * given[None, :]
    for i in tl.static_range(N):
        old = tl.load(streams + (t * N + i) * D + c, mask=c < D, other=0.0)
        total += tl.load(comb + (t * N + i) * N + n)[:, None] * old[None, :]
    tl.store(mixed + (t * N + n)[:, None] * D + c[None, :], total, mask=(c < D)[None, :])
