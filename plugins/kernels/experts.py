"""The routed experts: weights are read as stored, and decoded in registers on their way into a product.

Every (token, expert) is a *pair*, numbered ``token * K + place``. Pairs that chose the same expert make up tiles of at most BM,
and a tile reads its expert's weights once. ``gate_up`` and ``down`` have a program for each tile and BN rows of a weight; the
rows of a weight are the rows of the product, the pairs are its columns. ``weigh`` adds the K rows of each token in the order of
``chosen``. A column of a product does not depend on the others, so a token's result does not depend on its neighbours.

Few pairs find their tiles themselves (``order`` is None). Many are sorted by expert first (``group``).
"""

import triton
import triton.language as tl

from .weights import read_weights


@triton.jit
def group(chosen, pairs, order, counts, BP: tl.constexpr):
    """chosen [pairs] int64 -> order [pairs] int32, the pairs sorted by expert and then by number; counts [E] int32. Grid (E).

    Every program counts for itself, so nothing depends on the order in which programs run.
    """
    expert = tl.program_id(0)
    i = tl.arange(0, BP)
    below = tl.zeros((BP,), tl.int32)
    own = tl.zeros((BP,), tl.int32)
    for low in range(0, pairs, BP):
        inside = low + i < pairs
        given = tl.load(chosen + low + i, mask=inside, other=0)
        below += (inside & (given < expert)).to(tl.int32)
        own += (inside & (given == expert)).to(tl.int32)
    tl.store(counts + expert, tl.sum(own, axis=0))
    at = tl.sum(below, axis=0)
    for low in range(0, pairs, BP):
        inside = low + i < pairs
        mine = inside & (tl.load(chosen + low + i, mask=inside, other=0) == expert)
        tl.store(order + (at + tl.cumsum(mine.to(tl.int32), axis=0) - 1), low + i, mask=mine)
        at += tl.sum(mine.to(tl.int32), axis=0)


@triton.jit
def _tile(chosen, order, counts, pairs, E: tl.constexpr, BE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr):
    """Tile ``program_id(0)``: whether it has pairs, its expert, their numbers [BM] int32, and which of these are real [BM]."""
    n = tl.program_id(0)
    m = tl.arange(0, BM)
    if order is None:
        # The tile of the nth pair, if as many pairs of its expert as fill whole tiles come before it.
        i = tl.arange(0, BP)
        inside = i < pairs
        expert = tl.load(chosen + n)
        same = inside & (tl.load(chosen + i, mask=inside, other=0) == expert)
        rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
        first = tl.sum((same & (i < n)).to(tl.int32), axis=0)
        mine = same[None, :] & (rank[None, :] == (first + m)[:, None])
        pair = tl.sum(tl.where(mine, i[None, :], 0), axis=1)
        real = tl.sum(mine.to(tl.int32), axis=1) > 0
        return first % BM == 0, expert, pair, real
    else:
        e = tl.arange(0, BE)
        count = tl.load(counts + e, mask=e < E, other=0)
        tiles = (count + BM - 1) // BM
        expert = tl.sum((tl.cumsum(tiles, axis=0) <= n).to(tl.int32), axis=0)
        before = e < expert
        m += (n - tl.sum(tl.where(before, tiles, 0), axis=0)) * BM
        real = m < tl.sum(tl.where(e == expert, count, 0), axis=0)
        first = tl.sum(tl.where(before, count, 0), axis=0)
        return expert < E, expert, tl.load(order + (first + m), mask=real, other=0), real


