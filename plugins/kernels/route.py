"""FoldkvRoute and FoldkvRouteHashed: the chosen experts of a token and their weights, in float32.

FoldkvRoute needs every expert's score. It takes two launches: the first, in products.py, reads the gate's matrix once, with
enough programs for a GPU; the second adds the parts and selects. FoldkvRouteHashed knows the experts, reads their rows only and
takes one launch.
"""

import triton
import triton.language as tl


@triton.jit
def _score(z):
    """sqrt(softplus(z)), with softplus(z) = max(z, 0) + log1p(exp(-|z|)).

    log1p(u) = 2 artanh(u / (2 + u)), whose series has terms below 2e-9 of its sum after s^15, since s <= 1/3. A logarithm of
    1 + u would lose all of a small u.
    """
    u = tl.exp(-tl.abs(z))
    s = u / (2 + u)
    q = s * s
    series = 1.0 / 15
    for i in tl.static_range(7):
        series = series * q + 1.0 / (13 - 2 * i)
    return tl.sqrt(tl.maximum(z, 0.0) + 2 * s * series)


@triton.jit
def _shares(scores, SCALING: tl.constexpr):
    """Chosen scores [BK], zero where there is none -> the experts' weights."""
    return scores / (tl.sum(scores, axis=0) + 1e-20) * SCALING


@triton.jit
def route(
    partial, bias, tokens, chosen, weights,
    X: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """partial [PARTS, M, X], bias [X] float32 -> chosen [M, K] int64, weights [M, K] float32. Grid (M,).

    The best first, of equal ones the lowest index. A row of NaN chooses experts that exist.
    """
    t = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BX), tl.arange(0, BK)
    logits = tl.zeros((BX,), tl.float32)
    for part in range(PARTS):
        logits += tl.load(partial + (part * tokens + t) * X + e, mask=e < X, other=0.0)
    scores = _score(logits)
    ranked = tl.where(e < X, scores + tl.load(bias + e, mask=e < X, other=0.0), float("-inf"))
    found = tl.zeros((BK,), tl.int32)
    taken = tl.zeros((BK,), tl.float32)
    for nth in range(K):
        best = tl.max(ranked, axis=0)
        index = tl.minimum(tl.min(tl.where(ranked == best, e, X), axis=0), X - 1)
        found = tl.where(k == nth, index, found)
        taken = tl.where(k == nth, tl.sum(tl.where(e == index, scores, 0.0), axis=0), taken)
        ranked = tl.where(e == index, float("-inf"), ranked)
    tl.store(chosen + t * K + k, found.to(tl.int64), mask=k < K)
    tl.store(weights + t * K + k, _shares(taken, SCALING), mask=k < K)


@triton.jit
def route_hashed(
    x, weight, tid2eid, input_ids, chosen, weights,
    K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """x [M, D] float32, weight [X, D] of any float type, tid2eid [V, K], input_ids [M] int64

    -> chosen [M, K] int64, weights [M, K] float32. Grid (M,).
    """
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BK)
    experts = tl.load(tid2eid + tl.load(input_ids + t) * K + k, mask=k < K, other=0)
    total = tl.zeros((BK, BC), tl.float32)
    for low in range(0, D, BC):
        c = low + tl.arange(0, BC)
        row = tl.load(x + t * D + c, mask=c < D, other=0.0)
        rows = tl.load(weight + experts[:, None] * D + c[None, :], mask=(k < K)[:, None] & (c < D)[None, :], other=0.0)
        total += rows.to(tl.float32) * row[None, :]
    scores = tl.where(k < K, _score(tl.sum(total, axis=1)), 0.0)
    tl.store(chosen + t * K + k, experts, mask=k < K)
    tl.store(weights + t * K + k, _shares(scores, SCALING), mask=k < K)