@triton.jit
def _product(
    values, at, real, codes, scales, row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` [BN] of one matrix, times rows ``at`` [BM] int64 of ``values`` [., COLUMNS], which are rounded to bfloat16.

    Returns [BN, BM] float32; columns that are not real are zero.
    """
    WIDTH: tl.constexpr = COLUMNS // GRID_COLUMNS
    # A step has BK columns within a block that shares a scale, or several whole blocks if scales are exponents.
    WITHIN: tl.constexpr = SCALE != "exponent" or GRID_COLUMNS == 1 or BK <= WIDTH or BK % WIDTH != 0
    PARTS: tl.constexpr = (WIDTH + BK - 1) // BK if WITHIN else 1
    STEPS: tl.constexpr = GRID_COLUMNS * PARTS if WITHIN else (COLUMNS + BK - 1) // BK
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(STEPS):
        if WITHIN:
            begin = step // PARTS * WIDTH
            low = begin + step % PARTS * BK
            end = begin + WIDTH
        else:
            low = step * BK
            end = COLUMNS
        weight, factor = read_weights(
            codes, scales, row, low, end, ROWS, COLUMNS, GRID_ROWS, GRID_COLUMNS, WEIGHT, SCALE, BK, WITHIN
        )
        k = low + tl.arange(0, BK)
        given = tl.load(values + at[None, :] * COLUMNS + k[:, None], mask=real[None, :] & (k < end)[:, None], other=0.0)
        if WITHIN:
            total += tl.dot(weight, given.to(tl.bfloat16)) * factor[:, None]
        else:
            total = tl.dot(weight, given.to(tl.bfloat16), total)
    return total


@triton.jit
def gate_up(
    x, chosen, codes, scales, slots, order, counts, pairs, hidden,
    K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID_ROWS: tl.constexpr,
    GRID_COLUMNS: tl.constexpr, CODES: tl.constexpr, SCALES: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    GATE_SCALE: tl.constexpr, UP_SCALE: tl.constexpr, LIMIT: tl.constexpr, WEIGHT: tl.constexpr, SCALE: tl.constexpr,
    BE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [T, COLUMNS] float32 -> hidden [pairs, ROWS] bfloat16: the clamped SwiGLU of each pair's gate and up projections.

    ``codes`` [slots, CODES] has the matrices of an expert from elements GATE and UP on, ``scales`` [slots, SCALES] their scales.
    Grid (tiles, ceil(ROWS / BN)).
    """
    busy, expert, pair, real = _tile(chosen, order, counts, pairs, E, BE, BP, BM)
    if busy:
        slot = expert.to(tl.int64) if slots is None else tl.load(slots + expert)
        own = codes + slot * CODES
        row = tl.program_id(1) * BN + tl.arange(0, BN)
        at = (pair // K).to(tl.int64)
        if scales is None:
            gate_scales = None
            up_scales = None
        else:
            gate_scales = scales + (slot * SCALES + GATE_SCALE)
            up_scales = scales + (slot * SCALES + UP_SCALE)
        gate = _product(
            x, at, real, own + GATE, gate_scales, row, ROWS, COLUMNS, GRID_ROWS, GRID_COLUMNS, WEIGHT, SCALE, BN, BM, BK
        )
        up = _product(
            x, at, real, own + UP, up_scales, row, ROWS, COLUMNS, GRID_ROWS, GRID_COLUMNS, WEIGHT, SCALE, BN, BM, BK
        )
        # Selections, not minima: NaN stays NaN, as in the definition.
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        value = gate / (1.0 + tl.exp(-gate)) * up
        place = pair.to(tl.int64)[None, :] * ROWS + row[:, None]
        tl.store(hidden + place, value.to(tl.bfloat16), mask=real[None, :] & (row < ROWS)[:, None])


@triton.jit
def down(
    hidden, chosen, codes, scales, slots, order, counts, pairs, rows,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLUMNS: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr, DOWN: tl.constexpr, DOWN_SCALE: tl.constexpr,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr,
    BE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """hidden [pairs, COLUMNS] bfloat16 -> rows [pairs, ROWS] float32: each pair's down projection; see ``gate_up``."""
    busy, expert, pair, real = _tile(chosen, order, counts, pairs, E, BE, BP, BM)
    if busy:
        slot = expert.to(tl.int64) if slots is None else tl.load(slots + expert)
        row = tl.program_id(1) * BN + tl.arange(0, BN)
        at = pair.to(tl.int64)
        own = None if scales is None else scales + (slot * SCALES + DOWN_SCALE)
        total = _product(
            hidden, at, real, codes + (slot * CODES + DOWN), own, row,
            ROWS, COLUMNS, GRID_ROWS, GRID_COLUMNS, WEIGHT, SCALE, BN, BM, BK,
        )  # fmt: skip
        tl.store(rows + (at[None, :] * ROWS + row[:, None]), total, mask=real[None, :] & (row < ROWS)[:, None])


@triton.jit
def weigh(rows, weights, y, K: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """rows [T * K, COLUMNS], weights [T, K] float32 -> y [T, COLUMNS] float32. Grid (T, ceil(COLUMNS / BC))."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = column < COLUMNS
    total = tl.zeros((BC,), tl.float32)
    for place in range(K):
        pair = token * K + place
        total += tl.load(weights + pair) * tl.load(rows + pair * COLUMNS + column, mask=inside, other=0.0)
    tl.store(y + token * COLUMNS + column, total, mask=inside)
